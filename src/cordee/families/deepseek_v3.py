"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv 2412.19437): V2's layers with another way to choose experts.

Each expert is scored by a sigmoid. A bias, which is no weight but moved to keep experts evenly used, takes part in the
choice alone. Weights are normalised and scaled. The layers that predict further tokens (`num_nextn_predict_layers`)
are not built: their tensors are left out.
"""

from __future__ import annotations

from cordee.families import deepseek
from cordee.families.experts import read_choice
from cordee.families.family import Family, HFConfig, LeftOut, Preset
from cordee.families.reader import ConfigReader
from cordee.model.config import BalanceConfig, ModelConfig, RouterConfig


def read(hf: ConfigReader) -> ModelConfig:
    if hf.value("num_nextn_predict_layers", 0):
        hf.integer("num_nextn_predict_layers")
    # Coefficient of the paper where the configuration has none: the published one leaves it out.
    balance = BalanceConfig(expert=hf.number("aux_loss_alpha", 0.0001), per_sequence=hf.flag("seq_aux", True))
    return deepseek.read_model(hf, read_router(hf), balance)


def read_router(hf: ConfigReader) -> RouterConfig:
    choice = read_choice(hf, "n_routed_experts")
    groups, top_groups = deepseek.read_groups(hf, choice, groups=8, top_groups=4)
    if choice["num_experts"] < 2 * groups:
        hf.problem("n_group", "groups are scored by their two best experts", "give each group two experts or more")
    hf.choice("scoring_func", {"sigmoid": "sigmoid"}, "sigmoid")
    hf.choice("topk_method", {"noaux_tc": "noaux_tc"}, "noaux_tc")
    return RouterConfig(
        **choice,
        score="sigmoid",
        normalise=hf.flag("norm_topk_prob", True) and choice["top_k"] > 1,
        scale=hf.number("routed_scaling_factor", 2.5),
        correction_bias=True,
        num_groups=groups,
        top_groups=top_groups,
        group_score="top2_sum",
    )


def left_out(hf: HFConfig) -> LeftOut:
    first, count = hf["num_hidden_layers"], hf.get("num_nextn_predict_layers") or 0
    prefixes = tuple(f"model.layers.{first + i}." for i in range(count))
    return LeftOut("layers that predict further tokens", prefixes, {"num_nextn_predict_layers": 0})


_671B = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM", "DeepseekV3Model"),
    model_types=("deepseek_v3",),
    read=read,
    weights=deepseek.weights,
    left_out=left_out,
    base_prefix="model.",
    keys=deepseek.KEYS,
    presets={"deepseek-v3": Preset(config=_671B, licence="DeepSeek Model License")},
)
