"""A pipeline's step, simulated.

Owns the model of time: how long an action takes and when it can start. Schedules come from `parallel.pipeline`."""

from collections.abc import Sequence
from dataclasses import dataclass

from cordee.parallel.pipeline.program import Event, deadlocked, gives, needs, topological_order
from cordee.parallel.pipeline.schedules import Action
from cordee.plan.timeline import Span, Timeline


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times in one unit, any.

    forward, backward, backward_input: of one sample through one layer; the rest of a backward is wgrad.
    fixed: what every forward and every backward (also one in two parts, half of it each) takes besides, whatever its
    size. communication: of one sample's activations, or their gradients, between two ranks; it runs beside the work of
    both. reduction: of one layer's gradients over the data-parallel ranks, beside the work, one stage after another."""

    forward: float = 1.0
    backward: float = 2.0
    backward_input: float = 1.0
    fixed: float = 0.0
    communication: float = 0.0
    reduction: float = 0.0

    def duration(self, action: Action, layers: float, size: float) -> float:
        """Of an action on a stage of `layers` layers and a micro-batch of `size` samples."""
        wgrad = self.backward - self.backward_input
        return {
            "F": self.forward * layers * size + self.fixed,
            "B": self.backward * layers * size + self.fixed,
            "I": self.backward_input * layers * size + self.fixed / 2,
            "W": wgrad * layers * size + self.fixed / 2,
            "R": self.reduction * layers,
        }[action.kind]


def simulate(
    orders: Sequence[Sequence[Action]], costs: Costs, *, layers: Sequence[float], sizes: Sequence[float], name: str = ""
) -> Timeline:
    """When each action starts and ends, if every rank works through its actions and waits for what an action needs.

    `layers` of each stage and `sizes` (samples) of each micro-batch give the durations."""
    assert not deadlocked(orders), f"the schedule deadlocks: {deadlocked(orders)[:3]}"
    computing = [0.0] * len(orders)  # until when each rank computes, and reduces
    reducing = [0.0] * len(orders)
    happened: dict[Event, tuple[float, int]] = {}  # when, and on which rank
    spans = []
    for rank, action in topological_order(orders):
        size = sizes[action.micro_batch]
        lane = reducing if action.kind == "R" else computing
        start = max(lane[rank], computing[rank])  # a rank starts a reduction when it comes to it
        for event in needs(action, len(layers)):
            time, where = happened[event]
            start = max(start, time if where == rank else time + costs.communication * size)
        end = start + costs.duration(action, layers[action.stage], size)
        lane[rank] = end
        happened.update((event, (end, rank)) for event in gives(action))
        spans.append(Span(rank, action, start, end))
    return Timeline(name=name, spans=spans, layers=layers, sizes=sizes)
