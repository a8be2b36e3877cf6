"""One writer at a time: a second one is refused, and what a killed one leaves is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee import lock

HOLD = """
import sys
from pathlib import Path
from cordee import lock
with lock.acquire(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock, until its standard input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_has_it(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "lock"
    process = holding(path)
    with pytest.raises(lock.HeldError) as caught:
        lock.acquire(path, patience=0)
    assert caught.value.holder == lock.holder(path, patience=0).holder
    assert caught.value.holder.pid == process.pid and caught.value.holder.host == os.uname().nodename
    process.communicate("")
    assert lock.holder(path) is None
    assert list(tmp_path.iterdir()) == []
    with lock.acquire(path) as mine:
        with pytest.raises(lock.HeldError):  # a process does not share it with itself either
            lock.acquire(path, patience=0)
        mine.release()
        with lock.acquire(path):
            pass


def test_what_a_killed_holder_leaves_is_no_obstacle(tmp_path: Path):
    path = tmp_path / "lock"
    process = holding(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(path.read_text())["pid"] == process.pid  # the lock record is there, the lock is not
    assert lock.holder(path, patience=0) is None
    with lock.acquire(path, patience=0):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_holder_that_is_dying_is_waited_for(tmp_path: Path):
    path = tmp_path / "lock"
    process = holding(path)
    threading.Timer(0.2, process.kill).start()
    with lock.acquire(path, patience=60):
        process.wait()


def test_of_many_at_once_one_has_it(tmp_path: Path):
    """Nobody locks a file that its holder is about to remove: they come and go as fast as they can."""
    path, inside, most = tmp_path / "lock", [], []

    def come_and_go() -> None:
        for _ in range(50):
            with lock.acquire(path, patience=60):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200
    assert list(tmp_path.iterdir()) == []


def test_a_planted_link_is_not_written_through(tmp_path: Path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        lock.acquire(tmp_path / "lock")
    assert lock.holder(tmp_path / "lock") is None
    assert (tmp_path / "target").read_text() == "precious"


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("put", [put_fifo, Path.mkdir])
def test_what_is_no_regular_file_is_no_lock(tmp_path: Path, put):
    path = tmp_path / "lock"
    put(path)
    assert lock.holder(path) is None
    with pytest.raises(OSError):
        lock.acquire(path)
    assert path.exists() and not path.is_file()


def test_what_the_system_does_not_tell_is_no_holder(tmp_path: Path, monkeypatch):
    def stale(descriptor: int, kind: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (tmp_path / "lock").write_text("")
    monkeypatch.setattr(fcntl, "flock", stale)
    assert lock.holder(tmp_path / "lock") is None


def test_a_group_can_lock_what_one_of_it_has_locked(tmp_path: Path):
    before = os.umask(0o002)
    try:
        with lock.acquire(tmp_path / "lock"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_directories_that_their_maker_removes_are_made_again(tmp_path: Path, monkeypatch):
    open_file, removed = os.open, []

    def removed_before(path, flags: int, *mode: int) -> int:
        if not removed:
            removed.append(Path(path).parent.rmdir())
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", removed_before)
    with lock.acquire(tmp_path / "deep" / "lock", patience=60) as mine:
        assert removed and mine.path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        lock.acquire(tmp_path / "deep" / "lock")
    assert list(tmp_path.iterdir()) == []


# ---- where the kernel cannot tell ------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "LEASE", 0.2)


@pytest.fixture(params=["no flock", "flock of one machine"])
def blind(request, quick, monkeypatch) -> None:
    """A file system without flock, or one whose locks another machine does not see."""

    def refuse(descriptor: int, kind: int) -> None:
        if request.param == "no flock":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    for kind in ("warning", "error"):
        monkeypatch.setattr(lock.logger, kind, lambda text, *values, kind=kind: lines.append(f"{kind}: {text}"))
    return lines


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


STALE = {"machine": "elsewhere", "host": "node0", "pid": 1, "started": "2020-01-01 00:00:00", "token": "x"}


def test_equal_host_names_are_not_one_machine(tmp_path: Path, blind, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 60.0)  # so long a heartbeat may take on a busy machine
    path = tmp_path / "lock"
    with lock.acquire(path):
        monkeypatch.setattr(lock, "machine", lambda: "another")
        with pytest.raises(lock.HeldError) as caught:
            lock.acquire(path, patience=0)
        assert caught.value.holder.host == os.uname().nodename and str(path) in str(caught.value)


def test_a_machine_is_known_by_its_kernel(monkeypatch):
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text().strip() if boot.exists() else os.uname().nodename
    assert lock.machine() == name
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    assert lock.machine() == os.uname().nodename


def test_without_heartbeats_a_holder_is_dead(tmp_path: Path, blind):
    path = tmp_path / "lock"
    path.write_text(json.dumps(STALE))
    with lock.acquire(path, patience=0):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_who_only_looks_waits_for_no_lease(tmp_path: Path, blind, monkeypatch):
    def sleep(seconds: float) -> None:
        raise AssertionError

    path = tmp_path / "lock"
    path.write_text(json.dumps(STALE))
    monkeypatch.setattr(time, "sleep", sleep)
    assert lock.holder(path) is None


def test_a_heartbeat_that_fails_is_not_the_last(tmp_path: Path, quick, said, monkeypatch):
    beat, beats = os.utime, []

    def stale(descriptor: int) -> None:
        beats.append(descriptor)
        if len(beats) in (2, 4):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        beat(descriptor)

    monkeypatch.setattr(os, "utime", stale)
    with lock.acquire(tmp_path / "lock"):
        wait_until(lambda: len(beats) > 5)
    assert [line.partition(":")[0] for line in said] == ["warning"]


@pytest.mark.parametrize("removed", [False, True])
def test_a_lock_that_another_process_took_is_reported_and_left_to_it(tmp_path: Path, quick, said, removed: bool):
    path = tmp_path / "lock"
    with lock.acquire(path):
        path.unlink() if removed else path.write_text(json.dumps(STALE))
        wait_until(lambda: bool(said))
    assert [line.partition(":")[0] for line in said] == ["error"]
    assert not path.exists() if removed else json.loads(path.read_text()) == STALE


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1]", b"[" * 4000, b'{"host": 1, "pid": "x", "started": 3}'])
def test_an_unreadable_lock_record_is_ignored(tmp_path: Path, quick, text: bytes):
    path = tmp_path / "lock"
    path.write_bytes(text)
    with lock.acquire(path, patience=0):
        pass
