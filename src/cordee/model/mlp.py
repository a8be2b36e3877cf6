"""The feed-forward block, gated or plain."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cordee.model.bound import Binding, BoundMLP, require_known, require_plain
from cordee.model.config import MLPConfig, ModelConfig
from cordee.model.linear import Linear, scaled_std
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import BlockPlacement
from cordee.ops.activation import ACTIVATIONS, gated


class MLP(SpecifiedModule[BlockPlacement]):
    """down(act(gate(x)) * up(x)) with gate and up in one GEMM, or down(act(up(x)))."""

    def __init__(self, config: MLPConfig, model: ModelConfig, **factory):
        super().__init__(BlockPlacement())
        self.config = config
        shared = {"bias": config.bias, "std": model.init_std, **factory}
        ffn = config.ffn_hidden_size
        if config.gated:
            self.gate_up = Linear((2, ffn), ("branch", "ffn"), model.hidden_size, "embed", **shared)
        else:
            self.up = Linear((ffn,), ("ffn",), model.hidden_size, "embed", **shared)
        shared["std"] = scaled_std(model.init_std, model.num_layers)
        self.down = Linear((model.hidden_size,), ("embed",), ffn, "ffn", **shared)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, embed]` to the same."""
        return self.placement.call(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.placement.enter(x)
        y = self.gate_up(x) if self.config.gated else self.up(x)
        return self.placement.exit(self.down(y, before=partial(activate, config=self.config)))

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
