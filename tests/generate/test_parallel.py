"""Generation by several processes: the same tokens as by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.errors import ProblemError
from cordee.generate.engine import generate, stream
from cordee.generate.options import DecodingOptions
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.parallel import inference
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from tests.generate import folders
from tests.matrix import sampled
from tests.parallel import models

PROMPTS = [[5, 9, 3, 20], [7], [1, 2, 3, 4, 5, 6]]
NAMES = ["llama", "gpt2", "gemma", "latent", "mixture"]
LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp4": {"tp": 4}, "tp2 pp2": {"tp": 2, "pp": 2}}


def options(**given: Any) -> DecodingOptions:
    return DecodingOptions(**{"max_new_tokens": 8, "batch_size": 2, **given})


def alone(name: str, decoding: DecodingOptions) -> list[list[int]]:
    model = GPTModel(models.MODELS[name])
    initialise(model, 7)
    return generate(model, PROMPTS, decoding)


def together(rank: int, world_size: int, name: str, degrees: dict, decoding: DecodingOptions) -> list[list[int]]:
    layout = Layout(Degrees(**degrees))
    model, stage = inference.build(models.MODELS[name], layout, torch.float32, torch.device("cpu"))
    initialise(model, 7)
    written: list[list[int]] = [[] for _ in PROMPTS]
    for token in stream(model, PROMPTS, decoding, stage=stage):
        written[token.sample].append(token.id)
    return written


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(LAYOUTS, NAMES, whole=["tp2 pp2"], per_row=2))
def test_writes_what_one_process_writes(pool, layout: str, name: str):
    degrees = LAYOUTS[layout]
    ranks = Degrees(**degrees).world_size
    expected = alone(name, options())
    assert all(found == expected for found in pool.run(together, ranks, name, degrees, options()))


@pytest.mark.parametrize("given", [{"use_kv_cache": False}, {"do_sample": True, "temperature": 1.5, "seed": 3}])
def test_without_cache_and_at_random(pool, given: dict):
    degrees = {"tp": 2, "pp": 2}
    expected = alone("llama", options(**given))
    assert all(found == expected for found in pool.run(together, 4, "llama", degrees, options(**given)))


def refused(rank: int, world_size: int) -> str:
    with pytest.raises(ProblemError) as caught:
        inference.build(models.MODELS["llama"], Layout(Degrees(tp=3)), torch.float32, torch.device("cpu"))
    return str(caught.value)


def test_degrees_that_do_not_fit(pool):
    assert all("4 attention heads" in told for told in pool.run(refused, 3))


@pytest.mark.slow
def test_by_the_command(tmp_path: Path):
    folders.model_directory("Llama", tmp_path / "model")
    command = [sys.executable, "-m", "cordee", "generate", "--load", str(tmp_path / "model"), "--max-new-tokens", "5"]
    prompts = ["--prompt", "a b", "c"]
    subprocess.run([*command, *prompts, "--output", str(tmp_path / "one.jsonl")], check=True)
    parts = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    subprocess.run([*command, *prompts, *parts, "--output", str(tmp_path / "four.jsonl")], check=True)
    one, four = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "four")
    )
    assert one == four and len(one) == 2
