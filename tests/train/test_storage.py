"""Runs whose checkpoints are in a store: the same losses, on another layout too, and what is refused before a start."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem

from cordee.checkpoint import directory
from cordee.checkpoint.storage import Location, location_of
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.errors import ProblemError
from cordee.train import job, objectives, outputs
from cordee.train.objectives.next_token import NextToken
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.checkpoint.stores import SHARED
from tests.problems import facts
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def stored(folder: Path, scheme: str = SHARED, **options) -> TrainConfig:
    metrics = str(folder / "metrics.jsonl")
    return tiny.config(
        folder, save=f"{scheme}://{folder}/store", metrics_file=metrics, train_iters=4, keep_last=1, **options
    )


def train_rank(rank: int, world_size: int, given: TrainConfig):
    """As that of `tiny`, in a process that has read what makes `SHARED` known."""
    return tiny.train_rank(rank, world_size, given)


def losses(given: TrainConfig) -> list[float]:
    beside = replace(given, save=str(Path(given.metrics_file or "").parent))
    return tiny.losses(beside)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    given = tiny.config(tmp_path_factory.mktemp("local"), train_iters=4)
    job.run(given)
    return tiny.losses(given)


@pytest.mark.parametrize("scheme", ["memory", SHARED])
def test_one_process_stops_and_resumes(tmp_path: Path, expected: list[float], scheme: str):
    given = stored(tmp_path, scheme)
    root = location_of(given.save or "")
    job.run(replace(given, exit_interval=2))
    assert directory.latest(root) == (2, [])
    job.run(tiny.resumed(given))
    assert losses(given) == expected
    assert directory.latest(root) == (4, []) and directory.iterations(root) == [4]
    exported = tmp_path / "hf"
    convert.run(ConvertConfig(load_dir=given.save or "", save_dir=str(exported), verify=True))
    assert (exported / "config.json").is_file()
    root.delete()


@pytest.mark.slow
def test_another_layout_resumes(tmp_path: Path, expected: list[float], pool):
    given = stored(tmp_path, tensor_model_parallel_size=2, nproc_per_node=2)
    pool.run(train_rank, 2, replace(given, exit_interval=2))
    pool.run(train_rank, 2, tiny.resumed(given, tensor_model_parallel_size=1, zero_stage=2))
    assert losses(given) == pytest.approx(expected, rel=1e-5)
    assert directory.iterations(location_of(given.save or "")) == [4]


@pytest.mark.parametrize("scheme", [SHARED, "file"])
def test_a_second_run_is_refused(tmp_path: Path, scheme: str):
    given = stored(tmp_path, scheme)
    with outputs.held(given), pytest.raises(ProblemError) as caught, outputs.held(replace(given, metrics_file=None)):
        pass
    assert [(problem.option, problem.value) for problem in caught.value.problems] == [("--save", given.save)]


def test_a_path_and_its_url_are_one(tmp_path: Path):
    given = replace(stored(tmp_path, "file"), metrics_file=None)
    assert outputs.metrics_path(given) == tmp_path / "store" / outputs.METRICS
    by_path = replace(given, save=str(tmp_path / "store"))
    with outputs.held(given), pytest.raises(ProblemError) as caught, outputs.held(by_path):
        pass
    assert [(problem.option, problem.value) for problem in caught.value.problems] == [("--save", by_path.save)]


class Loses(NextToken):
    """In its third step, of one micro-batch each, another run takes the lock at `lock`."""

    stage = "loses"

    def __init__(self, lock: Location):
        self.lock = lock
        self.steps = 0

    def loss(self, head, hidden, batch, reduce):
        self.steps += 1
        if self.steps == 3:
            self.lock.write_text("another's")
        return super().loss(head, hidden, batch, reduce)


@pytest.mark.parametrize("scheme", [None, "memory"])
def test_a_run_that_loses_its_lock_stops_at_the_next_save(tmp_path: Path, monkeypatch, scheme: str | None):
    places = {"save": str(tmp_path / "run")} if scheme is None else {}
    given = replace(stored(tmp_path, scheme or SHARED, stage="loses", micro_batch_size=8, async_save=False), **places)
    root = location_of(given.save or "")
    monkeypatch.setitem(objectives.registry(), "loses", Loses(root / outputs.LOCK))
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    assert facts(caught) == [("--save", given.save, "taken")]
    assert directory.iterations(root) == [2] and directory.tidy(root) == []
    root.delete()


def test_what_is_not_written_is_said(tmp_path: Path):
    given = stored(tmp_path)
    assert not any(outputs.METRICS in note for note in plan_run(given, 1).notes)
    assert any(outputs.METRICS in note for note in plan_run(replace(given, metrics_file=None), 1).notes)


def test_another_run_is_not_overwritten(tmp_path: Path):
    given = stored(tmp_path)
    job.run(replace(given, exit_interval=2))
    with pytest.raises(ProblemError) as caught:
        plan_run(given, 1)
    assert [problem.option for problem in caught.value.problems] == ["--save"]
    with pytest.raises(ProblemError) as caught:
        plan_run(replace(given, load=f"{given.save}-elsewhere"), 1)
    assert [problem.option for problem in caught.value.problems] == ["--load"]


class Refusing(AbstractFileSystem):
    """A store that lets nobody in; packages tell that in their own ways."""

    def info(self, path: str, **kwargs):
        raise PermissionError("Forbidden") if "forbidden" in path else RuntimeError("no credentials")

    def ls(self, path: str, detail: bool = True, **kwargs):
        return self.info(path)


@pytest.mark.parametrize(
    "url", ["nowhere://bucket/run", "s3://bucket/run", "refusing://forbidden/run", "refusing://bucket/run"]
)
def test_what_cannot_be_reached_is_found_before_a_start(tmp_path: Path, url: str):
    """A scheme that nobody knows, one whose package is not installed here, places that refuse."""
    if url.startswith("s3:") and find_spec("s3fs") is not None:
        pytest.skip("the package is installed")
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    given = stored(tmp_path)
    found = check_run(replace(given, save=url))
    assert [(problem.option, problem.value) for problem in found] == [("--save", url)]
    found = check_run(replace(given, load=url))
    assert [(problem.option, problem.value) for problem in found] == [("--load", url)]
    found = convert.check_run(ConvertConfig(load_dir=url, save_dir=str(tmp_path / "out")))
    assert [problem.value for problem in found] == [url]
