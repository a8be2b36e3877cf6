"""`cordee bench parity`: one loss, any layout.

Owns the comparison. A tiny dense model and a tiny MoE train the same few steps, through the whole of
`cordee train`, on every layout; losses and gradient norms are compared with those of one process. What is saved on one
layout and resumes on another is `resume.py`'s, the second part of the report."""

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cordee.bench import resume
from cordee.bench.contest import Turn
from cordee.bench.layouts import ALONE, cases
from cordee.bench.options import BenchConfig
from cordee.bench.pool import Pool
from cordee.bench.report import Report
from cordee.bench.tiny import (
    BATCH,
    LENGTH,
    MODELS,
    SHAPE,
    STEPS,
    TOLERANCE,
    Comparisons,
    micro_batch_size,
    prepare,
    trained,
)

PEERS = ()


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Train every model on every layout; the report names those that do not agree."""
    found = Comparisons(on_turn)
    with tempfile.TemporaryDirectory() as folder, Pool(timeout=600) as pool:
        work = Path(folder)
        pool.run(prepare, 1, folder)
        for name in MODELS:
            # The auxiliary loss of an MoE is one of micro-batches: they are alike on both sides.
            alone = {size: trained(pool, work, name, ALONE, micro_batch_size=size) for size in (1, 2, 4)}
            for case in cases(name == "MoE"):
                run_case = partial(trained, pool, work, name, case)
                found.add(name, case.name, (case.name, str(case.ranks)), run_case, alone[micro_batch_size(case)])
    return _report(found, resume.run(config, on_turn))


def _report(found: Comparisons, further: Report) -> Report:
    rows = found.rows
    counts = Counter(row[-1].partition(":")[0] for row in rows)
    notes = [
        f"{counts['equal']} layouts equal to one process, {len(rows) - counts['equal'] - counts['refused']} different, "
        f"{counts['refused']} refused",
        f"largest relative distance over {STEPS} steps, float32; equal: at most {TOLERANCE:g}",
        f"{SHAPE['num_hidden_layers']} layers, {BATCH} sequences of {LENGTH} tokens a step; loaded from a Hugging Face "
        "directory; every rank is a process on this machine",
    ]
    columns = ["model", "layout", "ranks", "loss", "gradient norm", ""]
    return Report(
        title="Parity of layouts", columns=columns, rows=rows, figures=found.figures, notes=notes, further=[further]
    )
