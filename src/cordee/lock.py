"""One writer at a time: a file that says which process writes to a place, locked as long as that process lives.

Owns taking and releasing such locks and telling a live holder from a dead one. Knows nothing of what is protected.

What is promised. Where `flock` works, the kernel decides: it drops the lock of a process that died, however it died,
and on a file system whose locks reach over hosts (NFS since Linux 2.6.12, Lustre with -o flock) it decides for all of
them. Where `flock` is missing or reaches over one host only, a live holder is known by its sign of life, the time of
the file, which it renews every `BEAT` seconds: who finds the note of another host waits `SILENCE` for it. A process
that is stopped for longer than that (SIGSTOP, a hung file server) is taken for dead there, and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cordee.log import logger

BEAT = 5.0  # seconds between two signs of life
SILENCE = 3 * BEAT  # without a sign of life after which a holder counts as dead, where no kernel can tell
PATIENCE = 3.0  # seconds that a process which is dying gets to be gone: a launcher starts the next at once
_POLL = 0.05
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}


@dataclass(frozen=True)
class Holder:
    """The process that has a lock; `started` is when it took it, local time."""

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


def machine() -> str:
    """What tells this machine from others: the id of its boot, its host name where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


class HeldError(Exception):
    """Another process has the lock: `holder`, None if it has not said yet who it is."""

    def __init__(self, holder: Holder | None):
        super().__init__(holder)
        self.holder = holder

    def __str__(self) -> str:
        return str(self.holder or "a process that has just begun")


class Lock:
    """A lock that this process has until `release`; a context manager. `acquire` makes it."""

    def __init__(self, path: Path, descriptor: int, made: list[Path]):
        self.path = path
        self._descriptor = descriptor
        self._made = made
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Let others have it; twice is once. Nothing is left behind, nor directories that were made for it alone."""
        if self._released.is_set():
            return
        self._released.set()
        self._beating.join()
        with suppress(OSError):  # a place that vanished or became read-only keeps nobody from releasing it
            if _is_at(self._descriptor, self.path):
                self.path.unlink()
        _unmake(self._made)
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            try:
                os.utime(self._descriptor)
            except OSError as error:
                logger.warning("%s gives no more signs of life, which matters to other hosts: %s", self.path, error)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire(path: Path, patience: float = PATIENCE) -> Lock:
    """The lock of the file `path`, made with its directories if it is not there.

    HeldError if another process has it and still does after `patience` seconds; OSError if it cannot be made.
    """
    made = _make(path.parent)
    end = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            if _take(descriptor, path):
                return Lock(path, descriptor, made)
        except HeldError:
            if time.monotonic() > end:
                os.close(descriptor)
                raise
        except BaseException:
            os.close(descriptor)
            _unmake(made)
            raise
        os.close(descriptor)
        time.sleep(_POLL)


def holder(path: Path, patience: float = PATIENCE) -> HeldError | None:
    """Who has the lock of the file `path` and still does after `patience` seconds; None if nobody. Writes nothing."""
    end = time.monotonic() + patience
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None  # what stands against writing there, others say
        try:
            local = _flock(descriptor, fcntl.LOCK_SH)
            fcntl.flock(descriptor, fcntl.LOCK_UN) if local else None  # who wants to write is not kept from it
            _require_silence(descriptor, path, local)
            return None
        except HeldError as held:
            if time.monotonic() > end:
                return held
        finally:
            os.close(descriptor)
        time.sleep(_POLL)


def _take(descriptor: int, path: Path) -> bool:
    """Make the open file the lock of this process; False if it is not the file at `path` any more. HeldError."""
    exclusive = _flock(descriptor, fcntl.LOCK_EX)
    _require_silence(descriptor, path, exclusive)
    if not _is_at(descriptor, path):  # its holder has released it meanwhile, and so removed it
        return False
    note = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(note)).encode(), 0)
    except OSError:
        path.unlink()  # which is this process's, only that it could not say so
        raise
    if not exclusive:  # of several that found nobody there, the last to write has it
        time.sleep(BEAT)
        if _note(descriptor) != note:
            raise HeldError(_note(descriptor))
    return True


def _flock(descriptor: int, kind: int) -> bool:
    """Lock an open file; False if this file system cannot. HeldError if another process has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeldError(_note(descriptor)) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _require_silence(descriptor: int, path: Path, exclusive: bool) -> None:
    """HeldError if the note in the file is of a process that lives, as far as the kernel's word does not settle it."""
    note = _note(descriptor)
    if note is None or (exclusive and note.host == socket.gethostname()):
        return
    before, end = _life(path), time.monotonic() + SILENCE
    while time.monotonic() < end and _is_at(descriptor, path):
        if _life(path) != before:
            raise HeldError(note)
        time.sleep(_POLL)


def _life(path: Path) -> int | None:
    """The last sign of life in ns; None if the file is gone. Opened for it: NFS asks its server only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _note(descriptor: int) -> Holder | None:
    """What the holder has written; None if nothing, or not all of it yet."""
    try:
        fields = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(str(fields["host"]), int(fields["pid"]), str(fields["started"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _unmake(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # it holds something by now, or is gone
            directory.rmdir()


def _make(directory: Path) -> list[Path]:
    """Make a directory with its parents; those that were not there, the innermost first."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing
