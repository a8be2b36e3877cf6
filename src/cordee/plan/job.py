"""`cordee plan --schedule ...`: simulate, compare and draw pipeline schedules.

Owns what the options mean for a simulation, their problems, and the table. How the picture looks is `picture`'s."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

from cordee.config import laws
from cordee.config.values import whole_numbers
from cordee.errors import Problem, ProblemError, Problems, at_most, divisible, raise_all
from cordee.files import unwritable
from cordee.log import console
from cordee.parallel.pipeline import micro_batches
from cordee.parallel.pipeline.schedules import REDUCING, STAGES_PER_RANK, problems, rank_actions, with_reduction
from cordee.plan.options import PlanConfig
from cordee.plan.schedule import Costs, simulate
from cordee.plan.timeline import Timeline, read_timeline

FORMATS = (".svg", ".png")
_MOST = 2**18  # forward passes of stages that are simulated in seconds


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step to simulate."""

    schedule: str
    num_ranks: int
    stages_per_rank: int
    sizes: tuple[int, ...]  # samples of each micro-batch
    manual: str | None = None  # what --manual-mbs says, if `sizes` are its

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.stages_per_rank

    @property
    def name(self) -> str:
        stages = f", {self.stages_per_rank} stages" if self.stages_per_rank > 1 else ""
        return f"{self.schedule}{stages}" + (f", {self.manual}" if self.manual else "")


def run(config: PlanConfig) -> int:
    """Print the figures of every schedule, draw them if there is an output, and return 0. ProblemError if unfit."""
    timelines = plan(config)
    _show(timelines)
    if config.output:
        from cordee.plan.picture import draw

        try:
            draw(timelines, Path(config.output))
        except OSError as error:
            why = f"it cannot be written: {error.strerror}"
            raise ProblemError.of("--output", config.output, why, "give another place") from error
        print(f"drawn: {config.output}")
    return 0


def plan(config: PlanConfig) -> list[Timeline]:
    """The step of every schedule, and last the measured one if there is one."""
    raise_all(check_run(config))
    config = _with_defaults(config)
    cases = _cases(config)
    costs = _costs(config)
    all_layers = [_layers(config, case, cases) for case in cases]
    timelines = [_simulated(case, costs, layers) for case, layers in zip(cases, all_layers, strict=True)]
    if config.timeline:
        timelines.append(read_timeline(Path(config.timeline), layers=all_layers[-1], sizes=cases[-1].sizes))
    return timelines


def _simulated(case: Case, costs: Costs, layers: Sequence[float]) -> Timeline:
    made = rank_actions(case.schedule, case.num_ranks, case.stages_per_rank, len(case.sizes))
    if costs.reduction:
        made = with_reduction(made, at_once=case.schedule in REDUCING)
    return simulate(made, costs, layers=layers, sizes=case.sizes, name=case.name)


def _with_defaults(config: PlanConfig) -> PlanConfig:
    """`config` with number and size of its micro-batches, by default those of --manual-mbs: as many, of their mean."""
    listed = micro_batches.sizes(config.manual_mbs) if config.manual_mbs else ()
    return replace(
        config,
        micro_batch_size=config.micro_batch_size or max(1, round(sum(listed) / max(1, len(listed)))),
        num_micro_batches=config.num_micro_batches or len(listed) or 8,
    )


def _cases(config: PlanConfig) -> list[Case]:
    assert config.micro_batch_size and config.num_micro_batches, "they have defaults"
    example = micro_batches.EXAMPLES.get(config.manual_mbs or "")
    num_ranks = config.pipeline_model_parallel_size or (example.num_ranks if example else 4)
    equal = (config.micro_batch_size,) * config.num_micro_batches
    cases = []
    for schedule in config.schedule:
        stages = STAGES_PER_RANK[schedule][1] or config.stages_per_rank or 2
        cases.append(Case(schedule=schedule, num_ranks=num_ranks, stages_per_rank=stages, sizes=equal))
        if schedule == "1f1b" and config.manual_mbs:
            cases.append(replace(cases[-1], sizes=micro_batches.sizes(config.manual_mbs), manual=config.manual_mbs))
    return cases


def _costs(config: PlanConfig) -> Costs:
    backward = config.backward_time or 2 * config.forward_time
    return Costs(
        forward=config.forward_time,
        backward=backward,
        backward_input=config.backward_input_time or backward / 2,
        fixed=config.fixed_time,
        communication=config.communication_time,
        reduction=config.reduction_time,
    )


def _layers(config: PlanConfig, case: Case, cases: Sequence[Case]) -> list[float]:
    """Layers of each stage."""
    if config.num_layer_list:
        return list(map(float, whole_numbers(config.num_layer_list) or ()))
    total = config.num_layers or lcm(*(each.num_stages for each in cases))
    return [total / case.num_stages] * case.num_stages


def check_run(config: PlanConfig) -> list[Problem]:
    """Everything that is wrong with a simulation."""
    if found := list(_options(config)):
        return found
    config = _with_defaults(config)
    return list(_fit(config, _cases(config)))


def _options(config: PlanConfig) -> Problems:
    """What is wrong with single options, so that the rest can be read."""
    yield from laws.problems(config)
    ranks, stages = config.pipeline_model_parallel_size or 4, config.stages_per_rank or 1
    passes = (config.num_micro_batches or 8) * ranks * stages
    if passes > _MOST:
        why = f"{passes} forward passes of a stage are too many to simulate"
        involved = ("pipeline_model_parallel_size", "stages_per_rank")
        yield Problem("--num-micro-batches", config.num_micro_batches, why, "give less", "at most", involved, _MOST)
    if config.manual_mbs:
        yield from micro_batches.unreadable(config.manual_mbs)
        if "1f1b" not in config.schedule:
            why = "micro-batches of different sizes run under the 1f1b schedule"
            yield Problem("--manual-mbs", config.manual_mbs, why, "add 1f1b to --schedule", "requires", ("schedule",))
    if (text := config.num_layer_list) and not any(whole_numbers(text) or ()):
        why = "it is no list of numbers" if whole_numbers(text) is None else "no stage has a layer"
        yield Problem("--num-layer-list", text, why, "write 3,4,4,3")
    if not config.schedule:
        yield Problem("--schedule", None, "there is nothing to simulate", "give a schedule, such as 1f1b", "missing")
    if config.timeline and len(config.schedule) != 1:
        why = f"it is the step of one schedule; there are {len(config.schedule)}"
        fix = "give the --schedule of that run alone"
        yield Problem("--timeline", config.timeline, why, fix, "requires", ("schedule",))
    if config.output:
        yield from _output(Path(config.output))


def _output(path: Path) -> Problems:
    if path.suffix.lower() not in FORMATS:
        yield Problem("--output", path, "a picture is drawn as SVG or PNG", "end the name in .svg or .png", "format")
    yield from unwritable("--output", path, path.parent)


def _fit(config: PlanConfig, cases: Sequence[Case]) -> Problems:
    """What does not fit together."""
    for case in cases:
        yield from problems(case.schedule, case.num_ranks, case.stages_per_rank, len(case.sizes))
        if case.manual:
            size, count = config.micro_batch_size or 1, config.num_micro_batches or 1
            sizes = {"micro_batch_size": size, "num_samples": size * count}
            yield from micro_batches.problems(case.manual, num_ranks=case.num_ranks, **sizes)
        else:
            yield from _uneven(config, case)
    if config.stages_per_rank and all(STAGES_PER_RANK[case.schedule][1] for case in cases):
        why = f"{', '.join(config.schedule)} leaves no choice"
        yield Problem("--stages-per-rank", config.stages_per_rank, why, "leave it out")
    costs = _costs(config)
    whole = f"the whole backward, {costs.backward:g}"
    yield from at_most("--backward-input-time", costs.backward_input, costs.backward, whole, "backward_time")


def _uneven(config: PlanConfig, case: Case) -> Problems:
    """Layers that do not come out even over the stages."""
    stages = f"{case.schedule} has {case.num_stages} stages"
    counts = whole_numbers(config.num_layer_list or "")
    if counts is not None and len(counts) != case.num_stages:
        why = f"{stages}, the list {len(counts)}"
        yield Problem("--num-layer-list", config.num_layer_list, why, f"give {case.num_stages} numbers", "length")
    if config.num_layers:
        stages, instead = f"the stages of {case.schedule}", "give --num-layer-list"
        yield from divisible("--num-layers", config.num_layers, case.num_stages, stages, instead=instead)


def _show(timelines: Sequence[Timeline]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("schedule", "step", "of first", "bubble", "worst", "peak", box=SIMPLE_HEAD)
    reduces = any(span.action.kind == "R" for timeline in timelines for span in timeline.spans)
    if reduces:
        table.add_column("reduction")
    for column in table.columns[1:]:
        column.justify = "right"
    for timeline in timelines:
        cells = [
            timeline.name,
            f"{timeline.makespan:.4g}",
            "-" if timeline.measured else f"{timeline.makespan / timelines[0].makespan:.3f}",
            f"{timeline.bubble:.1%}",
            f"{max(timeline.bubbles()):.1%}",
            f"{max(timeline.peak_activations()):g}",
        ]
        table.add_row(*cells, *([f"{timeline.exposed_reduction:.4g}"] if reduces else []))
    console().print(table)
    print("step: time of one step in the unit of the times given (measured: seconds), and its ratio to the first one's")
    print("bubble: share of the step in which a rank does not compute, mean over ranks and on the worst one")
    print("peak: most samples x layers whose activations a rank holds, on the rank that holds most")
    if reduces:
        print("reduction: time at the end of the step in which gradients are reduced and nothing is computed")
