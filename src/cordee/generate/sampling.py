"""Which token comes next, given the logits of one step.

Owns the filters and the draws. Knows nothing of models, caches or text."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.generate.options import DecodingOptions

TIE = 1e-6  # float32 logits hold a probability no more exactly, so a sum this little below top_p has reached it


def choose(logits: Tensor, options: DecodingOptions, draws: Sequence[tuple[int, int]]) -> Tensor:
    """One token for each row of `logits` `[rows, vocab]`, int64 `[rows]`.

    Greedy, or with `do_sample` a draw from what the filters leave. `draws` names each row's draw, (sample, step):
    together with the seed it decides the outcome, whatever rows are computed beside it."""
    if not options.do_sample:
        return logits.argmax(-1)
    chances = filtered(logits, options.temperature, options.top_k, options.top_p).double().softmax(-1).cumsum(-1)
    points = torch.tensor([[uniform(options.seed, *draw)] for draw in draws], dtype=torch.float64)
    points = points.to(chances.device) * chances[:, -1:]
    # right=True: a token without a chance has an empty interval, which no point falls in.
    return torch.searchsorted(chances, points, right=True).squeeze(-1)


def filtered(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits `[..., vocab]` in float32, divided by `temperature`, at -inf where a filter removed the token.

    top_k: keeps what is at least the k-th largest value, so ties stay together; 0 keeps all. top_p: of what is left,
    keeps the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020), lower ids
    first where tokens are equally likely, and never less than one token; 1 keeps all. Probabilities are summed in
    float64: in float32 the sum over a large vocabulary is off by more than a token's share."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True, stable=True)
        reached = ordered.double().softmax(-1).cumsum(-1) >= top_p - TIE
        behind = F.pad(reached[..., :-1], (1, 0))  # False for the most likely token
        removed = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, behind)
        logits = logits.masked_fill(removed, float("-inf"))
    return logits


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1) that (seed, sample, step) alone decide: 53 bits of a hash."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
