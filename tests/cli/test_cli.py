"""The command line: what is printed, which job runs, and with which exit code it ends."""

from __future__ import annotations

import shlex
import subprocess
import sys
import types
from unittest.mock import Mock

import pytest

import cordee
from cordee import cli, supervisor
from cordee.cli import COMMANDS, main
from cordee.config import laws
from cordee.errors import Problem, ProblemError
from cordee.train import plan
from cordee.train.options import TrainConfig

TRAIN = ["--seq-length", "8", "--lr", "1e-3", "--train-iters", "5", "--data-path", "corpus", "--nproc-per-node", "1"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As if no launcher had started the tests."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "CORDEE_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def jobs(monkeypatch):
    """Stand-ins for all jobs, which check only what options are together; the list holds what was run with which."""
    ran: list[tuple[str, object]] = []
    for command, entry in COMMANDS.items():
        if entry.job:
            module = types.ModuleType(entry.job)
            module.run = lambda config, command=command: ran.append((command, config)) or 0
            module.check_run = lambda config: list(laws.problems(config))
            monkeypatch.setitem(sys.modules, entry.job, module)
    module = types.ModuleType("cordee.train.plan")
    module.check_run = lambda config: list(plan.option_problems(config))
    monkeypatch.setitem(sys.modules, "cordee.train.plan", module)
    checks = types.ModuleType("cordee.train.check")
    checks.check_with_contents = module.check_run
    checks.examine = lambda config: ("described", module.check_run(config))
    monkeypatch.setitem(sys.modules, "cordee.train.check", checks)
    return ran


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview(argv, capsys):
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for command in (*COMMANDS, "models"):
        assert f"\n  {command} " in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cordee {cordee.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cordee {command} ")
    assert COMMANDS[command].about in shown
    assert f"example:\n  cordee {command}" in shown
    for name in COMMANDS[command].schema.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown or name in ("suite", "prefix")


def test_examples_are_valid(jobs, monkeypatch, tmp_path):
    """Every example of a help text loads: its options exist and their values fit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seq_length: 8\nlr: 1e-3\ntrain_iters: 5\ndata_path: corpus\n")
    monkeypatch.setattr(supervisor, "spawn_local", lambda *args, **kwargs: 0)
    for command in COMMANDS.values():
        assert main(shlex.split(command.example.replace("\\\n", " "))[1:]) == 0


@pytest.mark.parametrize(
    ("call", "heavy"),
    [
        ('main(["--help"]), main(["train", "--help"])', {"torch", "numpy", "yaml", "transformers", "rich"}),
        ('assert main(["train", "--sq", "3"]) == 2', {"torch", "transformers", "rich"}),
    ],
)
def test_nothing_heavy_is_imported_for_help_and_errors(call: str, heavy: set[str]):
    code = f"import sys\nfrom cordee.cli import main\n{call}\nprint('found', sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "found []"


def test_python_m_cordee():
    done = subprocess.run([sys.executable, "-m", "cordee", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"cordee {cordee.__version__}\n")


def test_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_problems_are_text_and_exit_code_2(capsys):
    assert main(["train", "--sqe-length", "3", "--lr", "fast"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "problems:\n1. --lr = fast\n" in shown.err
    assert "did you mean --seq-length?" in shown.err
    assert "Traceback" not in shown.err


def test_wrong_values_hide_no_other_problems(capsys, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("micro_batch_size: 0\nsave_interval: 4\nseq_length: 9999\n")
    flags = ["--config", str(config), "--lr", "-1", "--train-itres", "5", "--model", "llama2-7b", "--data-path", "none"]
    assert main(["check", *flags, "--tensor-model-parallel-size", "3"]) == 2
    told = capsys.readouterr().err
    options = [line.split(". ", 1)[1] for line in told.splitlines() if line[0].isdigit() and ". " in line]
    assert options == [  # no length of the run, which may be what --train-itres was to say
        f"micro_batch_size ({config}:1) = 0",
        "--lr = -1",
        "--train-itres = 5",
        f"--save-interval ({config}:2) = 4",
        "dataset = none",
        f"--seq-length ({config}:3) = 9999",
        "--tensor-model-parallel-size = 3",
        "--tensor-model-parallel-size = 3",
    ]
    assert main(["train", "--config", str(tmp_path / "nowhere.yaml"), "--lr", "-1"]) == 2
    assert "2 problems:" in capsys.readouterr().err  # what the file would have said is not known, so no more is found


@pytest.mark.parametrize(
    ("rank", "everywhere", "launcher", "told"),
    [(0, True, "cordee", 1), (1, True, "cordee", 0), (1, False, "cordee", 1), (1, True, "torchrun", 1)],
)
def test_what_all_ranks_find_is_told_once(monkeypatch, capsys, rank: int, everywhere: bool, launcher: str, told: int):
    def fail(argv):
        raise ProblemError([Problem("--lr", 1, "why", "fix")], everywhere)

    monkeypatch.setattr(cli, "_dispatch", fail)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CORDEE_LAUNCHER", launcher)
    assert cli.main([]) == 2
    assert capsys.readouterr().err.count("--lr = 1") == told


def test_each_job_gets_its_configuration(jobs):
    assert main(["convert", "--load-dir", "a", "--save-dir", "b"]) == 0
    assert main(["generate", "--load", "a", "--prompt", "hi"]) == 0
    assert main(["preprocess", "--input", "a", "--output-prefix", "b"]) == 0
    assert main(["evaluate", "--load", "a", "--task-data-path", "b"]) == 0
    assert main(["bench", "train"]) == 0
    assert main(["quickstart"]) == 0
    assert main(["train", *TRAIN]) == 0
    assert [name for name, _ in jobs] == [
        *("convert", "generate", "preprocess", "evaluate", "bench", "quickstart", "train")
    ]
    for name, config in jobs:
        assert isinstance(config, COMMANDS[name].schema)


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--load", "a", "--tensor-model-parallel-size", "2"],
        ["evaluate", "--load", "a", "--nproc-per-node", "2"],
    ],
)
def test_checks_come_before_the_job(monkeypatch, jobs, argv):
    monkeypatch.setattr(supervisor, "spawn_local", lambda *args, **kwargs: jobs.append(args) or 0)
    assert main(argv) == 2
    assert jobs == []


def test_exit_code_of_the_job(monkeypatch, jobs, capsys):
    job = sys.modules["cordee.convert.job"]
    for outcome, code in ((ProblemError([Problem("x", 1, "why", "fix")]), 2), (KeyboardInterrupt(), 130), (3, 3)):
        monkeypatch.setattr(job, "run", Mock(side_effect=[outcome]))
        assert main(["convert", "--load-dir", "a", "--save-dir", "b"]) == code
    assert "1. x = 1" in capsys.readouterr().err


def test_print_config_runs_nothing(jobs, capsys):
    assert main(["train", *TRAIN, "--bf16", "--print-config"]) == 0
    assert jobs == []
    shown = capsys.readouterr().out
    assert any(line.split() == ["bf16:", "true", "#", "--bf16"] for line in shown.splitlines())


def test_check_says_ok_after_what_would_run(jobs, capsys):
    assert main(["check", *TRAIN, "--micro-batch-size", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("described\n") and shown.endswith("\nok\n") and "micro_batch_size: 4" in shown
    assert jobs == []


def test_check_reports_what_train_would(jobs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("\nmin_lr: 1\nfinetune: true\n")
    shown = []
    for command in ("check", "train"):
        assert main([command, *TRAIN, "--config", "run.yaml"]) == 2
        shown.append(capsys.readouterr().err)
    assert shown[0] == shown[1]
    assert "--min-lr (run.yaml:2) = 1.0" in shown[0] and "--finetune (run.yaml:3) = True" in shown[0]
    assert jobs == []


@pytest.fixture
def spawned(monkeypatch):
    """What `spawn_local` was asked for."""
    calls: list[tuple[list[str], int, dict[str, float]]] = []
    monkeypatch.setattr(supervisor, "spawn_local", lambda *args, **named: calls.append((*args, named)) or 7)
    return calls


def test_train_starts_local_processes(jobs, spawned):
    argv = ["train", *TRAIN[:-1], "3", "--exit-grace-seconds", "5"]
    assert main(argv) == 7
    assert spawned == [(argv, 3, {"grace_seconds": 5.0})]
    assert jobs == []


def test_train_uses_all_devices(jobs, spawned, monkeypatch):
    monkeypatch.setitem(sys.modules, "cordee.device", types.SimpleNamespace(count=lambda: 4))
    assert main(["train", *TRAIN[:-2]]) == 7
    assert spawned[0][1] == 4


def test_train_checks_before_it_starts_processes(jobs, spawned, monkeypatch, capsys):
    assert main(["train", *TRAIN[:-1], "2", "--global-batch-size", "3"]) == 2
    assert "--global-batch-size = 3" in capsys.readouterr().err
    assert spawned == []


def test_train_joins_a_launcher(jobs, spawned, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *TRAIN[:-2]]) == 0
    assert spawned == []
    ((_, config),) = jobs
    assert isinstance(config, TrainConfig) and config.nproc_per_node is None
    assert main(["train", *TRAIN[:-2], "--global-batch-size", "3"]) == 2  # the two processes are known


def test_models(capsys):
    assert main(["models"]) == 0
    assert "llama2-7b" in capsys.readouterr().out
    assert main(["models", "show", "llama2-7b"]) == 0
    assert "6,738,415,616" in capsys.readouterr().out
    assert main(["models", "--help"]) == 0
    assert main(["models", "show"]) == 2
    assert main(["models", "show", "llama2-8b"]) == 2
    assert "llama2-7b" in capsys.readouterr().err
