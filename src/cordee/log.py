"""Where messages for people go.

Owns how the logger "cordee" prints, how numbers read, the console of tables, and progress bars. Knows nothing of ranks
but the one given to `setup`."""

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SILENCE = 10.0  # seconds between two lines of progress, where each step takes less

_UNBOUNDED = 1 << 20  # columns

logger = logging.getLogger("cordee")


def setup(rank: int = 0, level: int = logging.INFO) -> None:
    """Print messages of rank 0 and warnings of every rank to standard error, those of other ranks with their number."""
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False
    # It warns that norms over several mesh axes are reduced over one after the other: these are a few scalars.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@functools.cache
def info_once(text: str, *values: object) -> None:
    """Log what a process has to say only once."""
    logger.info(text, *values)


def counted(number: int, what: str, several: str = "") -> str:
    """`1 document`, `2,000 documents`; `several` is the plural where it is not made by an s."""
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def shortened(number: float) -> str:
    """1234567890 -> 1.23B"""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:  # 999,950 rounds to 1M, not to 1000K
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def in_bytes(number: float) -> str:
    """1.5 GiB, 12 MiB"""
    unit, name = (2**30, "GiB") if number >= 2**30 else (2**20, "MiB")
    return f"{number / unit:,.3g} {name}" if number < 1000 * unit else f"{number / unit:,.0f} {name}"


def console(*, record: bool = False) -> "Console":
    """Standard output for tables and styles, `[` being a character like others; where that is no terminal, nothing is
    wrapped or cut. `record`: what is shown is kept, to be exported."""
    from rich.console import Console

    return Console(markup=False, width=None if sys.stdout.isatty() else _UNBOUNDED, record=record)


@contextmanager
def progress_bar(
    text: str = "", total: float = 1.0, *, nbytes: bool = False, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """A bar on standard error, removed at the end; where that is no terminal, a log line every `SILENCE` seconds.

    Yields a function of what is completed of `total`, and of what else `rich.progress.Progress.update` takes, for the
    bar. `nbytes`: these are bytes, of which amount and rate are shown."""
    if not sys.stderr.isatty():
        yield _progress_lines(text, total) if shown else lambda completed, **more: None
        return
    from rich import progress as bars
    from rich.console import Console

    amount = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if nbytes else (bars.TaskProgressColumn(),)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *amount, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task(text, total=total)
        yield lambda completed, **more: progress.update(task, completed=completed, **more)


def _progress_lines(text: str, total: float) -> Callable[..., None]:
    start = last = time.monotonic()

    def show(completed: float, **more: object) -> None:
        nonlocal last
        now = time.monotonic()
        if completed and now - last >= SILENCE:
            left = timedelta(seconds=round((now - start) * (total - completed) / completed))
            logger.info("%s: %.0f %%, %s left", text, 100 * completed / total, left)
            last = now

    return show
