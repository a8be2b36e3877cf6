"""Checkpoints in stores that rename nothing: what is whole after a fault anywhere, and what is read of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cordee.checkpoint import assets, directory, files, source, storage
from cordee.checkpoint.storage import Location, location_of
from cordee.checkpoint.storage_lock import StorageLock
from cordee.checkpoint.store import CheckpointStore, restore
from cordee.errors import Problem, ProblemError
from cordee.lock import HeldError
from tests.checkpoint import toy
from tests.checkpoint.stores import ROOT, FaultyStorage, Killed
from tests.problems import facts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(root: Location, iteration: int, seed: int, keep_last: int | None = None) -> None:
    """A checkpoint of the toy model of `seed`, by a process of its own as far as the store can tell."""
    store = CheckpointStore(root, keep_last=keep_last)
    store.save(iteration, *toy.build(seed=seed), {"seed": seed}, background=False)


def load(folder: Location) -> int:
    """The seed that the checkpoint says it is of; every tensor of it is compared with that model's."""
    seed = directory.read_manifest(folder)["seed"]
    model, optimizer = toy.build(seed=seed + 100)
    optimizer.state.clear()
    restore(folder, model, optimizer)
    found, expected = toy.values(model, optimizer), toy.values(*toy.build(seed=seed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return seed


def next_process(root: Location) -> tuple[int, int]:
    """The last good checkpoint, as a run finds it that starts now: its iteration and seed. All others are whole too."""
    directory.tidy(root)
    assert directory.tidy(root) == []  # a second look changes nothing
    last, skipped = directory.latest(root)
    assert last is not None and all(directory.TRACKER in note for note in skipped)  # which may be torn
    for folder in directory.folders(root).values():
        assert directory.damage(folder, contents=directory.read_manifest(folder)["files"]) is None
        load(folder)
    return last, load(directory.folder_of(root, last))


def save_the_next(root: Location) -> None:
    save(root, 30, seed=3)


def save_over_an_older_one(root: Location) -> None:
    save(root, 20, seed=3)


def save_and_remove_the_oldest(root: Location) -> None:
    save(root, 30, seed=3, keep_last=1)


SAVES = [save_the_next, save_over_an_older_one, save_and_remove_the_oldest]
EXPECTED = {(20, 2), (30, 3), (20, 3)}  # iteration and seed: before or after


def begin(root: Location) -> None:
    save(root, 10, seed=1)
    save(root, 20, seed=2)


def folders_of(store: FaultyStorage) -> set[str]:
    return {url.removeprefix(ROOT + "/").partition("/")[0] for url in store.objects} - {directory.TRACKER}


@pytest.mark.parametrize("error", [Killed, OSError])
@pytest.mark.parametrize("tear", [False, True])
@pytest.mark.parametrize("change", SAVES)
def test_a_fault_at_every_operation(change: Callable[[Location], None], tear: bool, error: type[BaseException]):
    """Whichever operation of a save, a replacement or a removal fails or is the last: before or after, bit for bit."""
    store = FaultyStorage()
    begin(store.root)
    before = dict(store.objects)
    store.arm(None)
    change(store.root)
    count, after = len(store.requests), next_process(store.root)
    assert count >= 7 and after != (20, 2)
    seen = set()
    for index in range(count):
        store.objects = dict(before)
        store.arm(index, tear, error)
        with suppress(Killed, ProblemError):
            change(store.root)
        store.arm(None)
        seen.add(next_process(store.root))
        kept = {directory.folder_of(store.root, i).name for i in directory.iterations(store.root)}
        assert folders_of(store) == kept, "something was left"
    assert (20, 2) in seen and seen <= {(20, 2), after}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of this process")
@pytest.mark.parametrize("change", SAVES)
def test_a_kill_at_every_operation_on_files(tmp_path: Path, change: Callable[[Location], None]):
    """The same on a file system, where the process is really killed, before every call that changes files."""
    index, seen = 0, set()
    while True:
        root = location_of(tmp_path / str(index))
        begin(root)
        if (pid := os.fork()) == 0:
            killed_at(index)
            change(root)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen.add(next_process(root))
        assert not list((tmp_path / str(index)).glob(".iter_*"))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        index += 1
    assert index > 10 and len(seen) == 2 and seen <= EXPECTED


def killed_at(index: int) -> None:
    """Kill this process before its call number `index` that changes files."""
    calls = iter(range(index))
    changing = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

    def hook(event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in changing) and next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_lists_that_lag():
    """Who does not see a new checkpoint in the list yet finds the one before."""
    store = FaultyStorage()
    begin(store.root)
    shown = store.list(ROOT)
    save(store.root, 30, seed=3)
    now = store.list
    store.list = lambda folder: shown if folder == ROOT else now(folder)  # type: ignore[method-assign]
    iteration, _ = directory.latest(store.root)
    assert iteration == 20 and load(directory.folder_of(store.root, 20)) == 2


def test_a_save_in_progress_is_no_checkpoint():
    store = FaultyStorage()
    begin(store.root)
    reached, go_on = threading.Event(), threading.Event()

    def wait(operation: str, url: str) -> None:
        if operation == "write" and url.endswith(directory.MANIFEST) and threading.current_thread() != main:
            reached.set()
            assert go_on.wait(30)

    main, store.before = threading.current_thread(), wait
    with CheckpointStore(store.root) as checkpoints:
        checkpoints.save(30, *toy.build(seed=3), {"seed": 3})
        assert reached.wait(30)
        assert directory.latest(store.root) == (20, [])
        assert directory.iterations(store.root) == [20, 10]
        go_on.set()
    assert directory.latest(store.root) == (30, [])


def test_two_writers_of_one_iteration_lose_neither():
    """Should both have taken the lock: what the other is writing is left alone, and the later generation is found."""
    root = Location(FaultyStorage(), ROOT)
    folders = [directory.temporary(root, 20) for _ in range(2)]
    entries = {}
    for folder in folders:
        with (folder / "data").write() as file:
            file.write(folder.name.encode())
        entries[folder] = {"bytes": len(folder.name), "crc32": directory.checksum(folder / "data")}
    for folder in folders:
        directory.publish(folder, {"format": directory.FORMAT, "iteration": 20, "files": {"data": entries[folder]}})
        assert directory.damage(folder, contents=["data"]) is None
    assert directory.latest(root) == (20, []) and directory.folder_of(root, 20) == folders[-1]


def test_a_torn_manifest_is_passed_over_and_a_copied_folder_is_read():
    store = FaultyStorage()
    begin(store.root)
    newest = directory.folder_of(store.root, 20)
    for name in [*directory.read_manifest(newest)["files"], directory.MANIFEST]:  # as a tool that copies would
        store.objects[f"{ROOT}/iter_0000020/{name}"] = store.objects[f"{newest}/{name}"]
    store.objects[f"{newest}/{directory.MANIFEST}"] = store.objects[f"{newest}/{directory.MANIFEST}"][:-9]
    assert directory.folder_of(store.root, 20).name == "iter_0000020"
    assert directory.tidy(store.root) == [newest.name]
    assert next_process(store.root) == (20, 2)


def test_downloaded_checkpoints_are_read_from_files_and_replaced_there(tmp_path: Path):
    store = FaultyStorage()
    begin(store.root)
    for url, data in store.objects.items():
        path = tmp_path / url.removeprefix(ROOT + "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    root = location_of(tmp_path)
    assert directory.latest(root) == (20, [])
    save(root, 20, seed=3)
    assert load(directory.folder_of(root, 20)) == 3
    assert sorted(path.name for path in tmp_path.glob("iter_0000020*")) == ["iter_0000020"]


def test_changed_and_missing_objects():
    store = FaultyStorage()
    begin(store.root)
    folder = directory.folder_of(store.root, 20)
    data = store.objects[f"{folder}/__0_0.distcp"]
    store.objects[f"{folder}/__0_0.distcp"] = data[:-1] + bytes([data[-1] ^ 1])
    assert directory.damage(folder) is None
    assert directory.damage(folder, contents=["__0_0.distcp"]) is not None
    del store.objects[f"{folder}/__0_0.distcp"]
    assert directory.latest(store.root)[0] == 10
    assert directory.tidy(store.root) == [], "damaged ones are left to the user"


# ---- reading by ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [32, 256, files.RANGE])
@pytest.mark.parametrize(
    "index", [None, (slice(2, 9),), (slice(None), slice(1, 2)), (slice(3, 12), slice(2, 7)), (slice(4, 4), slice(0, 8))]
)
def test_slices(monkeypatch: pytest.MonkeyPatch, limit: int, index):
    monkeypatch.setattr(files, "RANGE", limit)
    store = FaultyStorage()
    begin(store.root)
    folder = directory.folder_of(store.root, 20)
    expected = toy.values(toy.build(seed=2)[0])["0.weight"]
    metadata = files.read_metadata(folder)
    found = files.read_tensor(folder, metadata, "model.0.weight", index)
    assert torch.equal(found, expected if index is None else expected[index])


def test_only_what_is_needed_is_transferred():
    store, rows = FaultyStorage(), 4096
    model = torch.nn.Linear(1024, rows, bias=False)  # 16 MiB
    CheckpointStore(store.root).save(1, model, None, {}, background=False)
    folder = directory.folder_of(store.root, 1)
    metadata = files.read_metadata(folder)
    store.arm(None)
    found = files.read_tensor(folder, metadata, "model.weight", (slice(100, 200),))
    assert torch.equal(found, model.weight[100:200])
    sizes = [size for operation, _, size in store.requests if operation == "read"]
    assert 100 * 4096 in sizes and sum(sizes) < 100 * 4096 + 8 * storage.BUFFER


def test_no_read_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "RANGE", 2**20)
    store, model = FaultyStorage(), torch.nn.Linear(1024, 4096, bias=False)
    CheckpointStore(store.root).save(1, model, None, {}, background=False)
    folder = directory.folder_of(store.root, 1)
    metadata = files.read_metadata(folder)
    store.arm(None)
    found = files.read_tensor(folder, metadata, "model.weight", (slice(None), slice(0, 512)))
    assert torch.equal(found, model.weight[:, :512])
    assert max(size for operation, _, size in store.requests if operation == "read") <= 2**20


# ---- fsspec ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "shared"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    place = location_of(f"{request.param}://{tmp_path}/run")
    assert isinstance(place, Location)
    request.addfinalizer(lambda: place.storage.delete(place.url))
    return place


def test_round_trip_by_fsspec(root: Location):
    begin(root)
    save(root, 20, seed=3)
    save(root, 30, seed=4, keep_last=2)
    assert directory.iterations(root) == [30, 20]
    assert next_process(root) == (30, 4)
    assert root.storage.size(f"{root}/absent") is None and root.storage.list(f"{root}/absent") == []
    assert {place.name.partition(".")[0] for place in root.iterdir()} == {
        "iter_0000020",
        "iter_0000030",
        directory.TRACKER.partition(".")[0],
    }
    (root / "absent").delete()


def test_an_interrupted_save_by_fsspec(root: Location):
    begin(root)
    new = directory.temporary(root, 30)
    assert isinstance(new, Location)
    with (new / "__0_0.distcp").write() as file:
        file.write(b"half")
    assert directory.latest(root) == (20, [])
    assert directory.tidy(root) == [new.name]
    assert not new.is_dir()


def save_sharded(rank: int, world_size: int, url: str, dim: int) -> dict[str, torch.Tensor]:
    model, optimizer = toy.build(world_size, dim=dim)
    with CheckpointStore(location_of(url), group=toy.background()) as store:
        store.save(1, model, optimizer, {"ranks": world_size})
        store.save(1, model, optimizer, {"ranks": world_size})
    return toy.values(model, optimizer)


def load_sharded(rank: int, world_size: int, url: str, dim: int) -> dict[str, torch.Tensor]:
    model, optimizer = toy.build(world_size, seed=rank + 5, dim=dim)
    optimizer.state.clear()
    restore(directory.folder_of(location_of(url), 1), model, optimizer, group=toy.background())
    return toy.values(model, optimizer)


def test_ranks_write_and_other_ranks_read(tmp_path: Path, pool):
    url = f"shared://{tmp_path}/run"
    saved = pool.run(save_sharded, 2, url, 0)[0]
    assert len(list(tmp_path.glob("run/iter_*"))) == 1
    for ranks in (2, 4):
        for found in pool.run(load_sharded, ranks, url, 1):
            assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_assets_are_brought(root: Location):
    begin(root)
    checkpoint = directory.folder_of(root, 20)
    assert not assets.are_in(root) and assets.beside(checkpoint) is None
    with assets.put_into(root) as scratch:
        (scratch / "tokenizer.json").write_bytes(b"{}")
        (scratch / "generation_config.json").write_bytes(b"[]")
    found = assets.beside(checkpoint)
    assert found is not None and assets.are_in(root)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        "tokenizer.json": b"{}",
        "generation_config.json": b"[]",
    }


@pytest.mark.parametrize("given", ["/tmp/run", "run", "./a:b", "C:/run", "iter_1"])
def test_plain_paths_are_local(given: str):
    assert location_of(given).local == Path(given)


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_path_behind_a_scheme_is_that_path(scheme: str):
    assert location_of(f"{scheme}:///tmp/run/") == location_of("/tmp/run")


def test_a_location_is_one_whatever_it_was_reached_by():
    assert location_of("memory://bucket/run/iter_0000010").parent == location_of("memory://bucket/run")


def test_an_error_of_who_writes_stays_what_it_is():
    with pytest.raises(ProblemError), location_of("memory://bucket/x").write():
        raise ProblemError([Problem("--save", None, "why", "fix")])


def test_a_scheme_that_nobody_knows():
    with pytest.raises(ProblemError) as caught:
        location_of("nowhere://bucket", "--save")
    assert [(problem.option, problem.value) for problem in caught.value.problems] == [("--save", "nowhere://bucket")]


def test_what_is_no_checkpoint_there(root: Location):
    with pytest.raises(ProblemError) as caught:
        source.read(root)
    assert [(problem.option, str(problem.value)) for problem in caught.value.problems] == [("checkpoint", str(root))]


# ---- the lock --------------------------------------------------------------------------------------------------------

BEAT = 0.3


def test_a_record_that_is_being_written_is_no_loss():
    store, writing, gate = FaultyStorage(), threading.Event(), threading.Event()

    def tear(operation: str, url: str) -> None:
        if operation == "write" and not gate.is_set():
            store.objects.pop(url)
            writing.set()
            assert gate.wait(30)

    with StorageLock(store.root / ".lock", BEAT) as held, ThreadPoolExecutor(1) as threads:
        store.before = tear
        assert writing.wait(30)
        asked = threads.submit(held.require_held)
        wait([asked], timeout=BEAT)
        gate.set()
        assert asked.result(30) is None


def test_a_second_run_is_refused_until_the_first_is_done():
    store = FaultyStorage()
    with StorageLock(store.root / ".lock", BEAT):
        with pytest.raises(HeldError) as caught:
            StorageLock(store.root / ".lock", BEAT)
        assert caught.value.holder is not None and caught.value.holder.pid == os.getpid()
    assert not store.objects
    StorageLock(store.root / ".lock", BEAT).release()


@pytest.mark.parametrize("record", [b"", b"{}", b'{"holder": {"pid": 1}}'])
def test_what_a_killed_run_left_is_taken_over(record: bytes):
    store = FaultyStorage()
    store.objects[f"{ROOT}/.lock"] = record
    StorageLock(store.root / ".lock", BEAT).release()
    assert not store.objects


def test_who_lost_the_lock_says_so_and_leaves_it(caplog: pytest.LogCaptureFixture):
    store = FaultyStorage()
    lock = StorageLock(store.root / ".lock", BEAT)
    store.objects[f"{ROOT}/.lock"] = b"another's"
    lock.release()
    assert store.objects == {f"{ROOT}/.lock": b"another's"}
    assert [record.levelname for record in caplog.records if "lock" in record.message] == ["ERROR"]


class Stopped(StorageLock):
    """Of a process whose heartbeat has stopped."""

    def _beat(self) -> None:
        pass


def test_who_lost_the_lock_saves_no_more():
    """The first run is stopped for longer than a lease; meanwhile a second one takes its place and saves."""
    store = FaultyStorage()
    first = Stopped(store.root / ".lock", BEAT)
    own, other = toy.build(seed=1), toy.build(seed=2)
    with CheckpointStore(store.root, lock=first) as checkpoints:
        checkpoints.save(10, *own, {"seed": 1})
        checkpoints.wait()
        with StorageLock(store.root / ".lock", BEAT) as second:
            CheckpointStore(store.root, lock=second).save(20, *other, {"seed": 2}, background=False)
            before = {url: data for url, data in store.objects.items() if not url.endswith(".lock")}
            for background in (False, True):
                with pytest.raises(ProblemError) as caught:
                    checkpoints.save(30, *own, {"seed": 1}, background=background)
                    checkpoints.wait()
                assert facts(caught) == [("--save", ROOT, "taken")]
            assert {url: data for url, data in store.objects.items() if not url.endswith(".lock")} == before
            CheckpointStore(store.root, lock=second).save(30, *other, {"seed": 2}, background=False)
    first.release()
    assert next_process(store.root) == (30, 2)


def test_a_lock_that_is_lost_while_writing_publishes_nothing():
    store = FaultyStorage()
    lock = Stopped(store.root / ".lock", BEAT)
    begin(store.root)

    def take(operation: str, url: str) -> None:
        if operation == "write" and url.endswith(files.METADATA):
            store.objects[f"{ROOT}/.lock"] = b"another's"

    store.before = take
    with pytest.raises(ProblemError) as caught:
        CheckpointStore(store.root, lock=lock).save(30, *toy.build(seed=3), {"seed": 3}, background=False)
    assert facts(caught) == [("--save", ROOT, "taken")]
    assert directory.latest(store.root) == (20, [])
