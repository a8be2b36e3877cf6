"""The tensors of a file of GGUF: what they are called, and how parameters are laid out in them.

Owns names and layouts, which all architectures share. Knows no keys, and never imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cordee.families import common
from cordee.families.count import canonical_shapes
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig
from cordee.tensors.rules import IDENTITY, Rule, each_layer, module, separate_qkv, stack
from cordee.tensors.views import Chain, Each, Join, Leaf, Op, Rearrange, View


def rules(config: ModelConfig, paired: bool) -> dict[str, Rule]:
    """How parameters are laid out in a file, by canonical name, in the order of the forward.

    paired: RoPE rotates neighbouring pairs of dims of queries and keys."""
    norm = _norm(config.final_norm.unit_offset)
    found = [
        *module("embedding", "token_embd"),
        *each_layer(config, lambda layer: _layer_rules(layer, paired), "blk.{i}."),
        *module("final_norm", "output_norm", op=norm),
        *module("head", "output"),
    ]
    by_name = {rule.canonical: rule for rule in found}
    return {name: by_name[name] for name in canonical_shapes(config) if name in by_name}


def _layer_rules(layer: LayerConfig, paired: bool) -> list[Rule]:
    attention = layer.attention
    if not isinstance(attention, AttentionConfig):
        return []
    qkv = common.paired_qkv(layer) if paired else common.qkv_op(layer, separate_qkv)
    norm = _norm(layer.norm.unit_offset)
    return [
        *module("attention_norm", "attn_norm", op=norm),
        *module("attention.qkv", "attn_q", "attn_k", "attn_v", op=qkv),
        *module("attention.q_norm", "attn_q_norm"),
        *module("attention.k_norm", "attn_k_norm"),
        *module("attention.out", "attn_output"),
        *module("attention_post_norm", "post_attention_norm", op=norm),
        *module("mlp_norm", "ffn_norm", op=norm),
        *module("mlp_post_norm", "post_ffw_norm", op=norm),
        *module("mlp.gate_up", "ffn_gate", "ffn_up", op=stack(2)),
        *module("mlp.down", "ffn_down"),
        *module("mlp.router", "ffn_gate_inp"),
        *module("mlp.experts.gate_up", "ffn_gate_exps", "ffn_up_exps", op=_EACH_GATE_UP),
        *module("mlp.experts.down", "ffn_down_exps"),
        *module("mlp.shared.gate_up", "ffn_gate_shexp", "ffn_up_shexp", op=stack(2)),
        *module("mlp.shared.down", "ffn_down_shexp"),
        *module("mlp.shared_gate", "ffn_gate_inp_shexp", op=Rearrange("h -> 1 h")),
    ]


_EACH_GATE_UP = Chain((Each((Rearrange("e ... -> e 1 ..."),) * 2), Join(1, (1, 1))))


@dataclass(frozen=True)
class Shift:
    """A tensor plus `amount`, in float32."""

    amount: float
    inputs: int = field(default=1, init=False)

    @property
    def inverse(self) -> "Shift":
        return Shift(-self.amount)

    def apply(self, views: Sequence[View]) -> list[View]:
        (view,) = views
        return [Leaf(view.shape, lambda index: view.read(index).float() + self.amount)]


def _norm(unit_offset: bool) -> Op:
    """Files hold the weights of norms, also where the model holds their distance from one."""
    return Shift(-1.0) if unit_offset else IDENTITY
