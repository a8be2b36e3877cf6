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
    assert json.loads(path.read_text())["pid"] == process.pid  # the note is there, the lock is not
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
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.2)


@pytest.fixture(params=["no flock", "flock of one host"])
def blind(request, quick, monkeypatch) -> None:
    """A file system without flock, or one whose locks another host does not see."""

    def refuse(descriptor: int, kind: int) -> None:
        if request.param == "no flock":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


def from_elsewhere(path: Path) -> None:
    note = json.loads(path.read_text())
    path.write_text(json.dumps({**note, "host": "elsewhere"}))


def test_signs_of_life_tell_a_holder_on_another_host(tmp_path: Path, blind, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 60.0)  # so long a sign may take on a busy machine
    path = tmp_path / "lock"
    with lock.acquire(path):
        from_elsewhere(path)
        with pytest.raises(lock.HeldError) as caught:
            lock.acquire(path, patience=0)
        assert caught.value.holder.host == "elsewhere"
        assert lock.holder(path, patience=0) is not None


def test_without_signs_of_life_a_holder_is_dead(tmp_path: Path, blind):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "2020-01-01 00:00:00"}))
    assert lock.holder(path, patience=0) is None
    with lock.acquire(path, patience=0):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1]", b"[" * 4000, b'{"host": 1, "pid": "x", "started": 3}'])
def test_a_note_that_says_nothing_is_no_obstacle(tmp_path: Path, quick, text: bytes):
    path = tmp_path / "lock"
    path.write_bytes(text)
    with lock.acquire(path, patience=0):
        pass
