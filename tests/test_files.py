"""Links in folders of others, and own files at names where something is already."""

from __future__ import annotations

import os
import shutil
import socket
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from cordee import files, lock
from cordee.checkpoint import directory as checkpoint
from cordee.checkpoint.storage import location_of
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.data import order_cache
from cordee.data.indexed import IndexedDataset, IndexedDatasetBuilder
from cordee.data.manifest import Manifest
from cordee.errors import ProblemError
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.train.job import _save_assets
from cordee.train.plan import RunPlan
from cordee.weights.gguf.vocabulary import CUTS
from cordee.weights.staging import Staging
from tests.weights import tiny
from tests.weights.test_gguf import MODELS
from tests.weights.test_gguf_vocabulary import byte_level

SECRET = '{"password": "what nobody else may read"}'


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "elsewhere" / "credentials"
    path.parent.mkdir()
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
def victim(tmp_path):
    """Another file of the user, which nothing may write to."""
    path = tmp_path / "elsewhere" / "thesis"
    path.parent.mkdir()
    path.write_text("years of work")
    yield path
    assert path.read_text() == "years of work" and not path.is_symlink()


def mode(path: Path) -> int:
    return os.lstat(path).st_mode & 0o7777


def leaks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


# ---- files of others -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, secret):
    """A model directory with a tokenizer, some of whose files are links to a file of the user."""
    tiny.save(tmp_path / "model", {**MODELS["llama"], "vocab_size": 400})
    byte_level(tmp_path / "model", CUTS[0].patterns)
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "vocab.txt"):
        (tmp_path / "model" / name).symlink_to(secret)
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["hf", "gguf", "mg", "dcp"])
def test_no_format_gives_away_what_links_lead_to(target, model, tmp_path, caplog):
    job.run(ConvertConfig(load_dir=str(model), save_dir=str(tmp_path / "out"), save_model_type=target))
    assert not leaks(tmp_path / "out")
    assert str(model / "LICENSE") in caplog.text and "outside the model directory" in caplog.text


def test_neither_does_a_tokenizer_nor_a_run(model, tmp_path, caplog):
    """Without one of its files the others would be another tokenizer, so none is copied."""
    tokenizer = load_tokenizer(TokenizerOptions(tokenizer_kwargs={"add_bos_token": False}), str(model))
    with pytest.raises(ProblemError) as caught:
        tokenizer.save(tmp_path / "saved")
    assert {problem.value for problem in caught.value.problems} == {model / "chat_template.jinja", model / "vocab.txt"}
    initial = SimpleNamespace(assets=model, weights=model)
    plan = cast(RunPlan, SimpleNamespace(tokenizer=tokenizer, initial=initial))
    (tmp_path / "run").mkdir()
    _save_assets(plan, location_of(tmp_path / "run"))
    assert str(model / "vocab.txt") in caplog.text and not list((tmp_path / "run").iterdir())
    assert not leaks(tmp_path / "saved")
    for name in ("chat_template.jinja", "vocab.txt"):
        (model / name).unlink()
    _save_assets(plan, location_of(tmp_path / "run"))
    assert str(model / "generation_config.json") in caplog.text and not leaks(tmp_path / "run")
    text = "some text, 123"
    assert load_tokenizer(TokenizerOptions(), str(tmp_path / "run")).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_linked_tokenizer_is_not_half_converted(model, tmp_path, caplog, name):
    """The vocabulary alone, or with another config, would be another tokenizer."""
    (tmp_path / "store").mkdir()
    (model / name).rename(tmp_path / "store" / name)
    (model / name).symlink_to(tmp_path / "store" / name)
    job.run(ConvertConfig(load_dir=str(model), save_dir=str(tmp_path / "out")))
    assert not list((tmp_path / "out").glob("tokenizer*")) and "is left out" in caplog.text


def _snapshot(cache: Path, repository: str, blob: str, content: str) -> Path:
    """A repository in the layout of Hugging Face's cache, with one file."""
    snapshot = cache / repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / repository / "blobs").mkdir()
    (cache / repository / "blobs" / blob).write_text(content)
    (snapshot / "LICENSE").symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_links_inside_and_to_the_blobs_of_a_cache_are_followed(tmp_path):
    snapshot = _snapshot(tmp_path, "models--a--b", "c0ffee", "the terms")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    (snapshot / "nested").mkdir()
    (snapshot / "nested" / "LICENSE").symlink_to("../../../blobs/c0ffee")
    (tmp_path / "link").symlink_to(snapshot)  # the user's own way there
    out = tmp_path / "out"
    out.mkdir()
    for file in (tmp_path / "link" / "LICENSE", snapshot / "NOTICE", snapshot / "nested" / "LICENSE"):
        assert files.copy_files([file], out) == [file]
        assert (out / file.name).read_text() == "the terms" and not (out / file.name).is_symlink()


def test_the_blobs_of_another_repository_are_not(tmp_path):
    snapshot = _snapshot(tmp_path, "models--a--b", "c0ffee", "the terms")
    _snapshot(tmp_path, "models--x--private", "bad", SECRET)
    (snapshot / "NOTICE").symlink_to("../../../models--x--private/blobs/bad")
    (tmp_path / "models--a--b" / "blobs" / "deep").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "bad").symlink_to(tmp_path / "models--x--private" / "blobs" / "bad")
    (snapshot / "USE_POLICY").symlink_to("../../blobs/bad")
    moved = _snapshot(tmp_path, "models--c--d", "bad", SECRET)
    (tmp_path / "models--c--d" / "blobs").rename(tmp_path / "taken")
    (tmp_path / "models--c--d" / "blobs").symlink_to(tmp_path / "models--x--private" / "blobs")  # the folder is a link
    for file in (snapshot / "NOTICE", snapshot / "USE_POLICY", moved / "LICENSE"):
        assert file.read_text() == SECRET
        assert "outside" in str(files.left_out(file)), file


def test_what_is_no_file_is_left_out_and_nothing_hangs(tmp_path, caplog):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    os.mkfifo(model / "LICENSE.pipe")
    (model / "LICENSE.zero").symlink_to("/dev/zero")
    (model / "LICENSE.broken").symlink_to("nowhere")
    (model / "LICENSE.circle").symlink_to("LICENSE.circle")
    (model / "LICENSE.folder").mkdir()
    with (model / "LICENSE.large").open("wb") as file:
        file.truncate(files.LARGEST + 1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(model / "LICENSE.socket"))  # the whole path may be too long for a socket
        assert files.copy_files(sorted(model.iterdir()), out) == []
    assert not any(out.iterdir())
    assert all(name in caplog.text for name in os.listdir(model)) and len(caplog.records) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
@pytest.mark.parametrize("given", [0o600, 0o640, 0o644, 0o444, 0o400, 0o755, 0o666, 0o4755])
def test_permissions_of_a_copy_are_the_users_and_never_wider(given, umask, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("x")
    source.chmod(given)
    target.write_text("what was there")
    before = os.umask(umask)
    try:
        files.copy_file(source, target)
    finally:
        os.umask(before)
    owner, others = 0o600, given & 0o066
    assert mode(target) == owner | (others & ~umask)
    assert target.read_text() == "x"


# ---- own files -------------------------------------------------------------------------------------------------------


def test_a_dataset_is_not_written_through_links(tmp_path, victim):
    for suffix in (".bin.incomplete", ".idx.incomplete", ".doc.incomplete"):
        (tmp_path / f"text{suffix}").symlink_to(victim)
    (tmp_path / ".text.json.new").symlink_to(victim)
    with IndexedDatasetBuilder(tmp_path / "text") as builder:
        builder.add_documents([1, 2, 3], [3])
    Manifest(documents=1, tokens=3, max_token=3).write(tmp_path / "text")
    np.testing.assert_array_equal(IndexedDataset(tmp_path / "text")[0], [1, 2, 3])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["text.bin", "text.idx", "text.json"]
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_sample_orders_are_not_written_through_links(tmp_path, victim):
    (tmp_path / f".key-order.npy.{os.getpid()}").symlink_to(victim)
    arrays = order_cache.cached_arrays(tmp_path, "key", {"order": (3,)}, lambda: {"order": np.arange(3)})
    np.testing.assert_array_equal(arrays["order"], [0, 1, 2])


def test_checkpoints_are_not_written_through_links(tmp_path, victim):
    root = location_of(tmp_path)
    new = checkpoint.temporary(root, 10)
    folder = tmp_path / new.name
    folder.symlink_to(victim.parent)
    (tmp_path / f".{checkpoint.TRACKER}.new").symlink_to(victim)
    checkpoint.discard(new)
    for name in ("data", checkpoint.MANIFEST):
        folder.mkdir(exist_ok=True)
        (folder / f".{name}.new").symlink_to(victim)
    (new / "data").write_text("x")
    entry = {"bytes": 1, "crc32": zlib.crc32(b"x")}
    checkpoint.publish(new, {"format": checkpoint.FORMAT, "iteration": 10, "files": {"data": entry}})
    assert checkpoint.latest(root) == (10, [])
    assert not (tmp_path / checkpoint.TRACKER).is_symlink()


def test_a_tokenizers_files_are_not_written_through_links(tmp_path, victim):
    (tmp_path / "model").mkdir()
    byte_level(tmp_path / "model", CUTS[0].patterns)
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).symlink_to(victim)
    options = TokenizerOptions(tokenizer_kwargs={"add_bos_token": False})
    tokenizer = load_tokenizer(options, str(tmp_path / "model"))
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(TokenizerOptions(), str(tmp_path / "out")).encode("a") == tokenizer.encode("a")


def _published(path: Path, content: str, **options: bool) -> None:
    staging = Staging(path, **options)
    (staging.scratch / "config.json").write_text(content)
    staging.publish()


@pytest.mark.parametrize("name", [".out.new", ".out.old", "out"])
def test_links_where_output_is_made_are_not_entered(name, tmp_path, victim):
    (victim.parent / ".unfinished").write_text("")
    (tmp_path / name).symlink_to(victim.parent)
    with pytest.raises(ProblemError):
        _published(tmp_path / "out", "{}", overwrite=True)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ProblemError):
        _published(tmp_path / "out", "{}", overwrite=True)
    assert {path.name for path in victim.parent.iterdir()} == {"thesis", ".unfinished"}


def test_what_a_kill_left_between_the_two_renames_is_replaced(tmp_path):
    _published(tmp_path / "out", "1")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    _published(tmp_path / "out", "2")
    _published(tmp_path / "out", "3", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("finish", [Staging.publish, Staging.discard])
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_while_finishing_output_keeps_no_later_run_from_it(tmp_path, monkeypatch, finish, old):
    """Before every call that changes a name, what is there is what a kill then leaves: each is tried by a later run."""
    if old:
        _published(tmp_path / "out", "1")
    kept = []

    def copy_first(change):
        def changed(path, *arguments, **values):
            kept.append(tmp_path.with_name(f"{tmp_path.name}-{len(kept)}"))
            shutil.copytree(tmp_path, kept[-1])
            return change(path, *arguments, **values)

        return changed

    staging = Staging(tmp_path / "out", overwrite=old)
    (staging.scratch / "config.json").write_text("2")
    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(Path, name, copy_first(getattr(Path, name)))
        finish(staging)
    assert len(kept) >= 2
    for left in kept:
        _published(left / "out", "3", overwrite=True)
        assert [path.name for path in left.iterdir()] == ["out"]
        assert (left / "out" / "config.json").read_text() == "3"


def test_output_that_another_process_completed_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    acquire = lock.acquire

    def completed_first(path: Path) -> lock.Lock:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("1")
        return acquire(path)

    monkeypatch.setattr(lock, "acquire", completed_first)
    with pytest.raises(ProblemError):
        _published(tmp_path / "out", "2")
    assert (tmp_path / "out" / "config.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_small_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    files.write_durably(tmp_path / "note", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_durably(tmp_path / "note", "new")
    assert (tmp_path / "note").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_link_that_changes_while_it_is_judged(tmp_path, secret, monkeypatch):
    """What is judged is what was opened: one that leads elsewhere a moment later gives nothing away."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "LICENSE"
    file.symlink_to(secret)
    resolve = Path.resolve

    def resolved(path, strict=False):
        found = resolve(path, strict)
        if path == file:  # judged as a file of the directory
            return file.parent / "LICENSE"
        return found

    monkeypatch.setattr(Path, "resolve", resolved)
    (tmp_path / "out").mkdir()
    assert files.copy_files([file], tmp_path / "out") == [] and not list((tmp_path / "out").iterdir())


def test_a_scratch_directory_of_another_user_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / ".unfinished").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ProblemError, match="something else is there"):
        Staging(tmp_path / "out")
