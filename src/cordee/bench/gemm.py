"""The rate of matrix products, against which training is measured."""

import time
from collections.abc import Callable

from cordee.bench.contest import Baton

SECONDS = 0.15  # one product is repeated for so long: what it sustains counts, not one lucky run
Shape = tuple[int, int, int]


def play(baton: Baton, shapes: list[Shape]) -> None:
    """Give FLOP/s of the best of `shapes` (m, k, n), by torch's own product and by the one that Cordée uses."""
    import torch

    from cordee.ops import gemm

    def best(multiply: Callable) -> float:
        return max(_rate(multiply, torch.randn(m, k), torch.randn(n, k).t()) for m, k, n in shapes)

    while baton.take():
        start = time.perf_counter()
        rates = {"torch_flops": best(torch.mm), "cordee_flops": best(gemm.matmul)}
        baton.give([time.perf_counter() - start], **rates)


def _rate(multiply: Callable, a, b) -> float:
    multiply(a, b)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SECONDS:
        multiply(a, b)
        count += 1
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] * count / elapsed
