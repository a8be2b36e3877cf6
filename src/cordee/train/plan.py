"""What a run is, worked out from its options before anything starts.

Owns the decisions that need no torch: which model, from where, over how many ranks, for how long, on which data. All
problems are found together, so `cordee check` and the start of a job are the same thing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cordee.checkpoint import directory
from cordee.config import deepspeed, laws
from cordee.config.check import check_train
from cordee.config.option import options_of, to_flag
from cordee.config.schema import ModelOptions, TokenizerOptions, TrainConfig
from cordee.data import check as data_check
from cordee.data.build import Part, plan_order, plan_parts
from cordee.data.indexed import IndexedDataset, bin_path, fingerprint, idx_path
from cordee.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from cordee.errors import Findings, Problem, ProblemError, Problems, at_most, divides, raise_all, unique
from cordee.families.described import canonical
from cordee.families.options import ignored, shape_of
from cordee.families.registry import ModelSpec, differences, spec_from_options, spec_named
from cordee.model.config import ModelConfig
from cordee.optim.schedule import Schedule, build_schedule
from cordee.parallel.degrees import Degrees, fitting
from cordee.parallel.degrees import problems as degree_problems
from cordee.parallel.laws import Run
from cordee.parallel.laws import check as layout_problems
from cordee.parallel.pipeline import check as pipeline_check
from cordee.parallel.pipeline.split import Division, noop_layers
from cordee.train import experts, objectives, resume
from cordee.train.batch_schedule import BatchSchedule, build_batch_schedule
from cordee.train.origin import Checkpoint, Origin, choose, described, opened


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that nothing is known to be wrong with.

    `iterations` is the length of the whole run in steps, `samples` what it needs for "train", "valid" and "test",
    `data` says which samples it sees in which order, `division` how a pipeline shares the layers out, `notes` what a
    person should know before it starts.
    """

    config: TrainConfig
    origin: Origin
    spec: ModelSpec
    tokenizer: Tokenizer | None
    degrees: Degrees
    division: Division | None
    batches: BatchSchedule
    iterations: int
    samples: dict[str, int]
    schedule: Schedule
    data: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint that the run resumes from."""
        checkpoint = self.origin.checkpoint
        return checkpoint if checkpoint is not None and checkpoint.resume else None


READ_OF_DATA = 1 << 30  # bytes, over all .bin and over all .idx, that tell whether the data changed: some seconds
# What the model and the tokenizer of a run follow from, by names that problems have.
_MODEL = (*(option.name for option in options_of(ModelOptions)), "load", "model_options")
_TOKENIZER = (*(option.name for option in options_of(TokenizerOptions)), "load", "tokenizer")
_MANY_TOKENS = 1 << 20  # of a tokenizer that cannot be read, so that the model it is for is checked all the same
Fingerprints = tuple[dict[str, int], ...]  # of the .bin and .idx of every dataset to train on


def plan_run(
    config: TrainConfig,
    world_size: int,
    avoid: Mapping[int, str] | None = None,
    fingerprints: Fingerprints | None = None,
) -> RunPlan:
    """The plan of a run over `world_size` processes; ProblemError with everything that is wrong with it.

    A run does not resume from checkpoints of the iterations in `avoid`: they have turned out to be damaged, as the
    text says. `fingerprints` are what `fingerprint_data` returned on this machine. With None, which is for plans that
    are not trained, the contents of the data are neither in the plan nor compared with those of a run to resume.
    """
    shape = fitting(config, world_size)
    notes = [str(each) for each in laws.ignored_options(replace(config, nproc_per_node=world_size))]
    found = Findings([*check_train(config), *_stage_problems(config), *_report_problems(config)], notes)
    if config.deepspeed_config is not None:
        settings = deepspeed.read(config.deepspeed_config)
        found.problems += deepspeed.check(config, settings, shape.data)
        found.notes += settings.ignored()
    found.problems += degree_problems(config, world_size)
    sizes = found.attempt(lambda: pipeline_check.sizes(config))
    batches = build_batch_schedule(config, shape.data, sizes)
    length = found.attempt(lambda: _iterations(config, batches, found.notes))
    iterations = length or (0 if config.skip_train else 1)  # one step stands in for a length that is not known
    schedule = build_schedule(config, config, batches.global_batch_size)
    contradictory = frozenset[str]().union(*(problem.names for problem in found.problems))
    origin, tokenizer, spec = _start(config, avoid, found)
    found.problems += _too_many(config, batches, iterations)
    samples = found.attempt(lambda: _samples(config, batches, iterations, found.notes)) or {}
    found.problems += data_check.check(
        config,
        **{f"{name}_samples": count for name, count in samples.items()},
        vocab_size=spec.config.vocab_size if spec else None,
        tokenizer=tokenizer,
    )
    if spec is not None:
        found.notes += experts.ignored(spec, config)
        trained = found.attempt(partial(experts.with_training, spec, config), involves=("num_experts", "model", "load"))
        spec = trained or spec
        found.problems += _fit_problems(config, spec, tokenizer)
    counts = sorted({size // batches.slice_size for size in batches.batch_sizes()})
    run = Run(model=spec.config if spec else None, degrees=shape, options=config, micro_batches=counts)
    found.problems += layout_problems(run) if shape.world_size > 1 else ()
    division = found.attempt(lambda: pipeline_check.division(run))
    found.notes += pipeline_check.notes(division, counts)
    data = found.attempt(lambda: _data_identity(config, samples, fingerprints))
    checkpoint = origin.checkpoint if origin is not None else None
    if checkpoint is not None and checkpoint.resume:
        # Of options that contradict each other it says nothing that a run had others before.
        resumed = resume.problems(config, schedule, data, checkpoint.manifest)
        found.problems += (problem for problem in resumed if not problem.names & contradictory)
    raise_all(unique(found.problems))
    assert origin is not None and spec is not None and data is not None
    return _joined(
        RunPlan(
            config=config,
            origin=origin,
            spec=spec,
            tokenizer=tokenizer,
            degrees=shape,
            division=division,
            batches=batches,
            iterations=iterations,
            samples=samples,
            schedule=schedule,
            data=data,
            notes=tuple(found.notes),
        )
    )


def _joined(plan: RunPlan) -> RunPlan:
    """`plan` as it resumes from its checkpoint, if it does."""
    if (resumed := plan.resumed) is None:
        return plan
    done = resumed.manifest["trainer"]["iteration"]
    if done >= plan.iterations and not plan.config.skip_train:
        note = f"{resumed.path} is of step {done} of {plan.iterations}: nothing is left to train"
        plan = replace(plan, notes=(*plan.notes, note))
    return resume.join(plan, resumed.manifest)


def _stage_problems(config: TrainConfig) -> Problems:
    known = objectives.registry()
    if config.stage not in known:
        yield Problem("--stage", config.stage, "there is no such objective", f"give one of {', '.join(sorted(known))}")


def _iterations(config: TrainConfig, batches: BatchSchedule, notes: list[str]) -> int:
    """Steps of the whole run; samples that make no whole step are left out."""
    if config.train_samples is None:
        return config.train_iters or 0
    steps, used = batches.whole_steps(config.train_samples)
    if not steps:
        why = f"it is less than the first step of {batches.batch_size(0)} samples"
        raise ProblemError([Problem("--train-samples", config.train_samples, why, "give more")])
    if left := config.train_samples - used:
        notes.append(f"the last {left} of --train-samples {config.train_samples} make no whole step and are left out")
    return steps


# ---- model and tokenizer -------------------------------------------------------------------------------------------


def _start(
    config: TrainConfig, avoid: Mapping[int, str] | None, found: Findings
) -> tuple[Origin | None, Tokenizer | None, ModelSpec | None]:
    """Where the run begins, and what model and tokenizer that makes; None for what is unknown."""
    chosen = found.attempt(lambda: choose(config, avoid, found.notes))
    found.problems += _save_problems(config, chosen)
    origin = None
    if chosen is not None:
        origin = found.attempt(lambda: opened(config, chosen)) or found.attempt(lambda: described(chosen))
    before = len(found.problems)
    tokenizer = found.attempt(lambda: _tokenizer(config, origin or Origin()), involves=_TOKENIZER)
    if origin is None:
        return None, tokenizer, None
    tokens = _MANY_TOKENS if len(found.problems) > before else tokenizer and tokenizer.vocab_size
    spec = found.attempt(lambda: _spec(config, origin, tokenizer, tokens, found.notes), involves=(*_MODEL, *_TOKENIZER))
    return origin, tokenizer, spec


def _tokenizer(config: TrainConfig, origin: Origin) -> Tokenizer | None:
    """The tokenizer of the options, else that beside the weights; None if there is neither."""
    given = any(
        getattr(config, name)
        for name in TokenizerOptions.__dataclass_fields__
        if name not in ("vocab_size", "tokenizer_use_fast")
    )
    beside = str(origin.companions) if origin.companions and holds_tokenizer(origin.companions) else None
    return load_tokenizer(config, beside) if given or beside else None


def _spec(
    config: TrainConfig, origin: Origin, tokenizer: Tokenizer | None, tokens: int | None, notes: list[str]
) -> ModelSpec:
    """The model of the run; `tokens` is how many the tokenizer has, for a model that is given by options."""
    spec = _asked(config, origin, tokenizer, tokens, notes)
    notes += ignored(config, shape_of(spec.config))
    return spec


def _asked(
    config: TrainConfig, origin: Origin, tokenizer: Tokenizer | None, tokens: int | None, notes: list[str]
) -> ModelSpec:
    if config.num_layers is not None and (placeholders := noop_layers(config)):  # which --num-layers counts
        config = replace(config, num_layers=config.num_layers - len(placeholders))
    if origin.checkpoint is not None:
        loaded = ModelSpec.from_dict(origin.checkpoint.manifest["model"])
    elif origin.spec is not None:
        loaded = origin.spec
    else:
        fresh = spec_from_options(config, tokens)
        return fresh.with_tokens(tokenizer.bos, tokenizer.eos) if tokenizer else fresh  # not those of a preset
    # What is loaded has its rows; options that count tokens, or say how rows were padded, only have to agree with them.
    shape = replace(config, vocab_size=None, make_vocab_size_divisible_by=None)
    wanted = (spec_named(config.model) if config.model else loaded).with_options(shape)
    problems = list(_vocabulary_problems(config, loaded.config.vocab_size))
    changed = differences(loaded.config, wanted.config)
    listed = ", ".join(f"{flag} {values}" for flag, values in changed.items()) or "in what no option says"
    resumes = origin.checkpoint is not None and origin.checkpoint.resume
    if wanted.shapes() != loaded.shapes():
        fix = "leave the model options out: what is loaded says its shape"
        problems.append(Problem("--load", config.load, f"the options ask for another model: {listed}", fix))
    elif resumes and _lasting(loaded.config) != _lasting(wanted.config):
        fix = "leave these options out, or start anew from the weights: --finetune"
        problems.append(Problem("--load", config.load, f"the run was of another model: {listed}", fix))
    elif canonical(loaded.config) != canonical(wanted.config):
        notes.append(f"the options change what the model that is loaded computes: {listed}")
    raise_all(problems)
    return wanted


def _lasting(config: ModelConfig) -> ModelConfig:
    """`config` without what a resumed run may be given otherwise: it is of training, not of what weights mean."""
    dropout = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    return canonical(replace(config, init_std=0.0, **dropout))


def _vocabulary_problems(config: TrainConfig, rows: int) -> Problems:
    loaded = f"the {rows} tokens of the model that is loaded"
    yield from at_most("--vocab-size", config.vocab_size, rows, loaded, "load")
    if config.make_vocab_size_divisible_by is not None:
        yield from divides(
            "--make-vocab-size-divisible-by", config.make_vocab_size_divisible_by, rows, "tokens of the model", "load"
        )


def _fit_problems(config: TrainConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> Problems:
    longest, vocab_size = spec.config.max_position_embeddings, spec.config.vocab_size
    positions = f"the {longest} positions that the model holds"
    yield from at_most(
        "--seq-length", config.seq_length, longest, positions, "max_position_embeddings", "model", "load"
    )
    if tokenizer is not None:
        why, involved = f"the {vocab_size} tokens of the model", (*_TOKENIZER, *_MODEL)
        yield from at_most("tokenizer", tokenizer.vocab_size, vocab_size, why, *involved)


# ---- places --------------------------------------------------------------------------------------------------------


def _save_problems(config: TrainConfig, origin: Origin | None) -> Problems:
    if config.save is None:
        return
    root = Path(config.save)
    yield from _unwritable("--save", root)
    if origin is not None and directory.is_root(root):
        checkpoint = origin.checkpoint
        resumes = checkpoint is not None and checkpoint.resume and checkpoint.path.parent.samefile(root)
        if not resumes:
            newest = max(directory.iterations(root), default=0)
            why = f"it holds the checkpoints of another run, up to iteration {newest}"
            fix = f"resume that run: --load {root}; or give another directory"
            yield Problem("--save", root, why, fix, "taken", ("load", "finetune"))


def _report_problems(config: TrainConfig) -> Problems:
    """Places of what the run tells, beside its checkpoints."""
    if config.tensorboard_dir is not None:
        yield from _unwritable("--tensorboard-dir", Path(config.tensorboard_dir))
    if config.metrics_file is not None:
        file = Path(config.metrics_file)
        if file.is_dir():
            yield Problem("--metrics-file", file, "it is a directory", "give the name of a file in it")
        else:
            yield from _unwritable("--metrics-file", file, file.parent)


def _unwritable(option: str, given: Path, folder: Path | None = None) -> Problems:
    """Why nothing can be put in `folder`, `given` itself if None, which need not be there yet."""
    folder = folder or given
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        yield Problem(option, given, f"{place} is not a directory", "give another place")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(option, given, f"{place} cannot be written to", "give a place that can be written to")


# ---- data ----------------------------------------------------------------------------------------------------------


def _too_many(config: TrainConfig, batches: BatchSchedule, iterations: int) -> Problems:
    """Why the samples of a run cannot be counted."""
    size = batches.global_batch_size
    train = ("train_samples", config.train_samples) if config.train_samples else ("train_iters", iterations * size)
    for name, count in (train, ("eval_iters", config.eval_iters * size)):
        if (count or 0) * (config.seq_length + 1) >= 2**63:
            why, involved = "it makes more tokens than 64 bits count", ("seq_length", "global_batch_size")
            yield Problem(to_flag(name), getattr(config, name), why, "give less", "at most", involved)


def _samples(config: TrainConfig, batches: BatchSchedule, iterations: int, notes: list[str]) -> dict[str, int]:
    """Samples that the run reads of each part. The final test is left out where --split leaves it no sequence."""
    held_out = config.eval_iters * batches.global_batch_size
    train = config.train_samples or iterations * batches.global_batch_size
    samples = {"train": 0 if config.skip_train else train, "valid": held_out, "test": held_out}
    parts = plan_parts(config)
    for name in ("valid", "test"):
        if name not in parts:
            samples[name] = 0
    if samples["test"] and not config.test_data_path and not _has_sequences(config):
        notes.append(f"no test at the end: --split {config.split} leaves it no sequence")
        samples["test"] = 0
    return samples


def _has_sequences(config: TrainConfig) -> bool:
    """Whether --split leaves the test any sequence; files that cannot be read are found by the check of the data."""
    part = plan_parts(config)["test"]
    try:
        ranges = [part.sequences(IndexedDataset(prefix)) for prefix in part.blend.prefixes]
    except ProblemError:
        return True
    return all(first < last for first, last in ranges)


def _training_part(config: TrainConfig) -> Part:
    if (part := plan_parts(config).get("train")) is None:
        fix = "give training a share, for example 969,30,1"
        raise ProblemError([Problem("--split", config.split, "its first share, that of training, is zero", fix)])
    return part


def fingerprint_data(config: TrainConfig) -> Fingerprints:
    """What tells changed bytes of the data to train on; ProblemError if it cannot be read.

    The more datasets, the less is read of each, so that no blend takes longer to start than another.
    """
    prefixes = _training_part(config).blend.prefixes
    bound = READ_OF_DATA // len(set(prefixes))

    def read(prefix: str) -> dict[str, int]:
        try:
            return {"bin": fingerprint(bin_path(prefix), bound), "idx": fingerprint(idx_path(prefix), bound)}
        except OSError as error:
            fix = "give a prefix whose files can be read"
            raise ProblemError([Problem("dataset", prefix, f"it cannot be read: {error}", fix)]) from error

    found = {prefix: read(prefix) for prefix in dict.fromkeys(prefixes)}
    return tuple(found[prefix] for prefix in prefixes)


def _data_identity(config: TrainConfig, samples: dict[str, int], fingerprints: Fingerprints | None) -> dict[str, Any]:
    """What decides which sample comes when: two runs with equal identities see the same ones. Nothing about the order
    for a run that trains on no samples."""
    part, count = _training_part(config), samples.get("train")
    weights = part.blend.weights or (1.0,)
    opened = [IndexedDataset(prefix) for prefix in part.blend.prefixes]
    sets = []
    for indexed, weight, content in zip(opened, weights, fingerprints or ({},) * len(opened), strict=True):
        first, last = part.sequences(indexed)
        sets.append({"tokens": indexed.num_tokens, "first": first, "last": last, "weight": weight, **content})
    order = plan_order(part, opened, config.seq_length, count).describe() if count else {"blocks": None, "period": None}
    whole = {"seq_length": config.seq_length, "seed": config.seed, "order": config.dataloader_type, "sets": sets}
    return whole | order | {"samples": count}
