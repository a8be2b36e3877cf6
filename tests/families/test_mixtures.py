"""What the keys of a configuration mean in families with experts, and what of a checkpoint is not a model's."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from cordee.errors import ProblemError
from cordee.families.registry import presets, spec_from_hf, spec_from_preset
from cordee.model.config import BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.weights import hf
from cordee.weights.load import load_into, save_from


def config_of(preset, **changes):
    """The `config.json` of a preset with other values of some keys, None for those to leave out."""
    family = presets()[preset]
    values = family.skeleton({**family.presets[preset].config, **changes})
    return {key: value for key, value in values.items() if value is not None}


def read(preset, **changes):
    return spec_from_hf(config_of(preset, **changes), "c").config


def mixture(preset, layer=-1, **changes):
    mlp = read(preset, **changes).layers[layer].mlp
    assert isinstance(mlp, MoEConfig)
    return mlp


def sparse_layers(preset, **changes):
    return [i for i, layer in enumerate(read(preset, **changes).layers) if isinstance(layer.mlp, MoEConfig)]


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "key"),
    [
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("mixtral-8x7b", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral-8x7b", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral-8x7b", {"router_aux_loss_coef": "much"}, "router_aux_loss_coef"),
        ("qwen1.5-moe-a2.7b", {"mlp_only_layers": [24]}, "mlp_only_layers"),
        ("qwen1.5-moe-a2.7b", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("qwen3-30b-a3b", {"num_local_experts": 64}, "num_local_experts"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("deepseek-v2", {"n_group": 7}, "n_group"),
        ("deepseek-v2", {"topk_group": 9}, "topk_group"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek-v2", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek-v3", {"n_group": 256, "topk_group": 8}, "n_group"),
        ("deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("grok-1", {"attn_output_multiplier": None}, "attn_output_multiplier"),
        ("gpt-oss-20b", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ("gpt-oss-20b", {"rope_scaling": None}, "rope_scaling"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gpt-oss-20b", {"experts_per_token": 3}, "experts_per_token"),
        ("llama4-scout", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("llama4-scout", {"layer_types": ["sliding_attention"] * 48}, "layer_types"),
        ("llama4-scout", {"moe_layers": [48]}, "moe_layers"),
        ("gpt4-4x13b", {"moe_token_drop_policy": "random"}, "moe_token_drop_policy"),
        ("gpt4-4x13b", {"moe_expert_capacity_factor": 0}, "moe_expert_capacity_factor"),
        ("llama2-7b", {"n_routed_experts": 8}, "n_routed_experts"),
    ],
)
def test_what_a_family_cannot_compute_is_refused(preset, changes, key):
    with pytest.raises(ProblemError) as caught:
        read(preset, **changes)
    assert f"c: {key}" in {problem.option for problem in caught.value.problems}


def test_quantised_experts_are_refused_with_a_way_out():
    with pytest.raises(ProblemError) as caught:
        read("gpt-oss-20b", quantization_config={"quant_method": "mxfp4"})
    (problem,) = caught.value.problems
    assert (problem.option, problem.kind, problem.limit) == ("c: quantization_config", "quantised", "mxfp4")


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "llama4-scout"])
def test_no_key_of_a_preset_goes_unread(preset, caplog):
    with caplog.at_level(logging.WARNING, "cordee"):
        spec_from_preset(preset)
    assert not caplog.records


@pytest.mark.parametrize(
    ("preset", "router"),
    [
        ("mixtral-8x7b", RouterConfig(num_experts=8, top_k=2, normalise=True)),
        ("qwen1.5-moe-a2.7b", RouterConfig(num_experts=60, top_k=4)),
        ("qwen3-30b-a3b", RouterConfig(num_experts=128, top_k=8, normalise=True)),
        ("deepseek-v2-lite", RouterConfig(num_experts=64, top_k=6)),
        ("deepseek-v2", RouterConfig(num_experts=160, top_k=6, scale=16.0, num_groups=8, top_groups=3)),
        ("grok-1", RouterConfig(num_experts=8, top_k=2)),
        ("gpt-oss-120b", RouterConfig(num_experts=128, top_k=4, score_when="after", bias=True)),
        ("llama4-maverick", RouterConfig(num_experts=128, top_k=1, score="sigmoid")),
        ("gpt4-4x13b", RouterConfig(num_experts=4, top_k=2, score_when="after")),
        (
            "deepseek-v3",
            RouterConfig(
                num_experts=256,
                top_k=8,
                score="sigmoid",
                normalise=True,
                scale=2.5,
                correction_bias=True,
                num_groups=8,
                top_groups=4,
                group_score="top2_sum",
            ),
        ),
    ],
)
def test_routers(preset, router):
    assert mixture(preset).router == router


def test_normalised_weights_of_deepseek_v2_are_not_scaled():
    router = mixture("deepseek-v2", norm_topk_prob=True).router
    assert router.normalise and router.scale == 1.0


def test_which_layers_have_experts():
    assert sparse_layers("qwen1.5-moe-a2.7b", decoder_sparse_step=4) == [3, 7, 11, 15, 19, 23]
    assert sparse_layers("qwen3-30b-a3b", decoder_sparse_step=16, mlp_only_layers=[31]) == [15, 47]
    assert sparse_layers("deepseek-v3")[0] == 3 and len(sparse_layers("deepseek-v3")) == 58
    assert sparse_layers("deepseek-v2-lite", moe_layer_freq=5) == [5, 10, 15, 20, 25]
    assert sparse_layers("llama4-maverick") == list(range(1, 48, 2))
    assert sparse_layers("llama4-maverick", moe_layers=[0, 5]) == [0, 5]


def test_shared_experts():
    assert mixture("deepseek-v2").shared.ffn_hidden_size == 2 * 1536
    assert mixture("deepseek-v2", n_shared_experts=None).shared.ffn_hidden_size == 2 * 1536  # left out
    null = spec_from_hf({**config_of("deepseek-v2"), "n_shared_experts": None}).config
    assert null.layers[-1].mlp.shared is None
    qwen = mixture("qwen1.5-moe-a2.7b")
    assert qwen.shared.ffn_hidden_size == 5632 and qwen.shared_gate
    llama = mixture("llama4-maverick")
    assert llama.shared == llama.expert and llama.weight_input and not llama.shared_gate


def test_attention_of_llama4():
    layers = read("llama4-scout").layers
    turned, unturned = layers[2].attention, layers[3].attention
    assert turned.rope and turned.qk_norm.after_rope and turned.chunk == 8192 and turned.query_scaling is None
    assert unturned.rope is unturned.qk_norm is unturned.chunk is None and unturned.query_scaling.floor_scale == 8192
    assert read("llama4-maverick").layers[0].attention.qk_norm is None


def test_bands_of_scout_that_touch():
    """Its two borders between long and short waves are one, where others blend between them."""
    from transformers import Llama4TextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from cordee.model.rotary import inverse_frequencies

    values = config_of("llama4-scout")
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](
        Llama4TextConfig(rope_theta=values["rope_theta"], rope_scaling=values["rope_scaling"]), "cpu"
    )
    found = inverse_frequencies(read("llama4-scout").layers[0].attention.rope, 128)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_scores_of_deepseek_are_sharper_where_positions_are_stretched():
    plain = read("deepseek-v3", rope_scaling=None).layers[0].attention
    assert plain.scale == 192**-0.5
    assert read("deepseek-v3").layers[0].attention.scale == pytest.approx(192**-0.5 * 1.3688879**2)  # 0.1 ln 40 + 1
    assert read("deepseek-v2").layers[0].attention.scale == pytest.approx(192**-0.5 * 1.2608037**2)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "balance"),
    [
        ("mixtral-8x7b", {}, BalanceConfig(expert=0.02)),
        ("mixtral-8x7b", {"router_aux_loss_coef": None}, BalanceConfig(expert=0.001)),
        ("grok-1-8x5b", {}, BalanceConfig(expert=0.01)),
        ("deepseek-v2-lite", {}, BalanceConfig(expert=0.001, per_sequence=True)),
        ("deepseek-v2", {"seq_aux": False}, BalanceConfig(expert=0.001, num_devices=8, top_devices=3)),
        ("deepseek-v3", {}, BalanceConfig(expert=0.0001, per_sequence=True)),
        ("gpt-oss-20b", {"router_aux_loss_coef": 0.9}, BalanceConfig()),
        ("gpt-oss-20b", {"router_aux_loss_coef": 0.9, "output_router_logits": True}, BalanceConfig(expert=0.9)),
        ("gpt4-4x16b", {}, BalanceConfig(expert=0.01)),
    ],
)
def test_coefficients_of_auxiliary_losses(preset, changes, balance):
    assert mixture(preset, **changes).balance == balance


def test_capacity():
    assert mixture("gpt4-4x13b").capacity == CapacityConfig(factor=1.1, pad=True)
    assert mixture("gpt4-4x13b", moe_token_drop_policy="position").capacity.drop == "position"
    assert mixture("gpt4-4x16b").capacity is None


# ---- checkpoints -----------------------------------------------------------------------------------------------------

TINY_DEEPSEEK = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 6,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 2,
    "v_head_dim": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def written(directory, config):
    """A random model in `directory`, with the tensors of a further layer and of what predicts with it beside it."""
    spec = spec_from_hf(config)
    model = GPTModel(spec.config).eval()
    initialise(model, seed=1)
    with hf.write(directory, spec) as sink:
        save_from(model, sink)
    tensors = load_file(directory / "model.safetensors")
    body = {
        name.replace(".1.", ".2.", 1): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight")
    further = body | {f"model.layers.2.{name}": torch.ones(3) for name in own}
    save_file(tensors | further, directory / "model.safetensors")
    return model, tensors, further


def test_layers_that_predict_further_tokens_are_left_out_and_said_to_be(tmp_path):
    model, tensors, further = written(
        tmp_path / "in", config_of("deepseek-v3", **TINY_DEEPSEEK, num_nextn_predict_layers=1)
    )
    source = hf.read(tmp_path / "in")
    (note,) = source.notes
    assert f"{len(further)} tensors" in note and "predict further tokens" in note
    loaded = GPTModel(source.spec.config, device="meta").eval()
    assert load_into(loaded, source).notes == source.notes
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids), model(ids))

    with hf.write(tmp_path / "out", source.spec) as sink:
        save_from(loaded, sink)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_other_tensors_of_further_layers_are_no_part_of_the_model(tmp_path):
    """A layer too many is an error where the configuration does not say what it is for."""
    written(tmp_path, config_of("deepseek-v3", **TINY_DEEPSEEK))
    with pytest.raises(ProblemError, match=r"model\.layers\.2\.enorm"):
        hf.read(tmp_path)
