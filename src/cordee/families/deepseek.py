"""What DeepSeek's models from V2 on share: latent attention, dense layers before MoE layers, and the names of tensors.

Owns the keys of their `config.json` and their layout in checkpoints. Routing differs: it is the families'."""

from dataclasses import replace

from cordee.families import common
from cordee.families.experts import Choice, expert_list_weights, with_experts
from cordee.families.family import HFConfig, keys
from cordee.families.lenses import LATENT_EPS, Words, scaling_of
from cordee.families.reader import ConfigReader
from cordee.families.rope import mscale, read_rope, rope_section, write_scaling
from cordee.model import config
from cordee.tensors.rules import Rule, module, rotary_halves
from cordee.tensors.views import Chain, Rearrange

KEYS = keys(
    "head_dim",
    num_key_value_heads="num_attention_heads",
    rope_scaling=lambda words: write_strength(write_scaling(scaling_of(words)), words),
    n_routed_experts="num_experts",
    num_experts_per_tok="moe_router_topk",
    aux_loss_alpha="moe_aux_loss_coeff",
    n_group="moe_router_num_groups",
    **{
        name: name
        for name in (
            *("first_k_dense_replace", "kv_lora_rank", "moe_intermediate_size", "moe_layer_freq", "n_shared_experts"),
            *("norm_topk_prob", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "routed_scaling_factor"),
            *("topk_group", "v_head_dim"),
        )
    },
)


def write_strength(scaling: HFConfig | None, words: Words) -> HFConfig | None:
    """`scaling` with what YaRN sharpens scores by besides."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return scaling
    return {**scaling, "mscale_all_dim": words["rope_scaling_mscale_all_dim"]}


# Implied by others, or left from the form that the configuration was made of.
DERIVED = ("ep_size", "head_dim", "num_key_value_heads", "qk_head_dim")


def read_model(
    hf: ConfigReader, router: config.RouterConfig, balance: config.BalanceConfig, *, shared: int, dense_layers: int
) -> config.ModelConfig:
    """A model whose layers have experts from `first_k_dense_replace` on, every `moe_layer_freq`-th. `shared` experts
    and so many `dense_layers` are the family's, where the keys are missing."""
    for key in DERIVED:
        hf.value(key, None)
    expert = common.read_swiglu(hf, key="moe_intermediate_size")
    width = (hf.nullable("n_shared_experts", shared) or 0) * expert.ffn_hidden_size
    shared_expert = replace(expert, ffn_hidden_size=width) if width else None
    moe = config.MoEConfig(router=router, expert=expert, shared=shared_expert, balance=balance)
    first, every = hf.number("first_k_dense_replace", dense_layers), hf.integer("moe_layer_freq", 1)
    layers = common.read_layers(hf, read_latent_attention(hf))
    sparse = [i >= first and i % every == 0 for i in range(len(layers))]
    return common.read_model(hf, with_experts(layers, moe, sparse))


def read_groups(hf: ConfigReader, choice: Choice, groups: int = 1, top_groups: int = 1) -> tuple[int, int]:
    """In how many groups the experts are, and from how many of them those of a token come; both by default as given."""
    groups, top_groups = hf.integer("n_group", groups), hf.integer("topk_group", top_groups)
    hf.divides("n_group", groups, "n_routed_experts", choice["num_experts"])
    if top_groups > groups or choice["top_k"] > choice["num_experts"] // groups * top_groups:
        why = f"a token's {choice['top_k']} experts are not to be found in {top_groups} of {groups} groups"
        hf.problem("topk_group", why, "correct topk_group, n_group or num_experts_per_tok")
    return groups, top_groups


def read_latent_attention(hf: ConfigReader) -> config.LatentAttentionConfig:
    nope_dim, rope_dim = hf.integer("qk_nope_head_dim"), hf.integer("qk_rope_head_dim")
    rope = read_rope(hf, rope_dim)
    return config.LatentAttentionConfig(
        num_heads=hf.integer("num_attention_heads"),
        q_lora_rank=hf.nullable("q_lora_rank", 1536),
        kv_lora_rank=hf.integer("kv_lora_rank"),
        nope_head_dim=nope_dim,
        rope_head_dim=rope_dim,
        v_head_dim=hf.integer("v_head_dim"),
        norm=config.NormConfig(kind="rms", eps=LATENT_EPS),  # whatever `rms_norm_eps` says
        rope=rope,
        scale=(nope_dim + rope_dim) ** -0.5 * read_mscale(hf, rope) ** 2,
        bias=hf.flag("attention_bias", False),
    )


def read_mscale(hf: ConfigReader, rope: config.RopeConfig) -> float:
    """By what queries and keys are multiplied where YaRN stretches positions."""
    if not isinstance(rope.scaling, config.YarnScaling):
        return 1.0
    strength = rope_section(hf).number("mscale_all_dim", 0)
    return mscale(rope.scaling.factor, strength) if strength else 1.0


def layer_weights(layer: config.LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer, latent_attention_weights(layer)),
        Rule("mlp.router.correction_bias", ("mlp.gate.e_score_correction_bias",)),
        *expert_list_weights(layer, "mlp", "gate_proj", "up_proj", "down_proj"),
        *common.mlp_weights("mlp.shared", "mlp.shared_experts"),
    ]


def latent_attention_weights(layer: config.LayerConfig) -> list[Rule]:
    """Rules of latent attention, whose rotary dims are the last of each query and of the compressed keys."""
    attention = layer.attention
    assert isinstance(attention, config.LatentAttentionConfig)
    rope, nope, latent = attention.rope_head_dim, attention.nope_head_dim, attention.kv_lora_rank
    heads = Rearrange("(n d) ... -> n d ...", {"n": attention.num_heads})
    queries = Chain((rotary_halves(nope + rope, rope, nope), heads))
    return [
        *module("attention.q", "self_attn.q_proj", op=queries),
        *module("attention.q_down", "self_attn.q_a_proj"),
        *module("attention.q_norm", "self_attn.q_a_layernorm"),
        *module("attention.q_up", "self_attn.q_b_proj", op=queries),
        *module("attention.kv_down", "self_attn.kv_a_proj_with_mqa", op=rotary_halves(latent + rope, rope, latent)),
        *module("attention.kv_norm", "self_attn.kv_a_layernorm"),
        *module("attention.kv_up", "self_attn.kv_b_proj", op=heads),
        *module("attention.out", "self_attn.o_proj"),
    ]
