"""`python -m benchmarks context`: one long sequence on one process, and sharded over several by each algorithm.

What counts is the memory of a rank, and that attention over the whole sequence is the same. The model has a wide MLP
and few, narrow heads, so that a CPU gets through the square of the length.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cordee.bench import llama
from cordee.bench.contest import Baton, Contender, Turn, together
from cordee.bench.options import BenchOptions
from cordee.bench.report import Report

PEERS = ()
LENGTH, RANKS = 32768, 4
HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS, VOCAB_SIZE = 4, 16, 256, 704, 1, 1024
CHECKED = 64  # queries whose attention is compared with the dense reference, over all keys
ALONE = "one process"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "Ulysses": {"context_parallel_algo": "ulysses_cp_algo"},
    "ring": {"context_parallel_algo": "megatron_cp_algo"},
    "ring, overlapped": {"context_parallel_algo": "megatron_cp_algo", "use_cp_send_recv_overlap": True},
    "double ring": {"context_parallel_algo": "megatron_cp_algo", "cp_window_size": 2},
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
}


def run(config: BenchOptions, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Some steps and a comparison for each algorithm; a row has the largest memory and error of its ranks."""
    steps = config.steps or 1
    turns: dict[str, list[Turn]] = {}
    for name, options in {ALONE: {}, **ALGORITHMS}.items():
        turns[name] = _measure(options, RANKS if options else 1, steps, config.threads or 1)
        on_turn(1, name, turns[name][0])
    base = _largest(turns[ALONE], "growth")
    rows, figures = [], {}
    for name, ranks in turns.items():
        growth, error = _largest(ranks, "growth"), _largest(ranks, "error")
        apart = abs(ranks[0].figures["loss"] / turns[ALONE][0].figures["loss"] - 1)
        seconds = max(turn.median for turn in ranks)
        row = [name, str(len(ranks)), f"{growth / 2**20:,.0f} MiB", f"{growth / base:.2f}"]
        rows.append([*row, f"{error:.1e}", f"{apart:.1e}", f"{seconds:.1f} s"])
        figures |= {f"{name}: memory by one process": growth / base, f"{name}: error": error, f"{name}: loss": apart}
    notes = [
        f"{LENGTH:,} tokens, {LAYERS} layer, hidden {HIDDEN}, ffn {FFN}, {HEADS} heads of {HEAD_DIM}, float32; memory "
        "is what a rank's process grows by in a forward and backward, the largest of the ranks",
        f"error: largest difference to the dense reference, of the results of {CHECKED} queries over the whole "
        "sequence and of the gradients that they give to all queries, keys and values",
        "loss: relative difference to that of one process; time of a step with all ranks on this machine",
    ]
    columns = ["", "processes", "memory of a rank", "x one process", "error", "loss", "time"]
    return Report(title="Long sequences", columns=columns, rows=rows, figures=figures, notes=notes)


def _measure(options: dict[str, Any], ranks: int, steps: int, threads: int) -> list[Turn]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, options, LENGTH, steps, str(Path(folder) / "store"))
        contenders = [Contender(f"rank {rank}", play, (rank, *arguments)) for rank in range(ranks)]
        return together(contenders, max(1, threads // ranks))


def _largest(ranks: list[Turn], figure: str) -> float:
    return max(turn.figures[figure] for turn in ranks)


# ---- on each rank ----------------------------------------------------------------------------------------------------


def play(baton: Baton, rank: int, ranks: int, options: dict[str, Any], length: int, steps: int, store: str) -> None:
    """Give the time of a step, the loss, the memory that it takes and the error of attention."""
    import torch
    import torch.distributed as dist

    from cordee import device

    baton.take()
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    model, layout, config = _build(ranks, options, length)
    before = device.memory().allocated
    batch, weight = _batch(layout, config)
    seconds, loss = [], torch.zeros(())
    for _ in range(steps):
        start = time.perf_counter()
        loss, _ = model(
            batch.input_ids,
            position_ids=batch.position_ids,
            output=lambda head, hidden: head.loss(hidden, batch.labels),
        )
        (loss / weight).backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    growth = device.memory().peak - before
    from cordee.parallel import collectives

    total = collectives.sum_over(loss.detach(), layout) / weight
    core = model.layers["0"].attention.placement.core
    error = _error(core, layout, length)
    if ranks > 1:
        dist.barrier()  # no rank leaves while another still reads
        dist.destroy_process_group()
    assert torch.isfinite(total)
    baton.give(seconds, loss=total.item(), growth=float(growth), error=error)


def _build(ranks: int, options: dict[str, Any], length: int) -> tuple:
    """Model, layout and options of a rank."""
    import torch

    from cordee.model.gpt import GPTModel
    from cordee.model.init import initialise
    from cordee.parallel import apply
    from cordee.parallel.degrees import degrees
    from cordee.parallel.layout import Layout
    from cordee.train.options import TrainConfig

    shape = llama.shape(
        length, layers=LAYERS, hidden=HIDDEN, heads=HEADS, head_dim=HEAD_DIM, ffn=FFN, vocab_size=VOCAB_SIZE, eps=1e-6
    )
    config = TrainConfig(seq_length=length, lr=1e-3, context_parallel_size=ranks, **options)
    layout = Layout(degrees(config, ranks))
    model = apply.apply(GPTModel(shape, device="meta"), layout, config, torch.device("cpu"))
    initialise(model, seed=0)
    return model, layout, config


def _batch(layout, config) -> tuple:
    """This rank's part of one sequence, and its whole weight."""
    import torch

    from cordee.data.batch import Batch
    from cordee.parallel import context

    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (1, config.seq_length + 1), generator=random)
    whole = Batch(tokens[:, :-1], tokens[:, 1:])
    return context.shard(whole, layout, config), whole.num_trained


def _error(core, layout, length: int) -> float:
    """Largest difference of `core` to the dense reference, for a gradient from `CHECKED` queries."""
    import torch

    from cordee.ops.attention import Scores, reference_attention
    from cordee.ops.mask import AttentionMask
    from cordee.parallel import context

    random = torch.Generator().manual_seed(2)
    q, k, v, upstream = (torch.randn(1, HEADS, length, HEAD_DIM, generator=random) for _ in range(4))
    checked = torch.randperm(length, generator=random)[:CHECKED].sort().values
    scores = Scores(scale=HEAD_DIM**-0.5)
    keys = torch.arange(length)
    sparse = torch.zeros_like(upstream)
    sparse[:, :, checked] = upstream[:, :, checked]

    def attend(core, index, mask, grad) -> list:
        leaves = [x.clone().requires_grad_() for x in (q[:, :, index], k, v)]
        y = core(*leaves, mask, scores)
        y.backward(grad)
        return [y.detach(), *(x.grad for x in leaves)]

    rows = AttentionMask(CHECKED, length, query_index=checked, key_index=keys)
    y, grad_q, grad_k, grad_v = attend(reference_attention, checked, rows, upstream[:, :, checked])
    own = context.positions(length, layout.degrees, layout.axis_rank("cp"), causal=True)
    q, k, v, sparse = (x[:, :, own] for x in (q, k, v, sparse))
    found = attend(core, slice(None), AttentionMask(len(own), len(own)), sparse)
    here = torch.isin(checked, own)
    at = torch.searchsorted(own, checked[here])
    whole_q = torch.zeros(1, HEADS, length, HEAD_DIM)
    whole_q[:, :, checked] = grad_q
    pairs = [
        (found[0][:, :, at], y[:, :, here]),
        (found[1], whole_q[:, :, own]),
        (found[2], grad_k[:, :, own]),
        (found[3], grad_v[:, :, own]),
    ]
    return max((mine - reference).abs().max().item() for mine, reference in pairs if mine.numel())
