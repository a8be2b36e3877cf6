"""Modules of checkpoints as slices of projections, for every family: where they are, and adapters of them in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cordee.checkpoint import formats
from cordee.families.count import shapes_of
from cordee.families.registry import spec_from_hf
from cordee.model.config import LowRankConfig, slice_of
from cordee.tensors.rules import Rule
from cordee.tensors.views import Leaf, whole
from cordee.tune import lora
from cordee.weights import peft
from cordee.weights.adapter import Given
from cordee.weights.peft_parameters import from_peft, held, to_peft
from tests.weights import models
from tests.weights import tiny as saved


def box_of(rule: Rule, number: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The part of a canonical tensor that the `number`-th tensor of a checkpoint is made of."""
    read: list[Any] = []

    def note(index):
        read.append(index)
        return torch.empty([cut.stop - cut.start for cut in index])

    view = rule.op.inverse.apply([Leaf(shape, note)])[number]
    view.read(whole(view.shape))
    return [(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in zip(*read, strict=True)]


@pytest.mark.parametrize("name", models.MODELS)
def test_modules_hold_the_slices_they_are_said_to(tmp_path: Path, name: str):
    """And adapters of all of them come back from PEFT's files as they were, slices of fused tensors as one."""
    spec = spec_from_hf(models.MODELS[name])
    rules, shapes = spec.rules(), spec.shapes()
    for place in held(spec):
        shape, stack = shapes[f"{place.path}.weight"], ".experts." in place.path
        expected = [(0, size) for size in shape]
        if stack and place.expert is not None:
            expected[0] = (place.expert, place.expert + 1)
        if (cut := slice_of(place.path, place.name)) is not None:
            dim = cut.dim + stack
            expected[dim] = slice(cut.start, cut.stop).indices(shape[dim])[:2]
        assert box_of(rules[f"{place.path}.weight"], place.number, shape) == expected, place
    targets = lora.targets_named(spec, ["all-linear"])
    adapted = spec.adapted((LowRankConfig(targets=targets, rank=2, scale=1.5),), ("final_norm",))
    generator = torch.Generator().manual_seed(0)
    wanted = shapes_of(adapted.config, "adapter", "tuned")
    made = {key: torch.randn(shape, generator=generator) for key, shape in wanted.items()}
    saved.save(tmp_path / "base", models.MODELS[name])
    tensors, settings = to_peft(adapted, made.__getitem__)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (2, 3.0, {})
    base = formats.read(tmp_path / "base")
    loaded = from_peft(peft.read(Given(path=tmp_path / "adapter"), base.spec), base)
    assert loaded.spec.config == adapted.config
    assert all(torch.equal(loaded.tensor(key), value) for key, value in made.items())


def test_slices_of_one_module_are_one_adapter_of_it(tmp_path: Path):
    """Adapters of q and v where the files have one tensor for q, k and v: the product is the same."""
    spec = spec_from_hf(models.MODELS["internlm2"])
    adapted = spec.adapted((LowRankConfig(targets=("attention.q", "attention.v"), rank=2, scale=1.5),), ())
    made = {key: torch.randn(shape) for key, shape in shapes_of(adapted.config, "adapter").items()}
    tensors, settings = to_peft(adapted, made.__getitem__)
    assert (settings["r"], settings["target_modules"]) == (4, ["wqkv"])
    name, rule = "layers.3.attention.qkv", spec.rules()["layers.3.attention.qkv.weight"]
    a, b = (tensors[f"base_model.model.model.layers.3.attention.wqkv.lora_{letter}.weight"] for letter in "AB")
    found = rule.forward([settings["lora_alpha"] / settings["r"] * b @ a])
    for part, region in (("q", slice(0, -2)), ("v", slice(-1, None))):
        product = 1.5 * made[f"{name}.adapters.{part}.b"] @ made[f"{name}.adapters.{part}.a"]
        torch.testing.assert_close(found[:, region], product, rtol=1e-5, atol=1e-5)
    assert not found[:, -2].any()
