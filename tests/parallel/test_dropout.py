"""What is dropped is the same on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel import models

RING, ULYSSES = {"context_parallel_algo": "megatron_cp_algo"}, {"context_parallel_algo": "ulysses_cp_algo"}
HYBRID = {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ring": (2, {"context_parallel_size": 2, **RING}),
    "ulysses": (2, {"context_parallel_size": 2, **ULYSSES}),
    "hybrid": (4, {"context_parallel_size": 4, **HYBRID}),
    "ring, heads and tokens sharded": (
        4,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, **RING},
    ),
    "ulysses, heads and tokens sharded": (
        4,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, **ULYSSES},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropped_alike(pool, layout: str):
    ranks, given = LAYOUTS[layout]
    expected = models.train_alone("gpt2")
    for found in pool.run(models.train_on_ranks, ranks, "gpt2", given):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for parameter, grad in expected["grads"].items():
            torch.testing.assert_close(found["grads"][parameter], grad, rtol=1e-4, atol=1e-6, msg=parameter)
