"""What each rank of a pipeline does, message by message.

Owns what an action depends on, the order in which the actions of all ranks can happen (the simulation of `cordee plan`
keeps time by it), and where sends and receives lie between them. All messages follow from that one order, in which a
message is expected as it is sent: two ranks name the messages between them in the same order, and no rank waits for a
message whose sender waits for it. Knows neither torch nor schedules."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cordee.parallel.pipeline.schedules import Action

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


def topological_order(schedules: Sequence[Sequence[Action]]) -> Iterator[tuple[int, Action]]:
    """The actions of all ranks with their ranks, each after all it needs; stops early at a deadlock.

    Ranks advance about as fast as each other, so that no message is expected long before it is sent."""
    num_stages = 1 + max(action.stage for actions in schedules for action in actions)
    done = [0] * len(schedules)
    happened: set[Event] = set()
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedules):
            if done[rank] < len(actions) and happened.issuperset(needs(action := actions[done[rank]], num_stages)):
                done[rank] += 1
                happened.update(gives(action))
                moved = True
                yield rank, action


def deadlocked(schedules: Sequence[Sequence[Action]]) -> list[tuple[int, Action]]:
    """The actions that are never reached, with their ranks."""
    everything = ((rank, action) for rank, actions in enumerate(schedules) for action in actions)
    reached = set(topological_order(schedules))
    return [each for each in everything if each not in reached]


@dataclass(frozen=True)
class Message:
    """An activation (F) in flight to the next stage or a gradient (B) to the one before.

    `stage` is the one that sends, or the one that receives."""

    what: Literal["send", "receive"]
    kind: Literal["F", "B"]
    stage: int
    micro_batch: int

    @property
    def peer_stage(self) -> int:
        """The stage at the other end."""
        return self.stage + 1 if (self.kind == "F") == (self.what == "send") else self.stage - 1


Instruction = Action | Message


def programs(
    schedules: Sequence[Sequence[Action]], rank_of: Callable[[int], int], num_stages: int
) -> list[list[Instruction]]:
    """The actions of all ranks with the messages between them; stages of one rank need none."""
    found: list[list[Instruction]] = [[] for _ in schedules]
    for rank, action in topological_order(schedules):
        found[rank].append(action)
        sent = _message(action, num_stages)
        if sent is not None and (peer := rank_of(sent.peer_stage)) != rank:
            found[rank].append(sent)
            found[peer].append(replace(sent, what="receive", stage=sent.peer_stage))
    assert not (stuck := deadlocked(schedules)), f"the schedules deadlock at {stuck[:3]}"
    return found


def _message(action: Action, num_stages: int) -> Message | None:
    """What an action sends to another stage."""
    if action.kind == "F" and action.stage < num_stages - 1:
        return Message("send", "F", action.stage, action.micro_batch)
    if action.kind in ("B", "I") and action.stage > 0:
        return Message("send", "B", action.stage, action.micro_batch)
    return None
