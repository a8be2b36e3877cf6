"""What the manifest of a checkpoint says about a run, and resuming from it.

Owns the run's part of the manifest and what has to be the same for the samples, the schedule and the optimizer to
continue as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cordee import sealed
from cordee.config.check import RANKS
from cordee.config.schema import BatchOptions, OptimizerOptions, TrainConfig
from cordee.data.build import plan_parts
from cordee.errors import Problem
from cordee.families.registry import STORED_SPEC
from cordee.optim.schedule import Schedule
from cordee.train import experts
from cordee.train.state import TrainState

if TYPE_CHECKING:
    from cordee.optim.precision import LossScaler
    from cordee.train.plan import RunPlan


CONTENTS = ("bin", "idx")  # fingerprints of the files of a dataset
# The form of what a manifest says of a run, all that is read of it to resume.
FORM = sealed.record(
    {
        "model": STORED_SPEC,
        "trainer": sealed.of(TrainState),
        "loss_scaler": sealed.record(
            {"scale": sealed.number(0), "good_steps": sealed.count(), "overflows": sealed.count()}
        ),
        "schedule": sealed.of(Schedule, decay=sealed.count(1), growth=sealed.count(1)),
        "optimizer": sealed.maybe(sealed.text()),
        "data": sealed.record(
            {
                "seq_length": sealed.count(1),
                "seed": sealed.count(),
                "order": sealed.text(),
                "sets": sealed.listed(
                    sealed.record(
                        {
                            **dict.fromkeys(("tokens", "first", "last", *CONTENTS), sealed.count()),
                            "weight": sealed.number(),
                        }
                    )
                ),
                "blocks": sealed.maybe(sealed.listed(sealed.row(sealed.count(1), sealed.flag))),
                "period": sealed.maybe(sealed.count(1)),
                "samples": sealed.maybe(sealed.count()),
            }
        ),
        "config": sealed.record({}),
    }
)
# The options that a schedule follows from.
_OF_SCHEDULE = (*OptimizerOptions.__dataclass_fields__, *BatchOptions.__dataclass_fields__, *RANKS)
_LENGTHS = {"warmup", "decay", "growth"}  # of a schedule: what another length of the run changes


def describe(plan: RunPlan, state: TrainState, scaler: LossScaler) -> dict[str, Any]:
    """What a checkpoint keeps besides tensors, as JSON holds it."""
    return {
        "written_by": f"cordee {version('cordee')}",
        "model": plan.spec.to_dict(),
        "trainer": state.state_dict(),
        "loss_scaler": scaler.state_dict(),
        "schedule": asdict(plan.schedule),
        "optimizer": plan.config.optimizer if plan.config.save_optim else None,
        "data": plan.data,
        "config": asdict(plan.config),
    }


def problems(
    config: TrainConfig, schedule: Schedule, data: dict[str, Any] | None, manifest: dict[str, Any]
) -> Iterator[Problem]:
    """All that keeps a run from resuming from a checkpoint with `manifest`; `data` is None if it cannot be read."""
    if data is not None:
        yield from _data_problems(config, data, manifest["data"])
    if not (config.use_checkpoint_opt_param_scheduler or config.override_opt_param_scheduler):
        for problem in _schedule_problems(config, schedule, Schedule(**manifest["schedule"])):
            yield problem.involving(*_OF_SCHEDULE)
    yield from _optimizer_problems(config, manifest)
    yield from experts.check_resumed(config, manifest["config"])


def join(plan: RunPlan, manifest: dict[str, Any]) -> RunPlan:
    """`plan` as it resumes from a checkpoint with `manifest`, which has no problems."""
    if plan.config.use_checkpoint_opt_param_scheduler:
        plan = replace(plan, schedule=Schedule(**manifest["schedule"]))
    return _in_order(plan, manifest["data"])


def _in_order(plan: RunPlan, then: dict[str, Any]) -> RunPlan:
    """`plan` with the order of its data as it was `then`. Megatron's depends on the length of a run: another length
    would bring other samples, some a second time before others come at all."""
    if not then["blocks"] or not plan.data["blocks"]:
        return plan
    kept, samples, notes = {"blocks": then["blocks"]}, plan.samples, plan.notes
    if plan.config.dataloader_type == "cyclic":  # what is added is further passes over the same samples
        kept["samples"] = then["samples"]
        samples = {**samples, "train": then["samples"]}
    if plan.data["blocks"] != then["blocks"]:
        notes = (*notes, "the run has another length than before: its data keeps the order that it began with")
    return replace(plan, data={**plan.data, **kept}, samples=samples, notes=notes)


def _data_problems(config: TrainConfig, now: dict[str, Any], then: dict[str, Any]) -> Iterator[Problem]:
    """Consumed samples are a place in the data only if the order of the data is the same."""
    if then["seed"] != now["seed"] and config.load_rng:
        why = f"the run had seed {then['seed']}, which decides the order of its data"
        fix = f"give --seed {then['seed']}, or --no-load-rng to resume with another order"
        yield Problem("--seed", now["seed"], why, fix)
    for key, option in (("seq_length", "--seq-length"), ("order", "--dataloader-type")):
        if then[key] != now[key]:
            why = f"the run had {then[key]}, so its place in the data would mean other samples"
            yield Problem(option, now[key], why, f"give {then[key]}, or start anew from the weights: --finetune")
    option = "--data-path" if config.data_path else "--train-data-path"
    if [_selection(part) for part in then["sets"]] != [_selection(part) for part in now["sets"]]:
        why = "the run was on other data, or on other parts of it, so its place in the data would mean other samples"
        fix = "give the same data, weights and --split, or start anew from the weights: --finetune"
        yield Problem(option, " ".join(config.data_path or config.train_data_path), why, fix)
        return
    changed = {
        f"{prefix}.{kind}"
        for prefix, before, after in zip(
            plan_parts(config)["train"].blend.prefixes, then["sets"], now["sets"], strict=True
        )
        for kind in CONTENTS
        if kind in after and before[kind] != after[kind]  # a plan that is not trained may not have read it
    }
    for file in sorted(changed):
        why = "its bytes changed since the checkpoint was saved, so its place in the data would mean other samples"
        yield Problem(option, file, why, "give the data as it was, or start anew from the weights: --finetune")
    if then["blocks"] and now["blocks"] and then["period"] != now["period"]:
        after = [each["period"] or "no" for each in (then, now)]
        why = f"the blend of the run repeats its choice of datasets after {after[0]} samples, this one after {after[1]}"
        option = "--train-samples" if config.train_samples else "--train-iters"
        value = config.train_samples or config.train_iters
        yield Problem(option, value, why, "keep the length, or start anew from the weights: --finetune")


def _selection(part: dict[str, Any]) -> dict[str, Any]:
    """What is taken of a dataset, whatever its tokens are."""
    return {key: value for key, value in part.items() if key not in CONTENTS}


def _schedule_problems(config: TrainConfig, schedule: Schedule, then: Schedule) -> Iterator[Problem]:
    before, now = then.effective(), schedule.effective()
    changed = [
        f"{name} {before.get(name)} -> {now.get(name)}" for name in before | now if before.get(name) != now.get(name)
    ]
    if not changed:
        return
    why = f"it was saved with another schedule: {', '.join(changed)}"
    if {name for name in before | now if before.get(name) != now.get(name)} <= _LENGTHS:
        option = "--train-samples" if config.train_samples else "--train-iters"
        value = config.train_samples or config.train_iters
        why = f"the learning rate of --load {config.load} was to follow another length: {', '.join(changed)} samples"
        fix = (
            "to let it follow the new length, which may raise it again: --override-opt-param-scheduler; to keep its "
            "course, and so its last value for what is added: --use-checkpoint-opt-param-scheduler"
        )
        yield Problem(option, value, why, fix)
        return
    fix = "--override-opt-param-scheduler takes the new one, --use-checkpoint-opt-param-scheduler the old one"
    yield Problem("--load", config.load, why, fix)


def _optimizer_problems(config: TrainConfig, manifest: dict[str, Any]) -> Iterator[Problem]:
    then, now = manifest["optimizer"], config.optimizer
    if not config.load_optim:
        return
    if then is None:
        fix = "resume without it: --no-load-optim"
        yield Problem("--load", config.load, "the checkpoint was saved without the state of the optimizer", fix)
    elif _algorithm(then) != _algorithm(now):
        why = f"the checkpoint has the state of {then}"
        yield Problem("--optimizer", now, why, f"give {then}, or resume without that state: --no-load-optim")


def _algorithm(optimizer: str) -> str:
    """The algorithm, whichever of its implementations runs: their state is the same."""
    return optimizer.rpartition("_")[2]
