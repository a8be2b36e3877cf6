"""Attention cores: softmax(scores) v over what the mask shows.

A core is any `core(q, k, v, mask, scores)` with q `[batch, heads, queries, head_dim]`, k `[batch, kv_heads, keys,
head_dim]` and v `[batch, kv_heads, keys, value_dim]`, giving `[batch, heads, queries, value_dim]`.
`reference_attention` is the definition, in float32; `sdpa_attention` is torch's fused attention;
`blockwise_attention` does what that cannot, with the scores of a few queries in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cordee.ops.dropout import Dropout
from cordee.ops.mask import AttentionMask

_ALL = slice(None)
_Drop = Callable[[Tensor], Tensor]
BLOCK_BYTES = 1 << 26  # float32 scores of one block of queries in `blockwise_attention`


@dataclass(frozen=True, eq=False)
class Scores:
    """How queries and keys become weights: softmax of c * tanh(scale * (q . k) / c) - slope * distance, for softcap c.

    Without `softcap` the scaled product is kept; without `slopes` (one a head) distance does not count. `window` and
    `chunk` are the reach of `AttentionMask`. `sinks` `[heads]` are scores that join the softmax of every query and then
    drop out (GPT-OSS). `dropout` drops weights after the softmax."""

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    sinks: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        return self.window, self.chunk


AttentionCore = Callable[[Tensor, Tensor, Tensor, AttentionMask, Scores], Tensor]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slopes of attention with linear biases (Press et al. 2022): a geometric series from the number of heads.

    Where that is no power of two: those of the next smaller power, then every second one of the next larger."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * n / power) for n in range(1, power + 1)]
    return (*slopes, *(2.0 ** (-8.0 * n / (2 * power)) for n in range(1, 2 * (num_heads - power), 2)))


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """The plain definition, scores and softmax in float32."""
    visible = mask.dense(q.device, *scores.reach)
    bias = None if scores.slopes is None else mask.bias(scores.slopes, torch.float32, q.device, *scores.reach)
    return _attend(q.float(), k.float(), v.float(), visible, bias, scores, _dropped(mask, scores, q.device)).to(q.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, scores: Scores, dropped: _Drop | None
) -> Tensor:
    """Products in the type of q, scores and softmax in float32."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    score = (q @ k.transpose(-1, -2)).float() * scores.scale
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    if bias is not None:
        score = score + bias
    score = score.masked_fill(~visible, float("-inf"))
    if scores.sinks is not None:
        score = torch.cat((score, scores.sinks.float()[None, :, None, None].expand(*score.shape[:3], 1)), -1)
    weights = score.softmax(-1)[..., : k.shape[2]]
    weights = weights if dropped is None else dropped(weights)
    return weights.to(v.dtype) @ v


def _dropped(
    mask: AttentionMask, scores: Scores, device: torch.device, rows: slice = _ALL, columns: slice = _ALL
) -> _Drop | None:
    """What drops the weights of some queries and keys; None: nothing."""
    if scores.dropout is None:
        return None
    queries, keys = mask.indices(device)
    return partial(scores.dropout.of_weights, queries=queries[rows], keys=keys[columns])


def behind_prefix(core: AttentionCore, prefix: Tensor | None) -> AttentionCore:
    """`core`, with learned keys and values before those it is given; None: there are none.

    `prefix` is `[kv_heads, 2, tokens, head_dim]`, keys and then values, or `[kv_heads, 1, ...]` where both are one."""
    if prefix is None:
        return core

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
        before = prefix.expand(len(k), *prefix.shape)
        keys = torch.cat((before[:, :, 0], k), 2)
        values = keys if v is k else torch.cat((before[:, :, -1], v), 2)
        return core(q, keys, values, mask.behind(prefix.shape[2]), scores)

    return attend


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """torch's fused attention; a dense mask is made only where order and causality do not decide.

    It has neither a softcap nor our dropout: those go to `blockwise_attention`."""
    if scores.softcap is not None or scores.dropout is not None:
        return blockwise_attention(q, k, v, mask, scores)
    if not torch.compiler.is_compiling() and (spans := mask.segment_spans) is not None:
        return _by_segment(q, k, v, spans, scores)
    sinks = scores.sinks
    window = scores.window
    ordered = mask.is_plain(None, scores.chunk) and scores.slopes is None
    if mask.num_queries == 1 and window is not None and ordered:
        k, v, window = k[:, :, -window:], v[:, :, -window:], None  # one last query: its window is the last keys
    dense, causal = _rendered_mask(q, mask, scores, window)
    value_dim = v.shape[-1]
    if sinks is not None:
        q, k, v, dense = _with_sink(q, k, v, dense, causal, sinks, scores.scale)
    if v.shape[-1] != q.shape[-1]:
        q, k, v = of_one_dim(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, dense, 0.0, causal, scale=scores.scale, enable_gqa=grouped)
    if sinks is not None and causal:
        y = y[:, :, 1:]
    return y if y.shape[-1] == value_dim else y[..., :value_dim]


def _by_segment(q: Tensor, k: Tensor, v: Tensor, spans: list[list[tuple[int, int]]], scores: Scores) -> Tensor:
    """The segments of every row one by one: pairs of different ones cost nothing."""

    def attend(row: int, begin: int, end: int) -> Tensor:
        part = (slice(row, row + 1), slice(None), slice(begin, end))
        return sdpa_attention(q[part], k[part], v[part], AttentionMask(end - begin, end - begin), scores)

    return torch.cat([torch.cat([attend(row, *span) for span in own], 2) for row, own in enumerate(spans)])


def of_one_dim(*tensors: Tensor) -> list[Tensor]:
    """Filled up with zeros to the largest last dim: fused kernels want one for all."""
    dim = max(t.shape[-1] for t in tensors)
    return [t if t.shape[-1] == dim else F.pad(t, (0, dim - t.shape[-1])) for t in tensors]


def _rendered_mask(q: Tensor, mask: AttentionMask, scores: Scores, window: int | None) -> tuple[Tensor | None, bool]:
    """Arguments of SDPA: a dense mask or bias, and `is_causal`."""
    if scores.slopes is not None:
        return mask.bias(scores.slopes, q.dtype, q.device, *scores.reach), False
    if mask.is_plain(window, scores.chunk):
        # A single last query sees every key, causal or not.
        if mask.num_queries == 1 or not mask.causal:
            return None, False
        if mask.num_queries == mask.num_keys:
            return None, True
    return mask.dense(q.device, *scores.reach), False


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None, causal: bool, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A first key whose score is the sink and whose value is zero.

    It lives in a dim of its own, where queries hold the sink and other keys zero, so that a fused kernel does the
    rest: scores given as a mask would need memory for every pair of positions, and their gradient too. A causal kernel
    gets a first query as well, which keeps the two in step."""
    sink = (sinks / scale).to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
    q = torch.cat((q, sink), -1)
    sink_key = F.pad(k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3]), (0, 1), value=1.0)
    k = torch.cat((sink_key, F.pad(k, (0, 1))), 2)
    v = F.pad(v, (0, 0, 1, 0))
    if causal:
        q = F.pad(q, (0, 0, 1, 0))
    if dense is not None:
        dense = F.pad(dense, (1, 0), value=True if dense.dtype == torch.bool else 0.0)
    return q, k, v, dense


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores, *, block_size: int | None = None
) -> Tensor:
    """As `reference_attention`, for `block_size` queries at a time, whose scores are made again in the backward.

    Keys that order or a window hides from a whole block are left out of it."""
    block_size = block_size or max(1, BLOCK_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    visible = mask.dense(q.device, *scores.reach)
    bias = None if scores.slopes is None else mask.bias(scores.slopes, torch.float32, q.device, *scores.reach)
    blocks = []
    for start in range(0, q.shape[2], block_size):
        rows = slice(start, start + block_size)
        keys = _visible_keys(mask, scores.window, start, min(start + block_size, q.shape[2]))
        inputs = (
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            visible[:, :, rows, keys],
            None if bias is None else bias[:, :, rows, keys],
            scores,
            _dropped(mask, scores, q.device, rows, keys),
        )
        if torch.is_grad_enabled():
            blocks.append(checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_attend(*inputs))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _visible_keys(mask: AttentionMask, window: int | None, start: int, stop: int) -> slice:
    """The keys that any of the queries [start, stop) may see, as far as order and window decide."""
    if not (mask.in_order and mask.causal):
        return _ALL
    before = mask.num_keys - mask.num_queries
    return slice(0 if window is None else max(0, before + start - window + 1), before + stop)
