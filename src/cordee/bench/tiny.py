"""Tiny models and their training, a few steps on any layout, for the measurements that compare layouts.

Owns models, data and the run of `cordee train` in warm workers. Knows no layout by name."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cordee.bench.contest import Turn
from cordee.bench.layouts import Case
from cordee.bench.pool import Pool
from cordee.errors import ProblemError
from cordee.train.options import TrainConfig

STEPS, TOLERANCE = 5, 1e-5
LENGTH, VOCAB, BATCH = 32, 96, 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**SHAPE, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "MoE": {
        **SHAPE,
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
        "norm_topk_prob": True,
    },
}


def distance(found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> tuple[float, float]:
    """Largest relative distance of losses and of gradient norms, over the steps."""

    def largest(key: str) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(found[key], expected[key], strict=True))

    return largest("loss"), largest("grad_norm")


def compare(
    find: Callable[[], Mapping[str, list[float]]], expected: Mapping[str, list[float]]
) -> tuple[float, float, str]:
    """How far what `find` trains is from `expected`, in loss and gradient norm, and what that means."""
    try:
        found = find()
    except ProblemError as error:
        return math.nan, math.nan, f"refused: {error.problems[0].why}"
    loss, norm = distance(found, expected)
    if found["consumed_samples"] != expected["consumed_samples"]:
        return loss, norm, "OTHER SAMPLES"
    return loss, norm, "equal" if max(loss, norm) <= TOLERANCE else "DIFFERENT"


class Comparisons:
    """What a table tells of runs that should be equal, line by line as they are made; `on_turn` hears of each."""

    def __init__(self, on_turn: Callable[[int, str, Turn], None]):
        self.rows: list[list[str]] = []
        self.figures: dict[str, float] = {}
        self._on_turn = on_turn

    def add(
        self,
        model: str,
        name: str,
        cells: Sequence[str],
        find: Callable[[], Mapping[str, list[float]]],
        expected: Mapping[str, list[float]],
    ) -> None:
        """A line for `model`: `cells`, then how far what `find` trains is from `expected`."""
        start = time.perf_counter()
        loss, norm, verdict = compare(find, expected)
        number = 1 + sum(row[0] == model for row in self.rows)
        distances = ["", ""] if verdict.startswith("refused") else [f"{loss:.1e}", f"{norm:.1e}"]
        self.rows.append([model, *cells, *distances, verdict])
        self.figures |= {f"{model}: {name}: loss": loss, f"{model}: {name}: gradient norm": norm}
        turn = Turn([time.perf_counter() - start], {"loss": loss, "norm": norm})
        self._on_turn(number, f"{model} {name}", turn)


def micro_batch_size(case: Case) -> int:
    """Samples of a micro-batch: two of them on every data-parallel rank, or four where they go through a pipeline."""
    return max(1, BATCH // ((4 if case.degree("pipeline_model") > 1 else 2) * case.data_ranks))


def trained(
    pool: Pool, work: Path, model: str, case: Case, steps: Sequence[int] = range(1, STEPS + 1), **given: Any
) -> dict[str, list[float]]:
    """Losses, gradient norms and consumed samples of the `steps` that a run reports; it takes `STEPS` in all, unless
    options that are `given` besides say otherwise. ProblemError if the layout is refused."""
    records = work / "metrics.jsonl"
    records.unlink(missing_ok=True)
    options: dict[str, Any] = {
        "load": str(work / model),
        "train_data_path": (str(work / "data"),),
        "metrics_file": str(records),
        "micro_batch_size": micro_batch_size(case),
        **case.options,
        **given,
    }
    for outcome in pool.run(train_rank, case.ranks, options):
        if isinstance(outcome, ProblemError):
            raise outcome
    lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line["kind"] == "train"]
    assert [line["iteration"] for line in found] == list(steps)
    return {key: [line[key] for line in found] for key in ("loss", "grad_norm", "consumed_samples")}


def prepare(rank: int, world_size: int, folder: str) -> None:
    """Data and initial weights, in a worker."""
    import numpy as np

    from cordee.data.indexed import IndexedDatasetBuilder
    from cordee.families.registry import spec_from_hf
    from cordee.model.gpt import GPTModel
    from cordee.model.init import initialise
    from cordee.weights import hf
    from cordee.weights.load import save_from

    random = np.random.default_rng(0)
    with IndexedDatasetBuilder(str(Path(folder) / "data"), np.uint16) as builder:
        for _ in range(200):
            steps = random.integers(0, 3, int(random.integers(20, 80)))
            builder.add_sequence((np.cumsum(steps) + int(random.integers(VOCAB))) % VOCAB)
            builder.end_document()
    for name, hf_config in MODELS.items():
        spec = spec_from_hf(hf_config)
        model = GPTModel(spec.config)
        initialise(model, 7)
        with hf.write(Path(folder) / name, spec) as sink:
            save_from(model, sink)


def train_rank(rank: int, world_size: int, options: dict[str, Any]) -> ProblemError | None:
    """One rank of a run, in a worker."""
    import torch

    from cordee.parallel.degrees import degrees
    from cordee.parallel.layout import Layout
    from cordee.train import job
    from cordee.train.exits import ExitRule, Signals

    config = TrainConfig(
        **{
            "seq_length": LENGTH,
            "global_batch_size": BATCH,
            "train_iters": STEPS,
            "lr": 1e-3,
            "eval_iters": 0,
            "log_interval": 1,
            "nproc_per_node": world_size,
            "peak_tflops": 1.0,
            **options,
        }
    )
    try:
        layout = Layout(degrees(config, world_size))
        job.train(config, layout, torch.device("cpu"), ExitRule(config, Signals(), time.monotonic()))
    except ProblemError as error:
        return error
    return None
