"""Words of the options and places in a model: read and put, and written by families as `config.json`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.families.lenses import LENSES, differences, scaling_of, words_of
from cordee.families.presets import _tables
from cordee.families.registry import families, presets, spec_from_preset
from cordee.model.compare import canonical
from cordee.model.config import DynamicNTKScaling, ModelConfig


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_family_writes_what_it_reads(name):
    family, config = presets()[name], spec_from_preset(name).config
    assert canonical(family.config(family.to_hf(config))) == canonical(config)


# Words that stand alone, so that any other value makes a model, and values of them.
VALUES = {
    "vocab_size": [100, 32001],
    "max_position_embeddings": [77, 4096],
    "norm_epsilon": [1e-3, 1e-6],
    "rotary_base": [1234.5, 1e6],
    "tied": [True, False],
    "init_method_std": [0.5, 0.02],
    "attention_dropout": [0.25, 0.0],
    "q_lora_rank": [24],
    "sliding_window": [16],
    "attn_logit_softcapping": [12.5],
    "output_logit_softcapping": [12.5],
    "query_pre_attn_scalar": [81.0],
    "scale_emb": [3.0],
    "dim_model_base": [192.0],
    "scale_depth": [2.5],
    "moe_aux_loss_coeff": [0.0, 0.25],
    "apply_residual_connection_post_layernorm": [True],
}


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_family_writes_models_of_other_words(data):
    """Whatever word a key of the family says, another value of it is written and read again."""
    family = data.draw(st.sampled_from([family for family in families().values() if family.presets]))
    config = spec_from_preset(data.draw(st.sampled_from(sorted(family.presets)))).config
    words = sorted(VALUES.keys() & {word for word in family.keys.values() if isinstance(word, str)})
    for word in data.draw(st.lists(st.sampled_from(words), unique=True)):
        by_length = isinstance(scaling_of(words_of(config)), DynamicNTKScaling)  # files say one length for both
        unread = word == "moe_aux_loss_coeff" and not words_of(config)[word]  # GPT-OSS trains without it
        if words_of(config)[word] is not None and not unread and not (by_length and word == "max_position_embeddings"):
            value = data.draw(st.sampled_from(VALUES[word]))
            config = ModelConfig(**LENSES[word].put(vars(config), value))
    assert differences(canonical(family.config(family.to_hf(config))), canonical(config)) == {}


def test_differences_are_named_by_flags_and_else_by_places():
    one = spec_from_preset("mixtral-8x7b").config
    attention = replace(one.layers[0].attention, num_heads=16, sinks=True)
    other = replace(one, hidden_size=128, layers=(replace(one.layers[0], attention=attention),) * one.num_layers)
    assert differences(one, other) == {
        "--hidden-size": (4096, 128),
        "--num-attention-heads": (32, 16),
        "layers.attention.sinks": (False, True),
    }
    assert differences(one, replace(one, layers=one.layers[:3])) == {"--num-layers": (32, 3)}
    assert differences(one, one) == {}


def test_every_table_of_presets_is_that_of_a_family():
    assert _tables().keys() == {family.name for family in families().values() if family.presets}
