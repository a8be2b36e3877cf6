"""When each rank of a pipeline did what, and the figures that follow from it.

Owns the record of a step, simulated or measured, its file form, and how bubble and activations are counted. Knows no
schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cordee import sealed
from cordee.errors import ProblemError
from cordee.files import read_json
from cordee.parallel.pipeline.schedules import Action, Kind


@dataclass(frozen=True)
class Span:
    """One action on one rank, from `start` to `end`, in any unit of time. An R runs beside the rank's own work."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step; activations are counted in the `layers` of each stage and the `sizes` (samples) of each micro-batch."""

    name: str
    spans: Sequence[Span]
    layers: Sequence[float]
    sizes: Sequence[float]
    measured: bool = False

    @property
    def num_ranks(self) -> int:
        return 1 + max(span.rank for span in self.spans)

    @property
    def makespan(self) -> float:
        """Time from the first action's start to the last one's end."""
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    @property
    def exposed_reduction(self) -> float:
        """Time after the last computation in which gradients are still reduced."""
        return max(0.0, max(span.end for span in self.spans) - max(span.end for span in self._computing()))

    def bubbles(self) -> list[float]:
        """For each rank, the share of the step in which it does not compute."""
        busy = [0.0] * self.num_ranks
        for span in self._computing():
            busy[span.rank] += span.end - span.start
        return [1 - each / self.makespan for each in busy]

    @property
    def bubble(self) -> float:
        """Mean share of the step in which a rank does not compute."""
        return sum(self.bubbles()) / self.num_ranks

    def peak_activations(self) -> list[float]:
        """For each rank, the most samples x layers whose activations it holds at one time.

        They are held from the start of the forward to the end of the whole backward, or of wgrad:
        an upper bound for a backward in two parts, which frees some after the first."""
        return [max(self._held(rank), default=0.0) for rank in range(self.num_ranks)]

    def _held(self, rank: int) -> list[float]:
        changes = []
        for span in self.spans:
            if span.rank == rank and span.action.kind in ("F", "B", "W"):
                amount = self.layers[span.action.stage] * self.sizes[span.action.micro_batch]
                changes.append((span.start, amount) if span.action.kind == "F" else (span.end, -amount))
        held, course = 0.0, []
        for _, change in sorted(changes):  # at the same time, what is freed comes first
            held += change
            course.append(held)
        return course

    def _computing(self) -> list[Span]:
        return [span for span in self.spans if span.action.kind != "R"]


def read_timeline(path: Path, *, layers: Sequence[float], sizes: Sequence[float]) -> Timeline:
    """A measured step: a JSON list of {rank, kind, stage, micro_batch, start, end}, times in seconds of one clock.

    ProblemError if it is none, or has other stages and micro-batches than `layers` and `sizes`."""
    try:
        if (why := _MEASURED(records := read_json(path))) is not None:
            raise ValueError(why)
        spans = [_span(record) for record in records]
    except (OSError, ValueError) as error:
        fix = "give the file that a run wrote: a list of {rank, kind, stage, micro_batch, start, end}"
        raise ProblemError.of("--timeline", path, f"it is no timeline: {error!r}", fix, "format") from error
    stages = 1 + max((span.action.stage for span in spans), default=-1)
    micro_batches = 1 + max((span.action.micro_batch for span in spans), default=-1)
    if (stages, micro_batches) != (len(layers), len(sizes)):
        why = f"it has {stages} stages and {micro_batches} micro-batches, the schedule {len(layers)} and {len(sizes)}"
        raise ProblemError.of("--timeline", path, why, "give the schedule and numbers of the run", "shape")
    if not any(span.action.kind != "R" and span.end > span.start for span in spans):
        fix = "give the file that a run wrote"
        raise ProblemError.of("--timeline", path, "nothing in it takes time", fix, "empty")
    first = min(span.start for span in spans)
    shifted = [Span(span.rank, span.action, span.start - first, span.end - first) for span in spans]
    return Timeline(name="measured", spans=shifted, layers=layers, sizes=sizes, measured=True)


_MEASURED = sealed.listed(
    sealed.record(
        {
            "kind": sealed.text(*get_args(Kind)),
            **dict.fromkeys(("rank", "stage", "micro_batch"), sealed.count()),
            **dict.fromkeys(("start", "end"), sealed.number()),
        }
    )
)


def _span(record: Mapping[str, Any]) -> Span:
    action = Action(record["kind"], record["stage"], record["micro_batch"])
    if record["end"] < record["start"]:
        raise ValueError(f"{action} on rank {record['rank']} ends before it starts")
    return Span(record["rank"], action, float(record["start"]), float(record["end"]))
