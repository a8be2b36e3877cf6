"""The mixture-of-experts blocks of transformers, and the same mathematics as a `MoEConfig`.

Each case builds a block with random weights, says how its parameters become canonical, and how it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cordee.model.config import (
    AttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from cordee.model.moe import MoE

HIDDEN, FFN, EXPERTS = 16, 12, 8


@dataclass(frozen=True)
class Case:
    block: Callable[[], nn.Module]
    config: MoEConfig
    canonical: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # parameters, or gradients, of the block
    output: Callable[[Any], Tensor] = lambda y: y


def mlp(ffn: int, **options) -> MLPConfig:
    return MLPConfig(ffn_hidden_size=ffn, gated=True, **{"activation": "silu", **options})


def build(config: MoEConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> MoE:
    """A block of our own with random parameters, in a model of two layers."""
    norm = NormConfig(kind="rms", eps=1e-6)
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=HIDDEN)
    layer = LayerConfig(attention=attention, mlp=config, norm=norm)
    model = ModelConfig(
        vocab_size=8, hidden_size=HIDDEN, max_position_embeddings=8, layers=(layer, layer), final_norm=norm
    )
    torch.manual_seed(seed)
    block = MoE(config, model, dtype=dtype)
    randomise(block)
    return block


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.normal_(std=0.3)


def _shared(of: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    gate_up = torch.stack([of[f"{prefix}.gate_proj.weight"], of[f"{prefix}.up_proj.weight"]])
    return {"shared.gate_up.weight": gate_up, "shared.down.weight": of[f"{prefix}.down_proj.weight"]}


def _experts(of: dict[str, Tensor], router: str = "gate") -> dict[str, Tensor]:
    return {
        "router.weight": of[f"{router}.weight"],
        "experts.gate_up.weight": of["experts.gate_up_proj"].unflatten(1, (2, -1)),
        "experts.down.weight": of["experts.down_proj"],
    }


def _transposed_experts(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "router.weight": of["router.weight"],
        "experts.gate_up.weight": of["experts.gate_up_proj"].transpose(1, 2).unflatten(1, (2, -1)),
        "experts.down.weight": of["experts.down_proj"].transpose(1, 2),
    }


def _qwen2(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return _experts(of) | _shared(of, "shared_expert") | {"shared_gate.weight": of["shared_expert_gate.weight"]}


def _deepseek(of: dict[str, Tensor]) -> dict[str, Tensor]:
    canonical = _experts(of) | _shared(of, "shared_experts")
    if "gate.e_score_correction_bias" in of:
        canonical["router.correction_bias"] = of["gate.e_score_correction_bias"]
    return canonical


def _llama4(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return _transposed_experts(of) | _shared(of, "shared_expert")


def _gpt_oss(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "router.weight": of["router.weight"],
        "router.bias": of["router.bias"],
        "experts.gate_up.weight": of["experts.gate_up_proj"].transpose(1, 2).unflatten(1, (-1, 2)).transpose(1, 2),
        "experts.gate_up.bias": of["experts.gate_up_proj_bias"].unflatten(1, (-1, 2)).transpose(1, 2),
        "experts.down.weight": of["experts.down_proj"].transpose(1, 2),
        "experts.down.bias": of["experts.down_proj_bias"],
    }


def _mixtral_block() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(_eager(config))


def _qwen2_block() -> nn.Module:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=FFN,
        shared_expert_intermediate_size=20,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    )
    return Qwen2MoeSparseMoeBlock(_eager(config))


def _qwen3_block() -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=FFN, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=True
    )
    return Qwen3MoeSparseMoeBlock(_eager(config))


def _deepseek_options(**options) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": FFN, "n_routed_experts": EXPERTS, "n_shared_experts": 2}
    return sizes | {"num_experts_per_tok": 3, "num_attention_heads": 2} | options


def _deepseek_v2_block(**options) -> nn.Module:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe

    return DeepseekV2Moe(_eager(DeepseekV2Config(**_deepseek_options(**options))))


def _deepseek_v3_block() -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    options = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    return DeepseekV3MoE(_eager(DeepseekV3Config(**_deepseek_options(**options))))


def _gpt_oss_block() -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2, swiglu_limit=0.5
    )
    return GptOssMLP(_eager(config))


def _llama4_block() -> nn.Module:
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    return Llama4TextMoe(_eager(config))


def _eager(config):
    config._experts_implementation = "eager"
    return config


def router(top_k: int, **options) -> RouterConfig:
    return RouterConfig(num_experts=EXPERTS, top_k=top_k, **options)


CASES = {
    "mixtral": Case(_mixtral_block, MoEConfig(router=router(2, normalise=True), expert=mlp(FFN)), _experts),
    "qwen2_moe": Case(
        _qwen2_block, MoEConfig(router=router(3), expert=mlp(FFN), shared=mlp(20), shared_gate=True), _qwen2
    ),
    "qwen3_moe": Case(_qwen3_block, MoEConfig(router=router(3, normalise=True), expert=mlp(FFN)), _experts),
    "deepseek_v2_lite": Case(
        lambda: _deepseek_v2_block(topk_method="greedy", routed_scaling_factor=1.0),
        MoEConfig(router=router(3), expert=mlp(FFN), shared=mlp(2 * FFN)),
        _deepseek,
    ),
    "deepseek_v2": Case(
        lambda: _deepseek_v2_block(
            topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
        ),
        MoEConfig(router=router(3, num_groups=4, top_groups=2, scale=16.0), expert=mlp(FFN), shared=mlp(2 * FFN)),
        _deepseek,
    ),
    "deepseek_v3": Case(
        _deepseek_v3_block,
        MoEConfig(
            router=router(
                3,
                score="sigmoid",
                correction_bias=True,
                num_groups=4,
                top_groups=2,
                group_score="top2_sum",
                normalise=True,
                scale=2.5,
            ),
            expert=mlp(FFN),
            shared=mlp(2 * FFN),
        ),
        _deepseek,
    ),
    "gpt_oss": Case(
        _gpt_oss_block,
        MoEConfig(
            router=router(2, score_when="after", bias=True),
            expert=mlp(FFN, activation="swiglu_clamped", limit=0.5, bias=True),
        ),
        _gpt_oss,
        lambda y: y[0],
    ),
    "llama4": Case(
        _llama4_block,
        MoEConfig(
            router=router(2, score="sigmoid", score_when="after"), expert=mlp(FFN), shared=mlp(FFN), weight_input=True
        ),
        _llama4,
        lambda y: y[0],
    ),
}
