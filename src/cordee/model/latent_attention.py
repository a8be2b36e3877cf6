"""Multi-head latent attention: keys and values of all heads from one compressed vector a token (DeepSeek-V2, 2024).

Owns two forms of the same sum. Over a whole sequence, keys and values are expanded for every head. For tokens that
continue a cache, which holds nothing but the compressed vectors, the expansion moves to the other side of the
products: queries are brought into the compressed space, where all heads share one key, and what they gather there
is expanded afterwards."""

from functools import partial

import torch
from torch import Tensor

from cordee.model import specs
from cordee.model.attention import AttentionPlacement
from cordee.model.config import LatentAttentionConfig, ModelConfig
from cordee.model.inputs import Context
from cordee.model.linear import Linear
from cordee.model.low_rank import Drop
from cordee.model.norm import Norm
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import altered
from cordee.ops.attention import Scores, behind_prefix
from cordee.ops.mask import AttentionMask
from cordee.ops.rope import rotate


class LatentAttention(SpecifiedModule[AttentionPlacement]):
    """Dims of a head: first those without, then those with rotary positions; `kv_up` gives its keys, then values."""

    prefix: Tensor | None

    def __init__(self, config: LatentAttentionConfig, model: ModelConfig, index: int, **factory):
        super().__init__(AttentionPlacement(scores=Scores(scale=config.scale)))
        self.config = config
        self.index = index
        self.dropout = model.attention_dropout
        own = specs.latent_attention(config, model)
        if config.q_lora_rank is None:
            self.q = Linear(specs.of_part(own, "q"), **factory)
        else:
            self.q_down = Linear(specs.of_part(own, "q_down"), **factory)
            self.q_norm = Norm(config.norm, config.q_lora_rank, "latent", **factory)
            self.q_up = Linear(specs.of_part(own, "q_up"), **factory)
        self.kv_down = Linear(specs.of_part(own, "kv_down"), **factory)
        self.kv_norm = Norm(config.norm, config.kv_lora_rank, "latent", **factory)
        self.kv_up = Linear(specs.of_part(own, "kv_up"), **factory)
        self.out = Linear(specs.of_part(own, "out"), **factory)
        self.declare(own, "prefix", **factory)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, seq, embed]` to the same."""
        return self.placement.call(self._forward, x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.placement.enter(x)
        q = self._queries(x, context)
        latent, k_rope = self._compressed(x, context)
        y = self._attend(q, latent, k_rope, context)
        return self.placement.exit(self.out(y.transpose(1, 2).flatten(2), drop=context.drop))

    def _attend(self, q: Tensor, latent: Tensor, k_rope: Tensor, context: Context) -> Tensor:
        """`[batch, heads, seq, v_head_dim]`."""
        scores = self.placement.scores_of(context, self.dropout, self.index)
        prefix = self.local("prefix")
        if context.step is None and prefix is None:
            return self._expanded(q, latent, k_rope, context.mask, scores, context.drop)
        stored = torch.cat((latent, k_rope), -1)[:, None]  # [batch, 1, seq, latent + rope]
        prefix = None if prefix is None else prefix[None, None]
        honoured = ("view_of_weight", "view_of_a", "view_of_b", "view_of_m")
        if context.continues and altered(self.kv_up, honoured=honoured) is None:
            return self._absorbed(q, stored, prefix, context, scores)
        core = behind_prefix(partial(self._expanding, drop=context.drop), prefix)
        return context.attend(self.index, core, q, stored, None, scores)

    def _queries(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, heads, seq, nope_head_dim + rope_head_dim]`, the latter rotated by their positions."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q(x, drop=context.drop)
        else:
            q = self.q_up(self.q_norm(self.q_down(x, drop=context.drop)), drop=context.drop)
        q = q.unflatten(-1, (-1, config.nope_head_dim + config.rope_head_dim))
        rotated = self._rotate(q[..., config.nope_head_dim :], context)
        return torch.cat((q[..., : config.nope_head_dim], rotated), -1).transpose(1, 2)

    def _compressed(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What a token leaves to later ones: `[batch, seq, latent]`, and a rotary key `[batch, seq, rope_head_dim]`."""
        kv = self.kv_down(x, drop=context.drop)
        latent, k_rope = kv.split((self.config.kv_lora_rank, self.config.rope_head_dim), -1)
        return self.kv_norm(latent), self._rotate(k_rope[:, :, None], context)[:, :, 0]

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        """x `[batch, seq, heads, rope_head_dim]`, rotated by its positions."""
        cos, sin = context.positions.angles(self.config.rope, self.config.rope_head_dim)
        return rotate(x, cos.squeeze(3), sin.squeeze(3))

    def _expanded(
        self, q: Tensor, latent: Tensor, k_rope: Tensor, mask: AttentionMask, scores: Scores, drop: Drop
    ) -> Tensor:
        """Attention with keys and values of every head."""
        nope, values = self.config.nope_head_dim, self.config.v_head_dim
        kv = self.kv_up(latent, drop=drop).unflatten(-1, (-1, nope + values))
        k_nope, v = kv.split((nope, values), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)), -1)
        return self.placement.core(q, k.transpose(1, 2), v.transpose(1, 2), mask, scores)

    def _expanding(
        self, q: Tensor, stored: Tensor, _: Tensor, mask: AttentionMask, scores: Scores, drop: Drop
    ) -> Tensor:
        """As `_expanded`, a core over what is `stored` of tokens, `[batch, 1, keys, latent + rope]`."""
        latent, k_rope = stored[:, 0].split((self.config.kv_lora_rank, self.config.rope_head_dim), -1)
        return self._expanded(q, latent, k_rope, mask, scores, drop)

    def _absorbed(self, q: Tensor, stored: Tensor, prefix: Tensor | None, context: Context, scores: Scores) -> Tensor:
        """Attention in the compressed space; as `_expanded`."""
        kv_up = self.kv_up.merged(self.kv_up.local("weight"))
        key_up, value_up = kv_up.split((self.config.nope_head_dim, self.config.v_head_dim), 1)
        q_nope, q_rope = q.split((self.config.nope_head_dim, self.config.rope_head_dim), -1)
        q = torch.cat((torch.einsum("bhsd,hdr->bhsr", q_nope, key_up), q_rope), -1)
        y = context.attend(self.index, behind_prefix(self.placement.core, prefix), q, stored, None, scores)
        return torch.einsum("bhsr,hdr->bhsd", y[..., : self.config.kv_lora_rank], value_up)
