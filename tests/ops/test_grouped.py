"""The grouped product against the loop that defines it and against a product of gathered matrices."""

from __future__ import annotations

import logging

import pytest
import torch

from cordee.ops.grouped import grouped_matmul, has_kernel, reference_grouped_matmul

TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 0.15, "rtol": 0.02},
    torch.float16: {"atol": 0.02, "rtol": 0.01},
}
COUNTS = [[3, 0, 5, 2], [0, 0, 0, 10], [10, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 129, 0, 1]]


def operands(counts: list[int], dtype: torch.dtype, in_size: int = 24, out_size: int = 16):
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), in_size).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out_size, in_size).to(dtype).requires_grad_()
    return rows, weight, torch.tensor(counts)


@pytest.mark.parametrize("function", [grouped_matmul, reference_grouped_matmul])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_gathered_matrices(function, counts, dtype):
    rows, weight, counts = operands(counts, dtype)
    result = function(rows, weight, counts)
    group = torch.arange(len(counts)).repeat_interleave(counts)
    exact_rows, exact_weight = rows.double(), weight.double()
    expected = torch.einsum("ri,roi->ro", exact_rows, exact_weight[group])
    torch.testing.assert_close(result, expected.to(dtype), **TOLERANCE[dtype])
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    own = torch.autograd.grad(result, (rows, weight), upstream.to(dtype))
    for gradient, exact in zip(own, torch.autograd.grad(expected, (rows, weight), upstream), strict=True):
        torch.testing.assert_close(gradient, exact, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "in_size", "out_size", "expected"),
    [
        (torch.float32, 24, 16, True),
        (torch.float32, 24, 18, False),
        (torch.float32, 7, 16, False),
        (torch.bfloat16, 24, 16, True),
        (torch.bfloat16, 20, 16, False),
        (torch.float64, 24, 16, False),
    ],
)
def test_what_the_kernel_takes(dtype, in_size, out_size, expected):
    rows, weight, counts = operands([4, 0, 3], dtype, in_size, out_size)
    assert has_kernel(rows, weight) == expected
    reference = reference_grouped_matmul(rows, weight, counts)
    torch.testing.assert_close(grouped_matmul(rows, weight, counts), reference, **TOLERANCE[dtype])


def test_the_loop_is_said_once(caplog, monkeypatch):
    rows, weight, counts = operands([1, 2], torch.float32, 5, 9)
    with caplog.at_level(logging.INFO, logger="cordee"):
        for _ in range(3):
            grouped_matmul(rows, weight, counts)
    assert [record.getMessage() for record in caplog.records] == [
        "No grouped kernel takes experts of (9, 5) in float32: they run one after the other"
    ]


@pytest.mark.parametrize("function", [grouped_matmul, reference_grouped_matmul])
def test_expanded_and_transposed_gradients(function):
    rows, weight, counts = operands([3, 0, 5], torch.float32)
    ones = torch.autograd.grad(function(rows, weight, counts), (rows, weight), torch.ones(8, 16))
    expanded = torch.autograd.grad(function(rows, weight, counts).sum(), (rows, weight))
    strided = torch.autograd.grad(function(rows, weight, counts).t().contiguous().sum(), (rows, weight))
    for gradient, a, b in zip(ones, expanded, strided, strict=True):
        torch.testing.assert_close(a, gradient)
        torch.testing.assert_close(b, gradient)


def test_weight_gradients_lie_as_the_weights():
    rows, weight, counts = operands([3, 0, 5], torch.float32)
    (gradient,) = torch.autograd.grad(grouped_matmul(rows, weight, counts).sum(), weight)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_is_trained_gets_a_gradient(frozen):
    rows, weight, counts = operands([3, 0, 5], torch.float32)
    (rows, weight)[frozen].requires_grad_(False)
    grouped_matmul(rows, weight, counts).sum().backward()
    assert [rows.grad is None, weight.grad is None] == [frozen == 0, frozen == 1]
