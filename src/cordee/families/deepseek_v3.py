"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv 2412.19437): V2's layers with another way to choose experts.

Each expert is scored by a sigmoid. A bias, which is no weight but moved to keep experts evenly used, takes part in the
choice alone. Weights are normalised and scaled. The layers that predict further tokens (`num_nextn_predict_layers`)
are not built: their tensors are left out."""

from cordee.families import deepseek
from cordee.families.experts import read_choice
from cordee.families.family import Family, HFConfig, LeftOut
from cordee.families.reader import ConfigReader
from cordee.model.config import BalanceConfig, ModelConfig, RouterConfig


def read(hf: ConfigReader) -> ModelConfig:
    if hf.value("num_nextn_predict_layers", 0):
        hf.integer("num_nextn_predict_layers")
    # Coefficient of the paper where the configuration has none: the published one leaves it out.
    balance = BalanceConfig(expert=hf.number("aux_loss_alpha", 0.0001), per_sequence=hf.flag("seq_aux", True))
    return deepseek.read_model(hf, read_router(hf), balance, shared=1, dense_layers=3)


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


FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM", "DeepseekV3Model", "DeepseekV3ForSequenceClassification"),
    read=read,
    layer_weights=deepseek.layer_weights,
    left_out=left_out,
    keys=deepseek.KEYS,
)
