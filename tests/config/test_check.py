"""Rules between options: each finds its problem, and a sound run has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cordee.config import laws
from cordee.data.options import PreprocessConfig
from cordee.errors import Problem
from cordee.evaluate import job as evaluate
from cordee.evaluate.options import EvaluateConfig
from cordee.generate import job as generate
from cordee.generate.options import GenerateConfig
from cordee.train import plan
from cordee.train.options import TrainConfig

SOUND = TrainConfig(
    seq_length=8,
    lr=1e-3,
    min_lr=1e-4,
    train_iters=100,
    lr_warmup_iters=10,
    data_path=("a",),
    nproc_per_node=2,
    micro_batch_size=2,
    global_batch_size=8,
    save="there",
    save_interval=10,
)
IN_SAMPLES = replace(SOUND, train_iters=None, train_samples=1000, lr_warmup_iters=0)

CHECKS = {
    TrainConfig: plan.option_problems,
    GenerateConfig: generate.option_problems,
    EvaluateConfig: evaluate.option_problems,
    PreprocessConfig: laws.problems,
}


def check(config) -> list[Problem]:
    return list(CHECKS[type(config)](config))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As if no launcher had started the tests."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"global_batch_size": None},
        {"bf16": True, "initial_loss_scale": 65536.0},
        {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.1, "end_weight_decay": 0.1},
        {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.1},
        {"skip_train": True, "train_iters": None},
        {"max_position_embeddings": 8},
    ],
)
def test_sound_runs(change):
    assert check(replace(SOUND, **change)) == []


def test_sound_run_in_samples():
    assert check(IN_SAMPLES) == []
    assert check(replace(IN_SAMPLES, rampup_batch_size=(4, 4, 100), lr_warmup_samples=10)) == []


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"global_batch_size": 6}, ["--global-batch-size"]),
        ({"global_batch_size": 2}, ["--global-batch-size"]),
        ({"train_samples": 10}, ["--train-samples", "--lr-warmup-iters"]),
        ({"train_iters": None, "lr_warmup_iters": 0}, ["--train-iters"]),
        ({"max_position_embeddings": 4}, ["--seq-length"]),
        ({"rampup_batch_size": (4, 4, 100)}, ["--rampup-batch-size"]),
        ({"min_lr": 1.0}, ["--min-lr"]),
        ({"lr_warmup_init": 1.0}, ["--lr-warmup-init"]),
        ({"lr_warmup_fraction": 0.1}, ["--lr-warmup-iters"]),
        ({"lr_warmup_iters": 100}, ["--lr-warmup-iters"]),
        ({"lr_decay_iters": 10}, ["--lr-warmup-iters"]),
        ({"lr_warmup_samples": 3}, ["--lr-warmup-samples"]),
        ({"lr_decay_samples": 3}, ["--lr-decay-samples"]),
        ({"start_weight_decay": 0.1}, ["--start-weight-decay"]),
        ({"weight_decay_incr_style": "linear"}, ["--start-weight-decay", "--end-weight-decay"]),
        (
            {"weight_decay_incr_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            ["--start-weight-decay"],
        ),
        (
            {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
            ["--use-checkpoint-opt-param-scheduler"],
        ),
        ({"fp16": True, "bf16": True}, ["--fp16"]),
        ({"loss_scale": 8.0}, ["--loss-scale"]),
        ({"fp16": True, "min_loss_scale": 2.0**40}, ["--min-loss-scale"]),
        ({"save_interval": None}, []),
        ({"save": None, "keep_last": 3}, ["--save-interval", "--keep-last"]),
        ({"finetune": True}, ["--finetune"]),
        ({"ckpt_step": 3, "exit_on_missing_checkpoint": True}, ["--ckpt-step", "--exit-on-missing-checkpoint"]),
        ({"skip_train": True, "eval_iters": 0}, ["--skip-train"]),
        ({"manual_gc_interval": 3}, ["--manual-gc-interval"]),
        ({"overlap_param_gather": True, "delay_param_gather": True}, ["--overlap-param-gather"]),
    ],
)
def test_each_rule(change, options):
    found = check(replace(SOUND, **change))
    assert [problem.option for problem in found] == options
    assert all(problem.why and problem.fix for problem in found)


@pytest.mark.parametrize(
    ("ramp", "end", "kind", "limit"),
    [
        ((2, 4, 100), 8, "divisible", ("start", 4)),
        ((4, 2, 100), 8, "divisible", ("increment", 4)),
        ((4, 8, 100), 8, "reaches", 8),
        ((12, 4, 100), 8, "reaches", 8),
        ((4, 4, 100), None, "requires", "--global-batch-size"),
    ],
)
def test_rampup(ramp, end, kind, limit):
    found = check(replace(IN_SAMPLES, rampup_batch_size=ramp, global_batch_size=end))
    assert {problem.option for problem in found} == {"--rampup-batch-size"}
    assert (kind, limit) in [(problem.kind, problem.limit) for problem in found]


def test_all_at_once():
    bad = replace(SOUND, global_batch_size=7, min_lr=1.0, fp16=True, bf16=True, finetune=True)
    assert {problem.option for problem in check(bad)} == {"--global-batch-size", "--min-lr", "--fp16", "--finetune"}


def test_the_launcher_counts_the_processes(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    found = {problem.option: problem for problem in check(SOUND)}
    assert (found["--global-batch-size"].kind, found["--global-batch-size"].limit) == ("divisible", 16)
    assert (found["--nproc-per-node"].kind, found["--nproc-per-node"].limit) == ("launched", 4)
    assert check(replace(SOUND, nproc_per_node=None, global_batch_size=32)) == []


def options(found):
    return [problem.option for problem in found]


def test_generate():
    sound = GenerateConfig(load="x", prompt=("hi",))
    assert check(sound) == []
    assert check(replace(sound, do_sample=True, top_k=3, temperature=0.5, num_return_sequences=2)) == []
    assert options(check(replace(sound, prompt=()))) == ["--prompt"]
    assert options(check(replace(sound, prompts_file="f"))) == ["--prompts-file"]
    assert options(check(replace(sound, top_p=0.9, num_return_sequences=2))) == ["--num-return-sequences", "--top-p"]


def test_evaluate():
    sound = EvaluateConfig(load="x", task_data_path=("t",), seq_length=64, stride=32)
    assert check(sound) == []
    assert options(check(replace(sound, stride=65, task_data_path=()))) == ["--task-data-path", "--stride"]


def test_preprocess():
    assert check(PreprocessConfig(output_prefix="o", input="i")) == []
    assert check(PreprocessConfig(output_prefix="o", hf_datasets_params="p")) == []
    assert options(check(PreprocessConfig(output_prefix="o"))) == ["--input"]
    assert options(check(PreprocessConfig(output_prefix="o", merge_group_keys=("a",)))) == ["--merge-group-keys"]
