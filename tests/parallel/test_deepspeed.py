"""DeepSpeed's configuration file as options of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cordee.config.load import config_from_dict, load_config
from cordee.config.render import to_yaml
from cordee.errors import ProblemError
from cordee.parallel.deepspeed import check, read
from cordee.train import plan
from cordee.train.options import TrainConfig

NEEDED = ["--seq-length", "8", "--lr", "1e-3", "--train-iters", "1", "--nproc-per-node", "2"]

# The fields of AscendSpeed's scripts that train with ZeRO.
SCRIPT: dict[str, Any] = {
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "initial_scale_power": 8,
        "hysteresis": 3,
        "min_loss_scale": 1,
    },
    "optimizer": {"type": "Adam"},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": 4,
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
}


def told(config: TrainConfig):
    """What is wrong with a run of two processes, and with the file against it."""
    assert config.deepspeed_config is not None
    return [*plan.option_problems(config), *check(config, read(config.deepspeed_config), 2)]


@pytest.fixture
def load(tmp_path: Path):
    """What becomes of a file with these contents and of more flags."""

    def load(contents: object, *flags: str):
        file = tmp_path / "ds.json"
        file.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return load_config(TrainConfig, [*NEEDED, "--deepspeed", "--deepspeed_config", str(file), *flags])

    return load


def test_the_fields_of_a_script(load):
    loaded = load(SCRIPT)
    config = loaded.config
    assert (config.zero_stage, config.fp16, config.bf16, config.loss_scale) == (2, True, False, None)
    assert (config.initial_loss_scale, config.loss_scale_window) == (256.0, 500)
    assert (config.hysteresis, config.min_loss_scale) == (3, 1.0)
    assert (config.global_batch_size, config.micro_batch_size) == (16, 2)
    assert loaded.origins["zero_stage"].endswith("ds.json: zero_optimization.stage")
    assert told(config) == []
    (note,) = read(config.deepspeed_config).ignored()
    for field in ("optimizer.type", "zero_optimization.overlap_comm", "zero_allow_untested_optimizer"):
        assert field in note
    assert "stage" not in note and "accumulation" not in note and "fp16" not in note


def test_bfloat16_clipping_and_what_is_left_automatic(load):
    contents = {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 64},
        "gradient_clipping": 0.5,
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
    }
    config = load(contents).config
    assert (config.bf16, config.fp16, config.loss_scale, config.clip_grad) == (True, False, None, 0.5)
    assert config.global_batch_size is None
    assert told(config) == []
    assert "fp16.loss_scale" in next(read(config.deepspeed_config).ignored())


def test_flags_that_agree_and_flags_that_do_not(load):
    assert told(load(SCRIPT, "--zero-stage", "2", "--fp16").config) == []
    config = load(SCRIPT, "--use-distributed-optimizer", "--micro-batch-size", "1", "--bf16", "--no-fp16").config
    assert (config.zero_stage, config.micro_batch_size, config.fp16) == (1, 1, False)
    found = {problem.option: problem for problem in told(config)}
    assert set(found) == {"--zero-stage", "--micro-batch-size", "--fp16", "--global-batch-size"}
    assert (found["--zero-stage"].value, found["--zero-stage"].limit) == (1, 2)
    assert all("deepspeed_config" in problem.names for option, problem in found.items() if option != "--fp16")
    assert found["--global-batch-size"].kind == "accumulates"


def test_passes_without_a_batch_size(load):
    contents = {"gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 2}
    (problem,) = told(load(contents).config)
    assert (problem.option, problem.kind, problem.limit) == ("--global-batch-size", "accumulates", 12)
    assert told(load(contents, "--global-batch-size", "12").config) == []
    (problem,) = told(load({"gradient_accumulation_steps": "many"}).config)
    assert (problem.option.split(" ")[0], problem.value) == ("gradient_accumulation_steps", "many")


def test_values_that_options_cannot_take_are_told_together(load):
    contents = {
        "zero_optimization": {"stage": 4},
        "fp16": {"enabled": True, "initial_scale_power": "big", "hysteresis": 1.5},
    }
    with pytest.raises(ProblemError) as caught:
        load(contents)
    told = {problem.option.split(" ")[0] for problem in caught.value.problems}
    assert told == {"zero_optimization.stage", "fp16.initial_scale_power", "fp16.hysteresis"}


@pytest.mark.parametrize("contents", ["{", "[1]"])
def test_files_that_are_none(load, contents: str):
    with pytest.raises(ProblemError) as caught:
        load(contents)
    assert [(problem.option, problem.kind) for problem in caught.value.problems] == [
        ("--deepspeed-config", "unreadable")
    ]


def test_a_file_that_is_missing(tmp_path: Path):
    path = str(tmp_path / "absent.json")
    with pytest.raises(ProblemError) as caught:
        load_config(TrainConfig, [*NEEDED, "--deepspeed-config", path])
    (problem,) = caught.value.problems
    assert (problem.option, problem.value, problem.kind) == ("--deepspeed-config", path, "unreadable")


def test_the_switch_alone_means_nothing():
    (problem,) = plan.option_problems(load_config(TrainConfig, [*NEEDED, "--deepspeed"]).config)
    assert problem.option == "--deepspeed"


def test_python_and_files_of_a_run_read_it_too(load, tmp_path: Path):
    loaded = load(SCRIPT)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(loaded))
    assert load_config(TrainConfig, ["--config", str(file)]).config == loaded.config
    given = {"seq_length": 8, "lr": 1e-3, "train_iters": 1, "nproc_per_node": 2}
    given["deepspeed_config"] = loaded.config.deepspeed_config
    assert config_from_dict(TrainConfig, given).zero_stage == 2
    unread = TrainConfig(**given)  # made by hand, it says something else than the file
    assert "--zero-stage" in {problem.option for problem in told(unread)}
