"""Where messages for people go.

Owns how the logger "cordee" prints, and the progress bar. Knows nothing of ranks but the one given to `setup`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("cordee")


def setup(rank: int = 0, level: int = logging.INFO) -> None:
    """Print messages of rank 0 and warnings of every rank to standard error, those of other ranks with their number."""
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False


def counted(number: int, what: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


@contextmanager
def progress_bar(
    text: str = "", total: float = 1.0, *, nbytes: bool = False, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """A bar on standard error, removed at the end. Yields a function of what is completed of `total`, and of anything
    else that `rich.progress.Progress.update` takes. `nbytes`: these are bytes, of which amount and rate are shown.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if nbytes else (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task(text, total=total)
        yield lambda completed, **more: progress.update(task, completed=completed, **more)
