"""`cordee check`: what a run would be, and all that is wrong with it, before anything is started.

Owns what of a run is shown, as far as it is known: where data or weights are missing, the rest is shown all the same.
Knows no torch."""

from collections.abc import Collection, Iterator

from cordee.errors import Findings, Problem
from cordee.log import counted, in_bytes
from cordee.model.config import ModelConfig
from cordee.model.specs import Origin
from cordee.parallel import cost
from cordee.parallel.describe import describe_layout
from cordee.parallel.pipeline.split import partition_layers
from cordee.train import techniques
from cordee.train.objectives import DataSize
from cordee.train.options import TrainConfig
from cordee.train.plan import examined
from cordee.train.run_plan import Draft


def examine(config: TrainConfig) -> tuple[str, list[Problem]]:
    """What the run would be, in words, and its problems: as `check_run` has them, with the contents of the data, of
    which up to some GiB are read."""
    draft, problems = examined(config, contents=True)
    return "\n".join(_describe(draft)) if draft else "", problems


def check_with_contents(config: TrainConfig) -> list[Problem]:
    """The problems alone."""
    return examine(config)[1]


def _describe(draft: Draft) -> Iterator[str]:
    config = draft.config  # what keeps the data from being read is among the problems
    size = None if config.skip_train else Findings().attempt(lambda: draft.objective.size(config))
    for label, lines in (
        ("model", _model(draft)),
        ("data", _data(size)),
        ("one step", _step(draft)),
        ("the run", _run(draft, size)),
        ("training", _recipe(draft)),
    ):
        for number, line in enumerate(lines):
            yield f"{'' if number else label:<9} {line}".rstrip()
    yield ""
    yield describe_layout(draft.degrees)
    if draft.partition is not None:
        yield f"pipeline: {draft.partition}"
    yield from _memory(draft)
    if notes := draft.found.notes:
        yield ""
        yield from (f"note: {note}" for note in notes)


def _model(draft: Draft) -> Iterator[str]:
    if draft.spec is None:
        yield "unknown"
    else:
        yield f"{draft.spec.family.name}, {techniques.describe_parameters(draft.spec.config, draft.config)}"


def _data(size: DataSize | None) -> Iterator[str]:
    if size is None:
        yield "unknown"
        return
    for name, tokens in size.tokens.items():
        yield f"{counted(tokens, 'token')} to train on in {name}"


def _step(draft: Draft) -> Iterator[str]:
    config, batches = draft.config, draft.batches
    size, micro = batches.global_batch_size, batches.micro_batch_size
    accumulated = counted(size // batches.slice_size, "micro-batch", "micro-batches")
    ranks = counted(batches.data_size, "data-parallel rank")
    yield f"{counted(size, 'sample')} = {micro} per micro-batch x {accumulated} x {ranks}"
    yield f"{counted(size * config.seq_length, 'token')} = {counted(size, 'sample')} x {config.seq_length} tokens"
    if batches.rampup is not None:
        yield f"after a ramp-up from {counted(batches.rampup[0], 'sample')}"


def _run(draft: Draft, size: DataSize | None) -> Iterator[str]:
    config, batches = draft.config, draft.batches
    if not draft.iterations:
        yield "nothing is trained" if config.skip_train else "of unknown length"
        return
    samples = config.train_samples or draft.iterations * batches.global_batch_size
    yield f"{counted(draft.iterations, 'step')}, {counted(samples * config.seq_length, 'token')}"
    if size is not None:
        yield from (f"epochs of {name}: {size.epochs(name, samples):.3g}" for name in size.tokens)


def _recipe(draft: Draft) -> Iterator[str]:
    config, schedule = draft.config, draft.schedule
    size = draft.batches.global_batch_size
    decay = "constant" if schedule.style == "constant" else f"{schedule.style} decay to {schedule.min_lr:g}"
    yield f"learning rate {schedule.max_lr:g}, {decay}, warm-up of {schedule.warmup / size:.4g} steps"
    betas = "" if config.optimizer == "sgd" else f", beta2 {config.adam_beta2:g}"
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
    yield f"{config.optimizer}{betas}, weight decay {config.weight_decay:g}, clipping {config.clip_grad:g}, {precision}"


def _memory(draft: Draft) -> Iterator[str]:
    """Of the rank that needs the most, and of models beside the one that is trained."""
    if draft.spec is None:
        return
    config, model = draft.config, draft.spec.config
    several = "a rank" if draft.partition is None else "the rank with the most"
    most = _cost(draft, model, techniques.trained(model, config), config.quantise_base)
    yield most.describe("the process" if draft.degrees.world_size == 1 else several)
    for name, further in (draft.models or {}).items():
        kind = None if further.spec.config.score else config.quantise_base
        size = in_bytes(_cost(draft, further.spec.config, (), kind).total)
        yield f"{size} more of weights: the {name.removesuffix(' model')} model"


def _cost(draft: Draft, model: ModelConfig, trained: Collection[Origin], kind: str | None) -> cost.MemoryCost:
    """Of the rank that needs the most for `model`."""
    config, degrees = draft.config, draft.degrees
    partition = None if draft.partition is None else partition_layers(config, model, config.seq_length)
    spans = [()] if partition is None else [partition.spans_of(rank) for rank in range(partition.num_ranks)]
    counts = [cost.count(model, degrees, of_rank, trained) for of_rank in spans]
    return max((cost.cost(config, degrees, each, kind) for each in counts), key=lambda each: each.total)
