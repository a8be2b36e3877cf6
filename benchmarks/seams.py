"""`python -m benchmarks seams`: what the seams, where layouts plug in, cost.

Two comparisons, in turns within the same processes. Alone: `GPTModel`, with every seam and none in use, beside a Llama
written down directly with the same operators. On two processes: tensor parallelism through the model's borders and
views, beside the same blocks written by hand as column- and row-parallel products with an all-reduce (Megatron-LM,
Shoeybi et al. 2019). Results are compared too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cordee.bench import llama
from cordee.bench.contest import Turn
from cordee.bench.options import BenchOptions
from cordee.bench.pool import Pool
from cordee.bench.report import Report

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.model.config import ModelConfig

PEERS = ()
STEPS = 4
HIDDEN, FFN, HEADS, LAYERS, VOCAB_SIZE = 512, 1408, 8, 4, 8192
BATCH, LENGTH = 4, 256
TARGETS = {"alone": 1.02, "tensor": 1.05}
Parts = dict[str, Any]


def run(config: BenchOptions, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Steps of forward and backward, ours and the bare ones in turns; the ratio is the median of the rounds' own."""
    steps = config.steps or STEPS
    rows, figures = [], {}
    with Pool(timeout=1200) as pool:
        for name, ranks in (("alone", 1), ("tensor", 2)):
            rounds, apart = pool.run(play, ranks, name, config.rounds, steps)[0]
            for number, (ours, bare) in enumerate(rounds):
                on_turn(number, name, Turn([ours], {"bare": bare}))
            ratio = statistics.median(ours / bare for ours, bare in rounds[1:])
            ours, bare = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
            row = [name, str(ranks), f"{ours * 1e3:.1f} ms", f"{bare * 1e3:.1f} ms", f"{ratio:.3f}"]
            rows.append([*row, f"{TARGETS[name]:.2f}", f"{apart:.1e}"])
            figures |= {f"{name}: ratio": ratio, f"{name}: difference": apart}
    notes = [
        f"{LAYERS} layers, hidden {HIDDEN}, ffn {FFN}, {HEADS} heads, vocabulary {VOCAB_SIZE}; {BATCH} x {LENGTH} "
        f"tokens, forward and backward, float32, one thread a process",
        f"{config.rounds} rounds of {steps} steps in turns, after a round that is not counted",
        "alone: the whole model beside one without seams; tensor: the layers on two processes beside blocks by hand",
        "difference: largest of loss (alone) or results (tensor), relative",
    ]
    columns = ["", "processes", "Cordée", "bare", "ratio", "target", "difference"]
    return Report(title="Cost of the seams", columns=columns, rows=rows, figures=figures, notes=notes)


# ---- in the workers --------------------------------------------------------------------------------------------------


def play(rank: int, world_size: int, name: str, rounds: int, steps: int) -> tuple[list[tuple[float, float]], float]:
    """Seconds a step of both in each round, a first one to warm up, and how far their results are apart."""
    ours, bare = (_whole_model if name == "alone" else _layers)(world_size)
    apart = abs(ours() - bare()) / abs(bare())
    return [(_timed(ours, steps), _timed(bare, steps)) for _ in range(rounds + 1)], apart


def _timed(step: Callable[[], float], steps: int) -> float:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _config() -> ModelConfig:
    return llama.shape(
        LENGTH, layers=LAYERS, hidden=HIDDEN, heads=HEADS, head_dim=HIDDEN // HEADS, ffn=FFN, vocab_size=VOCAB_SIZE
    )


def _whole_model(world_size: int) -> tuple[Callable[[], float], Callable[[], float]]:
    import torch

    from cordee.model.gpt import GPTModel
    from cordee.model.init import initialise
    from cordee.parallel import apply
    from cordee.parallel.degrees import Degrees
    from cordee.parallel.layout import Layout
    from cordee.train.options import TrainConfig

    config = _config()
    layout = Layout(Degrees())
    options = TrainConfig(seq_length=LENGTH, lr=1e-3)
    model = apply.apply(GPTModel(config, device="meta"), layout, options, torch.device("cpu"))
    initialise(model, 1)
    tokens = torch.randint(VOCAB_SIZE, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def ours() -> float:
        loss, _ = model(ids, output=lambda head, hidden: head.loss(hidden, labels))
        loss.backward()
        _forget(model.parameters())
        return loss.item()

    def bare() -> float:
        loss = _bare_loss(weights, ids, labels)
        loss.backward()
        _forget(weights.values())
        return loss.item()

    return ours, bare


def _forget(parameters: Any) -> None:
    for parameter in parameters:
        parameter.grad = None


def _angles(length: int) -> tuple[Tensor, Tensor]:
    import torch

    half = HIDDEN // HEADS // 2
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angles.cos()[None, :, None, None], angles.sin()[None, :, None, None]


def _bare_loss(w: Parts, ids: Tensor, labels: Tensor) -> Tensor:
    """The model, written down."""
    import torch.nn.functional as F

    from cordee.ops.cross_entropy import chunked_cross_entropy

    x = F.embedding(ids, w["embedding.weight"])
    angles = _angles(ids.shape[1])
    for i in range(LAYERS):
        layer = {name.removeprefix(f"layers.{i}."): p for name, p in w.items() if name.startswith(f"layers.{i}.")}
        x = x + _bare_attention(layer, F.rms_norm(x, (HIDDEN,), layer["attention_norm.weight"], 1e-5), angles)
        x = x + _bare_mlp(layer, F.rms_norm(x, (HIDDEN,), layer["mlp_norm.weight"], 1e-5))
    x = F.rms_norm(x, (HIDDEN,), w["final_norm.weight"], 1e-5)
    return chunked_cross_entropy(x.flatten(0, 1), w["head.weight"], labels.flatten())


def _bare_attention(w: Parts, x: Tensor, angles: Sequence[Tensor]) -> Tensor:
    import torch.nn.functional as F

    from cordee.ops.gemm import linear
    from cordee.ops.rope import split_rotated

    weight = w["attention.qkv.weight"]
    qkv = linear(x, weight.flatten(0, -2)).unflatten(-1, (weight.shape[0], 3, HIDDEN // HEADS))
    q, k, v = split_rotated(qkv, *angles)
    q, k, v = q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(y.transpose(1, 2).flatten(2), w["attention.out.weight"])


def _bare_mlp(w: Parts, x: Tensor) -> Tensor:
    from cordee.ops.activation import gated
    from cordee.ops.gemm import linear

    y = linear(x, w["mlp.gate_up.weight"].flatten(0, -2))
    return linear(y, w["mlp.down.weight"], before=lambda y: gated(y, "silu", None))


def _layers(world_size: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Attention and MLPs alone, without embedding and head, which no two projects do alike."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.autograd import Function

    from cordee.model.gpt import GPTModel
    from cordee.model.init import initialise
    from cordee.model.parameter import local_shard
    from cordee.parallel import sharding, tensor
    from cordee.parallel.degrees import degrees
    from cordee.parallel.layout import Layout
    from cordee.train.options import TrainConfig
    from cordee.weights.load import materialise

    class Copy(Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            grad = grad.contiguous()
            dist.all_reduce(grad)
            return grad

    class Reduce(Function):
        @staticmethod
        def forward(ctx, x):
            dist.all_reduce(x)
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad

    options = TrainConfig(seq_length=LENGTH, lr=1e-3, tensor_model_parallel_size=world_size)
    layout = Layout(degrees(options, world_size))
    model = GPTModel(_config(), device="meta")
    sharding.apply(model, layout, options)
    tensor.apply(model, layout, options)
    materialise(model)
    initialise(model, 1)
    weights = {name: local_shard(p)[0].detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    angles = _angles(LENGTH)
    _, context = model._inputs.prepare(
        x, None, torch.arange(LENGTH)[None], None, None, None, None, True, model.placement
    )

    def ours() -> float:
        hidden = x
        for layer in model.own_layers():
            hidden = layer(hidden, context)
        loss = hidden.square().mean()
        loss.backward()
        _forget(model.parameters())
        return loss.item()

    def bare() -> float:
        hidden = x
        for i in range(LAYERS):
            prefix = f"layers.{i}."
            w = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
            inner = F.rms_norm(hidden, (HIDDEN,), w["attention_norm.weight"], 1e-5)
            hidden = hidden + Reduce.apply(_bare_attention(w, Copy.apply(inner), angles))
            inner = F.rms_norm(hidden, (HIDDEN,), w["mlp_norm.weight"], 1e-5)
            hidden = hidden + Reduce.apply(_bare_mlp(w, Copy.apply(inner)))
        loss = hidden.square().mean()
        loss.backward()
        _forget(weights.values())
        return loss.item()

    return ours, bare
