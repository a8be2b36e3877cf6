"""Pipeline schedules: in which order each rank computes.

Owns the schedules by name, which rank each gives a stage, and its laws of ranks, stages and micro-batches. Stages are
numbered along the model, micro-batches in the order of their samples. Knows neither torch nor time: the executor runs
these schedules, `cordee.plan` simulates them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cordee.errors import Problem, Problems, raise_all
from cordee.parallel.options import PipelineSchedule

Kind = Literal["F", "B", "I", "W", "R"]
SCHEDULES: tuple[str, ...] = get_args(PipelineSchedule)
V_SHAPED = ("zbv", "dualpipev")  # rank r has the stages r and 2 * ranks - 1 - r; elsewhere r, r + ranks, ...
REDUCING = ("fold_aiao", "fold_fifo")  # gradients of a stage are reduced under the backward of the next

STAGES_PER_RANK: dict[str, tuple[int, int | None]] = {  # at least, and at most (None: any number)
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "interleaved_zero_bubble": (1, None),
    "zbv": (2, 2),
    "dualpipev": (2, 2),
    "fold_aiao": (2, None),
    "fold_fifo": (2, None),
}


@dataclass(frozen=True)
class Action:
    """One thing a rank does for one stage and one micro-batch.

    kind: F forward, B whole backward, I input-gradient backward (dgrad), W weight-gradient backward (wgrad, after I),
    R start the reduction of the stage's gradients over the data-parallel ranks; `micro_batch` of R is that of the last
    backward."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


def rank_actions(schedule: str, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> list[list[Action]]:
    """The actions of each rank, in order. ProblemError if the schedule does not fit these numbers.

    A backward in two parts is I directly followed by W where nothing is to be done between them. Sources: GPipe (Huang
    et al. 2019), 1f1b and interleaved (Narayanan et al. 2021), interleaved_zero_bubble (ZB-H1 over several stages) and
    zbv (Qi et al. 2024), dualpipev (DeepSeek-V3, cut in half), fold_aiao and fold_fifo (AscendSpeed's Fold3D)."""
    raise_all(problems(schedule, num_ranks, stages_per_rank, num_micro_batches))
    return [list(_BUILDERS[schedule](rank, num_ranks, stages_per_rank, num_micro_batches)) for rank in range(num_ranks)]


def rank_of(schedule: str, stage: int, num_ranks: int) -> int:
    """The rank that has a stage."""
    if schedule in V_SHAPED:
        return stage if stage < num_ranks else 2 * num_ranks - 1 - stage
    return stage % num_ranks


def with_reduction(schedules: Iterable[Sequence[Action]], *, at_once: bool = True) -> list[list[Action]]:
    """The actions with an R for every stage: behind its last backward `at_once`, or else when all stages are done."""
    return [_reduced(actions, at_once) for actions in schedules]


def problems(schedule: str, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Problems:
    """Why these numbers do not fit the schedule."""
    least, most = STAGES_PER_RANK[schedule]
    if not least <= stages_per_rank <= (most or stages_per_rank):
        wanted = f"{least}" if most else f"at least {least}"
        why = f"it needs {wanted} stages per rank, not {stages_per_rank}"
        others = [name for name, (low, high) in STAGES_PER_RANK.items() if low <= stages_per_rank <= (high or 10**9)]
        fix = f"give {wanted}, or choose {' or '.join(others)}"
        yield Problem("schedule", schedule, why, fix, "stages", limit=wanted)
    # Stages take turns after about as many micro-batches as there are ranks; all turns are equally long.
    rounds = max(1, num_micro_batches // num_ranks)
    if schedule in ("interleaved", "interleaved_zero_bubble", "fold_fifo") and num_micro_batches % rounds:
        why = f"{num_micro_batches} micro-batches are not divisible by {rounds} rounds over {num_ranks} ranks"
        multiple = num_micro_batches // num_ranks * num_ranks
        fix = f"give {multiple} or {multiple + num_ranks} micro-batches"
        yield Problem("schedule", schedule, why, fix, "rounds", limit=(multiple, multiple + num_ranks))
    if schedule == "dualpipev" and num_micro_batches < 2 * num_ranks:
        why = f"the 2 x {num_ranks} stages need as many micro-batches; there are {num_micro_batches}"
        fix = f"give at least {2 * num_ranks} micro-batches, or choose zbv"
        yield Problem("schedule", schedule, why, fix, "micro-batches", limit=2 * num_ranks)


def _gpipe(rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Iterator[Action]:
    """All forwards, then all backwards; with several stages, one stage after another (all in, all out)."""
    stages = range(rank, num_ranks * stages_per_rank, num_ranks)
    for stage in stages:
        yield from (Action("F", stage, micro_batch) for micro_batch in range(num_micro_batches))
    for stage in reversed(stages):
        yield from (Action("B", stage, micro_batch) for micro_batch in range(num_micro_batches))


def _one_f_one_b(rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Iterator[Action]:
    forwards = [Action("F", rank, micro_batch) for micro_batch in range(num_micro_batches)]
    backwards = [[Action("B", rank, micro_batch)] for micro_batch in range(num_micro_batches)]
    return _alternate(forwards, backwards, warmup=num_ranks - 1 - rank)


def _interleaved(rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Iterator[Action]:
    """1F1B over several stages, which take turns."""
    turn = num_micro_batches // max(1, num_micro_batches // num_ranks)
    stages = range(rank, num_ranks * stages_per_rank, num_ranks)
    forwards = list(_in_turns("F", stages, turn, num_micro_batches))
    backwards = [[action] for action in _in_turns("B", stages[::-1], turn, num_micro_batches)]
    return _alternate(forwards, backwards, warmup=(stages_per_rank - 1) * turn + 2 * (num_ranks - 1 - rank))


def _interleaved_zero_bubble(
    rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int
) -> Iterator[Action]:
    """Interleaved, with a shorter warm-up; wgrad lags `rank` micro-batches behind dgrad."""
    turn = num_micro_batches // max(1, num_micro_batches // num_ranks)
    stages = range(rank, num_ranks * stages_per_rank, num_ranks)
    forwards = list(_in_turns("F", stages, turn, num_micro_batches))
    dgrads = list(_in_turns("I", stages[::-1], turn, num_micro_batches))
    wgrads = [Action("W", action.stage, action.micro_batch) for action in dgrads]
    backwards = [[action] if number < rank else [action, wgrads[number - rank]] for number, action in enumerate(dgrads)]
    backwards.append(wgrads[max(0, len(wgrads) - rank) :])
    return _alternate(forwards, backwards, warmup=(stages_per_rank - 1) * turn + num_ranks - 1 - rank)


def _in_turns(kind: Kind, stages: Sequence[int], turn: int, num_micro_batches: int) -> Iterator[Action]:
    """Each stage handles `turn` micro-batches, then the next stage the same ones."""
    for first in range(0, num_micro_batches, turn):
        for stage in stages:
            yield from (Action(kind, stage, micro_batch) for micro_batch in range(first, first + turn))


def _alternate(forwards: Sequence[Action], backwards: Sequence[Sequence[Action]], warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then forward and backward in turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    yield from forwards[:warmup]
    for number, backward in enumerate(backwards, warmup):
        yield from forwards[number : number + 1]
        yield from backward


def _zbv(rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Iterator[Action]:
    """Both arms of the V: 0 goes down the ranks, 1 comes back up. Weight gradients at the end fill the bubble.

    The pattern is that of a pipeline which is full at least once; micro-batches that do not exist are left out."""
    full = max(2 * num_ranks - 1, num_micro_batches)
    after = num_ranks - rank
    lacking = full - (2 * num_ranks - 1 - rank)  # forwards of arm 0 that the warm-up leaves
    pattern = ["F0"] * (2 * after - 1) + ["F1", "F0"] * rank + ["F1", "I1", "W1"] * after
    for number in range(full - num_ranks):
        pattern += ["F0"] * (number < lacking) + ["I0", "W0", "F1", "I1", "W1"]
    pattern += ["I0", "I1"] * rank + ["I0", "W0"] * after + ["W1"] * rank + ["W0"] * rank
    return (action for action in _numbered(pattern, rank, num_ranks) if action.micro_batch < num_micro_batches)


def _dualpipev(rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Iterator[Action]:
    """Both arms of the V, each forward beside a backward of the other arm, so that one's messages hide the other's."""
    after = num_ranks - 1 - rank
    pattern = ["F0"] * (2 * after) + ["F0", "F1"] * (rank + 1) + ["I1", "W", "F1"] * after
    pattern += ["F0", "B1", "F1", "B0"] * (num_micro_batches - 2 * num_ranks + rank + 1)
    pattern += ["B1", "F1", "B0"] * after
    ending = ["B1", "B0"] * (rank + 1)
    pattern += ending[: rank + 1] + [step.replace("B", "I") for step in ending[rank + 1 :]]
    pattern += ["W", "I0"] * after + ["W"] * (rank + 1)
    return _numbered(pattern, rank, num_ranks)


def _numbered(pattern: Iterable[str], rank: int, num_ranks: int) -> Iterator[Action]:
    """Steps such as "F0", "I1" (kind, arm of the V) to actions; "W1" is the oldest arm 1 owes, "W" either's."""
    stages = (rank, 2 * num_ranks - 1 - rank)
    forward, backward = [0, 0], [0, 0]
    owed: deque[tuple[int, int]] = deque()  # (arm, micro-batch)
    for kind, *arms in pattern:
        if kind == "W":
            arm, micro_batch = next(each for each in owed if not arms or each[0] == int(arms[0]))
            owed.remove((arm, micro_batch))
            yield Action("W", stages[arm], micro_batch)
            continue
        arm = int(arms[0])
        count = forward if kind == "F" else backward
        micro_batch, count[arm] = count[arm], count[arm] + 1
        if kind == "I":
            owed.append((arm, micro_batch))
        yield Action(kind, stages[arm], micro_batch)  # type: ignore[arg-type]


def _reduced(actions: Sequence[Action], at_once: bool) -> list[Action]:
    last = {action.stage: action for action in actions if action.kind in ("B", "W")}
    reductions = {action: Action("R", action.stage, action.micro_batch) for action in last.values()}
    if not at_once:
        return [*actions, *(reductions[action] for action in actions if action in reductions)]
    return [each for action in actions for each in (action, reductions.get(action)) if each]


_BUILDERS: dict[str, Callable[[int, int, int, int], Iterator[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "interleaved": _interleaved,
    "interleaved_zero_bubble": _interleaved_zero_bubble,
    "zbv": _zbv,
    "dualpipev": _dualpipev,
    "fold_aiao": _gpipe,
    "fold_fifo": _interleaved,
}
