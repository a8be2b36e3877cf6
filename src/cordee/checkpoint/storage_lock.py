"""One run at a time in a folder of a store, as far as that can be had where nothing locks.

Owns an object that names who writes there, and whose holder changes it every `heartbeat` seconds. Who finds one waits
for three heartbeats whether it changes, and takes the place of a holder that is dead. There is no atomic exchange: of
two runs that begin at the same moment the later to write has the lock, the other notices when it reads its own record
back, at the latest at its next heartbeat or save, and stops. What both have saved stays whole: no two saves share a
folder."""

import json
import time
from contextlib import suppress
from dataclasses import asdict

from cordee import lock
from cordee.checkpoint.storage import Location
from cordee.lock import HEARTBEAT_SECONDS, HeldError, Holder, Lock
from cordee.log import logger


def acquire(path: Location) -> Lock:
    """The lock at `path`: of the kernel where it is on this machine, else a `StorageLock`. As these raise."""
    return StorageLock(path) if path.local is None else lock.acquire(path.local)


class StorageLock(Lock):
    """The lock at `path`, which this process has from the beginning until `release`.

    HeldError if another process has it; OSError if the store cannot be read or written."""

    path: Location

    def __init__(self, path: Location, heartbeat: float = HEARTBEAT_SECONDS):
        self.path, self._heartbeat = path, heartbeat
        self._mine = Holder.new()
        self._beats = 0
        if (before := self._read()) is not None:
            self._require_expired(before)
        self._write()
        time.sleep(heartbeat / 5)  # another that found nobody there has written by now
        self._require_mine()
        super().__init__(path, heartbeat)

    def _renew(self) -> None:
        self._require_mine()
        self._write()

    def _remove(self) -> None:
        try:
            self._require_mine()
            self.path.delete()
        except HeldError:
            self._report_loss()
        except OSError as error:
            logger.warning("%s could not be removed, the next run waits until it is stale: %s", self.path, error)

    def _require_expired(self, before: bytes) -> None:
        end = time.monotonic() + 3 * self._heartbeat
        while time.monotonic() < end:
            time.sleep(self._heartbeat / 5)
            now = self._read()
            if now is None:
                return
            if now != before:
                raise HeldError(self.path, _holder(now))

    def _require_mine(self) -> None:
        if (now := _holder(self._read() or b"")) != self._mine:
            raise HeldError(self.path, now)

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._beats += 1
        with self.path.write() as file:
            file.write(json.dumps({"holder": asdict(self._mine), "beats": self._beats}).encode())


def _holder(record: bytes) -> Holder | None:
    """Who wrote a record; None if it is torn."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return Holder(**json.loads(record)["holder"])
    return None
