"""Llama 4, the language model (Meta 2025): three of four layers attend within chunks, the others without positions.

Queries and keys are normed after RoPE; layers without it (NoPE) scale queries by the position instead. The sigmoid
of a token's best logit multiplies what its expert is given; a shared expert sees all tokens. Experts are stored as
stacks `[expert, in, out]`, rotary dims in neighbouring pairs."""

from dataclasses import replace

from cordee.families import common
from cordee.families.experts import expert_keys, expert_stack_weights, read_balance, read_choice, read_layer_numbers
from cordee.families.family import Family, keys
from cordee.families.lenses import MODEL
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model import config as configs
from cordee.model.config import LayerConfig, ModelConfig, MoEConfig
from cordee.tensors.rules import Rule, module

CHUNKED = "chunked_attention"


def read(hf: ConfigReader) -> ModelConfig:
    norm, count = common.read_norm(hf), hf.integer("num_hidden_layers")
    expert, dense = common.read_swiglu(hf), common.read_swiglu(hf, key="intermediate_size_mlp")
    moe = MoEConfig(
        router=configs.RouterConfig(**read_choice(hf, "num_local_experts"), score="sigmoid"),
        expert=expert,
        shared=expert,
        weight_input=True,
        balance=read_balance(hf),
    )
    step = hf.integer("interleave_moe_layer_step", 1)
    sparse = read_layer_numbers(hf, "moe_layers", list(range(step - 1, count, step)))
    mlps = [moe if i in sparse else dense for i in range(count)]
    layers = [LayerConfig(attention=own, mlp=mlp, norm=norm) for own, mlp in zip(read_attention(hf), mlps, strict=True)]
    return common.read_model(hf, layers)


def read_attention(hf: ConfigReader) -> list[configs.AttentionConfig]:
    """Attention of every layer."""
    heads, bias = common.read_heads(hf, head_dim=128, groups=8), hf.flag("attention_bias", False)
    plain = configs.AttentionConfig(**heads, qkv_bias=bias, out_bias=bias)
    grown = configs.TemperatureScaling(scale=hf.number("attn_scale", 0.1), floor_scale=hf.positive("floor_scale", 8192))
    without_rope = replace(plain, query_scaling=grown if hf.value("attn_temperature_tuning", True) else None)
    norm = configs.NormConfig(kind="rms", eps=hf.number("rms_norm_eps"), affine=False)
    qk_norm = configs.QKNormConfig(norm=norm, after_rope=True)
    rope = read_rope(hf, heads["head_dim"], theta=500000.0)
    with_rope = replace(plain, rope=rope, qk_norm=qk_norm if hf.flag("use_qk_norm", True) else None)

    interval, chunk = hf.integer("no_rope_layer_interval", 4), hf.integer("attention_chunk_size", 8192)
    rotated = [int((i + 1) % interval != 0) for i in range(hf.integer("num_hidden_layers"))]
    rotated = common.read_of_layers(hf, "no_rope_layers", (0, 1), rotated)  # 1 where there is rope, despite the name
    default = [CHUNKED if r else common.FULL for r in rotated]
    types = common.read_of_layers(hf, "layer_types", (CHUNKED, common.FULL), default)
    chunks = [chunk if kind == CHUNKED else None for kind in types]
    return [replace(with_rope if r else without_rope, chunk=own) for r, own in zip(rotated, chunks, strict=True)]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    mlp = "feed_forward"
    attention = common.attention_weights(layer, common.paired_qkv(layer))
    return [
        *common.layer_weights(layer, attention, common.mlp_weights("mlp", mlp)),
        *module("mlp.router", f"{mlp}.router"),
        *expert_stack_weights(f"{mlp}.experts", branches="two f"),
        *common.mlp_weights("mlp.shared", f"{mlp}.shared_expert"),
    ]


def first_sparse(config: ModelConfig) -> int:
    return next((i for i, layer in enumerate(config.layers) if isinstance(layer.mlp, MoEConfig)), 0)


FAMILY = Family(
    name="llama4",
    architectures=("Llama4ForCausalLM", "Llama4TextModel"),
    model_types=("llama4_text",),
    read=read,
    layer_weights=layer_weights,
    keys=keys(
        "intermediate_size",
        interleave_moe_layer_step=lambda words: 1 + first_sparse(words[MODEL]),
        use_qk_norm="qk_layernorm",
        **expert_keys("num_local_experts"),
    ),
)
