"""W&B, by a stand-in for its package that keeps what it is told in files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cordee.train import job
from cordee.train.plan import check_run
from tests.train import tiny

KEY = "0123456789abcdef0123456789abcdef01234567"
FAKE = """
import json, os
from pathlib import Path
from wandb.errors import Error

class Run:
    def __init__(self, told, mode):
        self.file = Path(told["dir"]) / "wandb" / f"{mode}-run.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        runs = self.file.read_text().count('"init"') if self.file.exists() else 0
        self.id = told["id"] or os.environ.get("WANDB_RUN_ID") or f"run{runs}"
        self.starting_step = int(os.environ.get("FAKE_HAS", -1)) + 1
        self.tell("init", told | {"id": self.id})

    def tell(self, what, told):
        with self.file.open("a") as file:
            file.write(json.dumps([what, told]) + "\\n")

    def log(self, values, *, step):
        if step == int(os.environ.get("FAKE_FAILS_AT", -1)):
            raise Error(f"no connection with {os.environ['WANDB_API_KEY']}")
        self.tell("log", [step, values])

    def finish(self):
        self.tell("finish", None)

def init(*, project, name, dir, config, id, resume):
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and "WANDB_API_KEY" not in os.environ:
        raise Error("not logged in")
    return Run({"project": project, "name": name, "dir": dir, "config": config, "id": id, "resume": resume}, mode)
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch):
    """The stand-in, in front of whatever else is installed."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (package / "errors.py").write_text("class Error(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(package.parent)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def config(folder: Path, **options: Any):
    defaults = {"micro_batch_size": 8, "train_iters": 4, "eval_iters": 1, "eval_interval": 2, "wandb_project": "climbs"}
    return tiny.config(folder, **{**defaults, **options})


def told(folder: Path, mode: str = "offline") -> list[tuple[str, Any]]:
    return [tuple(json.loads(line)) for line in (folder / "wandb" / f"{mode}-run.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_offline(tmp_path: Path, wandb, monkeypatch, place: str | None):
    """Everything that metrics.jsonl has, by iteration; beside the checkpoints, if no other place is given."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = config(tmp_path, wandb_exp_name="first", wandb_save_dir=place and str(tmp_path / place))
    assert check_run(given) == []
    assert job.run(given) == 0
    folder = Path(given.wandb_save_dir or given.save or "")
    first, *logged, last = told(folder)
    assert first[0] == "init" and (first[1]["project"], first[1]["name"]) == ("climbs", "first")
    assert first[1]["config"]["lr"] == given.lr
    assert last == ("finish", None)
    steps = [step for _, (step, _) in logged]
    assert steps == sorted(steps)  # W&B drops what goes back
    trained = {step: values["lm loss"] for _, (step, values) in logged if "lm loss" in values}
    assert trained == {i: record["loss"] for i, record in tiny.records(given).items()}
    validated = {step: v["lm loss validation"] for _, (step, v) in logged if "lm loss validation" in v}
    assert validated == {i: record["loss"] for i, record in tiny.records(given, "validation").items()}


def test_beside_tensorboard_at_its_interval(tmp_path: Path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = config(tmp_path, tensorboard_dir=str(tmp_path / "board"), tensorboard_log_interval=2, eval_iters=0)
    assert job.run(given) == 0
    assert [step for what, values in told(Path(given.save or "")) if what == "log" for step in values[:1]] == [2, 4]
    assert list((tmp_path / "board").glob("events*"))


def test_a_run_that_resumes_continues_its_wandb_run(tmp_path: Path, wandb, monkeypatch):
    """Which has the third step already, of which no checkpoint is left."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = config(tmp_path, exit_interval=2, eval_iters=0)
    job.run(given)
    monkeypatch.setenv("FAKE_HAS", "3")
    job.run(tiny.resumed(given))
    found = told(Path(given.save or ""))
    assert [(values["id"], values["resume"]) for what, values in found if what == "init"] == [("run0", "allow")] * 2
    assert [values[0] for what, values in found if what == "log"] == [1, 2, 4]


def test_other_runs_of_wandb(tmp_path: Path, wandb, monkeypatch):
    """Where only the weights are taken, and where the user names one."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = config(tmp_path, exit_interval=2, eval_iters=0, wandb_save_dir=str(tmp_path / "wandb"))
    job.run(given)
    job.run(tiny.resumed(given, finetune=True, save=str(tmp_path / "tuned"), exit_interval=2))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    job.run(tiny.resumed(given))
    ids = [values["id"] for what, values in told(tmp_path / "wandb") if what == "init"]
    assert ids == ["run0", "run1", "mine"]


def test_without_a_login_the_run_trains_and_says_so(tmp_path: Path, wandb, capsys):
    given = config(tmp_path)
    assert job.run(given) == 0
    assert capsys.readouterr().err.count("W&B project climbs gets no more metrics") == 1
    assert len(tiny.losses(given)) == 4


def test_a_lost_connection_ends_no_run_and_tells_no_key(tmp_path: Path, wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("FAKE_FAILS_AT", "2")
    given = config(tmp_path)
    assert job.run(given) == 0
    said = "".join(capsys.readouterr())
    assert said.count("W&B project climbs gets no more metrics") == 1 and KEY not in said
    assert [values[0] for what, values in told(Path(given.save or ""), "online") if what == "log"] == [1]
    kept = [file for file in Path(given.save or "").rglob("*") if file.is_file()]
    assert kept and not [file for file in kept if KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize("directory", [False, True])
def test_a_package_that_is_missing_is_found_by_check(tmp_path: Path, monkeypatch, directory: bool):
    """A directory of that name, as W&B makes one where it runs, is none."""
    if directory:
        (tmp_path / "here" / "wandb").mkdir(parents=True)
    others = [path for path in sys.path if not (Path(path) / "wandb").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *others])
    forget()
    (problem,) = check_run(config(tmp_path))
    assert (problem.option, problem.kind, problem.limit) == ("--wandb-project", "missing", "wandb")
    assert check_run(config(tmp_path, wandb_project="")) == []


def test_a_place_that_is_none(tmp_path: Path, wandb):
    (tmp_path / "file").write_text("no directory")
    (problem,) = check_run(config(tmp_path, wandb_save_dir=str(tmp_path / "file")))
    assert (problem.option, problem.kind) == ("--wandb-save-dir", "unwritable")
