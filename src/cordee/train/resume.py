"""The run's part of a checkpoint's manifest, and resuming from it.

Owns what has to be the same for the samples, the schedule and the optimizer to continue as if never interrupted."""

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cordee import sealed
from cordee.checkpoint import directory
from cordee.data.options import BatchOptions
from cordee.errors import Findings, Problem, Problems
from cordee.families.registry import STORED_SPEC
from cordee.optim.algorithms import state_of
from cordee.optim.options import OptimizerOptions
from cordee.optim.schedule import Schedule
from cordee.parallel.degrees import RANKS
from cordee.train import experts, objectives
from cordee.train.objectives import DataPlan
from cordee.train.options import TrainConfig
from cordee.train.run_plan import RunPlan, TrainState

if TYPE_CHECKING:
    from cordee.optim.precision import LossScaler

_LATER = ("best_loss", "best_iteration", "stale_validations", "validation_due", "wandb_run")  # of a run's state
# What is read of a manifest, but for the data of the run.
_FORM = sealed.record(
    {
        "model": STORED_SPEC,
        "trainer": sealed.of(TrainState, added=_LATER),
        "loss_scaler": sealed.record(
            {"scale": sealed.number(0), "good_steps": sealed.count(), "overflows": sealed.count()}
        ),
        "schedule": sealed.of(
            Schedule, added=("anneal", "anneal_style"), decay=sealed.count(1), growth=sealed.count(1)
        ),
        "optimizer": sealed.maybe(sealed.text()),
        "data": sealed.record({}),
        "config": sealed.record({}),
    },
    {"base": directory.BASE},
)
# The options that a schedule follows from.
_OF_SCHEDULE = (*OptimizerOptions.__dataclass_fields__, *BatchOptions.__dataclass_fields__, *RANKS)
_LENGTHS = {"warmup", "decay", "growth"}  # of a schedule: what another length of the run changes


def form(config: TrainConfig) -> sealed.Form:
    """The form of what a manifest says of a run that `config` is to resume: of its data, as the objective says."""

    def fault(manifest: Any) -> str | None:
        if (why := _FORM(manifest)) is not None or config.finetune or _stage(config, manifest) != config.stage:
            return why
        why = objectives.named(config.stage).identity_form()(manifest["data"])
        return None if why is None else f"data: {why}"

    return fault


def _stage(config: TrainConfig, manifest: dict[str, Any]) -> object:
    return manifest["config"].get("stage", config.stage)


def describe(plan: RunPlan, state: TrainState, scaler: "LossScaler") -> dict[str, Any]:
    """What a checkpoint keeps besides tensors, as JSON holds it."""
    base = plan.initial.base
    return ({} if base is None else {"base": base}) | {
        "written_by": f"cordee {version('cordee')}",
        "model": plan.spec.to_dict(),
        "trainer": asdict(state),
        "loss_scaler": scaler.state_dict(),
        "schedule": asdict(plan.schedule),
        "optimizer": plan.config.optimizer if plan.config.save_optim else None,
        "data": plan.data.identity,
        "config": asdict(plan.config),
    }


def problems(config: TrainConfig, schedule: Schedule, data: DataPlan | None, manifest: dict[str, Any]) -> Problems:
    """All that keeps a run from resuming from a checkpoint with `manifest`; `data` is None if it cannot be read."""
    if (stage := _stage(config, manifest)) != config.stage:
        why, fix = f"the run was of stage {stage}", "give that, or start anew from the weights: --finetune"
        yield Problem("--stage", config.stage, why, fix, "resume", limit=stage)
    elif data is not None:
        found = Findings()
        data.resumed(manifest["data"], found)
        yield from found.problems
    if not (config.use_checkpoint_opt_param_scheduler or config.override_opt_param_scheduler):
        for problem in _schedule_problems(config, schedule, Schedule(**manifest["schedule"])):
            yield problem.involving(*_OF_SCHEDULE)
    yield from _optimizer_problems(config, manifest)
    yield from experts.check_resumed(config, manifest["config"])


def join(plan: RunPlan) -> RunPlan:
    """`plan` as it resumes from its checkpoint, if it does; that has no problems."""
    if (resumed := plan.resumed) is None:
        return plan
    manifest, found = resumed.manifest, Findings(notes=list(plan.notes))
    done = manifest["trainer"]["iteration"]
    if done >= plan.iterations and not plan.config.skip_train:
        found.notes.append(f"{resumed.path} is of step {done} of {plan.iterations}: nothing is left to train")
    if plan.config.use_checkpoint_opt_param_scheduler:
        plan = replace(plan, schedule=Schedule(**manifest["schedule"]))
    return replace(plan, data=plan.data.resumed(manifest["data"], found), notes=tuple(found.notes))


def _schedule_problems(config: TrainConfig, schedule: Schedule, then: Schedule) -> Problems:
    before, now = then.effective(), schedule.effective()
    names = [name for name in before | now if before.get(name) != now.get(name)]
    changed = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in names)
    option, value, kind = "--load", config.load, "schedule"
    why = f"it was saved with another schedule: {changed}"
    fix = "--override-opt-param-scheduler takes the new one, --use-checkpoint-opt-param-scheduler the old one"
    if set(names) <= _LENGTHS:
        option, kind = "--train-samples" if config.train_samples else "--train-iters", "length"
        value = config.train_samples or config.train_iters
        why = f"the learning rate of the run that is resumed decays over another length: {changed} samples"
        fix = (
            "to decay over the new length, which may raise the learning rate again: --override-opt-param-scheduler; to "
            "keep the schedule, and its last value beyond it: --use-checkpoint-opt-param-scheduler"
        )
    if names:
        yield Problem(option, value, why, fix, kind)


def _optimizer_problems(config: TrainConfig, manifest: dict[str, Any]) -> Problems:
    then, now = manifest["optimizer"], config.optimizer
    if not config.load_optim:
        return
    if then is None:
        fix = "resume without it: --no-load-optim"
        yield Problem("--load", config.load, "the checkpoint was saved without optimizer state", fix, "resume")
    elif state_of(then) != state_of(now):
        why, fix = f"the checkpoint has the state of {then}", f"give {then}, or resume without it: --no-load-optim"
        yield Problem("--optimizer", now, why, fix, "resume", limit=then)
