"""Reading configurations strictly, and naming models by preset, directory and options."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from cordee.config.option import options_of
from cordee.errors import ProblemError
from cordee.families.lenses import words_of
from cordee.families.registry import (
    ModelSpec,
    families,
    presets,
    spec_from_directory,
    spec_from_hf,
    spec_from_options,
    spec_from_preset,
)
from cordee.model.config import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH, Llama3Scaling, RopeConfig
from cordee.model.options import ModelOptions

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 100,
    "n_embd": 48,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def problems_of(function, *args):
    with pytest.raises(ProblemError) as caught:
        function(*args)
    return {problem.option: problem for problem in caught.value.problems}


def test_naming_models_needs_no_torch():
    code = (
        "import sys; from cordee.families.registry import spec_from_preset; "
        "from cordee.families.catalogue import describe; describe(); spec_from_preset('llama2-7b').rules(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_family_is_found_and_its_names_are_its_own():
    assert {"llama", "gpt2"} <= families().keys()
    for names in ("architectures", "model_types", "presets"):
        listed = [name for family in families().values() for name in getattr(family, names)]
        assert len(listed) == len(set(listed)), names


def test_llama_values_reach_the_model():
    config = spec_from_hf({**LLAMA, "attention_bias": True, "head_dim": 10, "rope_theta": 5e5}).config
    attention = config.layers[1].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (6, 2, 10)
    assert attention.qkv_bias and attention.out_bias and not config.layers[1].mlp.bias
    assert attention.rope == RopeConfig(theta=5e5)
    assert (config.hidden_size, config.vocab_size, config.num_layers) == (48, 100, 2)
    assert config.layers[0].mlp.gated and config.layers[0].norm.kind == "rms" and not config.tie_word_embeddings


def test_llama_defaults_are_those_of_transformers():
    config = spec_from_hf({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}).config
    attention = config.layers[0].attention
    assert attention.num_kv_heads == 6 and attention.head_dim == 8 and attention.rope == RopeConfig(theta=10000.0)


def test_gpt2_values_reach_the_model():
    config = spec_from_hf({**GPT2, "n_inner": 96, "resid_pdrop": 0.0, "activation_function": "gelu"}).config
    assert config.learned_positions and config.tie_word_embeddings and config.max_position_embeddings == 64
    assert config.layers[0].mlp.ffn_hidden_size == 96 and config.layers[0].mlp.activation == "gelu"
    assert config.layers[0].attention.rope is None and config.layers[0].attention.out_bias
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3, "rope_scaling": None},
    ],
)
def test_both_spellings_of_rope(rope):
    attention = spec_from_hf({**LLAMA, **rope}).config.layers[0].attention
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    assert attention.rope == RopeConfig(theta=5e5, scaling=scaling)


def test_all_problems_come_at_once():
    hf = {
        **LLAMA,
        "hidden_size": "wide",
        "num_key_value_heads": 4,
        "tie_word_embeddings": "yes",
        "hidden_act": "gelu",
        "rope_scaling": {"rope_type": "spiral", "factor": 2.0},
        "sliding_window": 512,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
    }
    del hf["rms_norm_eps"]
    found = problems_of(spec_from_hf, hf, "c")
    assert found.keys() == {
        "c: hidden_size",
        "c: num_key_value_heads",
        "c: tie_word_embeddings",
        "c: hidden_act",
        "c: rope_scaling: rope_type",
        "c: sliding_window",
        "c: quantization_config",
        "c: rms_norm_eps",
    }
    assert found["c: rms_norm_eps"].kind == "missing"
    assert found["c: quantization_config"].value == "gptq"
    assert found["c: hidden_act"].limit == "one of silu, swish"


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads"])
def test_what_is_missing_is_not_blamed_for_more(key):
    """The stand-in for a value that is missing divides nothing; the keys beside it are right."""
    assert problems_of(spec_from_hf, {name: LLAMA[name] for name in LLAMA if name != key}, "c").keys() == {f"c: {key}"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("num_local_experts", 8),
        ("final_logit_softcapping", 30.0),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "mscale": 1.0}),
        ("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_scaling", {**LLAMA3, "attention_factor": 1.2}),
        ("rope_parameters", {"rope_type": "llama3"}),
    ],
)
def test_what_would_change_the_mathematics_is_never_ignored(key, value):
    assert any(key in option for option in problems_of(spec_from_hf, {**LLAMA, key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", None),
        ("partial_rotary_factor", 1.0),
        ("layer_types", ["full_attention"] * 2),
        ("rope_scaling", {"rope_type": "default"}),
        ("pretraining_tp", 2),
        ("quantization_config", None),
    ],
)
def test_what_changes_nothing_is_no_problem(key, value):
    assert spec_from_hf({**LLAMA, key: value}).config == spec_from_hf(LLAMA).config


def test_heads_of_gpt2_divide_its_channels():
    assert list(problems_of(spec_from_hf, {**GPT2, "n_head": 5}, "c")) == ["c: n_head"]


GONE = object()


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize(
    "value",
    [GONE, None, "wide", -1, 0, 1.5, True, [], [1], {}, {"a": 1}],
    ids=lambda value: "gone" if value is GONE else repr(value),
)
def test_no_value_breaks_the_reading(name, value):
    """Whatever a key says, it is read or it is a problem."""
    family = families()[name]
    (preset, *_) = family.presets
    complete = family.skeleton(family.presets[preset].config)
    for key in complete.keys() - {"architectures", "model_type"}:
        hf = {**complete, key: value} if value is not GONE else {k: v for k, v in complete.items() if k != key}
        try:
            spec_from_hf(hf)
        except ProblemError as error:
            assert any(key in problem.option or key in str(problem.value) for problem in error.problems), key


def test_contradictory_rope_is_a_problem():
    hf = {**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert list(problems_of(spec_from_hf, hf, "c")) == ["c: rope_theta"]


def test_unknown_keys_are_reported_once(caplog):
    with caplog.at_level(logging.WARNING, "cordee"):
        spec_from_hf({**LLAMA, "wavelets": 3, "use_cache": True})
    assert [record.getMessage() for record in caplog.records if "wavelets" in record.getMessage()]
    assert not any("use_cache" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("hf", "option", "near"),
    [
        ({"architectures": ["LlamaForCausalLm"]}, "architectures", "LlamaForCausalLM"),
        ({"model_type": "lama"}, "model_type", "llama"),
    ],
)
def test_unknown_architectures_name_the_nearest(hf, option, near):
    (problem,) = problems_of(spec_from_hf, hf, "c").values()
    assert (problem.option, problem.kind) == (f"c: {option}", "unknown") and near in problem.limit


def test_a_configuration_that_names_no_architecture():
    assert [problem.kind for problem in problems_of(spec_from_hf, {}, "c").values()] == ["missing"]


def test_directories_without_a_configuration(tmp_path):
    def facts(directory):
        (problem,) = problems_of(spec_from_directory, directory).values()
        return problem.option, problem.value, problem.kind, problem.limit

    assert facts(tmp_path / "none") == ("model directory", tmp_path / "none", "missing", None)
    assert facts(tmp_path) == ("model directory", tmp_path, "missing", "config.json")
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert facts(tmp_path) == (str(tmp_path / "config.json"), None, "corrupt", None)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert spec_from_directory(tmp_path).config == spec_from_hf(LLAMA).config


def test_a_spec_survives_being_stored():
    spec = spec_from_preset("llama3.2-1b")
    bare = ModelSpec(spec.family, spec.hf_config, spec.config, base_prefix=False)
    assert ModelSpec.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare


@pytest.mark.parametrize("name", sorted(presets()))
def test_rules_cover_every_parameter_of_every_preset(name):
    spec = spec_from_preset(name)
    rules = spec.rules()
    assert list(rules) == list(spec.shapes())
    foreign = [tensor for rule in rules.values() for tensor in rule.foreign]
    assert len(foreign) == len(set(foreign))


# ---- options ---------------------------------------------------------------------------------------------------------

FLAGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 1000,
}
LLAMA_FLAGS = {
    **FLAGS,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}


def from_flags(**flags):
    return spec_from_options(ModelOptions(**flags))


def test_megatron_defaults_give_gpt():
    spec = from_flags(**FLAGS)
    layer = spec.config.layers[0]
    assert spec.family.name == "gpt2" and spec.config.tie_word_embeddings and spec.config.learned_positions
    assert (layer.mlp.ffn_hidden_size, layer.mlp.activation, layer.norm.kind) == (256, "gelu", "layer")
    assert spec.config.vocab_size == 1024  # padded to a multiple of 128
    assert spec.config.hidden_dropout == spec.config.attention_dropout == spec.config.embedding_dropout == 0.1


def test_flags_of_a_llama_script():
    spec = from_flags(
        **LLAMA_FLAGS, group_query_attention=True, num_query_groups=2, hidden_dropout=0.0, attention_dropout=0.0
    )
    layer = spec.config.layers[0]
    assert spec.family.name == "llama" and not spec.config.tie_word_embeddings
    assert (layer.attention.num_kv_heads, layer.attention.qkv_bias, layer.mlp.bias) == (2, False, False)
    assert layer.mlp.ffn_hidden_size == int(4 * 64 * 2 / 3 / 64) * 64
    assert spec.config.hidden_dropout == 0.0


@pytest.mark.parametrize(
    ("flags", "vocab_size"),
    [
        ({}, 1024),
        ({"make_vocab_size_divisible_by": 1}, 1000),
        ({"make_vocab_size_divisible_by": 300}, 1200),
        ({"padded_vocab_size": 1001}, 1001),
    ],
)
def test_vocabulary_padding(flags, vocab_size):
    assert from_flags(**FLAGS, **flags).config.vocab_size == vocab_size


def test_the_tokenizer_gives_the_vocabulary_where_no_option_does():
    flags = {key: value for key, value in FLAGS.items() if key != "vocab_size"}
    assert spec_from_options(ModelOptions(**flags), vocab_size=500).config.vocab_size == 512
    assert list(problems_of(from_flags_dict, flags)) == ["--vocab-size"]


def from_flags_dict(flags):
    return from_flags(**flags)


def test_llama3_scaling_from_flags():
    scaling = {
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    rope = from_flags(**LLAMA_FLAGS, **scaling, rotary_base=5e5).config.layers[0].attention.rope
    assert rope.theta == 5e5 and rope.scaling.factor == 8.0
    del scaling["low_freq_factor"]
    assert list(problems_of(from_flags_dict, {**LLAMA_FLAGS, **scaling})) == ["--low-freq-factor"]


def test_everything_wrong_with_flags_at_once():
    flags = {
        "hidden_size": 65,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "padded_vocab_size": 50,
        "group_query_attention": False,
        "num_query_groups": 2,
        "swiglu": True,
        "openai_gelu": True,
        "rotary_base": 1e6,
        "high_freq_factor": 4.0,
    }
    assert problems_of(from_flags_dict, flags).keys() == {
        "--num-attention-heads",
        "--num-layers",
        "--max-position-embeddings",
        "--padded-vocab-size",
        "--num-query-groups",
        "--openai-gelu",
        "--rotary-base",
        "--high-freq-factor",
    }


def test_a_form_that_no_family_has():
    flags = {**LLAMA_FLAGS, "normalization": "LayerNorm"}
    (problem,) = problems_of(from_flags_dict, flags).values()
    assert (problem.option, problem.kind, problem.limit) == ("model options", "unknown", ["--normalization"])


def test_a_preset_with_changes_keeps_the_rest():
    plain = spec_from_preset("llama3.1-8b")
    spec = from_flags(model="llama3.1-8b", num_layers=4, rotary_base=1e6, hidden_dropout=0.1)
    rope = spec.config.layers[0].attention.rope
    assert spec.config.num_layers == 4 and rope.theta == 1e6 and spec.config.hidden_dropout == 0.1
    assert rope.scaling == plain.config.layers[0].attention.rope.scaling
    assert spec.hf_config["bos_token_id"] == 128000
    assert spec_from_options(ModelOptions(model="llama3.1-8b")) == plain


def test_heads_changed_in_a_preset_keep_their_meaning():
    multi_head = from_flags(model="llama2-7b", num_attention_heads=16).config.layers[0].attention
    assert (multi_head.num_heads, multi_head.num_kv_heads, multi_head.head_dim) == (16, 16, 256)
    grouped = from_flags(model="llama3-8b", num_attention_heads=16).config.layers[0].attention
    assert (grouped.num_heads, grouped.num_kv_heads, grouped.head_dim) == (16, 8, 256)


def test_a_configuration_in_the_new_spelling_takes_changes():
    spec = spec_from_hf({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    changed = spec.with_options(ModelOptions(rotary_base=1e6))
    assert changed.config.layers[0].attention.rope.theta == 1e6


def test_special_tokens_that_a_vocabulary_lacks_are_left_out_and_named(caplog):
    spec = spec_from_preset("phi3-mini-4k")
    with caplog.at_level(logging.WARNING, "cordee"):
        smaller = spec.with_vocab_size(500)
    assert smaller.hf_config["bos_token_id"] == 1
    assert smaller.hf_config["eos_token_id"] is None and smaller.hf_config["pad_token_id"] is None
    assert "500" in caplog.text and "eos_token_id = 32000" in caplog.text and "bos" not in caplog.text
    assert spec.hf_config["eos_token_id"] == 32000


HUGE = 10**9


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_no_model_is_so_large(key):
    size = 10**12 if key == "vocab_size" else HUGE
    found = problems_of(spec_from_hf, {**LLAMA, key: size})
    names = {"intermediate_size": "ffn_hidden_size"}
    assert found[f"config.json: {names.get(key, key)}"].value == size


@pytest.mark.parametrize("preset", sorted(presets()))
def test_no_family_makes_lists_of_layers_without_end(preset):
    hf = spec_from_preset(preset).hf_config
    for key in ("num_hidden_layers", "num_layers", "n_layer", "num_nextn_predict_layers"):
        if key in hf:
            assert problems_of(spec_from_hf, {**hf, key: HUGE})[f"config.json: {key}"].value == HUGE
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hf.get(key):
            assert problems_of(spec_from_hf, {**hf, key: HUGE})


@pytest.mark.parametrize("model", [None, "llama2-7b", "deepseek-v2", "bloom-560m"])
@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "ffn_hidden_size"])
def test_no_options_ask_for_so_large_a_model(model, name):
    flags = {"model": model} if model else LLAMA_FLAGS
    assert problems_of(from_flags_dict, {**flags, name: HUGE})


def test_limits_are_far_above_published_models():
    for config in (spec_from_preset(name).config for name in presets()):
        assert 10 * config.num_layers < MAX_LAYERS and 10 * config.vocab_size < MAX_TOKENS
        assert 10 * config.hidden_size < MAX_WIDTH
    (declared,) = (option.declared for option in options_of(ModelOptions) if option.name == "num_layers")
    assert declared.at_most == MAX_LAYERS  # of the flag, which is refused by its name


def test_a_preset_cannot_leave_its_family():
    (problem,) = problems_of(from_flags_dict, {"model": "gpt2", "swiglu": True}).values()
    assert (problem.option, problem.kind, problem.limit) == ("model options", "unknown", ["the activation"])


def test_unknown_presets_name_the_nearest():
    (problem,) = problems_of(spec_from_preset, "lama2-7b").values()
    assert problem.kind == "unknown" and "llama2-7b" in problem.limit


ONE_PRESET = sorted(next(iter(family.presets)) for family in families().values() if family.presets)


@pytest.mark.parametrize("preset", ONE_PRESET)
def test_an_option_reaches_the_model_or_is_refused(preset):
    spec = spec_from_preset(preset)
    words = words_of(spec.config)
    doubled = ("ffn_hidden_size", "hidden_size", "kv_channels", "max_position_embeddings", "num_attention_heads")
    wanted = {name: 2 * words[name] for name in doubled}
    wanted |= {"attention_dropout": 0.25, "hidden_dropout": 0.25, "init_method_std": 0.5, "norm_epsilon": 0.5}
    wanted |= {"num_layers": 2, "num_query_groups": 1, "rotary_base": 1234.0, "vocab_size": 77}
    with_it = {"num_query_groups": {"group_query_attention": True}}
    arrived = set()
    for name, value in wanted.items():
        try:
            changed = spec.with_options(ModelOptions(**{name: value}, **with_it.get(name, {})))
        except ProblemError:
            continue
        assert words_of(changed.config)[name] == value, name
        arrived.add(name)
    assert {"num_attention_heads", "num_layers", "max_position_embeddings", "vocab_size"} <= arrived


@pytest.mark.parametrize("preset", ONE_PRESET)
def test_other_vocabularies(preset):
    spec = spec_from_preset(preset)
    bare = ModelSpec(spec.family, spec.hf_config, spec.config, base_prefix=False)
    for size in (100, 60000):
        assert bare.with_vocab_size(size).config == spec.config.with_vocab_size(size)
        assert not bare.with_vocab_size(size).base_prefix
