"""What a run is, worked out from its options before anything starts.

Owns the decisions that need no torch: which model, from where, over how many ranks, for how long, on which data. All
problems are found together, so `cordee check` and the start of a job are the same thing."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cordee import launch
from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of, reached
from cordee.config import laws
from cordee.config.option import options_of
from cordee.errors import Findings, Problem, ProblemError, Problems, at_most, divides, raise_all, unique
from cordee.families.lenses import differences, words_of
from cordee.families.options import ignored
from cordee.families.registry import ModelSpec, spec_from_options, spec_named
from cordee.files import is_within, unwritable
from cordee.log import counted
from cordee.model.compare import canonical
from cordee.model.config import ModelConfig
from cordee.model.options import ModelOptions
from cordee.optim import algorithms, recipe
from cordee.optim import schedule as optim_schedule
from cordee.optim.schedule import build_schedule
from cordee.parallel import deepspeed
from cordee.parallel.degrees import fitting
from cordee.parallel.degrees import problems as degree_problems
from cordee.parallel.laws import PlacedRun
from cordee.parallel.laws import check as layout_problems
from cordee.parallel.pipeline import check as pipeline_check
from cordee.parallel.pipeline.split import StagePartition, noop_layers
from cordee.tokenizer import Tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.train import batch_schedule, experts, objectives, outputs, resume, techniques
from cordee.train.batch_schedule import BatchSchedule, build_batch_schedule
from cordee.train.initial_weights import choose, opened, tokenizer_of
from cordee.train.objectives import Objective
from cordee.train.options import TrainConfig
from cordee.train.run_plan import Draft, InitialWeights, RunPlan

# What the model and the tokenizer of a run follow from, by names that problems have.
_MODEL = (*(option.name for option in options_of(ModelOptions)), "load", "model_options")
_TOKENIZER = (*(option.name for option in options_of(TokenizerOptions)), "load", "tokenizer")
_MANY_TOKENS = 1 << 20  # of a tokenizer that cannot be read, so that the model it is for is checked all the same


def check_run(config: TrainConfig) -> list[Problem]:
    """Everything that is wrong with a run, as far as it can be known without starting it.

    The number of processes is the launcher's, or --nproc-per-node. The contents of the data are not compared with those
    of a run to resume: the run itself does that when it starts."""
    return examined(config)[1]


def examined(config: TrainConfig, *, contents: bool = False) -> tuple[Draft | None, list[Problem]]:
    """The run as far as it is known, and its problems as of `check_run`; with the `contents` of the data, of which up
    to some GiB are read, also those that these have."""
    found, unread, objective = Findings(), Findings(), objectives.named(config.stage)
    found.problems += found.attempt(lambda: outputs.check_free(config)) or []
    if (ready := found.attempt(lambda: objective.ready(config))) is None:
        return None, unique([*option_problems(config), *found.problems])
    fingerprint = unread.attempt(lambda: objective.fingerprint(ready)) if contents else None
    draft = found.attempt(lambda: draft_run(ready, launch.world_size(ready.nproc_per_node), fingerprint=fingerprint))
    return draft, unique([*found.problems, *(draft.found.problems if draft else ()), *unread.problems])


def plan_run(
    config: TrainConfig, world_size: int, avoid: Mapping[int, str] | None = None, fingerprint: Any = None
) -> RunPlan:
    """The plan of a run over `world_size` processes; ProblemError with everything that is wrong with it.

    A run does not resume from checkpoints of the iterations in `avoid`: they are corrupt, and how. `fingerprint`
    is what `Objective.fingerprint` returned on this machine. With None, which is for plans that are not trained, the
    contents of the data are neither in the plan nor compared with those of a run to resume."""
    return resume.join(draft_run(config, world_size, avoid, fingerprint).complete())


def draft_run(
    config: TrainConfig, world_size: int, avoid: Mapping[int, str] | None = None, fingerprint: Any = None
) -> Draft:
    """As `plan_run`, as far as the run is known with what is wrong with it."""
    shape = fitting(config, world_size)
    notes = [str(each) for each in laws.ignored_options(replace(config, nproc_per_node=world_size))]
    found = Findings(
        [*option_problems(config), *_name_problems(config), *_report_problems(config)],
        [*notes, *outputs.left_out(config), *recipe.notes(config)],
    )
    if config.deepspeed_config is not None:
        settings = deepspeed.read(config.deepspeed_config)
        found.problems += deepspeed.check(config, settings, shape.data)
        found.notes += settings.ignored()
    found.problems += degree_problems(config, world_size)
    objective = objectives.named(config.stage).with_options(config)
    batches = build_batch_schedule(config, shape.data, found.attempt(lambda: pipeline_check.sizes(config)))
    if (counted_out := _with_length(config, objective, batches, found)) is not config:
        config = counted_out
        found.problems += optim_schedule.problems(config, config.train_iters, None)
    length = found.attempt(lambda: _iterations(config, batches, found.notes))
    iterations = length or (0 if config.skip_train else 1)  # one step stands in for a length that is not known
    schedule = build_schedule(config, config.train_iters, config.train_samples, batches.global_batch_size)
    contradictory = frozenset[str]().union(*(problem.names for problem in found.problems))
    initial, tokenizer, loaded = _start(config, avoid, found)
    spec = None if loaded is None else found.attempt(lambda: objective.model(loaded, found.notes))
    run = objectives.Run(
        config=config, batches=batches, iterations=iterations, spec=spec, tokenizer=tokenizer, fingerprint=fingerprint
    )
    data = objective.data(run, found)
    models = found.attempt(lambda: objective.models(run))
    if spec is not None:
        found.notes += experts.ignored(spec, config)
        trained = found.attempt(partial(experts.with_training, spec, config), involves=("num_experts", "model", "load"))
        spec = _adapted(trained or spec, config, found)
        found.notes += techniques.wide(spec.config)
    counts = sorted({each // batches.slice_size for each in batches.batch_sizes()})
    placed = PlacedRun(model=spec.config if spec else None, degrees=shape, options=config, micro_batches=counts)
    partition = _place(placed, tokenizer, found)
    for further in (models or {}).values():
        _place(replace(placed, model=further.spec.config), tokenizer, found)
    found.notes += pipeline_check.notes(partition, counts)
    checkpoint = initial.checkpoint if initial is not None else None
    if checkpoint is not None and checkpoint.resume:
        # That the run had other options before matters only for options that agree with each other.
        resumed = resume.problems(config, schedule, data, checkpoint.manifest)
        found.problems += (problem for problem in resumed if not problem.names & contradictory)
        found.notes += techniques.thawed(config, checkpoint.manifest["config"])
    else:
        found.notes += found.attempt(lambda: list(outputs.written_before(config))) or []
    return Draft(
        config=config,
        initial=initial,
        spec=spec,
        tokenizer=tokenizer,
        degrees=shape,
        partition=partition,
        batches=batches,
        iterations=length,
        schedule=schedule,
        objective=objective,
        data=data,
        models=models,
        found=found,
    )


def option_problems(config: TrainConfig) -> Problems:
    """All problems between the options of a run; a launcher, if there is one, sets the number of processes."""
    yield from laws.problems(config)
    yield from batch_schedule.problems(config, fitting(config, launch.world_size(config.nproc_per_node)).data)
    yield from optim_schedule.problems(config, config.train_iters, config.train_samples)
    yield from launch.problems(config.nproc_per_node)


def _adapted(spec: ModelSpec, config: TrainConfig, found: Findings) -> ModelSpec:
    """The model that is trained, with what techniques add to it."""
    for technique in techniques.TECHNIQUES:
        spec = replace(spec, config=found.attempt(partial(technique.adapt, spec, config)) or spec.config)
    return spec


def _place(run: PlacedRun, tokenizer: Tokenizer | None, found: Findings) -> StagePartition | None:
    """How a pipeline shards a model; all that keeps the run from using it is added to `found`."""
    if run.model is not None:
        longest = run.model.context_length
        positions = f"the {longest} positions that the model holds"
        involved = ("max_position_embeddings", "model", "load")
        found.problems += at_most("--seq-length", run.options.seq_length, longest, positions, *involved)
        if tokenizer is not None and (note := tokenizer.beyond(run.model.vocab_size)):
            found.notes.append(note)
    found.problems += layout_problems(run) if run.degrees.world_size > 1 else ()
    return found.attempt(lambda: pipeline_check.partition(run))


def _name_problems(config: TrainConfig) -> Problems:
    named = (
        ("--stage", config.stage, "objective", objectives.registry()),
        ("--optimizer", config.optimizer, "optimizer", algorithms.registry()),
    )
    for option, value, what, known in named:
        if value not in known:
            yield Problem(option, value, f"there is no such {what}", f"give one of {', '.join(sorted(known))}")


def _with_length(
    config: TrainConfig, objective: Objective[Any], batches: BatchSchedule, found: Findings
) -> TrainConfig:
    """--num-epochs as the iterations that it means here; problems of the data are found with all else of it."""
    if config.num_epochs is None or config.skip_train:
        return config
    unread = Findings()
    size = unread.attempt(lambda: objective.size(config))
    if size is None and not unread.problems:
        why = f"the length of an epoch of --stage {config.stage} is not known before the run"
        found.problems.append(Problem("--num-epochs", config.num_epochs, why, "give --train-iters", "length"))
    if size is None or config.train_iters or config.train_samples:
        return config
    return replace(config, num_epochs=None, train_iters=batches.steps_of(config.num_epochs * size.epoch))


def _iterations(config: TrainConfig, batches: BatchSchedule, notes: list[str]) -> int:
    """Steps of the whole run; samples that make no whole step are left out."""
    if config.train_samples is None:
        return config.train_iters or 0
    steps, used = batches.whole_steps(config.train_samples)
    if not steps:
        why = f"the first step takes {counted(batches.batch_size(0), 'sample')}"
        raise ProblemError.of("--train-samples", config.train_samples, why, "give more", limit=batches.batch_size(0))
    if left := config.train_samples - used:
        notes.append(f"left out: {counted(left, 'sample')} of --train-samples after the last whole step")
    return steps


def _start(
    config: TrainConfig, avoid: Mapping[int, str] | None, found: Findings
) -> tuple[InitialWeights | None, Tokenizer | None, ModelSpec | None]:
    """Where the run begins, and what model and tokenizer that makes; None for what is unknown."""
    chosen = found.attempt(lambda: choose(config, avoid, found.notes))
    found.problems += found.attempt(lambda: list(_save_problems(config, chosen))) or []
    initial = None
    if chosen is not None:
        initial = opened(config, chosen, found)
    before = len(found.problems)
    tokenizer = found.attempt(lambda: tokenizer_of(config, initial or InitialWeights()), involves=_TOKENIZER)
    tokens = _MANY_TOKENS if len(found.problems) > before else tokenizer and tokenizer.vocab_size
    if initial is None:  # the options may have the whole shape, too
        alone = Findings()
        tokens = tokens or _MANY_TOKENS
        spec = alone.attempt(lambda: _spec(config, InitialWeights(), tokenizer, tokens, []), involves=_MODEL)
        found.problems += () if any(problem.kind == "missing" for problem in alone.problems) else alone.problems
        return None, tokenizer, spec
    involved = (*_MODEL, *_TOKENIZER)
    spec = found.attempt(lambda: _spec(config, initial, tokenizer, tokens, found.notes), involves=involved)
    if spec is not None:
        found.notes += ignored(config, words_of(spec.config))
    return initial, tokenizer, spec


def _spec(
    config: TrainConfig, initial: InitialWeights, tokenizer: Tokenizer | None, tokens: int | None, notes: list[str]
) -> ModelSpec:
    """The model of the run; `tokens` is how many the tokenizer has, for a model that is given by options."""
    if config.num_layers is not None and (placeholders := noop_layers(config)):  # which --num-layers counts
        layers, involved = f"the layers before the last of {config.num_layers}", ("num_layers",)
        raise_all(at_most("--noop-layers", len(placeholders), config.num_layers - 1, layers, *involved))
        config = replace(config, num_layers=config.num_layers - len(placeholders))
    if initial.checkpoint is not None:
        loaded = ModelSpec.from_dict(initial.checkpoint.manifest["model"])
    elif initial.spec is not None:
        loaded = initial.spec
    else:
        fresh = spec_from_options(config, tokens)
        return fresh.with_tokens(tokenizer.bos, tokenizer.eos) if tokenizer else fresh  # not those of a preset
    # What is loaded has its rows; options that count tokens, or say how rows were padded, only have to agree with them.
    shape = replace(config, vocab_size=None, make_vocab_size_divisible_by=None)
    wanted, heads = loaded, {"score": loaded.config.score, "lm_head": loaded.config.lm_head}
    if config.model:
        wanted = spec_named(config.model).adapted_as(loaded.config).with_heads(**heads)
    wanted = wanted.with_options(shape)
    problems = list(_vocabulary_problems(config, loaded.config.vocab_size))
    changed = differences(loaded.config, wanted.config)
    listed = ", ".join(f"{flag} {before} -> {after}" for flag, (before, after) in changed.items())
    resumes = initial.checkpoint is not None and initial.checkpoint.resume
    if wanted.shapes() != loaded.shapes():
        why = f"the options ask for another model: {listed}"
        fix = "leave the model options out: the shape comes from what is loaded"
        problems.append(Problem("--load", config.load, why, fix, "model", limit=changed))
    elif resumes and _lasting(loaded.config) != _lasting(wanted.config):
        why = f"the run was of another model: {listed}"
        fix = "leave these options out, or start anew from the weights: --finetune"
        problems.append(Problem("--load", config.load, why, fix, "model", limit=changed))
    elif canonical(loaded.config) != canonical(wanted.config):
        notes.append(f"the options change the model that is loaded: {listed}")
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
        by = config.make_vocab_size_divisible_by
        yield from divides("--make-vocab-size-divisible-by", by, rows, "tokens of the model", "load")


def _save_problems(config: TrainConfig, initial: InitialWeights | None) -> Problems:
    if config.save is None:
        return
    root = location_of(config.save, "--save")
    if root.local is not None:
        yield from unwritable("--save", config.save, root.local)
    with reached("--save", config.save):
        holds_run, newest = directory.is_root(root), max(directory.iterations(root), default=0)
    if initial is not None and initial.weights is not None and is_within(root.local, str(initial.weights)):
        why, fix = "it is the model directory that is read, or in it", "give another directory"
        yield Problem("--save", config.save, why, fix, "excludes", ("load",), "--load")
    if initial is not None and holds_run:
        checkpoint = initial.checkpoint
        resumes = checkpoint is not None and checkpoint.resume and checkpoint.path.parent.resolve() == root.resolve()
        if not resumes:
            why = f"it holds the checkpoints of another run, up to iteration {newest}"
            fix = f"resume that run: --load {root}; or give another directory"
            yield Problem("--save", config.save, why, fix, "taken", ("load", "finetune"))


def _report_problems(config: TrainConfig) -> Problems:
    """Where the run reports to, beside its checkpoints."""
    if config.tensorboard_dir is not None:
        yield from unwritable("--tensorboard-dir", config.tensorboard_dir, Path(config.tensorboard_dir))
    if config.wandb_project:
        found = find_spec("wandb")
        if found is None or found.origin is None:  # a directory that W&B has made here is no package
            why, fix = "the package wandb is not installed", 'pip install "cordee[wandb]"'
            yield Problem("--wandb-project", config.wandb_project, why, fix, "missing", limit="wandb")
        if config.wandb_save_dir:
            yield from unwritable("--wandb-save-dir", config.wandb_save_dir, Path(config.wandb_save_dir))
    if config.metrics_file is not None:
        file = Path(config.metrics_file)
        if not file.is_file() and os.path.lexists(file):
            yield Problem("--metrics-file", file, "it is no regular file", "give the name of a file")
        else:
            yield from unwritable("--metrics-file", file, file.parent)
