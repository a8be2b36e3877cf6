"""One transformer layer: norm, attention, norm, MLP, each half added to the residual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from cordee.model.attention import Attention
from cordee.model.bound import Binding, BoundLayer, BoundStep, Unsupported, require_known, require_plain
from cordee.model.config import LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig
from cordee.model.inputs import Context
from cordee.model.latent_attention import LatentAttention
from cordee.model.mlp import MLP
from cordee.model.moe import MoE
from cordee.model.norm import Norm
from cordee.model.placement import CallPlacement


class Layer(nn.Module):
    def __init__(self, config: LayerConfig, model: ModelConfig, index: int, **factory):
        super().__init__()
        self.placement = CallPlacement()
        self.config = config
        self.index = index
        self.dropout = model.hidden_dropout
        self.attention_norm = Norm(config.norm, model.hidden_size, **factory)
        if isinstance(config.attention, LatentAttentionConfig):
            self.attention = LatentAttention(config.attention, model, index, **factory)
        else:
            self.attention = Attention(config.attention, model, index, **factory)
        self.mlp_norm = Norm(config.norm, model.hidden_size, **factory)
        if isinstance(config.mlp, MoEConfig):
            self.mlp = MoE(config.mlp, model, **factory)
        else:
            self.mlp = MLP(config.mlp, model, **factory)
        sandwich = config.norm_placement == "sandwich"
        self.attention_post_norm = Norm(config.norm, model.hidden_size, **factory) if sandwich else None
        self.mlp_post_norm = Norm(config.norm, model.hidden_size, **factory) if sandwich else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, seq, embed]` to the same."""
        return self.placement.call(self._forward, x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        norm = self.attention_norm
        inner = self._enter(x, norm)
        y = self.attention(inner, context)
        x = self._leave(x, inner, y, norm, self.attention_post_norm, partial(self._drop, context, "attention"))
        norm = self.mlp_norm
        inner = self._enter(x, norm)
        y = self._feed_forward(inner, context)
        return self._leave(x, inner, y, norm, self.mlp_post_norm, partial(self._drop, context, "mlp"))

    def bind(self, binding: Binding) -> BoundLayer:
        require_known(self.config, "attention mlp norm")
        require_plain(self, Layer, "attention_norm attention mlp_norm mlp")
        if not (isinstance(self.attention, Attention) and isinstance(self.mlp, MLP)):
            raise Unsupported(f"it has a layer of {type(self.attention).__name__} and {type(self.mlp).__name__}")
        attention_norm, mlp_norm = self.attention_norm.bind(), self.mlp_norm.bind()
        attend, feed_forward = self.attention.bind(binding), self.mlp.bind(binding)

        def step(x: Tensor, now: BoundStep) -> Tensor:
            x = attend(x, attention_norm(x), now)
            return feed_forward(x, mlp_norm(x))

        return step

    def _enter(self, x: Tensor, norm: Norm) -> Tensor:
        """What a block is given."""
        return x if self.config.norm_placement == "post" else norm(x)

    def _leave(
        self,
        x: Tensor,
        inner: Tensor,
        y: Tensor,
        norm: Norm,
        post_norm: Norm | None,
        drop: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The residual with a block's result y added to it; `inner` is what the block was given."""
        if self.config.norm_placement == "post":
            y = norm(y)
        elif post_norm is not None:
            y = post_norm(y)
        y = drop(y)
        if self.config.residual_scale != 1.0:
            y = y * self.config.residual_scale
        return (inner if self.config.residual_from_norm else x) + y

    def _feed_forward(self, x: Tensor, context: Context) -> Tensor:
        return self.mlp(x, context.balance) if isinstance(self.mlp, MoE) else self.mlp(x)

    def _drop(self, context: Context, block: str, x: Tensor) -> Tensor:
        return context.drop(x, self.dropout, self.index, block)
