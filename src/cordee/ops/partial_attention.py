"""Attention over a part of the keys, in a form that parts can be merged in.

Owns what a part gives, its result and the logarithm of its sum of exponentials, how parts are merged, and the gradients
of a part once the merged result is known (the online softmax of Milakov & Gimelshein 2018, as in FlashAttention).
`plain_part` and `plain_gradients` are the definition, for any mask, bias and softcap; `flash_part` and
`flash_gradients` are torch's fused attention on CPU, for parts with no mask or a causal one. Knows no processes.

Shapes are those of `cordee.ops.attention`; `lse` is float32 `[batch, heads, queries]`, minus infinity for a query that
sees none of the keys."""

import torch
from torch import Tensor

from cordee import device
from cordee.ops.attention import Scores, of_one_dim
from cordee.ops.mask import AttentionMask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Gradients = tuple[Tensor, Tensor, Tensor]


def has_flash(on: torch.device, scores: Scores) -> bool:
    """Whether the parts of such scores without a mask, or with a causal one, have a fused form on device `on`."""
    kind = device.KINDS.get(on.type)
    plain = scores.softcap is None and scores.slopes is None and scores.dropout is None
    return kind is not None and kind.flash_parts and plain


def part(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> tuple[Tensor, Tensor]:
    """Result of these keys alone, and its lse; sinks are not a part's to add (see `Merged`)."""
    return (flash_part if mask.is_plain() and has_flash(q.device, scores) else plain_part)(q, k, v, mask, scores)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: AttentionMask, scores: Scores
) -> Gradients:
    """What this part adds to the gradients of q, k and v, float32; `grad`, `out` and `lse` are of the merged result."""
    fused = mask.is_plain() and has_flash(q.device, scores)
    return (flash_gradients if fused else plain_gradients)(grad, q, k, v, out, lse, mask, scores)


class Merged:
    """The merged result of the parts so far: `out` float32 and `lse`."""

    def __init__(self, q: Tensor, value_dim: int):
        """Of queries `q`, no part yet."""
        self.out = q.new_zeros(*q.shape[:3], value_dim, dtype=torch.float32)
        self.lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """A part of the queries `rows`."""
        before, merged = self.lse[:, :, rows], torch.logaddexp(self.lse[:, :, rows], lse)
        kept = self.out[:, :, rows] * _weight(before, merged)
        self.out[:, :, rows] = kept.addcmul_(out.float(), _weight(lse, merged))
        self.lse[:, :, rows] = merged

    def add_sinks(self, sinks: Tensor) -> None:
        """Scores `[heads]` that join every softmax with a value of zero."""
        merged = torch.logaddexp(self.lse, sinks.float()[None, :, None])
        self.out *= _weight(self.lse, merged)
        self.lse = merged


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """`[heads]`, of the merged result with the sinks in it."""
    return -((sinks.float()[None, :, None] - lse).exp() * _inner(grad, out)).sum((0, 2)).to(sinks.dtype)


def _weight(lse: Tensor, merged: Tensor) -> Tensor:
    """What part of the merged sum of exponentials a part is, `[batch, heads, queries, 1]`; 0 where it is empty."""
    return (lse - merged.masked_fill(merged == float("-inf"), 0.0)).exp()[..., None]


def _inner(grad: Tensor, out: Tensor) -> Tensor:
    return (grad.float() * out.float()).sum(-1)


def plain_part(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> tuple[Tensor, Tensor]:
    """As `part`, in float32."""
    score, _ = _scores(q, k, mask, scores)
    lse = score.logsumexp(-1)
    share = _dropped(_weights(score, lse), mask, scores)
    return (_of_groups(share, k) @ v.float()).view(*q.shape[:3], -1), lse


def plain_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: AttentionMask, scores: Scores
) -> Gradients:
    """As `gradients`, by the chain rule."""
    score, capped = _scores(q, k, mask, scores)
    share, grad = _weights(score, lse), grad.float()
    by_group = _of_groups(grad, k)
    grad_v = _of_groups(_dropped(share, mask, scores), k).transpose(-1, -2) @ by_group
    grad_share = _dropped((by_group @ v.float().transpose(-1, -2)).view(score.shape), mask, scores)
    grad_score = share * (grad_share - _inner(grad, out)[..., None])
    if scores.softcap is not None:
        grad_score = grad_score * (1 - (capped / scores.softcap) ** 2)
    grad_score = _of_groups(grad_score * scores.scale, k)
    return (grad_score @ k.float()).view(q.shape), grad_score.transpose(-1, -2) @ _of_groups(q.float(), k), grad_v


def _scores(q: Tensor, k: Tensor, mask: AttentionMask, scores: Scores) -> tuple[Tensor, Tensor]:
    """`[batch, heads, queries, keys]`: with minus infinity where hidden, and before bias and mask."""
    capped = (_of_groups(q.float(), k) @ k.float().transpose(-1, -2)).view(*q.shape[:3], -1) * scores.scale
    if scores.softcap is not None:
        capped = scores.softcap * torch.tanh(capped / scores.softcap)
    if scores.slopes is not None:
        return capped + mask.bias(scores.slopes, torch.float32, q.device, *scores.reach), capped
    if mask.is_plain() and not mask.causal:
        return capped, capped
    return capped.masked_fill(~mask.dense(q.device, *scores.reach), float("-inf")), capped


def _weights(score: Tensor, lse: Tensor) -> Tensor:
    """Softmax of `score` by a given `lse`, with zeros for a query that sees no key."""
    return (score - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()


def _dropped(share: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """With dropout, softmax is over all keys, and what is dropped of it is missing in the sum of values only."""
    return share if scores.dropout is None else scores.dropout.of_weights(share, *mask.indices(share.device))


def _of_groups(x: Tensor, k: Tensor) -> Tensor:
    """x `[batch, heads, queries, dim]` as `[batch, kv_heads, heads of a group * queries, dim]`."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def flash_part(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> tuple[Tensor, Tensor]:
    """As `part`, for a mask that is plain."""
    out, lse = _flash(*of_one_dim(q, k, v), 0.0, mask.causal, scale=scores.scale)
    return out[..., : v.shape[-1]], lse


def flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: AttentionMask, scores: Scores
) -> Gradients:
    """As `gradients`, for a mask that is plain."""
    inputs = of_one_dim(grad.to(q.dtype), q, k, v, out.to(q.dtype))
    found = _flash_backward(*inputs, lse, 0.0, mask.causal, scale=scores.scale)
    grad_q, grad_k, grad_v = (x[..., : like.shape[-1]].float() for x, like in zip(found, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v
