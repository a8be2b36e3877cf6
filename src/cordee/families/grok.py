"""Grok-1 (xAI 2024): eight gated experts a layer, four norms around attention and experts, scaled scores and logits.

Attention scores are multiplied by a number of their own and capped at 30 by a tanh. A token's two experts are weighted
by the softmax over all eight, not normalised. GELU is the tanh form, as in the original. That was published as a JAX
program with its own files; names of tensors and keys are those of its conversions to PyTorch."""

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_balance, read_choice
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, MLPConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.tensors.rules import Rule, module, separate_qkv


def read(hf: ConfigReader) -> ModelConfig:
    scale, cap = hf.positive("attn_output_multiplier"), hf.positive("max_attn_value", 30.0)
    attention = common.read_attention(hf, common.read_heads(hf), scale=scale, softcap=cap)
    moe = MoEConfig(
        router=RouterConfig(**read_choice(hf, "num_experts")),
        expert=MLPConfig(ffn_hidden_size=hf.integer("intermediate_size"), activation="gelu_tanh", gated=True),
        balance=read_balance(hf),
    )
    return common.read_model(
        hf,
        common.read_layers(hf, attention, mlp=moe, norm_placement="sandwich"),
        embedding_scale=hf.positive("embedding_multiplier_scale"),
        logit_scale=hf.positive("output_multiplier_scale"),
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
    )


def layer_weights(layer: LayerConfig) -> list[Rule]:
    qkv = common.qkv_op(layer, separate_qkv)
    return [
        scale("attention_norm", "pre_attn_norm"),
        *module("attention.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", op=qkv),
        *module("attention.out", "attn.o_proj"),
        scale("attention_post_norm", "post_attn_norm"),
        scale("mlp_norm", "pre_moe_norm"),
        *expert_list_weights(layer, "moe_block", "linear", "linear_v", "linear_1"),
        scale("mlp_post_norm", "post_moe_norm"),
    ]


def scale(canonical: str, foreign: str) -> Rule:
    """The rule of a norm."""
    return Rule(f"{canonical}.weight", (f"{foreign}.scale",))


FAMILY = Family(
    name="grok",
    architectures=("Grok1ModelForCausalLM", "Grok1Model"),
    model_types=("grok-1",),
    read=read,
    outer_weights=(
        *module("embedding", "model.embed_tokens"),
        scale("final_norm", "model.norm"),
        *module("head", "lm_head"),
    ),
    layer_weights=layer_weights,
    keys=keys(
        attn_output_multiplier=lambda words: (words["query_pre_attn_scalar"] or 1) ** -0.5,
        embedding_multiplier_scale="scale_emb",
        max_attn_value="attn_logit_softcapping",
        output_multiplier_scale="output_multiplier_scale",
        **expert_keys("num_experts"),
    ),
)
