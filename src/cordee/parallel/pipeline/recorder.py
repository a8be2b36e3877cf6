"""The timeline of a pipeline, measured.

Owns the clock of a recorded step and the file that `cordee plan --timeline` draws. Knows no schedule."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cordee import device
from cordee.log import logger
from cordee.parallel import collectives
from cordee.parallel.degrees import AXES
from cordee.parallel.layout import Layout
from cordee.parallel.pipeline.schedules import Action

RECORDED = 2  # steps: the first makes connections and buffers, the second stays in the file


class Recorder:
    """Records the first steps of a run into `path`, each in place of the one before; without a path, none.

    All ranks begin a step together, and count time from there. Of several pipelines the first is recorded."""

    def __init__(self, path: str | None, layout: Layout):
        self._path = path
        self._layout = layout
        self._left = RECORDED if path is not None else 0
        self._spans: list[dict[str, object]] | None = None
        self._since = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step; an accelerator is waited for after every action of a recorded one."""
        if not self._left:
            yield
            return
        self._left -= 1
        self._spans = []
        collectives.from_first(None, self._layout)
        self._since = time.perf_counter()
        yield
        spans = self._spans if all(self._layout.axis_rank(axis) == 0 for axis in AXES if axis != "pp") else []
        self._spans = None
        found = [span for part in collectives.gather(spans, self._layout) for span in part]
        if self._layout.rank == 0:
            self._write(found)

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Around an action, messages left out."""
        if self._spans is None:
            yield
            return
        spans, start = self._spans, time.perf_counter() - self._since
        yield
        device.synchronize()
        what = {"kind": action.kind, "stage": action.stage, "micro_batch": action.micro_batch}
        times = {"start": start, "end": time.perf_counter() - self._since}
        spans.append({"rank": self._layout.axis_rank("pp"), **what, **times})

    def _write(self, spans: list[dict[str, object]]) -> None:
        assert self._path is not None
        try:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            Path(self._path).write_text(json.dumps(spans), encoding="utf-8")
        except OSError as error:  # the run is worth more than its picture
            logger.warning("--pipeline-timeline %s could not be written: %s", self._path, error)
