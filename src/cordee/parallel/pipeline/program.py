"""What a rank of a pipeline does, message by message.

Owns where sends and receives lie between the actions of an order. All ranks' messages follow from one course of events,
in which a message is expected as it is sent: so two ranks name the messages between them in the same order, and nobody
waits for a message whose sender waits for him. Knows neither torch nor schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cordee.parallel.pipeline.dependencies import Event, gives, needs
from cordee.parallel.pipeline.orders import Action


@dataclass(frozen=True)
class Message:
    """An activation (F) on its way to the next stage or a gradient (B) to the one before.

    `stage` is the one that sends, or the one that is to receive.
    """

    what: Literal["send", "receive"]
    kind: Literal["F", "B"]
    stage: int
    micro_batch: int


Step = Action | Message


def programs(orders: Sequence[Sequence[Action]], rank_of: Callable[[int], int], num_stages: int) -> list[list[Step]]:
    """The orders of all ranks with the messages between them; stages of one rank need none."""
    found: list[list[Step]] = [[] for _ in orders]
    places = [0] * len(orders)
    happened: set[Event] = set()
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        before = sum(places)
        for rank, order in enumerate(orders):  # about as fast as each other, so that nothing is expected long before
            if places[rank] == len(order) or not happened.issuperset(needs(action := order[places[rank]], num_stages)):
                continue
            places[rank] += 1
            happened.update(gives(action))
            found[rank].append(action)
            if (message := _message(action, num_stages)) is not None:
                kind, to = message
                if (peer := rank_of(to)) != rank:
                    found[rank].append(Message("send", kind, action.stage, action.micro_batch))
                    found[peer].append(Message("receive", kind, to, action.micro_batch))
        assert sum(places) > before, "the orders wait for each other"
    return found


def _message(action: Action, num_stages: int) -> tuple[Literal["F", "B"], int] | None:
    """What an action makes for another stage, and for which."""
    if action.kind == "F" and action.stage < num_stages - 1:
        return "F", action.stage + 1
    if action.kind in ("B", "I") and action.stage > 0:
        return "B", action.stage - 1
    return None
