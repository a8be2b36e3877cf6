"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434): latent attention and many small experts.

Softmax over all experts; V2 limits each token to the best groups of them. Weights are scaled, or normalised instead.
Agrees with the code published with the weights, which transformers differs from: it ignores `moe_layer_freq` and
`norm_topk_prob`.
"""

from __future__ import annotations

from cordee.families import deepseek
from cordee.families.experts import read_choice
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.model.config import BalanceConfig, ModelConfig, RouterConfig

GROUPED = {"greedy": False, "group_limited_greedy": True}


def read(hf: ConfigReader) -> ModelConfig:
    router = read_router(hf)
    balance = BalanceConfig(
        expert=hf.number("aux_loss_alpha", 0.001),
        per_sequence=hf.flag("seq_aux", True),
        num_devices=router.num_groups,
        top_devices=router.top_groups,
    )
    return deepseek.read_model(hf, router, balance)


def read_router(hf: ConfigReader) -> RouterConfig:
    choice = read_choice(hf, "n_routed_experts")
    groups, top_groups = deepseek.read_groups(hf, choice)
    hf.choice("scoring_func", {"softmax": "softmax"}, "softmax")
    normalise = hf.flag("norm_topk_prob", False) and choice["top_k"] > 1
    scale = hf.number("routed_scaling_factor", 1.0)
    limited = hf.choice("topk_method", GROUPED, "greedy")
    return RouterConfig(
        **choice,
        normalise=normalise,
        scale=1.0 if normalise else scale,
        num_groups=groups if limited else 1,
        top_groups=top_groups if limited else 1,
    )


def _preset(licence: str, layers: int, hidden: int, ffn: int, heads: int, **more: object) -> Preset:
    config = {
        "vocab_size": 102400,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "hidden_act": "silu",
        "max_position_embeddings": 163840,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence=licence)


LICENCE = "DeepSeek Model License"
UNPUBLISHED = "no weights published"

_GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
_LIMITED = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
_LITE = {**_GREEDY, "n_routed_experts": 64, "moe_intermediate_size": 1408, "q_lora_rank": None}
_FULL = {**_LIMITED, "n_routed_experts": 160, "moe_intermediate_size": 1536, "q_lora_rank": 1536}
_CUT = {**_FULL, "aux_loss_alpha": 0.003}  # as trained by the scripts that cut the model

FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM", "DeepseekV2Model"),
    model_types=("deepseek_v2",),
    read=read,
    weights=deepseek.weights,
    base_prefix="model.",
    keys=deepseek.KEYS,
    presets={
        "deepseek-v2-lite": _preset(LICENCE, 27, 2048, 10944, 16, **_LITE),
        "deepseek-v2": _preset(LICENCE, 60, 5120, 12288, 128, **_FULL),
        "deepseek-v2-100b": _preset(UNPUBLISHED, 24, 5120, 12288, 128, **_CUT),
        "deepseek-v2-60b": _preset(UNPUBLISHED, 16, 5120, 12288, 128, **_CUT),
    },
)
