"""Which checkpoint is the latest whole one, whatever a killed process left behind."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of


def make(path: Path, iteration: int, data: bytes = b"data") -> Path:
    root = location_of(path)
    new = directory.temporary(root, iteration)
    with (new / "__0_0.distcp").write() as file:
        file.write(data)
    files = {"__0_0.distcp": {"bytes": len(data), "crc32": zlib.crc32(data)}}
    directory.publish(new, {"format": directory.FORMAT, "iteration": iteration, "files": files})
    return path / directory.name_of(iteration)


def test_names(tmp_path: Path):
    make(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000010", directory.TRACKER]
    assert directory.is_root(location_of(tmp_path))
    assert not directory.is_root(location_of(tmp_path / "iter_0000010"))


def spoil_missing(path: Path):
    (path / "__0_0.distcp").unlink()


def spoil_short(path: Path):
    (path / "__0_0.distcp").write_bytes(b"da")


def spoil_manifest(path: Path):
    (path / directory.MANIFEST).write_text("{")


def spoil_no_manifest(path: Path):
    (path / directory.MANIFEST).unlink()


def spoil_format(path: Path):
    (path / directory.MANIFEST).write_text(json.dumps({"format": 99, "files": {"a": {}}}))


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_short, spoil_manifest, spoil_no_manifest, spoil_format])
def test_damaged_latest_is_passed_over_and_reported(tmp_path: Path, spoil):
    make(tmp_path, 10)
    spoil(make(tmp_path, 20))
    iteration, passed_over = directory.latest(location_of(tmp_path))
    assert iteration == 10
    assert len(passed_over) == 1 and "iter_0000020" in passed_over[0]


def test_changed_bytes_are_found_by_reading(tmp_path: Path):
    path = make(tmp_path, 10)
    (path / "__0_0.distcp").write_bytes(b"dat!")
    assert directory.damage(location_of(path)) is None
    assert directory.damage(location_of(path), contents=["__0_0.distcp"]) is not None


def test_tracker_can_be_edited_to_go_back(tmp_path: Path):
    for iteration in (10, 20, 30):
        make(tmp_path, iteration)
    (tmp_path / directory.TRACKER).write_text("20\n")
    assert directory.latest(location_of(tmp_path)) == (20, [])


@pytest.mark.parametrize(
    "text", [b"", b"release", b"-10", b"1" * 5000, b"1_0", "\u0661\u0660".encode(), b"\xff\xfe", None]
)
def test_without_a_readable_tracker_the_newest_counts(tmp_path: Path, text: bytes | None):
    for iteration in (10, 20):
        make(tmp_path, iteration)
    tracker = tmp_path / directory.TRACKER
    tracker.unlink() if text is None else tracker.write_bytes(text)
    iteration, said = directory.latest(location_of(tmp_path))
    assert iteration == 20
    assert len(said) == (text is not None) and all(directory.TRACKER in note for note in said)


def test_tracker_that_names_no_checkpoint_is_said(tmp_path: Path):
    make(tmp_path, 10)
    (tmp_path / directory.TRACKER).write_text("9" * 18)
    assert directory.latest(location_of(tmp_path))[0] == 10
    assert len(directory.latest(location_of(tmp_path))[1]) == 1
    (tmp_path / directory.TRACKER).unlink()
    (tmp_path / directory.TRACKER).mkdir()
    assert directory.latest(location_of(tmp_path))[0] == 10


def test_nothing_there(tmp_path: Path):
    assert directory.latest(location_of(tmp_path / "absent")) == (None, [])
    assert directory.tidy(location_of(tmp_path / "absent")) == []


def test_half_written_is_invisible_and_tidied(tmp_path: Path):
    make(tmp_path, 10)
    (tmp_path / ".iter_0000020.new").mkdir()
    assert directory.latest(location_of(tmp_path)) == (10, [])
    assert directory.tidy(location_of(tmp_path)) == [".iter_0000020.new"]
    assert directory.iterations(location_of(tmp_path)) == [10]


def test_kill_between_the_renames_of_a_replacement(tmp_path: Path):
    make(tmp_path, 10).rename(tmp_path / ".iter_0000010.old")
    assert directory.latest(location_of(tmp_path))[0] is None
    assert directory.tidy(location_of(tmp_path)) == []
    assert directory.latest(location_of(tmp_path)) == (10, [])


def test_replacement(tmp_path: Path):
    make(tmp_path, 10, b"first")
    make(tmp_path, 10, b"second")
    assert (tmp_path / "iter_0000010" / "__0_0.distcp").read_bytes() == b"second"
    assert not list(tmp_path.glob(".*"))


def test_retention(tmp_path: Path):
    for iteration in (10, 20, 30, 40):
        make(tmp_path, iteration)
    spoil_short(tmp_path / "iter_0000020")
    assert directory.retain(location_of(tmp_path), 30, keep=1) == [10]
    assert directory.iterations(location_of(tmp_path)) == [40, 30, 20]  # damaged and later ones are left to the user


def test_retention_spares_the_best(tmp_path: Path):
    root = location_of(tmp_path)
    for iteration in (10, 20, 30, 40):
        make(tmp_path, iteration)
    directory.point_to_best(root, 20)
    directory.point_to_best(root, 25)  # of which there is no checkpoint
    assert directory.tracked(root, directory.BEST) == 20
    (tmp_path / directory.BEST).write_text("torn")
    assert directory.retain(root, 40, keep=1) == [], "which one it is cannot be read"
    directory.point_to_best(root, 20)
    assert directory.retain(root, 40, keep=1) == [30, 10]
    directory.point_to_best(root, 40)
    assert directory.retain(root, 40, keep=2) == []


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", range(40))
def test_a_replacement_killed_at_any_step(tmp_path: Path, monkeypatch, step: int):
    """Before every rename, removal and flush: what is under a final name is the old checkpoint or the new, whole."""
    make(tmp_path, 10, b"older")
    make(tmp_path, 20, b"first")
    steps = iter(range(1000))

    def until_killed(function):
        def call(*arguments, **options):
            if next(steps) == step:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in [(os, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")]:
            patch.setattr(owner, name, until_killed(getattr(owner, name)))
        with suppress(Killed):
            make(tmp_path, 20, b"second")
    for _ in range(2):  # a second look changes nothing
        directory.tidy(location_of(tmp_path))
        assert directory.latest(location_of(tmp_path)) == (20, [])
        for iteration in directory.iterations(location_of(tmp_path)):
            assert (
                directory.damage(location_of(tmp_path / directory.name_of(iteration)), contents=["__0_0.distcp"])
                is None
            )
    assert (tmp_path / "iter_0000020" / "__0_0.distcp").read_bytes() in (b"first", b"second")
    assert not list(tmp_path.glob(".iter_*"))


def test_a_checkpoint_behind_a_link_stays(tmp_path: Path):
    archived = make(tmp_path / "archive", 10)
    root = location_of(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / archived.name).symlink_to(archived)
    make(tmp_path / "run", 10)
    assert directory.latest(root) == (10, []) and not (tmp_path / "run" / archived.name).is_symlink()
    assert directory.damage(location_of(archived)) is None


def test_a_file_with_the_name_of_a_checkpoint_is_none(tmp_path: Path):
    (tmp_path / directory.name_of(10)).touch()
    new = tmp_path / f".{directory.name_of(20)}.new"
    new.touch()
    root = location_of(tmp_path)
    directory.discard(location_of(new))
    assert not directory.is_root(root) and directory.iterations(root) == []
    make(tmp_path, 20)
    assert directory.latest(root) == (20, [])
