"""`cordee bench rl`: whether a policy learns from a reward that a program gives, by GRPO and by PPO.

The model of --load, such as one of TinyStories, continues short beginnings; it is rewarded for words of a list. Each
objective has a run of its own, alone in this process. With --output a picture of the rewards is beside the report."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cordee.bench.contest import Turn
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.config.load import config_from_dict
from cordee.errors import ProblemError
from cordee.train import job
from cordee.train.options import TrainConfig

PEERS = ()
STEPS, ROLLOUTS, GROUP, LENGTH = 60, 64, 8, 40
WORDS = frozenset(("happy", "smile", "smiled", "fun"))
NAMES = ("Lily", "Tom", "Ben", "Sue", "Max", "Anna", "Tim", "Mia", "Sam", "Jack")
THINGS = ("dog", "cat", "ball", "tree", "bird", "car", "boat", "cake", "star", "fish")
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"lr": 2e-4, "kl_coefficient": 0.02},
    "ppo": {"lr": 5e-4, "kl_coefficient": 0.02, "num_generations": 1, "updates_per_rollout": 2},
}


def joyful(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """The share of words that are glad, of which a fifth is enough."""
    found = ([word.strip('.,!?"').lower() for word in completion.split()] for completion in completions)
    return [min(1.0, 5 * sum(word in WORDS for word in words) / max(len(words), 1)) for words in found]


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Train by both for `config.steps` steps. ProblemError without a model."""
    if config.load is None:
        why, fix = "rewards are of words, which a random model does not write", "give a model of English text"
        raise ProblemError.of("--load", None, why, fix, "missing")
    steps, rewards, seconds = config.steps or STEPS, {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
            for who in NAMES:
                for what in THINGS:
                    record = {"instruction": f"One day, {who} saw a {what}.", "output": "It was fun."}
                    file.write(json.dumps(record) + "\n")
        for stage, options in RUNS.items():
            given = _config(folder, config.load, steps, stage, options)
            began = time.monotonic()
            assert job.run(given) == 0
            seconds[stage] = time.monotonic() - began
            rewards[stage] = _rewards(given)
    if config.output:
        _draw(rewards, Path(config.output).with_suffix(".svg"))
    every = max(1, steps // 12)
    rows = [
        [
            f"{first + 1} to {first + every}",
            *(f"{_mean(curve[first : first + every]):.3f}" for curve in rewards.values()),
        ]
        for first in range(0, steps - every + 1, every)
    ]
    figures = {f"{stage}, seconds": spent for stage, spent in seconds.items()}
    for stage, curve in rewards.items():
        figures |= {f"{stage}, first": _mean(curve[:every]), f"{stage}, last": _mean(curve[-every:])}
    notes = [
        f"mean reward of {ROLLOUTS} rollouts a step of at most {LENGTH} tokens: the share of glad words, of which a "
        f"fifth is enough; {', '.join(f'{stage} {spent:.0f} s' for stage, spent in seconds.items())}",
        f"{config.load}; {config.threads} threads; "
        + "; ".join(f"{name}: {options}" for name, options in RUNS.items()),
    ]
    return Report(title="Rewards", columns=["step", *rewards], rows=rows, figures=figures, notes=notes)


def _config(folder: Path, model: str, steps: int, stage: str, options: dict[str, Any]) -> TrainConfig:
    common = {
        "stage": stage,
        "load": model,
        "train_data_path": (str(folder / "prompts.jsonl"),),
        "handler_name": "AlpacaStyleInstructionHandler",
        "prompt_type": "empty",
        "reward_function": ("cordee.bench.rl:joyful",),
        "num_generations": GROUP,
        "global_batch_size": ROLLOUTS,
        "micro_batch_size": ROLLOUTS,
        "rollout_batch_size": ROLLOUTS,
        "seq_length": 96,
        "max_completion_length": LENGTH,
        "variable_seq_lengths": True,
        "train_iters": steps,
        "eval_iters": 0,
        "lr_decay_style": "constant",
        "metrics_file": str(folder / f"{stage}.jsonl"),
        "log_interval": 1,
    }
    return replace(config_from_dict(TrainConfig, {**common, **options}), nproc_per_node=1)


def _rewards(given: TrainConfig) -> list[float]:
    records = map(json.loads, Path(given.metrics_file or "").read_text().splitlines())
    return [record["metrics"]["reward"] for record in records if "metrics" in record]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _draw(rewards: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for stage, curve in rewards.items():
        axes.plot(range(1, len(curve) + 1), curve, label=stage)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.02), xlim=(1, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
