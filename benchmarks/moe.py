"""Experts of a mixture in one grouped product, against loops over them: forward and backward.

Contenders take turns in one process, so that what else the machine does hits them alike; ratios are of medians.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cordee.bench.contest import Turn
from cordee.bench.options import BenchOptions
from cordee.bench.report import Report
from cordee.model.config import (
    AttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from cordee.model.init import initialise
from cordee.model.moe import Dispatch, MoE, local_dispatch, loop_dispatch

PEERS = ()
EXPERTS = (8, 64)
HIDDEN, FFN, TOP_K, TOKENS = 256, 512, 2, 2048
STEPS = 3

Step = Callable[[], None]


def run(config: BenchOptions, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """A forward and backward for each number of experts, by contender."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows, figures = [], {}
    for num_experts in EXPERTS:
        milliseconds = interleaved(contenders(num_experts), config.rounds, config.steps or STEPS)
        for name, value in milliseconds.items():
            on_turn(config.rounds, f"{name}, {num_experts}", Turn([value / 1000]))
            ratio = value / milliseconds["grouped"]
            rows.append([f"{num_experts} experts, {name}", f"{value:.1f} ms", f"{ratio:.2f}"])
            figures[f"{num_experts} experts, {name}: by grouped"] = ratio
    notes = [
        f"one layer, forward and backward: {TOKENS} tokens, hidden {HIDDEN}, ffn {FFN}, top {TOP_K}, float32, "
        f"{torch.get_num_threads()} threads, {config.rounds} rounds of {config.steps or STEPS}"
    ]
    columns = ["", "median time", "x grouped"]
    return Report(title="Experts of a mixture", columns=columns, rows=rows, figures=figures, notes=notes)


def contenders(num_experts: int) -> dict[str, Step]:
    """What is measured: our layer with its two dispatches and, where it is installed, the loop of transformers."""
    torch.manual_seed(0)
    x, upstream = torch.randn(1, TOKENS, HIDDEN, requires_grad=True), torch.randn(1, TOKENS, HIDDEN)
    steps = {
        "grouped": _step(_block(num_experts, local_dispatch), x, upstream),
        "loop": _step(_block(num_experts, loop_dispatch), x, upstream),
    }
    if importlib.util.find_spec("transformers") is not None:
        steps["transformers, eager"] = _step(_peer(num_experts), x, upstream)
    return steps


def interleaved(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each step over `rounds` of `repeats`, taken in turns after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                if number:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _step(block: nn.Module, x: Tensor, upstream: Tensor) -> Step:
    def step() -> None:
        block.zero_grad()
        x.grad = None
        block(x).backward(upstream)

    return step


def _block(num_experts: int, dispatch: Dispatch) -> MoE:
    norm = NormConfig(kind="rms", eps=1e-6)
    config = MoEConfig(
        router=RouterConfig(num_experts=num_experts, top_k=TOP_K, normalise=True),
        expert=MLPConfig(ffn_hidden_size=FFN, activation="silu", gated=True),
    )
    layer = LayerConfig(attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=HIDDEN), mlp=config, norm=norm)
    model = ModelConfig(
        vocab_size=1, hidden_size=HIDDEN, max_position_embeddings=TOKENS, layers=(layer,), final_norm=norm
    )
    block = MoE(config, model)
    block.placement.replace("dispatch", "bench", dispatch)
    initialise(block, seed=0)
    return block


def _peer(num_experts: int) -> nn.Module:
    """The same layer as transformers computes it by default: a loop that picks each expert out of the stack."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=num_experts, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block
