"""Frequencies and angles of rotary positions, and what else depends on positions alone.

Owns every way to stretch them. Knows nothing of heads; its caller gives the positions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cordee.model import config
from cordee.model.placement import unchanged


def depends_on_length(rope: config.RopeConfig) -> bool:
    """Whether frequencies change as a sequence grows, after which keys in a cache are no longer valid."""
    return isinstance(rope.scaling, config.DynamicNTKScaling | config.QwenNTKScaling | config.LongRopeScaling)


def inverse_frequencies(
    rope: config.RopeConfig, head_dim: int, device: torch.device | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Radians a position for each pair of dims, float32 `[rotary_dim / 2]`.

    Where they depend on the `lengths` of the sequences, int64 `[..., 1]`: `[..., rotary_dim / 2]`, one set for each
    sequence, so that none depends on its neighbours in the batch."""
    dim, scaling = rope.rotary_dim or head_dim, rope.scaling
    exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    if isinstance(scaling, config.DynamicNTKScaling | config.QwenNTKScaling):
        assert lengths is not None
        return 1.0 / (rope.theta * _ntk_stretch(scaling, lengths) ** (dim / (dim - 2))) ** exponent
    frequency = 1.0 / rope.theta**exponent
    match scaling:
        case None:
            return frequency
        case config.LinearScaling():
            return frequency / scaling.factor
        case config.Llama3Scaling():
            return _llama3(frequency, scaling)
        case config.YarnScaling():
            return _yarn(frequency, rope.theta, scaling)
        case config.LongRopeScaling():
            assert lengths is not None
            return frequency / _longrope_stretch(scaling, lengths)


def _ntk_stretch(scaling: config.DynamicNTKScaling | config.QwenNTKScaling, lengths: Tensor) -> Tensor:
    """How much the base would grow if every pair of dims were stretched, float32 `[..., 1]`."""
    ratio = lengths / scaling.original_max_position_embeddings
    if isinstance(scaling, config.DynamicNTKScaling):
        return scaling.factor * ratio.clamp(min=1.0) - (scaling.factor - 1)
    return (2.0 ** torch.ceil(torch.log2(ratio) + 1) - 1).clamp(min=1.0)


def _llama3(frequency: Tensor, scaling: config.Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / frequency
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn(frequency: Tensor, theta: float, scaling: config.YarnScaling) -> Tensor:
    pairs = frequency.shape[0]

    def pair_of(rotations: float) -> float:
        """The pair of dims that makes so many rotations within the original length."""
        return pairs * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001  # a step instead of a division by zero
    stretched = ((torch.arange(pairs, device=frequency.device).float() - low) / width).clamp(0.0, 1.0)
    return frequency / scaling.factor * stretched + frequency * (1 - stretched)


def _longrope_stretch(scaling: config.LongRopeScaling, lengths: Tensor) -> Tensor:
    short, long = (torch.tensor(f, device=lengths.device) for f in (scaling.short_factor, scaling.long_factor))
    return torch.where(lengths > scaling.original_max_position_embeddings, long, short)


Longest = Callable[[Tensor], Tensor]


class Positions:
    """The position of every token of one forward, `[1 or batch, seq]` int64, and what follows from it.

    Layers with the same rope share one table, made at its first use. Some scalings hold in evaluation only, not
    in `training`. `longest` maps the last position of a sequence that is here, `[1 or batch, 1]`, to the last of all
    processes that hold its tokens."""

    def __init__(self, ids: Tensor, training: bool = False, longest: Longest = unchanged):
        self.ids = ids
        self.training = training
        self._longest = longest
        self._tables: dict[tuple[config.RopeConfig, int], tuple[Tensor, Tensor]] = {}
        self._query_scales: dict[config.LogNScaling | config.TemperatureScaling, Tensor] = {}

    def frequencies(self, rope: config.RopeConfig, head_dim: int) -> Tensor:
        """As `inverse_frequencies`; a sequence is as long as its last position says."""
        if self.training and isinstance(rope.scaling, config.QwenNTKScaling):
            rope = config.RopeConfig(theta=rope.theta, rotary_dim=rope.rotary_dim)
        lengths = None
        if depends_on_length(rope):
            lengths = self._longest(self.ids.amax(-1, keepdim=True)) + 1
        return inverse_frequencies(rope, head_dim, self.ids.device, lengths)

    def angles(self, rope: config.RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[1 or batch, seq, 1, 1, rotary_dim / 2]`: one for all heads of all groups."""
        key = (rope, head_dim)
        if key not in self._tables:
            frequency = self.frequencies(rope, head_dim)
            angle = self.ids[..., None] * (frequency if frequency.ndim == 1 else frequency[:, None])
            cos, sin = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]
            if isinstance(rope.scaling, config.YarnScaling | config.LongRopeScaling):
                cos, sin = cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor
            self._tables[key] = (cos, sin)
        return self._tables[key]

    def query_scale(self, scaling: config.LogNScaling | config.TemperatureScaling) -> Tensor | None:
        """What queries are multiplied by, float32 `[1 or batch, seq, 1, 1, 1]`; None: nothing."""
        if self.training and isinstance(scaling, config.LogNScaling):
            return None
        if scaling not in self._query_scales:
            count = self.ids[..., None, None, None].float() + 1.0
            if isinstance(scaling, config.LogNScaling):
                scale = (count.log() / math.log(scaling.length)).clamp(min=1.0)
            else:
                scale = 1.0 + scaling.scale * torch.log1p(torch.floor(count / scaling.floor_scale))
            self._query_scales[scaling] = scale
        return self._query_scales[scaling]
