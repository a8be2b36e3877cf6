"""What a run is, worked out from its options before anything starts.

Owns the decisions that need no torch: which model, from where, over how many ranks, for how long, on which data. All
problems are found together, so `cordee check` and the start of a job are the same thing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cordee.checkpoint import directory
from cordee.config import deepspeed
from cordee.config.check import check_train, fewest_processes, without_effect
from cordee.config.schema import TokenizerOptions, TrainConfig
from cordee.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from cordee.errors import Findings, Problem, ProblemError, raise_all
from cordee.families.described import canonical
from cordee.families.options import ignored, shape_of
from cordee.families.registry import ModelSpec, differences, spec_from_options, spec_named
from cordee.model.config import ModelConfig
from cordee.optim.schedule import build_schedule
from cordee.parallel.degrees import Degrees, degrees
from cordee.parallel.pipeline import check as pipeline_check
from cordee.parallel.pipeline.split import noop_layers
from cordee.train import experts, objectives, resume
from cordee.train.batch_schedule import BatchSchedule, build_batch_schedule
from cordee.train.origin import choose, described, opened
from cordee.train.run_plan import Origin, RunPlan


def plan_run(
    config: TrainConfig,
    world_size: int,
    avoid: Mapping[int, str] | None = None,
    fingerprint: Any = None,
) -> RunPlan:
    """The plan of a run over `world_size` processes; ProblemError with everything that is wrong with it.

    A run does not resume from checkpoints of the iterations in `avoid`: they have turned out to be damaged, as the
    text says. `fingerprint` is what `Objective.fingerprint` returned on this machine. With None, which is for plans
    that are not trained, the contents of the data are neither in the plan nor compared with those of a run to resume.
    """
    contradictions = check_train(config)
    found = Findings(
        [*contradictions, *_stage_problems(config), *_report_problems(config)],
        [*without_effect(config), *deepspeed.without_effect(config.deepspeed_config)],
    )
    objective = objectives.named(config.stage)
    shape = found.attempt(lambda: degrees(config, world_size)) or _smallest(config)
    sizes = found.attempt(lambda: pipeline_check.sizes(config))
    batches = build_batch_schedule(config, shape.data, sizes)
    iterations = found.attempt(lambda: _iterations(config, batches, found.notes)) or 0
    schedule = build_schedule(config, config, batches.global_batch_size)
    origin, tokenizer, spec = _start(config, avoid, found)
    run = objectives.Run(
        config=config, batches=batches, iterations=iterations, spec=spec, tokenizer=tokenizer, fingerprint=fingerprint
    )
    data = objective.data(run, found)
    models = found.attempt(lambda: objective.models(run))
    division = None
    if spec is not None:
        found.notes += experts.ignored(spec, config)
        spec = found.attempt(partial(experts.with_training, spec, config)) or spec
        counts = sorted({size // batches.slice_size for size in batches.batch_sizes()})
        found.problems += _fit_problems(config, spec, tokenizer)
        for each in (spec, *(model.spec for model in (models or {}).values())):
            found.problems += _layout_problems(config, each, shape)
        division = found.attempt(lambda: pipeline_check.division(config, shape, spec.config, counts))
        found.notes += pipeline_check.notes(division, counts)
    plan = None
    if origin is not None and spec is not None and data is not None and models is not None:
        whole = RunPlan(
            config=config,
            origin=origin,
            spec=spec,
            tokenizer=tokenizer,
            degrees=shape,
            division=division,
            batches=batches,
            iterations=iterations,
            schedule=schedule,
            objective=objective,
            data=data,
            models=models,
            notes=tuple(found.notes),
        )
        # With options that contradict each other the schedule is none that anybody wants.
        plan = whole if contradictions else found.attempt(lambda: _joined(whole))
    # What a contradiction already says of an option may be found in other words further on.
    known = {(problem.option, str(problem.value)) for problem in contradictions}
    further = found.problems[len(contradictions) :]
    raise_all(dict.fromkeys([*contradictions, *(p for p in further if (p.option, str(p.value)) not in known)]))
    assert plan is not None
    return plan


def _smallest(config: TrainConfig) -> Degrees:
    """The fewest processes that `config` fits, so that what does not depend on their number is checked all the same."""
    try:
        return degrees(config, fewest_processes(config))
    except ProblemError:  # degrees that fit no number of processes, which is known already
        return Degrees()


def _joined(plan: RunPlan) -> RunPlan:
    """`plan` as it resumes from its checkpoint, if it does."""
    if (resumed := plan.resumed) is None:
        return plan
    done = resumed.manifest["trainer"]["iteration"]
    if done >= plan.iterations and not plan.config.skip_train:
        note = f"{resumed.path} is of step {done} of {plan.iterations}: nothing is left to train"
        plan = replace(plan, notes=(*plan.notes, note))
    return resume.join(plan, resumed.manifest)


def _stage_problems(config: TrainConfig) -> Iterator[Problem]:
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
    if chosen is None:
        return None, None, None
    found.problems += _save_problems(config, chosen)
    origin = found.attempt(lambda: opened(config, chosen)) or found.attempt(lambda: described(chosen))
    if origin is None:
        return None, None, None
    tokenizer = found.attempt(lambda: _tokenizer(config, origin))
    return origin, tokenizer, found.attempt(lambda: _spec(config, origin, tokenizer, found.notes))


def _tokenizer(config: TrainConfig, origin: Origin) -> Tokenizer | None:
    """The tokenizer of the options, else that beside the weights; None if there is neither."""
    given = any(
        getattr(config, name)
        for name in TokenizerOptions.__dataclass_fields__
        if name not in ("vocab_size", "tokenizer_use_fast")
    )
    beside = str(origin.companions) if origin.companions and holds_tokenizer(origin.companions) else None
    return load_tokenizer(config, beside) if given or beside else None


def _spec(config: TrainConfig, origin: Origin, tokenizer: Tokenizer | None, notes: list[str]) -> ModelSpec:
    spec = _asked(config, origin, tokenizer, notes)
    notes += ignored(config, shape_of(spec.config))
    return spec


def _asked(config: TrainConfig, origin: Origin, tokenizer: Tokenizer | None, notes: list[str]) -> ModelSpec:
    if config.num_layers is not None and (placeholders := noop_layers(config)):  # which --num-layers counts
        config = replace(config, num_layers=config.num_layers - len(placeholders))
    if origin.checkpoint is not None:
        loaded = ModelSpec.from_dict(origin.checkpoint.manifest["model"])
    elif origin.spec is not None:
        loaded = origin.spec
    else:
        fresh = spec_from_options(config, tokenizer.vocab_size if tokenizer else None)
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


def _vocabulary_problems(config: TrainConfig, rows: int) -> Iterator[Problem]:
    if config.vocab_size is not None and config.vocab_size > rows:
        why = f"the model that is loaded has {rows} tokens"
        yield Problem("--vocab-size", config.vocab_size, why, f"give at most {rows}, or leave it out")
    multiple = config.make_vocab_size_divisible_by
    if multiple is not None and rows % multiple:
        why = f"the model that is loaded has {rows} tokens"
        yield Problem("--make-vocab-size-divisible-by", multiple, why, "leave it out")


def _fit_problems(config: TrainConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> Iterator[Problem]:
    longest, vocab_size = spec.config.max_position_embeddings, spec.config.vocab_size
    if config.seq_length > longest:
        why = f"the model holds at most {longest} positions"
        yield Problem("--seq-length", config.seq_length, why, f"give at most {longest}, or a larger model")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        why = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}"
        yield Problem("tokenizer", tokenizer.type, why, "take the model's own tokenizer, or a model with more tokens")


def _layout_problems(config: TrainConfig, spec: ModelSpec, shape: Degrees) -> Iterator[Problem]:
    if shape.world_size > 1:
        from cordee.parallel import apply  # brings torch, which a run in one process needs none of here

        yield from apply.check(spec.config, shape, config)


# ---- places --------------------------------------------------------------------------------------------------------


def _save_problems(config: TrainConfig, origin: Origin) -> Iterator[Problem]:
    if config.save is None:
        return
    root = Path(config.save)
    yield from _unwritable("--save", root)
    if directory.is_root(root):
        checkpoint = origin.checkpoint
        resumes = checkpoint is not None and checkpoint.resume and checkpoint.path.parent.samefile(root)
        if not resumes:
            newest = max(directory.iterations(root), default=0)
            why = f"it holds the checkpoints of another run, up to iteration {newest}"
            yield Problem("--save", root, why, f"resume that run: --load {root}; or give another directory")


def _report_problems(config: TrainConfig) -> Iterator[Problem]:
    """Places of what the run tells, beside its checkpoints."""
    if config.tensorboard_dir is not None:
        yield from _unwritable("--tensorboard-dir", Path(config.tensorboard_dir))
    if config.metrics_file is not None:
        file = Path(config.metrics_file)
        if file.is_dir():
            yield Problem("--metrics-file", file, "it is a directory", "give the name of a file in it")
        else:
            yield from _unwritable("--metrics-file", file, file.parent)


def _unwritable(option: str, given: Path, folder: Path | None = None) -> Iterator[Problem]:
    """Why nothing can be put in `folder`, `given` itself if None, which need not be there yet."""
    folder = folder or given
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        yield Problem(option, given, f"{place} is not a directory", "give another place")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(option, given, f"{place} cannot be written to", "give a place that can be written to")
