"""`python -m benchmarks load`: memory and time to load a Hugging Face checkpoint, by Cordée and by transformers.

A checkpoint of some hundred megabytes with random weights is made first. Memory is what a fresh process grows by from
before the load to its peak, as a share of the model's bytes.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cordee import device
from cordee.bench.contest import Baton, Contender, Results, Turn, apart, hold
from cordee.bench.options import BenchOptions
from cordee.bench.report import Report

PEERS = ()
SHAPE = {"layers": 8, "hidden": 1024, "ffn": 2816, "heads": 16, "vocab": 32000}
CORDEE, PEER, COPY = "cordee", "transformers", "read of the file"


def run(config: BenchOptions, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Load the same directory once a turn."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        apart(write_checkpoint, path)
        contenders = [
            Contender(CORDEE, play_cordee, (path,)),
            Contender(PEER, play_transformers, (path,)),
            Contender(COPY, play_read, (path,)),
        ]
        results = hold(contenders, config.rounds, config.threads or 1, on_turn)
        total, largest = _bytes(path)
    return _report(config, total, largest, results)


def write_checkpoint(path: str) -> None:
    """A Llama with random weights in safetensors."""
    import torch

    from cordee.families.registry import spec_from_hf
    from cordee.weights import hf

    spec = spec_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": SHAPE["vocab"],
            "hidden_size": SHAPE["hidden"],
            "intermediate_size": SHAPE["ffn"],
            "num_hidden_layers": SHAPE["layers"],
            "num_attention_heads": SHAPE["heads"],
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
        }
    )
    with hf.write(Path(path), spec) as sink:
        for name, shape in spec.shapes().items():
            sink.put(name, torch.randn(shape))


def play_cordee(baton: Baton, path: str) -> None:
    from cordee.checkpoint import formats
    from cordee.generate.loading import load_model

    _play(baton, lambda: load_model(formats.read(path)))


def play_transformers(baton: Baton, path: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    _play(baton, lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def play_read(baton: Baton, path: str) -> None:
    """Reading the bytes into memory and nothing else: what the machine can do."""
    _play(baton, lambda: [file.read_bytes() for file in Path(path).glob("*.safetensors")])


def _play(baton: Baton, load: Callable[[], object]) -> None:
    while baton.take():
        before = device.anonymous_bytes()
        _reset_peak()
        start = time.perf_counter()
        loaded = load()
        seconds = time.perf_counter() - start
        baton.give([seconds], growth=_peak_anonymous(before))
        del loaded


def _reset_peak() -> None:
    """Let the system begin a new peak of this process (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


def _peak_anonymous(before: int) -> int:
    """Bytes by which the peak since `_reset_peak` is above `before`; mapped pages of the file count as well."""
    return device.peak_resident_bytes() - before


def _bytes(path: str) -> tuple[int, int]:
    """Bytes of all weights and of the largest tensor."""
    from cordee.weights import hf

    source = hf.read(path)
    sizes = [4 * math.prod(source.shape(name)) for name in source.names()]
    return sum(sizes), max(sizes)


def _report(config: BenchOptions, total: int, largest: int, results: Results) -> Report:
    rows, figures = [], {}
    for name in (CORDEE, PEER, COPY):
        seconds, growth = results.median(name), results.figure(name, "growth")
        rows.append([name, f"{seconds:.2f} s", f"{total / seconds / 1e9:.2f}", f"{growth / total:.2f}"])
        figures |= {f"{name}: seconds": seconds, f"{name}: growth by model": growth / total}
    bound = (total + largest) / total
    notes = [
        f"{total / 2**20:,.0f} MiB of float32 weights, largest tensor {largest / 2**20:,.0f} MiB, files in the "
        f"system's cache, {config.rounds} rounds, {os.cpu_count()} cores",
        f"growth at the peak, by the model's size; the bound of model plus largest tensor is {bound:.2f}",
    ]
    columns = ["", "time", "GB/s", "peak growth / model"]
    return Report(
        title="Loading a checkpoint", columns=columns, rows=rows, figures=figures | {"bound": bound}, notes=notes
    )
