"""A function applied to a stream of items by several processes, results in the order of the items.

Owns the processes: how many items are in flight, that none outlives its parent, and that one that dies is reported.
Knows nothing of what the function does."""

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from cordee.errors import ProblemError

In = TypeVar("In")
Out = TypeVar("Out")

_AHEAD = 3  # items per process that are waiting or done: enough that none idles, few enough to hold in memory
_SERIAL = "TOKENIZERS_PARALLELISM"


@contextmanager
def process_map(function: Callable[[In], Out], processes: int) -> Iterator[Callable[[Iterable[In]], Iterator[Out]]]:
    """What applies `function`, which is sent to each process once, to every item in order, with a bounded number of
    items in flight; one process is this one. The processes start here, so that this program's own threads can start
    after them. The iteration raises `ProblemError` if a process dies."""
    if processes == 1:
        with _one_thread():
            yield lambda items: map(function, items)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context(_start_method()), _prepare, (function,))
    pool.submit(int)  # the pool starts its processes with its first task
    try:
        yield lambda items: _map(pool, processes, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _map(pool: ProcessPoolExecutor, processes: int, items: Iterable[Any]) -> Iterator[Any]:
    in_flight: deque[Future[Any]] = deque()
    try:
        for item in items:
            in_flight.append(pool.submit(_apply, item))
            if len(in_flight) >= processes * _AHEAD:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        why = "one of the processes was killed or could not start, perhaps because memory ran out"
        raise ProblemError.of("--workers", processes, why, "start again with fewer") from error


def _start_method() -> str:
    """Fork, as it has the function at once, unless libraries that run threads are loaded, with which it can hang."""
    threads = threading.active_count() > 1 or any(name in sys.modules for name in ("torch", "pyarrow"))
    return "fork" if sys.platform == "linux" and not threads else "spawn"


@contextmanager
def _one_thread() -> Iterator[None]:
    """The processes are the parallelism; `tokenizers` reads at every batch whether to use threads too."""
    before = os.environ.get(_SERIAL)
    os.environ[_SERIAL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SERIAL]
        else:
            os.environ[_SERIAL] = before


# The pool has no other place for what belongs to a process than a global of the process.
_function: Callable[[Any], Any] | None = None


def _prepare(function: Callable[[Any], Any]) -> None:
    """In a new process: keep the function, leave Ctrl-C to the parent, and end when the parent does."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ[_SERIAL] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)
