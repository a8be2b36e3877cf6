"""The page on adding a family, followed to the letter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from cordee.families.count import canonical_shapes, count_parameters
from cordee.families.family import Family
from cordee.families.lenses import LENSES
from cordee.families.presets import read_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-family.md"


def followed() -> Family:
    """What the code of the page, taken together, defines, with the presets of the page's table."""
    page = PAGE.read_text(encoding="utf-8")
    names: dict[str, Family] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    (table,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    family = names["FAMILY"]
    return replace(family, presets=read_table(yaml.safe_load(table)[family.name]))


def test_the_family_of_the_page_reads_its_preset():
    family = followed()
    config = family.config(family.skeleton(family.presets["example-7b"].config))
    assert count_parameters(config) == 7_241_732_096  # it has the shape of Mistral 7B
    assert {layer.attention.window for layer in config.layers} == {4096}


def test_the_rules_of_the_page_cover_the_model_and_invert():
    family = followed()
    small = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": 5, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = family.config(family.skeleton(family.presets["example-7b"].config | small))
    rules = {rule.canonical: rule for rule in family.weights(config)}
    for name, shape in canonical_shapes(config).items():
        canonical = torch.randn(shape)
        foreign = rules[name].inverse(canonical)
        assert torch.equal(rules[name].forward(foreign), canonical)
    assert rules["layers.0.attention.qkv.weight"].foreign == ("model.layers.0.self_attn.qkv_proj.weight",)


def test_options_reach_the_family_of_the_page():
    family = followed()
    config = family.config(family.skeleton(family.presets["example-7b"].config))
    for name, value in {"sliding_window": 16, "num_layers": 2, "rotary_base": 1e6}.items():
        draft = LENSES[name].put({**vars(config), "layers": config.layers[:1]}, value)
        asked = replace(config, **draft)
        assert family.config(family.to_hf(asked)) == asked
