"""`python -m benchmarks pipeline`: bubbles as they are measured, beside those that `cordee plan` simulates.

Owns the steps that are compared, and stages whose time is known: a tiny model in which every layer sleeps, in
proportion to the samples of the micro-batch forward and twice as long backward, and in which the reduction of a layer's
gradients sleeps too. Sleeping ranks do not compete for cores, so any machine shows what a schedule gains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.bench import llama
from cordee.bench.contest import Turn
from cordee.bench.options import BenchOptions
from cordee.bench.pool import Pool
from cordee.bench.report import Report
from cordee.parallel.options import PipelineSchedule
from cordee.parallel.pipeline import micro_batches
from cordee.parallel.pipeline.schedules import STAGES_PER_RANK
from cordee.plan.job import plan
from cordee.plan.options import PlanConfig
from cordee.plan.timeline import Timeline

if TYPE_CHECKING:
    from cordee.model.gpt import GPTModel

PEERS = ()
UNIT = 0.01  # seconds: the forward of one sample through one layer
LAYERS_PER_RANK, LENGTH, HIDDEN, HEADS, VOCAB_SIZE = 2, 8, 16, 2, 32
REDUCTION = 16  # units: the reduction of one layer's gradients, where it is not free


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: `num_micro_batches` of `size` samples each, or of the sizes that `manual` says; `reduction` in units."""

    schedule: PipelineSchedule
    num_ranks: int
    num_micro_batches: int
    size: int
    data_ranks: int = 1
    manual: str | None = None
    reduction: int = 0

    @property
    def name(self) -> str:
        return self.schedule if self.manual is None else f"{self.schedule}, {self.manual}"

    @property
    def stages_per_rank(self) -> int:
        return STAGES_PER_RANK[self.schedule][0]

    @property
    def sizes(self) -> tuple[int, ...]:
        return micro_batches.sizes(self.manual) if self.manual else (self.size,) * self.num_micro_batches


def _dynamic(name: str) -> tuple[Step, ...]:
    """An example of micro-batches of several sizes, after what it is compared with."""
    example = micro_batches.EXAMPLES[name]
    count = len(example.sizes)

    def step(schedule: PipelineSchedule, manual: str | None = None) -> Step:
        size = example.micro_batch_size
        return Step(schedule=schedule, num_ranks=example.num_ranks, num_micro_batches=count, size=size, manual=manual)

    return step("1f1b"), step("1f1b", name), step("interleaved")


def _fold() -> tuple[Step, ...]:
    schedules: tuple[PipelineSchedule, ...] = ("1f1b", "interleaved", "fold_aiao", "fold_fifo")
    return tuple(
        Step(schedule=schedule, num_ranks=4, num_micro_batches=8, size=4, data_ranks=2, reduction=REDUCTION)
        for schedule in schedules
    )


GROUPS: tuple[tuple[Step, ...], ...] = (*map(_dynamic, micro_batches.EXAMPLES), _fold())  # the first is the measure


def run(config: BenchOptions, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Run and simulate every step; within a group, ratios are to its first."""
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, Pool(timeout=600) as pool:
        for number, group in enumerate(GROUPS, 1):
            first: tuple[Timeline, Timeline] | None = None
            for step in group:
                pair = _timelines(pool, step, Path(folder) / "timeline.json")
                first = first or pair
                simulated, measured = pair
                rows.append(_row(step, pair, first))
                name = f"{number}: {step.name}"
                figures |= {f"{name}: simulated": simulated.bubble, f"{name}: measured": measured.bubble}
                turn = Turn([measured.makespan], {"simulated": simulated.bubble, "measured": measured.bubble})
                on_turn(number, step.name, turn)
    notes = [
        f"{LAYERS_PER_RANK} layers a rank; a layer sleeps {UNIT * 1e3:g} ms a sample forward and twice that backward; "
        f"in the last group the reduction of its gradients over 2 data-parallel ranks {REDUCTION * UNIT * 1e3:g} ms",
        "bubble: share of the step in which a rank does not compute, mean over ranks; a cell: simulated / measured",
        "by 1f1b: bubble and time of the step by those of the first line of the group; reduction: time at the end of "
        "the step in which gradients are reduced and nothing is computed",
        "measured: the second step of each, messages and the sums of a tiny model included",
    ]
    columns = ["schedule", "pipeline", "samples", "bubble", "measured by simulated", "by 1f1b"]
    columns += ["step", "by 1f1b", "reduction"]
    return Report(title="Bubbles of pipelines", columns=columns, rows=rows, figures=figures, notes=notes)


def _row(step: Step, pair: tuple[Timeline, Timeline], first: tuple[Timeline, Timeline]) -> list[str]:
    def both(form: str, value: Callable[[Timeline, Timeline], float]) -> str:
        return " / ".join(form.format(value(*two)) for two in zip(pair, first, strict=True))

    simulated, measured = pair
    return [
        step.name,
        f"{step.num_ranks} x {step.data_ranks}",
        str(sum(step.sizes)),
        both("{:.1%}", lambda own, _: own.bubble),
        f"{measured.bubble / simulated.bubble:.2f}",
        both("{:.2f}", lambda own, other: own.bubble / other.bubble),
        both("{:.2f} s", lambda own, _: own.makespan),
        both("{:.3f}", lambda own, other: own.makespan / other.makespan),
        both("{:.2f} s", lambda own, _: own.exposed_reduction) if step.reduction else "",
    ]


def _timelines(pool: Pool, step: Step, path: Path) -> tuple[Timeline, Timeline]:
    """The simulated step and the measured one."""
    pool.run(play, step.num_ranks * step.data_ranks, step, UNIT, str(path))
    simulated, measured = plan(
        PlanConfig(
            schedule=(step.schedule,),
            pipeline_model_parallel_size=step.num_ranks,
            num_layers=step.num_ranks * LAYERS_PER_RANK,
            num_micro_batches=step.num_micro_batches,
            micro_batch_size=step.size,
            manual_mbs=step.manual,
            forward_time=UNIT,
            reduction_time=step.reduction * UNIT,
            timeline=str(path),
        )
    )[-2:]
    return simulated, measured


# ---- in the workers --------------------------------------------------------------------------------------------------


def play(rank: int, world_size: int, step: Step, unit: float, path: str) -> None:
    """Two steps on this rank, of which the second stays in the file at `path`."""
    import torch

    from cordee.data.batch import Batch
    from cordee.model.gpt import GPTModel
    from cordee.model.init import initialise
    from cordee.parallel import apply
    from cordee.parallel.degrees import degrees
    from cordee.parallel.execution import Criterion, StepBatches
    from cordee.parallel.layout import Layout
    from cordee.parallel.pipeline.executor import PipelineExecutor
    from cordee.parallel.pipeline.split import partition_layers
    from cordee.train import objectives
    from cordee.train.options import TrainConfig

    options = TrainConfig(seq_length=LENGTH, lr=1e-3, zero_stage=1, pipeline_timeline=path, **_options(step))
    layout = Layout(degrees(options, world_size))
    shape = llama.shape(
        LENGTH,
        layers=step.num_ranks * LAYERS_PER_RANK,
        hidden=HIDDEN,
        heads=HEADS,
        head_dim=HIDDEN // HEADS,
        ffn=HIDDEN,
        vocab_size=VOCAB_SIZE,
    )
    partition = partition_layers(options, shape, LENGTH)
    model = GPTModel(shape, spans=partition.spans_of(layout.axis_rank("pp")), device="meta")
    model = apply.apply(model, layout, options, torch.device("cpu"))
    initialise(model, 1)
    _slow_down(model, unit, step.reduction * unit)
    criterion = Criterion(objectives.named("pretrain"), layout)
    executor = PipelineExecutor(model, partition, layout, options, torch.device("cpu"), criterion)
    random = torch.Generator().manual_seed(layout.data_rank)
    tokens = [torch.randint(VOCAB_SIZE, (size, LENGTH + 1), generator=random) for size in step.sizes]
    batches = [Batch(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]
    weights = [batch.num_trained for batch in batches]
    for _ in range(2):
        executor.train(StepBatches(batches=batches, weights=weights, weight=sum(weights) * layout.data_size, scale=1.0))


def _options(step: Step) -> dict[str, Any]:
    stages = {"pipeline_schedule": step.schedule, "pipeline_model_parallel_size": step.num_ranks}
    if step.stages_per_rank > 1:
        return stages | {"num_layers_per_virtual_pipeline_stage": LAYERS_PER_RANK // step.stages_per_rank}
    return stages | {"num_layer_list": ",".join([str(LAYERS_PER_RANK)] * step.num_ranks)}


def _slow_down(model: GPTModel, unit: float, reduction: float) -> None:
    """Let every layer take its time: a `unit` a sample forward, two backward, and `reduction` seconds to reduce."""
    import time

    from torch import Tensor
    from torch.autograd import Function
    from torch.distributed.fsdp import FSDPModule

    from cordee.model.placement import Call

    class Sleep(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
            time.sleep(seconds)
            ctx.seconds = seconds
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            time.sleep(2 * ctx.seconds)
            return grad, None

    def slowed(inner: Call) -> Call:
        return lambda forward, x, context: Sleep.apply(inner(forward, x, context), unit * len(x))

    for layer in model.own_layers():
        layer.placement.wrap("call", "bench", slowed)
        assert isinstance(layer, FSDPModule), "a pipeline has several ranks"
        if reduction:
            layer.set_all_reduce_hook(lambda grads: time.sleep(reduction))
