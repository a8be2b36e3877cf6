"""One transformer layer: norm, attention, norm, MLP, each half added to the residual."""

from collections.abc import Callable

from torch import Tensor, nn

from cordee.model.attention import Attention
from cordee.model.bound import Binding, BoundLayer, DecodeStep, Unsupported, require_known, require_plain
from cordee.model.config import LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig
from cordee.model.inputs import Context
from cordee.model.latent_attention import LatentAttention
from cordee.model.mlp import MLP
from cordee.model.moe import MoE
from cordee.model.norm import Norm
from cordee.model.placement import CallPlacement

_Block = Callable[[Tensor, Context], Tensor]


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
        x = self._add(x, self.attention, self.attention_norm, self.attention_post_norm, "attention", context)
        return self._add(x, self._feed_forward, self.mlp_norm, self.mlp_post_norm, "mlp", context)

    def _add(self, x: Tensor, block: _Block, norm: Norm, post_norm: Norm | None, site: str, context: Context) -> Tensor:
        """The residual x with the block's result added to it."""
        config = self.config
        inner = x if config.norm_placement == "post" else norm(x)
        y = block(inner, context)
        if config.norm_placement == "post":
            y = norm(y)
        elif post_norm is not None:
            y = post_norm(y)
        y = context.drop(y, self.dropout, self.index, site, residual=True)
        if config.residual_scale != 1.0:
            y = y * config.residual_scale
        return (inner if config.residual_from_norm else x) + y

    def _feed_forward(self, x: Tensor, context: Context) -> Tensor:
        if isinstance(self.mlp, MoE):
            return self.mlp(x, context.balance, drop=context.drop)
        return self.mlp(x, drop=context.drop)

    def bind(self, binding: Binding) -> BoundLayer:
        require_known(self.config, "attention mlp norm")
        require_plain(self, Layer, "attention_norm attention mlp_norm mlp")
        if not (isinstance(self.attention, Attention) and isinstance(self.mlp, MLP)):
            raise Unsupported(f"it has a layer of {type(self.attention).__name__} and {type(self.mlp).__name__}")
        attention_norm, mlp_norm = self.attention_norm.bind(), self.mlp_norm.bind()
        attend, feed_forward = self.attention.bind(binding), self.mlp.bind(binding)

        def step(x: Tensor, now: DecodeStep) -> Tensor:
            x = attend(x, attention_norm(x), now)
            return feed_forward(x, mlp_norm(x))

        return step
