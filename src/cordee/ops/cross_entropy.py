"""Cross entropy over a large vocabulary without its logits in memory.

`reference_cross_entropy` is the definition. `chunked_cross_entropy` walks over the tokens in chunks and forms the
gradients of hidden states and head weight while a chunk's logits are at hand, so that at most one chunk's logits
exist and nothing is computed twice (the idea of Hsu et al. 2024, Liger Kernel). Where it gives the loss of every token
instead of their sum, the factors of their gradients are known only in the backward, which therefore computes the logits
of every chunk again.

Logits are products times `scale`, and within +-`softcap` where that is given: c * tanh(logit / c) (Gemma 2)."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cordee.ops.gemm import TransposedSum, matmul

IGNORED = -100


class VocabularyPart(Protocol):
    """The tokens from `start` on whose rows of the head this process holds: its shard of the vocabulary."""

    @property
    def start(self) -> int: ...

    @property
    def rows(self) -> int:
        """Tokens of the largest part."""
        ...

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all parts, element by element."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over all parts."""
        ...

    def join(self, logits: Tensor) -> Tensor:
        """`[..., tokens of this part]` to `[..., vocab]`, differentiable."""
        ...


CHUNK_BYTES = 1 << 25  # logits of one chunk: small enough for a last-level cache, large enough for a full-rate GEMM
CHUNK_MULTIPLE = 128  # tokens of a chunk come in multiples of this: GEMM kernels have no remainders to treat then


def adjusted(logits: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Products of hidden states and head as logits: scaled, then softly capped."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], float32 scalar; labels of -100 do not count."""
    logits = adjusted(F.linear(hidden, weight).float(), scale, softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int | None = None,
    *,
    reduction: Literal["sum", "none"] = "sum",
    scale: float = 1.0,
    softcap: float | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """As `reference_cross_entropy`: hidden `[tokens, embed]`, weight `[vocab, embed]`, labels int64 `[tokens]`.

    With `reduction` "none" the loss of every token, float32 `[tokens]`, 0 where the label is -100. `chunk_size` is in
    tokens. The result can be differentiated once. With a `part`, `weight` are its rows only, and the gradient of
    `hidden` is what comes through them: it has to be summed over all parts."""
    how = chunk_size or _chunk_size(weight, part), scale, softcap, part
    if reduction == "none":
        return _ChunkedTokenLosses.apply(hidden, weight, labels, *how)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, *how)
    if part is not None:
        return _total(_walk(hidden, weight, labels, *how)[0], hidden)
    chunks = zip(hidden.split(how[0]), labels.split(how[0]), strict=True)
    return _total([reference_cross_entropy(rows, weight, target, scale, softcap) for rows, target in chunks], hidden)


def _total(losses: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of all losses of all chunks, a float32 scalar."""
    total = like.new_zeros((), dtype=torch.float32)
    for chunk in losses:
        total += chunk.sum()
    return total


def _chunk_size(weight: Tensor, part: VocabularyPart | None) -> int:
    num_rows = weight.shape[0] if part is None else part.rows  # all parts go through the same chunks
    return max(1, CHUNK_BYTES // (4 * num_rows * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE


class _ChunkedCrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, *how) -> Tensor:
        losses, hidden_grad, weight_grad = _walk(hidden, weight, labels, *how, needed=ctx.needs_input_grad)
        ctx.grads = (hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return _total(losses, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        assert ctx.grads is not None, "the gradients of chunked_cross_entropy were already taken"
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        if hidden_grad is not None:
            # In float32: one over the number of tokens, rounded to a low precision, would change all gradients alike.
            exact = hidden_grad.dtype == torch.float32
            hidden_grad = hidden_grad.mul_(grad) if exact else hidden_grad.float().mul_(grad).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.times(grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None


class _ChunkedTokenLosses(Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, *how) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.how = how
        losses, _, _ = _walk(hidden, weight, labels, *how)
        return torch.cat(losses).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, labels = ctx.saved_tensors
        factors = grad[:, None].float()
        needed = ctx.needs_input_grad
        _, hidden_grad, weight_grad = _walk(hidden, weight, labels, *ctx.how, needed=needed, factors=factors)
        if weight_grad is not None:
            weight_grad = weight_grad.times(factors.new_ones(())).to(weight.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None


def _walk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int,
    scale: float,
    softcap: float | None,
    part: VocabularyPart | None,
    *,
    needed: Sequence[bool] = (False, False),
    factors: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, TransposedSum | None]:
    """Losses `[tokens, 1]` of every chunk, and those `needed` of the gradients of their sum by hidden states and
    weight. In this sum each loss is multiplied with its one of `factors`, float32 `[tokens, 1]`."""
    losses: list[Tensor] = []
    hidden_grad = torch.empty_like(hidden) if needed[0] else None
    weight_grad = TransposedSum(weight) if needed[1] else None
    counted = (labels != IGNORED)[:, None]
    target = torch.where(counted, labels[:, None], 0)
    for start in range(0, hidden.shape[0], chunk_size):
        chunk = slice(start, start + chunk_size)
        rows = hidden[chunk]

        def weighted(x: Tensor, chunk: slice = chunk) -> Tensor:
            # Ignored labels are masked in the small tensors, not in the large one. They are selected rather than
            # indexed, which would make the host wait for an accelerator.
            return (x if factors is None else (x * factors[chunk]).to(x.dtype)).where(counted[chunk], 0.0)

        products = matmul(rows, weight.t())
        found, products_grad = _losses_and_products_grad(products, target[chunk], scale, softcap, part)
        losses.append(found.where(counted[chunk], 0.0))
        if hidden_grad is not None:
            hidden_grad[chunk] = weighted(matmul(products_grad, weight))
        if weight_grad is not None:
            weight_grad.add(products_grad, weighted(rows))
        del products, products_grad  # before the next chunk takes as much memory
    return losses, hidden_grad, weight_grad


def _losses_and_products_grad(
    products: Tensor, target: Tensor, scale: float, softcap: float | None, part: VocabularyPart | None
) -> tuple[Tensor, Tensor]:
    """Losses `[tokens, 1]` and their gradients by the products `[tokens, vocab]`, which are used up."""
    if scale == 1.0 and softcap is None:
        return _losses_and_logits_grad(products, target, part)
    dtype = products.dtype
    logits = adjusted(products.float(), scale, softcap)
    slope = scale if softcap is None else scale * (1.0 - (logits / softcap).square_())  # tanh' = 1 - tanh^2
    losses, logits_grad = _losses_and_logits_grad(logits, target, part)
    return losses, logits_grad.mul_(slope).to(dtype)


def _losses_and_logits_grad(logits: Tensor, target: Tensor, part: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Losses `[tokens, 1]` for targets `[tokens, 1]`, and their gradients by the logits, which are used up."""
    dtype = logits.dtype
    logits = logits.float()
    if part is not None:
        losses, grad = _of_part(logits, target, part)
        return losses, grad.to(dtype)
    largest = logits.amax(-1, keepdim=True)
    at_target = logits.gather(1, target)
    probability = torch.softmax(logits, -1, out=logits)
    # The largest logit yields the denominator of the softmax, and its probability cannot underflow.
    losses = largest - probability.amax(-1, keepdim=True).log_() - at_target
    probability.scatter_add_(1, target, torch.full_like(losses, -1.0))
    return losses, probability.to(dtype)


def _of_part(logits: Tensor, target: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """As `_losses_and_logits_grad`, of a part's float32 logits: two exchanges of one or two numbers a token."""
    largest = part.largest(logits.amax(-1, keepdim=True))
    own = target - part.start
    here = (own >= 0) & (own < logits.shape[-1])
    own = own.clamp(0, logits.shape[-1] - 1)
    at_target = logits.gather(1, own).where(here, 0.0)
    exponential = logits.sub_(largest).exp_()
    denominator, at_target = part.total(torch.cat((exponential.sum(-1, keepdim=True), at_target), -1)).split(1, -1)
    losses = denominator.log() + largest - at_target
    grad = exponential.div_(denominator)
    return losses, grad.scatter_add_(1, own, -here.to(grad.dtype))
