"""Conversion takes the memory of a tensor, not of a model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.families.registry import spec_from_hf
from cordee.weights.codec import SLICE
from cordee.weights.staged_sink import SLICES_HELD
from tests.matrix import on_demand
from tests.weights.models import DENSE

MIB = 2**20
SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
}
MEASURE = """
import re, sys, threading
from cordee.config.load import load_config
from cordee.convert.options import ConvertConfig
from cordee.convert import job, targets
from cordee.device import peak_resident_bytes

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

before, own, seen, done = peak_resident_bytes(), anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
job.run(load_config(ConvertConfig, sys.argv[1:]).config)
done.set()
thread.join()
print("grown by", peak_resident_bytes() - before, max(seen) - own)
"""


def sparse_model(path: Path) -> int:
    """A Hugging Face directory of zeros that take no room on disk; bytes of the model."""
    config = {**DENSE["llama tied"], **SHAPE, "num_key_value_heads": 4, "torch_dtype": "bfloat16"}
    spec = spec_from_hf(config)
    header, end = {}, 0
    for name, rule in spec.rules().items():
        for foreign, shape in zip(rule.foreign, rule.foreign_shapes(spec.shapes()[name]), strict=True):
            start, end = end, end + 2 * math.prod(shape)
            header[foreign] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return end


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    ("workers", "flags"),
    [
        (4, ("--params-dtype", "fp16")),
        (1, ("--save-model-type", "mg", "--use-mcore-models", "--target-tensor-parallel-size", "4")),
        *on_demand(
            (1, ("--params-dtype", "fp16")), (2, ("--save-model-type", "dcp")), (2, ("--save-model-type", "mg"))
        ),
    ],
    ids=["hf, 4 workers", "mg tp4", "hf", "dcp, 2 workers", "mg, 2 workers"],
)
def test_memory_is_bounded(tmp_path, workers, flags):
    total = sparse_model(tmp_path / "hf")
    largest = 2 * SHAPE["intermediate_size"] * SHAPE["hidden_size"] * 2  # gate and up together
    arguments = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), *flags]
    arguments += ["--workers", str(workers)]
    large = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # what is freed counts no more, whichever thread had it
    program = [sys.executable, "-c", MEASURE, *arguments]
    run = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | large)
    grown, anonymous = map(int, run.stdout.rpartition("grown by")[2].split())
    assert total > 1600 * MIB
    assert grown <= (1 + workers) * largest + 300 * MIB  # what is promised
    # Without the pages of files that are mapped, which the system takes back when it needs them.
    assert anonymous <= (1 + workers) * SLICES_HELD * SLICE + 150 * MIB
    print(f"{' '.join(flags)}: grown by {grown / MIB:.0f} MiB, {anonymous / MIB:.0f} of them not of files")
