"""`cordee bench resume`: saved on one layout, going on on another.

Owns the pairs. Runs of `cordee train` are stopped after two steps on each layout, and go on from their checkpoint on
the next one of the list: the steps that are left must be those of one process that was never stopped, with the same
samples. The learning rate decays meanwhile, so that the place in its schedule counts too."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cordee.bench.contest import Turn
from cordee.bench.layouts import ALONE, Case, cases
from cordee.bench.options import BenchConfig
from cordee.bench.pool import Pool
from cordee.bench.report import Report
from cordee.bench.tiny import BATCH, STEPS, TOLERANCE, Comparisons, prepare, trained

PEERS = ()
SAVED = 2  # the step after which a run is saved and stopped
GIVEN = {"lr_decay_style": "cosine", "min_lr": 1e-4, "micro_batch_size": 1}  # to all runs, lest they differ
# Each goes on on the next one, and the last on the first: to more and to fewer processes, and all that shares out
# parameters or the state of the optimizer meets what does it in another way.
ROUNDS: dict[str, tuple[str, ...]] = {
    "dense": (
        *(ALONE.name, "tp2·sp · dp2·zero1", "pp2·1f1b", "tp2 · dp4·hsdp2", "dp2·zero3", "tp2 · pp2·interleaved"),
        *("dp8·zero1", "pp2·zbv", "cp4·hybrid", "tp8", "dp2·zero2 · pp2·1f1b", "cp2·ring", "tp4·sp · pp2·zbv"),
        *("dp4·zero0", "pp4·interleaved", "tp2·sp · cp2·ulysses · pp2·1f1b"),
    ),
    "MoE": (
        *(ALONE.name, "ep2·alltoall", "tp2·sp · dp2·zero1 · ep2·alltoall", "pp2·interleaved"),
        *("dp2·zero3 · ep2·allgather", "cp2·ring · pp2·zbv", "dp4·hsdp2 · ep2·alltoall", "tp2", "ep4·alltoall"),
        *("cp2·ulysses · pp2·1f1b · ep2·alltoall", "dp8·zero1", "dp2·zero2 · pp2·zbv", "tp4·sp · dp2·zero0"),
    ),
}


def pairs(model: str) -> Iterator[tuple[Case, Case]]:
    """Where a run of `model` is saved and where it goes on; each layout saves once."""
    known = {case.name: case for case in (ALONE, *cases(model == "MoE"))}
    names = ROUNDS[model]
    for first, second in itertools.pairwise((*names, names[0])):
        yield known[first], known[second]


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Save and go on for every pair; the report names those that do not agree."""
    found = Comparisons(on_turn)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Pool(timeout=600) as pool:
        work = Path(folder)
        pool.run(prepare, 1, folder)
        for model in ROUNDS:
            whole = trained(pool, work, model, ALONE, **GIVEN)
            for first, second in pairs(model):
                cells = (first.name, second.name, f"{first.ranks} to {second.ranks}")
                run_pair = partial(resumed, pool, work, model, first, second)
                found.add(model, f"{first.name} to {second.name}", cells, run_pair, rest(whole))
            apart = other_samples(pool, work, model, whole)
            found.figures[f"{model}: other samples: loss"] = apart
            notes.append(f"{model}: what is saved gives another loss with other samples, {apart:.1e} away")
    return _report(found, notes)


def _report(found: Comparisons, notes: list[str]) -> Report:
    rows = found.rows
    equal = sum(row[-1] == "equal" for row in rows)
    said = [
        f"{equal} of {len(rows)} pairs equal to one process that was never stopped",
        f"saved after {SAVED} of {STEPS} steps of {BATCH} samples; largest relative distance over the steps that are "
        f"left, float32; equal: at most {TOLERANCE:g}, and as many samples consumed after every step",
    ]
    columns = ["model", "saved on", "going on on", "processes", "loss", "gradient norm", ""]
    return Report(
        title="Going on on another layout", columns=columns, rows=rows, figures=found.figures, notes=[*said, *notes]
    )


def rest(whole: dict[str, list[float]]) -> dict[str, list[float]]:
    """What a run that goes on should find, of what the whole run has found."""
    return {key: values[SAVED:] for key, values in whole.items()}


def resumed(pool: Pool, work: Path, model: str, first: Case, second: Case) -> dict[str, list[float]]:
    """What a run finds on `second` that was saved on `first`. ProblemError if a layout is refused."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        _save(pool, work, model, first, folder)
        return trained(pool, work, model, second, range(SAVED + 1, STEPS + 1), load=folder, **GIVEN)


def other_samples(pool: Pool, work: Path, model: str, whole: dict[str, list[float]]) -> float:
    """How far the loss of a saved model is away, if it starts with the first samples instead of going on: what an
    equal loss says of the samples."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        _save(pool, work, model, ALONE, folder)
        found = trained(pool, work, model, ALONE, load=folder, finetune=True, **GIVEN)
    return abs(found["loss"][0] / whole["loss"][SAVED] - 1)


def _save(pool: Pool, work: Path, model: str, case: Case, folder: str) -> None:
    steps = range(1, SAVED + 1)
    trained(pool, work, model, case, steps, save=folder, save_interval=STEPS, exit_interval=SAVED, **GIVEN)
