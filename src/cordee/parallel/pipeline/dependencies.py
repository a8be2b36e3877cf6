"""What an action of a pipeline waits for, and whether orders ever come to their end.

Owns the one statement of these dependencies: the simulation keeps time by it. Knows no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cordee.parallel.pipeline.orders import Action

Event = tuple[str, int, int]  # ("activation" | "input gradient" | "gradient", stage, micro-batch)


def needs(action: Action, num_stages: int) -> Iterator[Event]:
    """What must have happened before an action, here or on another rank."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "F":
        if stage > 0:
            yield "activation", stage - 1, micro_batch
    elif action.kind in ("B", "I"):
        yield "activation", stage, micro_batch
        if stage < num_stages - 1:
            yield "input gradient", stage + 1, micro_batch
    elif action.kind == "W":
        yield "input gradient", stage, micro_batch
    else:
        yield "gradient", stage, micro_batch


def gives(action: Action) -> Iterator[Event]:
    """What has happened once an action is done."""
    names = {"F": ("activation",), "B": ("input gradient", "gradient"), "I": ("input gradient",), "W": ("gradient",)}
    for name in names.get(action.kind, ()):
        yield name, action.stage, action.micro_batch


def in_time(orders: Sequence[Sequence[Action]]) -> Iterator[tuple[int, Action]]:
    """The actions with their ranks, each once all it needs has happened; stops early where all ranks wait for ever."""
    num_stages = 1 + max(action.stage for order in orders for action in order)
    positions = [0] * len(orders)
    happened: set[Event] = set()
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order) and happened.issuperset(needs(order[positions[rank]], num_stages)):
                action = order[positions[rank]]
                positions[rank] += 1
                happened.update(gives(action))
                moved = True
                yield rank, action


def stuck(orders: Sequence[Sequence[Action]]) -> list[tuple[int, Action]]:
    """The actions that are never reached, with their ranks: none, if the orders come to their end."""
    done = set(in_time(orders))
    return [(rank, action) for rank, order in enumerate(orders) for action in order if (rank, action) not in done]
