"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434): latent attention and many small experts.

Softmax over all experts; V2 limits each token to the best groups of them. Weights are scaled, or normalised instead.
Agrees with the code published with the weights, which transformers differs from: it ignores `moe_layer_freq` and
`norm_topk_prob`."""

from cordee.families import deepseek
from cordee.families.experts import read_choice
from cordee.families.family import Family
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
    return deepseek.read_model(hf, router, balance, shared=2, dense_layers=0)


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


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM", "DeepseekV2Model", "DeepseekV2ForSequenceClassification"),
    read=read,
    layer_weights=deepseek.layer_weights,
    keys={
        **deepseek.KEYS,
        "topk_method": lambda words: (
            "group_limited_greedy" if words["moe_router_load_balancing_type"] == "group_limited_greedy" else "greedy"
        ),
    },
)
