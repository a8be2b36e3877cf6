"""A tiny run: data, options, one or several ranks, and what it reported."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cordee.data.indexed import IndexedDatasetBuilder
from cordee.parallel.degrees import degrees
from cordee.parallel.layout import Layout
from cordee.train import job
from cordee.train.exits import Exit, ExitRule, Signals
from cordee.train.options import TrainConfig

VOCAB, LENGTH, BATCH = 61, 16, 8
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 1,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def make_data(folder: Path, documents: int = 80, vocab: int = VOCAB, seed: int = 0) -> str:
    """Documents that count upwards, more or less; the prefix of the dataset."""
    random = np.random.default_rng(seed)
    prefix = str(folder / f"data{seed}")
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(documents):
            steps = random.integers(0, 3, int(random.integers(20, 50)))
            builder.add_sequence((np.cumsum(steps) + int(random.integers(vocab))) % vocab)
            builder.end_document()
    return prefix


def config(folder: Path, **options: Any) -> TrainConfig:
    """Six steps with a checkpoint at every second one; the data is made in `folder` if it is not there."""
    prefix = str(folder / "data0")
    if "data_path" not in options and not Path(f"{prefix}.idx").exists():
        make_data(folder)
    defaults = {
        **MODEL,
        "data_path": (prefix,),
        "split": "90,10,0",
        "seq_length": LENGTH,
        "micro_batch_size": 1,
        "global_batch_size": BATCH,
        "train_iters": 6,
        "lr": 1e-2,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 1,
        "eval_iters": 0,
        "log_interval": 1,
        "save": str(folder / "run"),
        "save_interval": 2,
        "nproc_per_node": 1,
        "peak_tflops": 1.0,
    }
    return TrainConfig(**{**defaults, **options})


def resumed(given: TrainConfig, **options: Any) -> TrainConfig:
    """The same run, going on."""
    return replace(given, **{"load": given.save, "exit_interval": None, **options})


def train_rank(rank: int, world_size: int, given: TrainConfig) -> Exit:
    """One rank of a run, in a worker of the pool."""
    layout = Layout(degrees(given, world_size))
    return job.train(given, layout, torch.device("cpu"), ExitRule(given, Signals(), time.monotonic()))


def records(given: TrainConfig, kind: str = "train") -> dict[int, dict[str, Any]]:
    """What a run wrote about each iteration; of iterations done twice the later."""
    lines = [json.loads(line) for line in (Path(given.save or "") / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line for line in lines if line["kind"] == kind}


def losses(given: TrainConfig) -> list[float]:
    found = records(given)
    return [found[iteration]["loss"] for iteration in sorted(found)]
