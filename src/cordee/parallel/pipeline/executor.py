"""Forward and backward of a step through a pipeline.

Owns running a program of actions and messages on this rank, and what ranks of a pipeline agree on: the names of
metrics, and the gradient of a tied embedding that two of them have. Knows no schedule by name."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cordee.data.batch import Batch
from cordee.model.balance import Balance
from cordee.model.gpt import GPTModel
from cordee.model.span import Span
from cordee.parallel import collectives, compile, data, differentiable
from cordee.parallel.execution import Criterion, LossParts, Output, StepBatches, add, dropout_rng_of
from cordee.parallel.layout import Layout
from cordee.parallel.options import LayoutOptions
from cordee.parallel.pipeline import engine
from cordee.parallel.pipeline.program import Instruction, Message, programs
from cordee.parallel.pipeline.recorder import Recorder
from cordee.parallel.pipeline.schedules import REDUCING, Action, rank_actions, with_reduction
from cordee.parallel.pipeline.split import StagePartition
from cordee.parallel.pipeline.stage import Stage

MAX_IN_FLIGHT = 8  # sent messages: each keeps a tensor alive


class PipelineExecutor:
    """This rank's part of a pipeline, `partition` of the layers over the ranks of `layout`."""

    def __init__(
        self,
        model: GPTModel,
        partition: StagePartition,
        layout: Layout,
        options: LayoutOptions,
        device: torch.device,
        criterion: Criterion,
    ):
        self._model = model
        self._partition = partition
        self._layout = layout
        self._criterion = criterion
        self._device = device
        self._zero_stage = options.zero_stage
        self._dtype = data.compute_dtype(options)
        self._parts = layout.degrees.tp if options.sequence_parallel else 1  # of a sequence between two stages
        self._rank = layout.axis_rank("pp")
        run = compile.whole(model, options, self._run)
        stages = partition.stages_of(self._rank)
        self._stages = {i: Stage(i, partition.spans[i], model, run, criterion.loss) for i in stages}
        self._program = cache(self._make_program)
        self._num_reports: dict[str, int] | None = None
        self._recorder = Recorder(options.pipeline_timeline, layout)
        self._seed = options.seed
        # Reductions that would block this thread run beside it where the schedule has them early.
        reduces_beside = layout.blocking and partition.schedule in REDUCING and self._zero_stage < 2
        self._reducer = ThreadPoolExecutor(1, "reduction") if reduces_beside else None
        self._reductions: list[Future[None]] = []

    def train(self, step: StepBatches) -> dict[str, Tensor]:
        batches = [batch.to(self._device) for batch in step.batches]
        weights = [self._criterion.weight(batch) for batch in step.batches]
        metrics = _StepMetrics()

        def forward(stage: Stage, micro_batch: int, x: Tensor) -> Tensor:
            balance = Balance(step.scale * step.weights[micro_batch] / step.weight, batches[micro_batch].counted)
            output, parts = stage.forward(micro_batch, x, batches[micro_batch], balance, step.scale / step.weight)
            metrics.add_layers(balance, weights[micro_batch], first=micro_batch == 0)
            if parts is not None:
                metrics.add_head(parts)
            return output

        with self._recorder.step():
            engine.begin_step(self._model, reshard=self._zero_stage == 3)
            self._perform(self._program(len(batches), training=True), batches, forward)
            if self._reducer is not None:
                while self._reductions:
                    self._reductions.pop().result()
                engine.post_backward(engine.fsdp_modules([self._model]), reduce=True)
            engine.finish_step(self._model)
        self._all_reduce_tied_embedding()
        return self._mean_over_layers(metrics)

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        loss = torch.zeros((), device=self._device)
        for parts in self.forward(batches, self._criterion.loss):
            if parts is not None:
                loss.add_(parts[0].float())
        return loss

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], output: Output) -> list[Any]:
        batches = [batch.to(self._device) for batch in batches]
        made: list[Any] = [None] * len(batches)

        def forward(stage: Stage, micro_batch: int, x: Tensor) -> Tensor:
            hidden = stage.evaluate(x, batches[micro_batch])
            if stage.span.head:
                made[micro_batch] = output(self._model.head, hidden, batches[micro_batch])
            return hidden

        self._perform(self._program(len(batches), training=False), batches, forward)
        return made

    def _make_program(self, num_micro_batches: int, training: bool) -> list[Instruction]:
        partition = self._partition
        found = rank_actions(partition.schedule, partition.num_ranks, partition.stages_per_rank, num_micro_batches)
        if training:
            found = with_reduction(found, at_once=partition.schedule in REDUCING)
        else:
            found = [[action for action in actions if action.kind == "F"] for actions in found]
        return programs(found, partition.rank_of, partition.num_stages)[self._rank]

    def _perform(
        self, program: Sequence[Instruction], batches: Sequence[Batch], forward: Callable[[Stage, int, Tensor], Tensor]
    ) -> None:
        mail = _Mailbox(self._layout, self._partition, self._device, [self._empty(batch) for batch in batches])
        for step in program:
            if isinstance(step, Message):
                mail.handle(step)
                continue
            stage, micro_batch = self._stages[step.stage], step.micro_batch
            if step.kind == "F":
                x = batches[micro_batch].input_ids if stage.span.embedding else mail.take("F", stage.index, micro_batch)
                with self._recorder.action(step):
                    output = forward(stage, micro_batch, x)
                mail.put("F", stage.index, micro_batch, output)
            elif step.kind == "R":
                self._reduce(step, stage)
            else:
                self._backward(step, stage, mail)
        mail.close()

    def _backward(self, action: Action, stage: Stage, mail: "_Mailbox") -> None:
        micro_batch = action.micro_batch
        grad = None
        if action.kind != "W" and not stage.span.head:
            grad = mail.take("B", stage.index, micro_batch)
        with self._recorder.action(action):
            if action.kind == "W":
                found = stage.backward_weight(micro_batch)
            elif action.kind == "I":
                found = stage.backward_input(micro_batch, grad)
            else:
                found = stage.backward(micro_batch, grad)
            engine.post_backward(stage.sharded, reduce=self._zero_stage >= 2 and action.kind != "I")
        if found is not None:
            mail.put("B", stage.index, micro_batch, found)

    def _reduce(self, action: Action, stage: Stage) -> None:
        # FSDP2 looks at the model's own group in the backward of every stage: it is reduced when all have ended.
        modules = [each for each in stage.sharded if self._reducer is None or each is not self._model]

        def reduce() -> None:
            with self._recorder.action(action):
                engine.post_backward(modules, reduce=True)

        if self._reducer is None:
            reduce()
        else:
            self._reductions.append(self._reducer.submit(reduce))

    def _run(self, x: Tensor, batch: Batch, balance: Balance | None, span: Span) -> Tensor:
        """The hidden states after `span`, of the last one after the final norm."""
        positions = batch.position_ids
        if positions is None and not span.embedding:
            positions = torch.arange(batch.input_ids.shape[1], device=self._device)[None]
        return self._model(
            x,
            position_ids=positions,
            segments=batch.segments,
            balance=balance,
            dropout_rng=dropout_rng_of(batch, self._seed),
            output=lambda head, hidden: hidden,
            span=span,
        )

    def _empty(self, batch: Batch) -> Tensor:
        """Hidden states of a micro-batch between two stages `[batch, seq / parts, embed]`, on the meta device."""
        size, length = batch.input_ids.shape
        shape = (size, length // self._parts, self._model.config.hidden_size)
        return torch.empty(shape, dtype=self._dtype, device="meta")

    def _mean_over_layers(self, metrics: "_StepMetrics") -> dict[str, Tensor]:
        """The same names on all ranks, each value divided by how many layers, of all ranks, report it."""
        if self._num_reports is None:
            of_rank = dict(collectives.gather((self._rank, metrics.num_reports), self._layout))
            names = sorted({name for found in of_rank.values() for name in found})
            self._num_reports = {name: sum(found.get(name, 0) for found in of_rank.values()) for name in names}
        sums = metrics.sums
        assert sums.keys() <= self._num_reports.keys(), "every step reports the same"
        nothing = torch.zeros((), device=self._device)
        return {name: sums.get(name, nothing) / number for name, number in self._num_reports.items()}

    def _all_reduce_tied_embedding(self) -> None:
        """Sum the gradients of a tied embedding, of which the first and the last rank each have a copy."""
        first, last = self._partition.rank_of(0), self._partition.rank_of(self._partition.num_stages - 1)
        if not self._model.config.tied_head or first == last or self._rank not in (first, last):
            return
        grad = self._model.embedding.weight.grad
        if grad is None:
            return
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        group, peer = self._layout.group("pp"), last if self._rank == first else first
        assert group is not None
        own.add_(differentiable.send_receive(own, group, to=peer, source=peer).wait())


class _StepMetrics:
    """Sums over the micro-batches of a step on this rank, and how many layers report each; the head reports once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_reports: dict[str, int] = {}

    def add_head(self, parts: LossParts) -> None:
        total, metrics = parts
        values = {"": total, **metrics}
        add(self.sums, values)
        self.num_reports |= dict.fromkeys(values, 1)

    def add_layers(self, balance: Balance, weight: float, first: bool) -> None:
        """What the layers of one stage report of a micro-batch of this weight; counted in the `first` only."""
        for values in balance.layers.values():
            add(self.sums, {name: value * weight for name, value in values.items()})
            for name in values if first else ():
                self.num_reports[name] = self.num_reports.get(name, 0) + 1


class _Mailbox:
    """Hidden states and gradients in flight between stages; `like` has their shape and type for each micro-batch."""

    def __init__(self, layout: Layout, partition: StagePartition, device: torch.device, like: Sequence[Tensor]):
        group = layout.group("pp")
        assert group is not None, "a pipeline has several ranks"
        self._group = group
        self._partition = partition
        self._rank = layout.axis_rank("pp")
        self._device = device
        self._like = like
        self._out: dict[tuple[str, int, int], Tensor] = {}
        self._due: dict[tuple[str, int, int], tuple[Tensor, dist.Work | None]] = {}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def put(self, kind: str, stage: int, micro_batch: int, tensor: Tensor) -> None:
        """The output of `stage` for the next one (F) or the one before (B)."""
        like = self._like[micro_batch]
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), f"{tensor.shape} {tensor.dtype}, not {like}"
        to = stage + 1 if kind == "F" else stage - 1
        if not 0 <= to < self._partition.num_stages:
            return
        if self._partition.rank_of(to) == self._rank:
            self._due[kind, to, micro_batch] = tensor, None
        else:
            self._out[kind, stage, micro_batch] = tensor

    def take(self, kind: str, stage: int, micro_batch: int) -> Tensor:
        """The input of `stage`, once it has arrived."""
        tensor, work = self._due.pop((kind, stage, micro_batch))
        if work is not None:
            work.wait()
        return tensor

    def handle(self, message: Message) -> None:
        """Start to send or to receive."""
        key = message.kind, message.stage, message.micro_batch
        peer = self._partition.rank_of(message.peer_stage)
        if message.what == "send":
            tensor = self._out.pop(key).contiguous()
            self._sent.append((collectives.send(tensor, peer, self._group), tensor))
            self._wait(MAX_IN_FLIGHT)
            return
        into = torch.empty_like(self._like[message.micro_batch], device=self._device)
        self._due[key] = into, collectives.receive(into, peer, self._group)

    def close(self) -> None:
        """Wait until all is sent."""
        self._wait(0)
        assert not self._due and not self._out, "every message is taken"

    def _wait(self, max_in_flight: int) -> None:
        # A receiver expects its messages in the order of the programs, so that no rank waits for this one in turn.
        while len(self._sent) > max_in_flight:
            self._sent.popleft()[0].wait()
