"""`cordee train` on one rank: from options to a finished run.

Owns the phases before and after the loop: join the other ranks, plan, build the model, load, open the data, and close
everything in order. The loop is `trainer.py`'s."""

import gc
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from cordee import device, launch, lock, log
from cordee.checkpoint import assets, directory
from cordee.checkpoint.storage import Location, location_of, reached
from cordee.checkpoint.store import CheckpointStore, restore
from cordee.config.option import options_of, to_flag
from cordee.data.gpt_dataset import Dataset
from cordee.data.loader import Loader
from cordee.errors import Findings, Problem, ProblemError
from cordee.families.count import training_flops_per_token
from cordee.families.registry import ModelSpec
from cordee.files import copy_files
from cordee.log import counted, logger
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.model.parameter import ORIGINS, train_only
from cordee.model.specs import Origin
from cordee.optim.build import build_optimizer
from cordee.optim.precision import build_scaler
from cordee.parallel import apply, collectives, cost, data, sharding
from cordee.parallel.collectives import together
from cordee.parallel.degrees import degrees
from cordee.parallel.describe import describe_layout
from cordee.parallel.execution import Criterion, Executor, Frozen, LocalExecutor
from cordee.parallel.layout import Layout, process_group
from cordee.parallel.pipeline.executor import PipelineExecutor
from cordee.parallel.pipeline.split import StagePartition, partition_layers
from cordee.train import objectives, outputs, techniques
from cordee.train.ending import describe_end
from cordee.train.exits import COMPLETE, Exit, ExitRule, watch
from cordee.train.initial_weights import option_of
from cordee.train.metrics import Meter, measure_peak_flops
from cordee.train.options import PerformanceOptions, TrainConfig
from cordee.train.plan import plan_run
from cordee.train.reports import Reports, build_reports
from cordee.train.run_plan import RunPlan, TrainState
from cordee.train.techniques import Technique
from cordee.train.trainer import Parts, Trainer
from cordee.weights.load import fill_lengths, load_into

# Options that may differ between nodes.
_OF_A_NODE = ("nproc_per_node", "num_workers", "peak_tflops", "exit_grace_seconds", "distributed_timeout_minutes")


def run(config: TrainConfig) -> int:
    """Train as `config` says, as the rank that the launcher's variables name. Returns the exit code of the process.

    ProblemError, on all ranks alike, for whatever is wrong with options, files or data, for a loss that is not finite
    and for a checkpoint that cannot be written."""
    started = time.monotonic()
    ranks = launch.rank_info()
    log.setup(ranks.rank)
    with ExitStack() as stack:
        exits = ExitRule(config, stack.enter_context(watch(config.exit_signal_handler)), started)
        stack.callback(exits.settle)
        stack.enter_context(_interpreter(config))
        device.keep_freed_memory()
        on = device.local_device(ranks.local_rank)
        config = objectives.named(config.stage).ready(config)
        timeout = timedelta(minutes=config.distributed_timeout_minutes)
        if cost.needs_sharding(config, ranks.world_size):
            backend = device.kind().collective_backend(config.distributed_backend)
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
            locks = together(lambda: stack.enter_context(outputs.held(config)) if first else {}, layout.control)
            plan = _plan(config, layout)
        with collectives.contact("while building the model and opening the data"):
            parts, state = _build(plan, layout, on, exits, locks, stack)
        trainer = Trainer(plan, parts, state)
        ending = COMPLETE if config.skip_train else trainer.train()
        if ending.final:
            trainer.validate("validation")
            trainer.validate("test")
            ending = trainer.stop_requested or ending
    logger.info("stopped after iteration %d: %s", state.iteration, ending.reason)
    if state.best_loss is not None:
        logger.info("best validation loss: %.6f at iteration %s", state.best_loss, state.best_iteration)
    for line in describe_end(plan, state.iteration) if layout.rank == 0 else ():
        logger.info("%s", line)
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


def _plan(config: TrainConfig, layout: Layout) -> RunPlan:
    """The plan, the same on all ranks, with a checkpoint whose every byte is as it was saved."""
    # Before any rank looks for checkpoints.
    together(lambda: _tidy(config) if layout.rank == 0 else None, layout.control)
    unread = Findings()
    fingerprint = _fingerprint(config, layout, unread)
    avoid: dict[int, str] = {}
    given = config.only_adapter() or config.load or ""
    while True:
        plan = together(lambda: plan_run(config, layout.world_size, avoid, fingerprint), layout.control)
        collectives.raise_together(unread.problems, layout.control)  # after what planning finds of the same files
        _require_equal(plan, layout)  # so all ranks have the same checkpoint, or none
        if (why := _damage(plan, layout)) is None:
            break
        assert plan.initial.checkpoint is not None
        path = plan.initial.checkpoint.path
        if config.ckpt_step is not None or path.resolve() == location_of(given).resolve():
            fix = "choose another checkpoint by --ckpt-step"
            raise ProblemError.of(option_of(config), str(path), why, fix, "corrupt")
        avoid[plan.initial.checkpoint.manifest["iteration"]] = why
    for note in plan.notes:
        logger.info("%s", note)
    return plan


def _require_equal(plan: RunPlan, layout: Layout) -> None:
    """ProblemError on all ranks if the `plan` of one is not that of rank 0: nodes may have their own copies of the
    configuration, the data and the checkpoints, which would be mixed silently."""
    mine = _identity(plan)
    first = collectives.from_first(mine, layout)
    fix = "give all nodes the same options, data and checkpoints"
    problems = [
        Problem(name, value, f"rank {layout.rank} has this, rank 0 has {first.get(name)}", fix, "differs")
        for name, value in mine.items()
        if first.get(name) != value
    ]
    collectives.raise_together(problems, layout.control)


def _identity(plan: RunPlan) -> dict[str, Any]:
    """What the result of a run depends on, by option. Free texts, such as paths, may differ between nodes."""
    config, checkpoint = plan.config, plan.initial.checkpoint
    options = [option for option in options_of(type(config)) if option.kind is not str or option.choices]
    found: dict[str, Any] = {
        to_flag(option.name): getattr(config, option.name) for option in options if option.name not in _OF_A_NODE
    }
    return {
        "--stage": config.stage,
        "--optimizer": config.optimizer,
        **found,
        "model": f"{plan.spec.to_dict()}, {plan.spec.config}",
        "pipeline": str(plan.partition),
        "micro-batches": plan.batches.sizes,
        "data": str(plan.data.identity),
        "length of the run": plan.iterations,
        "checkpoint": None if checkpoint is None else (checkpoint.manifest["iteration"], checkpoint.resume),
        "weights of a model": (plan.initial.weights is not None, (plan.initial.base or {}).get("fingerprint")),
        "further models": str({name: (m.spec.to_dict(), m.source is not None) for name, m in plan.models.items()}),
    }


def _tidy(config: TrainConfig) -> None:
    if config.save is not None:
        with reached("--save", config.save):
            for name in directory.tidy(location_of(config.save, "--save")):
                logger.info("removed what an interrupted save had left: %s", name)


def _first_of_machine(layout: Layout) -> int:
    """The lowest rank that runs on the machine of this one; containers of a machine count as several, for each may
    have files of its own."""
    mine = (lock.machine(), socket.gethostname())
    return collectives.gather(mine, layout).index(mine)


def _fingerprint(config: TrainConfig, layout: Layout, unread: Findings) -> Any:
    """That of the data on this machine, read by its first rank alone; machines may have copies, which
    `_require_equal` compares. None, and the problems of the reader in `unread`, if it cannot be read."""
    first = _first_of_machine(layout)
    objective = objectives.named(config.stage)
    mine = unread.attempt(lambda: objective.fingerprint(config)) if first == layout.rank else None
    return collectives.gather(mine, layout)[first]


def _damage(plan: RunPlan, layout: Layout) -> str | None:
    """What is wrong with the contents of the checkpoint to load; each rank reads its share of the files."""
    why = None
    if (checkpoint := plan.initial.checkpoint) is not None:
        names = sorted(checkpoint.manifest["files"])[layout.rank :: layout.world_size]
        why = directory.damage(checkpoint.path, contents=names)
    return next((found for found in collectives.gather(why, layout) if found), None)


def _build(
    plan: RunPlan, layout: Layout, on: torch.device, exits: ExitRule, locks: Mapping[str, lock.Lock], stack: ExitStack
) -> tuple[Parts, TrainState]:
    """Everything the loop works with, closed when `stack` is, and where the run is."""
    config, objective = plan.config, plan.objective
    criterion = Criterion(objective, layout)
    model, executor = _model(plan.spec, plan.partition, config, layout, on, criterion, techniques.TECHNIQUES)
    fused = device.kind().fused_optimizer
    optimizer = build_optimizer(config, model.named_parameters(), model.parameter_specs(), fused=fused)
    scaler, state = build_scaler(config), TrainState()
    _fill(plan, model, optimizer, layout)
    if (resumed := plan.resumed) is not None:
        state = TrainState(**resumed.manifest["trainer"])
        scaler.load_state_dict(resumed.manifest["loss_scaler"])
        logger.info("resuming from %s", resumed.path)
    loaders = _loaders(plan, layout, stack)
    store = None
    if config.save is not None:
        root = location_of(config.save, "--save")
        store = CheckpointStore(
            root,
            group=layout.background,
            keep_last=config.keep_last,
            origins=ORIGINS if plan.initial.base is None else techniques.trained(plan.spec.config, config),
            on_lost=exits.rank_lost,
            lock=locks.get("--save"),
        )
        stack.enter_context(store)
        together(lambda: _save_assets(plan, root) if layout.rank == 0 else None, layout.control)
    reports = _reports(plan, layout, on, state)
    stack.callback(reports.close)
    logger.info("%s", _summary(plan))
    if plan.partition is not None:
        logger.info("pipeline: %s", plan.partition)
    _log_layout(plan, layout, model)
    make = {name: partial(_further, each, plan, layout, on, criterion) for name, each in plan.models.items()}
    make[objectives.POLICY] = partial(Frozen, model, executor, layout)
    parts = Parts(
        model=model,
        executor=executor,
        objective=objective,
        models=objective.begin(make, plan, {name: each.dataset for name, each in loaders.items()}, layout),
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


def _model(
    spec: ModelSpec,
    partition: StagePartition | None,
    config: TrainConfig,
    layout: Layout,
    on: torch.device,
    criterion: Criterion,
    put_on: Sequence[Technique] = (),
) -> tuple[GPTModel, Executor]:
    """This rank's part of a model, its values still to be filled, and what runs it."""
    spans = partition.spans_of(layout.axis_rank("pp")) if partition is not None else ()
    model = GPTModel(spec.config, spans=spans, device="meta")
    for technique in put_on:
        train_only(model, technique.trains(spec.config, config))
    wrappers = [wrapper for technique in put_on for wrapper in technique.wrappers(config)]
    apply.apply(model, layout, config, on, wrappers)
    if partition is None:
        return model, LocalExecutor(model, config, on, criterion)
    return model, PipelineExecutor(model, partition, layout, config, on, criterion)


def _further(
    further: objectives.FurtherModel, plan: RunPlan, layout: Layout, on: torch.device, criterion: Criterion
) -> Frozen:
    """A further model of the objective, over the same ranks."""
    spec, source, config = further.spec, further.source, plan.config
    partition = None if plan.partition is None else partition_layers(config, spec.config, config.seq_length)
    put_on = () if spec.config.score else (techniques.Adapters(),)  # the reference is quantised as the base
    model, executor = _model(spec, partition, config, layout, on, criterion, put_on)
    if source is None:
        initialise(model, config.seed)
    else:
        together(lambda: load_into(model, source), layout.control)
    return Frozen(model.requires_grad_(False), executor, layout)


def _fill(plan: RunPlan, model: GPTModel, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
    """Values of the parameters and, where the run resumes, the state of the optimizer."""
    initial, left = plan.initial, set(ORIGINS)
    if (source := initial.source) is not None:
        loaded: set[Origin] = {"base", "tuned"} if initial.peft is None else {"base", "tuned", "adapter"}
        loaded |= {"head"} if source.spec.config.score else set()
        report = together(lambda: load_into(model, source, origins=loaded), layout.control)
        logger.info("%s: %s", initial.weights, report)
        left -= loaded
    if (checkpoint := initial.checkpoint) is not None:
        state = optimizer if checkpoint.resume and plan.config.load_optim else None
        optional: tuple[Origin, ...] = () if checkpoint.resume else ("adapter", "head")
        origins = ORIGINS if initial.base is None else techniques.trained(plan.spec.config, plan.config)
        left &= restore(checkpoint.path, model, state, group=layout.background, origins=origins, optional=optional)
    initialise(model, plan.config.seed, left)
    if "adapter" in left:
        fill_lengths(model)


def _save_assets(plan: RunPlan, root: Location) -> None:
    """Put the tokenizer beside the checkpoints, so that they can be talked to and exported without the options."""
    if plan.tokenizer is None:
        return
    with reached("--save", str(root)):
        if assets.are_in(root):
            return
        try:
            with assets.put_into(root) as scratch:
                plan.tokenizer.save(scratch)
                if plan.initial.weights and plan.initial.assets is not None:
                    copy_files(plan.initial.assets.glob("generation_config.json"), scratch)
        except ProblemError as error:
            logger.warning("the tokenizer is not put beside the checkpoints: %s", error)


def _loaders(plan: RunPlan, layout: Layout, stack: ExitStack) -> dict[str, Loader]:
    """Loaders of all datasets of the run, by their names."""
    config, collate = plan.config, plan.data.collate()
    loaders = {}
    for name, dataset in _datasets(plan, layout).items():
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


def _datasets(plan: RunPlan, layout: Layout) -> Mapping[str, Dataset]:
    """Datasets of all splits. Rank 0 builds what is cached on disk where it is missing, the first rank of every machine
    verifies it, the others open it; each rank builds the rest itself, when it needs it."""
    first = _first_of_machine(layout)
    turn = 0 if layout.rank == 0 else 1 if layout.rank == first else 2

    def build() -> Mapping[str, Dataset]:
        return plan.data.open(verified=turn == 2)

    turns = (build if now == turn else dict for now in range(3))
    return [together(function, layout.control) for function in turns][turn]  # each after those before


def _reports(plan: RunPlan, layout: Layout, on: torch.device, state: TrainState) -> Reports:
    """The reports of this rank; ranks other than 0 have none, but measure the peak with it."""
    config = plan.config
    peak = config.peak_tflops * 1e12 if config.peak_tflops else device.peak_flops()
    if peak is None:  # on all ranks at once, for they share the machine while they train too
        peak = measure_peak_flops(data.compute_dtype(config), on)
    if layout.rank != 0:
        return Reports([])
    meter = partial(
        Meter,
        train_iterations=plan.iterations,
        flops_per_token=training_flops_per_token(plan.spec.config, config.seq_length),
        num_devices=layout.world_size,
        peak_flops=peak,
    )
    return build_reports(config, meter, plan.objective.loss_name, state)


def _log_layout(plan: RunPlan, layout: Layout, model: GPTModel) -> None:
    """Log which rank holds which shard, and its memory and communication."""
    logger.info("%s", describe_layout(layout.degrees, collectives.gather(sharding.kept(model), layout)))
    spans = () if plan.partition is None else plan.partition.spans_of(0)
    count = cost.count(plan.spec.config, layout.degrees, spans, techniques.trained(plan.spec.config, plan.config))
    logger.info("%s", cost.cost(plan.config, layout.degrees, count, plan.config.quantise_base).describe("rank 0"))


def _summary(plan: RunPlan) -> str:
    size, batches = techniques.describe_parameters(plan.spec.config, plan.config), plan.batches
    steps = counted(plan.iterations, "step")
    return (
        f"{plan.spec.family.name} with {size}; {steps} of {batches.global_batch_size} x "
        f"{plan.config.seq_length} tokens; ZeRO stage {plan.config.zero_stage}"
    )
