"""`cordee train` on one rank: from options to a finished run.

Owns the phases before and after the loop: join the other ranks, plan, build the model, load, open the data, and close
everything in order. The loop is `trainer.py`'s.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from cordee import device, launch, lock, log
from cordee.checkpoint import directory
from cordee.checkpoint.store import CheckpointStore, restore
from cordee.config.schema import PerformanceOptions, TrainConfig
from cordee.data.batch import NextToken
from cordee.data.build import Datasets, build_datasets
from cordee.data.loader import Loader
from cordee.data.tokenizer import VOCABULARIES, holds_tokenizer
from cordee.errors import Findings, Problem, ProblemError
from cordee.families.count import count_parameters, training_flops_per_token
from cordee.files import copy_files
from cordee.log import logger
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.optim.build import build_optimizer
from cordee.optim.precision import build_scaler
from cordee.parallel import apply, collectives, cost, data, sharding
from cordee.parallel.degrees import degrees
from cordee.parallel.describe import describe
from cordee.parallel.execution import Executor, LocalExecutor
from cordee.parallel.layout import Layout, process_group
from cordee.parallel.pipeline.executor import PipelineExecutor
from cordee.train import agreement, objectives, outputs
from cordee.train.exits import COMPLETE, Exit, ExitRule
from cordee.train.metrics import Meter, measure_peak_flops
from cordee.train.plan import Fingerprints, RunPlan, fingerprint_data, plan_run
from cordee.train.reports import Reports, build_reports
from cordee.train.signals import watch
from cordee.train.state import TrainState
from cordee.train.trainer import Parts, Trainer
from cordee.weights.load import load_into

T = TypeVar("T")


def run(config: TrainConfig) -> int:
    """Train as `config` says, as the rank that the launcher's variables name. Returns the exit code of the process.

    ProblemError, on all ranks alike, for whatever is wrong with options, files or data, for a loss that is not finite
    and for a checkpoint that cannot be written.
    """
    started = time.monotonic()
    ranks = launch.rank_info()
    log.setup(ranks.rank)
    with ExitStack() as stack:
        exits = ExitRule(config, stack.enter_context(watch(config.exit_signal_handler)), started)
        stack.callback(exits.settle)
        stack.enter_context(_interpreter(config))
        device.keep_freed_memory()
        on = device.local_device(ranks.local_rank)
        timeout = timedelta(minutes=config.distributed_timeout_minutes)
        if data.needs_sharding(config, ranks.world_size):
            backend = config.distributed_backend or device.kind().backend
            stack.enter_context(collectives.contact("between two phases"))
            with collectives.contact("while joining them"):
                stack.enter_context(process_group(ranks, backend, timeout))
        with collectives.contact("while joining them"):
            layout = Layout(degrees(config, ranks.world_size), on.type, timeout)
        return train(config, layout, on, exits).code


def train(config: TrainConfig, layout: Layout, on: torch.device, exits: ExitRule) -> Exit:
    """Train as `config` says on the ranks of `layout`, this one computing on device `on`. Returns why it ended."""
    with ExitStack() as stack, exits.bounded_after_loss():
        with collectives.contact("while planning the run"):
            first = layout.rank == 0
            together(layout, lambda: stack.enter_context(outputs.held(config)) if first else None)
            plan = _plan(config, layout)
        with collectives.contact("while building the model and opening the data"):
            parts, state = _build(plan, layout, on, exits, stack)
        trainer = Trainer(plan, parts, state)
        ending = COMPLETE if config.skip_train else trainer.train()
        if ending is COMPLETE:
            trainer.validate("validation")
            trainer.validate("test")
            ending = trainer.told_to_stop or ending
    logger.info("stopped after iteration %d: %s", state.iteration, ending.reason)
    return ending


@contextmanager
def _interpreter(options: PerformanceOptions) -> Iterator[None]:
    """Settings of the whole process, put back at the end."""
    deterministic, collecting = torch.are_deterministic_algorithms_enabled(), gc.isenabled()
    if options.use_deter_comp:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it that library refuses
        torch.use_deterministic_algorithms(True)
    if options.manual_gc:
        gc.disable()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if collecting:
            gc.enable()


# ---- plan ------------------------------------------------------------------------------------------------------------


def _plan(config: TrainConfig, layout: Layout) -> RunPlan:
    """The plan, the same on all ranks, with a checkpoint whose every byte is as it was saved."""
    if config.save is not None and layout.rank == 0:
        for name in directory.tidy(Path(config.save)):
            logger.info("removed what an interrupted save had left: %s", name)
    collectives.from_first(None, layout)  # nobody looks for checkpoints before that is done
    unread = Findings()
    fingerprints = _fingerprints(config, layout, unread)
    avoid: dict[int, str] = {}
    while True:
        plan = together(layout, lambda: plan_run(config, layout.world_size, avoid, fingerprints))
        collectives.raise_together(unread.problems, layout)  # after what planning finds of the same files
        agreement.require(plan, layout)  # so all ranks have the same checkpoint, or none
        if (why := _damage(plan, layout)) is None:
            break
        assert plan.origin.checkpoint is not None
        path = plan.origin.checkpoint.path
        if config.ckpt_step is not None or path == Path(config.load or ""):
            raise ProblemError([Problem("--load", path, why, "choose another checkpoint by --ckpt-step")])
        avoid[plan.origin.checkpoint.manifest["iteration"]] = why
    for note in plan.notes:
        logger.info("%s", note)
    return plan


def _first_of_machine(layout: Layout) -> int:
    """The lowest rank that runs on the machine of this one; containers of a machine count as several, for each may
    have files of its own."""
    mine = (lock.machine(), socket.gethostname())
    return collectives.gather(mine, layout).index(mine)


def _fingerprints(config: TrainConfig, layout: Layout, unread: Findings) -> Fingerprints | None:
    """Those of the data on this machine, read by its first rank alone; machines may have copies, which `agreement`
    compares. None, and the problems of the reader in `unread`, if it cannot be read."""
    first = _first_of_machine(layout)
    mine = unread.attempt(lambda: fingerprint_data(config)) if first == layout.rank else None
    return collectives.gather(mine, layout)[first]


def _damage(plan: RunPlan, layout: Layout) -> str | None:
    """What is wrong with the contents of the checkpoint to load; each rank reads its share of the files."""
    why = None
    if (checkpoint := plan.origin.checkpoint) is not None:
        names = sorted(checkpoint.manifest["files"])[layout.rank :: layout.world_size]
        why = directory.damage(checkpoint.path, contents=names)
    return next((found for found in collectives.gather(why, layout) if found), None)


def together(layout: Layout, function: Callable[[], T]) -> T:
    """What `function` returns on this rank; ProblemError on all ranks with what it finds on any."""
    result, problems = None, []
    try:
        result = function()
    except ProblemError as error:
        problems = error.problems
    collectives.raise_together(problems, layout)
    return result  # type: ignore[return-value]


# ---- parts -----------------------------------------------------------------------------------------------------------


def _build(
    plan: RunPlan, layout: Layout, on: torch.device, exits: ExitRule, stack: ExitStack
) -> tuple[Parts, TrainState]:
    """Everything the loop works with, closed when `stack` is, and where the run is."""
    config = plan.config
    spans = plan.division.owned(layout.axis_rank("pp")) if plan.division is not None else ()
    model = apply.apply(GPTModel(plan.spec.config, spans=spans, device="meta"), layout, config, on)
    fused = device.kind().fused_optimizer
    optimizer = build_optimizer(config, model.named_parameters(), model.parameter_specs(), fused=fused)
    scaler, state = build_scaler(config), TrainState()
    _fill(plan, model, optimizer, layout)
    if (resumed := plan.resumed) is not None:
        state = TrainState.from_dict(resumed.manifest["trainer"])
        scaler.load_state_dict(resumed.manifest["loss_scaler"])
        logger.info("resuming from %s", resumed.path)
    loaders = _loaders(plan, layout, stack)
    store = None
    if config.save is not None:
        store = CheckpointStore(
            Path(config.save), group=layout.background, keep_last=config.keep_last, on_lost=exits.rank_lost
        )
        stack.enter_context(store)
        if layout.rank == 0:
            _save_companions(plan, store.root)
    objective = objectives.registry()[config.stage]
    reports = _reports(plan, layout, on, objective.loss_name)
    stack.callback(reports.close)
    logger.info("%s", _summary(plan))
    if plan.division is not None:
        logger.info("pipeline: %s", plan.division)
    _tell_layout(plan, layout, model)
    parts = Parts(
        model=model,
        executor=_executor(plan, model, layout, on, objective),
        optimizer=optimizer,
        scaler=scaler,
        loaders=loaders,
        layout=layout,
        device=on,
        store=store,
        reports=reports,
        exits=exits,
    )
    return parts, state


def _executor(
    plan: RunPlan, model: GPTModel, layout: Layout, on: torch.device, objective: objectives.Objective
) -> Executor:
    if plan.division is None:
        return LocalExecutor(model, plan.config, on, objective.loss)
    return PipelineExecutor(model, plan.division, layout, plan.config, on, objective.loss)


def _fill(plan: RunPlan, model: GPTModel, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
    """Values of the parameters and, where the run resumes, the state of the optimizer."""
    origin = plan.origin
    if origin.checkpoint is not None:
        takes_state = origin.checkpoint.resume and plan.config.load_optim
        restore(origin.checkpoint.path, model, optimizer if takes_state else None, group=layout.background)
    elif (source := origin.source) is not None:
        report = together(layout, lambda: load_into(model, source, origins={"base"}))
        logger.info("%s: %s", origin.weights, report)
        initialise(model, plan.config.seed, {"adapter", "head"})
    else:
        initialise(model, plan.config.seed)


def _save_companions(plan: RunPlan, root: Path) -> None:
    """Put the tokenizer beside the checkpoints, so that they can be talked to and exported without the options."""
    if plan.tokenizer is None or holds_tokenizer(root):
        return
    scratch = root / ".tokenizer.new"
    directory.discard(scratch)
    scratch.mkdir(parents=True)
    try:
        plan.tokenizer.save(scratch)
    except ProblemError as error:
        logger.warning("the tokenizer is not put beside the checkpoints: %s", error)
        directory.discard(scratch)
        return
    companions = plan.origin.companions if plan.origin.weights else None
    if companions is not None:
        copy_files(companions.glob("generation_config.json"), scratch)
    # What makes it a tokenizer comes last: a process that is killed in between does it again the next time.
    for file in sorted(scratch.iterdir(), key=lambda file: (file.name in VOCABULARIES, file.name)):
        file.rename(root / file.name)
    directory.discard(scratch)


def _loaders(plan: RunPlan, layout: Layout, stack: ExitStack) -> dict[str, Loader]:
    """Loaders of those of "train", "validation" and "test" that the run has samples of."""
    config, tokenizer = plan.config, plan.tokenizer
    collate = NextToken(
        vocab_size=plan.spec.config.vocab_size,
        eod=tokenizer.eod if tokenizer else None,
        eod_mask_loss=config.eod_mask_loss,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
    )
    datasets = _datasets(plan, layout)
    named = {"train": datasets.train, "validation": datasets.valid, "test": datasets.test}
    loaders = {}
    for name, dataset in named.items():
        if dataset is not None:
            loaders[name] = Loader(
                dataset,
                collate,
                order=config.dataloader_type if name == "train" else "single",
                rank=layout.data_rank,
                size=layout.data_size,
                num_workers=config.num_workers,
            )
            stack.callback(loaders[name].close)
    return loaders


def _datasets(plan: RunPlan, layout: Layout) -> Datasets:
    """Datasets of all parts. Of the sample orders that are kept in the cache rank 0 builds those that are missing, the
    first rank of every machine verifies them, and the others open them; small blocks of an order each rank builds
    itself, when it comes to them."""
    counts = [plan.samples[name] for name in ("train", "valid", "test")]
    first = _first_of_machine(layout)
    turn = 0 if layout.rank == 0 else 1 if layout.rank == first else 2

    def build() -> Datasets:
        return build_datasets(plan.config, *counts, train_blocks=plan.data["blocks"], verified=turn == 2)

    built = [together(layout, build if now == turn else lambda: None) for now in range(3)]  # each after those before
    datasets = built[turn]
    assert datasets is not None
    return datasets


def _reports(plan: RunPlan, layout: Layout, on: torch.device, loss_name: str) -> Reports:
    """What this rank tells, and the rate that is 100 % of its device."""
    config = plan.config
    peak = config.peak_tflops * 1e12 if config.peak_tflops else device.peak_flops()
    if peak is None:  # on all ranks at once, for they share the machine while they train too
        peak = measure_peak_flops(data.compute_dtype(config), on)
    if layout.rank != 0:
        return Reports([])

    def meter() -> Meter:
        return Meter(
            train_iterations=plan.iterations,
            flops_per_token=training_flops_per_token(plan.spec.config, config.seq_length),
            num_devices=layout.world_size,
            peak_flops=peak,
        )

    return build_reports(config, meter, loss_name)


def _tell_layout(plan: RunPlan, layout: Layout, model: GPTModel) -> None:
    """Who owns what, and what it takes."""
    config, batches = plan.config, plan.batches
    logger.info("%s", describe(layout.degrees, collectives.gather(sharding.kept(model), layout)))
    takes = cost.cost(
        config,
        layout.degrees,
        sharding.count(model, model.layers.values()),
        wrapped=data.needs_sharding(config, layout.world_size),
        accumulates=batches.global_batch_size > config.micro_batch_size * layout.data_size,
    )
    logger.info("%s", takes)


def _summary(plan: RunPlan) -> str:
    size, batches = count_parameters(plan.spec.config), plan.batches
    return (
        f"{plan.spec.family.name} with {size:,} parameters; {plan.iterations} steps of {batches.global_batch_size} x "
        f"{plan.config.seq_length} tokens; {plan.degrees.world_size} processes, ZeRO stage {plan.config.zero_stage}"
    )
