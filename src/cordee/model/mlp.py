"""The feed-forward block, gated or plain."""

from functools import partial

from torch import Tensor

from cordee.model import specs
from cordee.model.bound import Binding, BoundMLP, require_known, require_plain
from cordee.model.config import MLPConfig, ModelConfig
from cordee.model.linear import Linear
from cordee.model.low_rank import Drop
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import BlockPlacement
from cordee.ops.activation import ACTIVATIONS, gated


class MLP(SpecifiedModule[BlockPlacement]):
    """down(act(gate(x)) * up(x)) with gate and up in one GEMM, or down(act(up(x)))."""

    def __init__(self, config: MLPConfig, model: ModelConfig, **factory):
        super().__init__(BlockPlacement())
        self.config = config
        own = specs.mlp(config, model)
        if config.gated:
            self.gate_up = Linear(specs.of_part(own, "gate_up"), **factory)
        else:
            self.up = Linear(specs.of_part(own, "up"), **factory)
        self.down = Linear(specs.of_part(own, "down"), **factory)

    def forward(self, x: Tensor, *, drop: Drop | None = None) -> Tensor:
        """`[batch, seq, embed]` to the same."""
        return self.placement.call(self._forward, x, drop)

    def _forward(self, x: Tensor, drop: Drop | None) -> Tensor:
        x = self.placement.enter(x)
        y = (self.gate_up if self.config.gated else self.up)(x, drop=drop)
        return self.placement.exit(self.down(y, before=partial(activate, config=self.config), drop=drop))

    def bind(self, binding: Binding) -> BoundMLP:
        config = self.config
        require_known(config, "ffn_hidden_size activation gated bias limit")
        require_plain(self, MLP, "gate_up down" if config.gated else "up down")
        up, down = (self.gate_up if config.gated else self.up).bind(binding), self.down.bind_onto(binding)
        return lambda residual, x: down(activate(up(x), config), residual)


def activate(x: Tensor, config: MLPConfig) -> Tensor:
    """What stands between the two projections: `[..., 2 * ffn]` to `[..., ffn]` if gated, else elementwise."""
    if config.gated:
        return gated(x, config.activation, config.limit)
    return ACTIVATIONS[config.activation](x)
