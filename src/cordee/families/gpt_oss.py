"""GPT-OSS (OpenAI 2025, arXiv 2508.10925): every other layer with a window, attention sinks, clamped SwiGLU.

A token's four experts are weighted by the softmax of their logits. Experts are stored as stacks `[expert, in, out]`,
gate and up in turns along the last dim. The published files have them quantised."""

from cordee.families import common
from cordee.families.experts import expert_keys, expert_stack_weights, read_balance, read_choice
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model import config
from cordee.tensors.rules import Rule, module

CLAMPED: dict[str, config.Activation] = {name: "swiglu_clamped" for name in common.names_of("silu")}


def read(hf: ConfigReader) -> config.ModelConfig:
    refuse_quantised(hf)
    hf.value("initial_context_length", None)  # said again among the rotary positions
    if hf.value("rope_parameters", None) is None:
        hf.value("rope_scaling")  # where neither is given, transformers stretches positions as the published models do
    heads, bias = common.read_heads(hf, head_dim=64, groups=8), hf.flag("attention_bias", True)
    rope = read_rope(hf, heads["head_dim"], theta=150000.0)
    attention = common.read_attention(hf, heads, bias, rope=rope, sinks=True)
    choice = read_choice(hf, "num_local_experts", hf.alias("num_experts_per_tok", "experts_per_token"))
    balance = read_balance(hf)
    if not hf.flag("output_router_logits", False):
        balance = config.BalanceConfig()  # published files give 0.9, which transformers uses with that flag only
    router = config.RouterConfig(**choice, score_when="after", bias=True)
    moe = config.MoEConfig(router=router, expert=read_expert(hf), balance=balance)
    windows = common.read_windows(hf, hf.integer("sliding_window", 128), lambda i: i % 2 == 0)
    return common.read_model(hf, common.windowed(common.read_layers(hf, attention, mlp=moe), windows))


def refuse_quantised(hf: ConfigReader) -> None:
    quantised = hf.value("quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        hf.problem(
            "quantization_config",
            f"experts are quantised ({method}), which is not supported",
            "write them in bfloat16: load with transformers and Mxfp4Config(dequantize=True), then save_pretrained",
            "quantised",
            limit=method,
        )


def read_expert(hf: ConfigReader) -> config.MLPConfig:
    return config.MLPConfig(
        ffn_hidden_size=hf.integer("intermediate_size"),
        activation=hf.choice("hidden_act", CLAMPED, "silu"),
        gated=True,
        bias=True,
        limit=hf.positive("swiglu_limit", 7.0),
    )


def layer_weights(layer: config.LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        Rule("attention.sinks", ("self_attn.sinks",)),
        *module("mlp.router", "mlp.router"),
        *expert_stack_weights("mlp.experts", branches="f two"),
    ]


FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM", "GptOssModel", "GptOssForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(sliding_window="interleave_sliding_window", **expert_keys("num_local_experts")),
)
