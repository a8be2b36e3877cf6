"""One writer at a time: a lock file that records which process writes to a place, locked as long as that process lives.

Owns taking and releasing such locks and telling a live holder from a dead one. Knows nothing of what is protected.

On one machine, and where `flock` reaches over machines (NFS since Linux 2.6.12, Lustre with -o flock), the kernel
keeps others out and drops the lock of a process that died. Whether it reaches, no process can see. So a lock record of
another machine, and without `flock` any, also has a lease: its holder renews the time of the file every
`HEARTBEAT_SECONDS`, and who finds it waits `LEASE` seconds for that. Where locks do not reach, a process that is
stopped for longer (SIGSTOP, a hung file server) loses its lock, and of two machines that start in the same moment both
may get it: the one whose record was replaced reports that at its next heartbeat, or when it asks (`require_held`)."""

import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from cordee.log import logger

HEARTBEAT_SECONDS = 5.0
LEASE = 3 * HEARTBEAT_SECONDS  # without a heartbeat after which a holder counts as dead, where no kernel decides
PATIENCE = 3.0  # seconds that a dying process gets to exit: a launcher starts the next at once
_POLL = 0.05
_TIME = "%Y-%m-%d %H:%M:%S"
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}


def machine() -> str:
    """What identifies this machine until it reboots: its boot id, since host names repeat, or else its host name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


@dataclass(frozen=True)
class Holder:
    """The process that has a lock, as the lock record has it; `started`: local time; `token`: random, of this lock."""

    machine: str
    host: str
    pid: int
    started: str
    token: str

    @classmethod
    def new(cls) -> "Holder":
        """This process, as the holder of a lock that it takes now."""
        return cls(machine(), socket.gethostname(), os.getpid(), time.strftime(_TIME), secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class HeldError(Exception):
    """Another process has the lock file `path`: `holder`, None if its record is not written yet."""

    def __init__(self, path: object, holder: Holder | None):
        super().__init__(path, holder)
        self.path = path
        self.holder = holder

    def __str__(self) -> str:
        return f"{self.holder or 'a process that has just begun'} (lock file {self.path})"


class Lock(ABC):
    """A lock of this process, renewed every `heartbeat` seconds by a thread until `release`; a context manager."""

    def __init__(self, path: object, heartbeat: float):
        self.path = path
        self._heartbeat = heartbeat
        self._lost: HeldError | None = None
        self._renewing = threading.Lock()  # by the heartbeat, or by who asks: a record half written is nobody's
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    @abstractmethod
    def _renew(self) -> None:
        """Let others see that the holder lives. HeldError if another process has the lock now."""

    @abstractmethod
    def _remove(self) -> None:
        """Remove what others see of the lock."""

    def require_held(self) -> None:
        """HeldError if another process has the lock now, as it may where this one was stopped for longer than a lease.
        OSError if that cannot be found out."""
        self._try_to_renew()
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Let others have it; twice is once."""
        if not self._released.is_set():
            self._released.set()
            self._beating.join()
            self._remove()

    def _beat(self) -> None:
        failed = False
        while self._lost is None and not self._released.wait(self._heartbeat):
            try:
                self._try_to_renew()
            except OSError as error:
                if not failed:
                    logger.warning("%s: a heartbeat failed, other machines may take the lock: %s", self.path, error)
                failed = True

    def _try_to_renew(self) -> None:
        """Renew it, or note that it is lost."""
        with self._renewing:
            try:
                if self._lost is None:
                    self._renew()
            except HeldError as error:
                self._lost = error
                self._report_loss()

    def _report_loss(self) -> None:
        logger.error("%s: another process took this lock and may write to the same place", self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class FileLock(Lock):
    """The lock of a file. `acquire` makes it.

    `path`: where the lock file is; who renames the directory it is in sets it anew."""

    path: Path

    def __init__(self, path: Path, descriptor: int, made: list[Path]):
        self._descriptor = descriptor
        self._made = made
        self._record = _read(descriptor)
        super().__init__(path, HEARTBEAT_SECONDS)

    def _renew(self) -> None:
        os.utime(self._descriptor)  # whose answer also tells an NFS client that the record has changed
        found = _read(self._descriptor)
        if not os.fstat(self._descriptor).st_nlink or found != self._record:
            raise HeldError(self.path, None if found == self._record else found)

    def _remove(self) -> None:
        """Also the directories that were made for the file alone."""
        with suppress(OSError):  # a place that vanished or became read-only keeps nobody from releasing it
            if _is_at(self._descriptor, self.path) and _read(self._descriptor) == self._record:
                self.path.unlink()
        _unmake(self._made)
        os.close(self._descriptor)


def acquire(path: Path, patience: float = PATIENCE) -> FileLock:
    """The lock of the file `path`, made with its directories if it is not there.

    HeldError if another process has it and still does after `patience` seconds; OSError if it cannot be made, or
    something else than a regular file is there."""
    made = [place for place in path.parents if not place.exists()]
    end = time.monotonic() + patience
    try:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return FileLock(path, _take(path), made)
            except (HeldError, FileNotFoundError):  # the latter: who released it has removed its directory
                if time.monotonic() > end:
                    raise
            time.sleep(_POLL)
    except BaseException:
        _unmake(made)
        raise


def holder(path: Path, patience: float = PATIENCE) -> HeldError | None:
    """Who has the lock of the file `path` and still does after `patience` seconds; None if nobody. Writes nothing.

    The kernel alone decides, no lease is waited for: a holder on another machine whose locks this one does not see is
    found by `acquire`. None, too, if there is no file that can be read."""
    end = time.monotonic() + patience
    with suppress(OSError):
        while True:
            try:
                with os.fdopen(_open(path, os.O_RDONLY)) as file:
                    _flock(file.fileno(), path, fcntl.LOCK_SH)
                    return None
            except HeldError as held:
                if time.monotonic() > end:
                    return held
            time.sleep(_POLL)
    return None


def _take(path: Path) -> int:
    """Make the file at `path` the lock of this process: its descriptor. HeldError."""
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        exclusive = _flock(descriptor, path, fcntl.LOCK_EX)
        _require_expired(descriptor, path, exclusive)
        if not _is_at(descriptor, path):  # its holder has released it meanwhile, and so removed it
            raise HeldError(path, _read(descriptor))
        mine = Holder.new()
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(mine)).encode(), 0)
        except OSError:
            path.unlink()  # this process has it, but cannot record that
            raise
        if not exclusive:  # of several that found nobody there, the last to write has it
            time.sleep(HEARTBEAT_SECONDS)
            if (now := _read(descriptor)) != mine:
                raise HeldError(path, now)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _flock(descriptor: int, path: Path, kind: int) -> bool:
    """Lock an open file; False if this file system cannot. HeldError if another process has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeldError(path, _read(descriptor)) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _require_expired(descriptor: int, path: Path, exclusive: bool) -> None:
    """HeldError if the lease in the file is renewed; a record of this machine has none where the kernel decides."""
    record = _read(descriptor)
    if record is None or (exclusive and record.machine == machine()):
        return
    before, end = _renewed(path), time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(_POLL)
        if _renewed(path) != before:
            raise HeldError(path, record)


def _renewed(path: Path) -> int | None:
    """The last heartbeat in ns; None if the file is gone. Opened for it: NFS asks its server only then."""
    with suppress(FileNotFoundError), os.fdopen(_open(path, os.O_RDONLY)) as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _open(path: Path, flags: int) -> int:
    """Open a regular file, without waiting for the other end of a pipe. OSError if it is something else."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


def _read(descriptor: int) -> Holder | None:
    """The lock record; None if there is none, or not all of it yet."""
    with suppress(ValueError, TypeError, RecursionError):
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def _unmake(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # it holds something by now, or is gone
            directory.rmdir()
