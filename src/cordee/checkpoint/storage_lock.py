"""One run at a time in a folder of a store, as far as that can be had where nothing locks.

Owns an object that names who writes there, and whose holder changes it every `heartbeat` seconds. Who finds one waits
for three heartbeats whether it changes, and takes the place of a holder that is dead. There is no atomic exchange: of
two runs that begin at the same moment the later to write has the lock, the other notices when it reads its own record
back, at the latest at its next heartbeat, and says so. What both have saved stays whole: no two saves share a folder.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict
from typing import Self

from cordee.checkpoint.storage import StoragePath
from cordee.lock import HEARTBEAT_SECONDS, HeldError, Holder, machine
from cordee.log import logger


class StorageLock:
    """The lock at `place`, which this process has from the beginning until `release`; a context manager.

    HeldError if another process has it; OSError if the store cannot be read or written.
    """

    def __init__(self, place: StoragePath, heartbeat: float = HEARTBEAT_SECONDS):
        self._place, self._heartbeat = place, heartbeat
        host, started = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
        self._mine = Holder(machine(), host, os.getpid(), started, secrets.token_hex(8))
        self._beats = 0
        self._released = threading.Event()
        if (before := self._read()) is not None:
            self._require_expired(before)
        self._write()
        time.sleep(heartbeat / 5)  # another that found nobody there has written by now
        self._require_mine()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Let others have it; twice is once."""
        if self._released.is_set():
            return
        self._released.set()
        self._beating.join()
        try:
            self._require_mine()
            self._place.delete()
        except HeldError:
            logger.error("%s: another process took this lock and may write to the same place", self._place)
        except OSError as error:
            logger.warning("%s could not be removed, the next run waits until it is stale: %s", self._place, error)

    def _beat(self) -> None:
        failed = False
        while not self._released.wait(self._heartbeat):
            try:
                self._require_mine()
                self._write()
                failed = False
            except HeldError:
                logger.error("%s: another process took this lock and may write to the same place", self._place)
                return
            except OSError as error:
                if not failed:
                    logger.warning("%s: a heartbeat failed, other runs may take the lock: %s", self._place, error)
                failed = True

    def _require_expired(self, before: bytes) -> None:
        end = time.monotonic() + 3 * self._heartbeat
        while time.monotonic() < end:
            time.sleep(self._heartbeat / 5)
            now = self._read()
            if now is None:
                return
            if now != before:
                raise self._held(now)

    def _require_mine(self) -> None:
        now = self._read()
        if now is None or self._holder(now) != self._mine:
            raise self._held(now)

    def _held(self, record: bytes | None) -> HeldError:
        return HeldError(self._place, self._holder(record) if record else None)

    def _holder(self, record: bytes) -> Holder | None:
        """Who wrote a record; None if it is torn."""
        try:
            return Holder(**json.loads(record)["holder"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _read(self) -> bytes | None:
        try:
            return self._place.read_bytes()
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._beats += 1
        with self._place.write() as file:
            file.write(json.dumps({"holder": asdict(self._mine), "beats": self._beats}).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
