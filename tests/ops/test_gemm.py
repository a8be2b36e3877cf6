"""Products of both libraries against float64, on any processor: oneDNN is also used where it is not the faster one."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cordee import device
from cordee.log import info_once, logger
from cordee.ops import gemm
from cordee.ops.activation import gated

LARGE = (3, 64, 96, 128)  # batch, seq, in, out: more than `gemm.WORTHWHILE` multiply-adds
SMALL = (1, 2, 6, 5)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["oneDNN", "torch"], autouse=True)
def library(request, monkeypatch):
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "prefers_onednn", lambda device: request.param == "oneDNN" and device.type == "cpu")
    return request.param


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def upstream(y: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


# ---- linear ----------------------------------------------------------------------------------------------------------


def results(function, *inputs: torch.Tensor | None) -> list[torch.Tensor]:
    """Output and gradients by all inputs that are there."""
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(upstream(y))
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
def test_linear_is_that_of_torch_forward_and_backward(shape, bias):
    batch, seq, inputs, outputs = shape
    x, weight = randn(batch, seq, inputs), randn(outputs, inputs)
    b = randn(outputs) if bias else None
    ours = results(gemm.linear, x, weight, b)
    exact = results(F.linear, x.double(), weight.double(), b if b is None else b.double())
    for got, expected in zip(ours, exact, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
def test_linear_of_a_function(shape):
    """The same values and gradients as if the function were outside, and autograd keeps only its input."""
    batch, seq, inputs, outputs = shape
    x, weight, bias = randn(batch, seq, 2 * inputs), randn(outputs, inputs), randn(outputs)
    kept = []

    def inside(x, weight, bias):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, lambda t: t):
            return gemm.linear(x, weight, bias, before=lambda x: gated(x, "silu"))

    ours = results(inside, x, weight, bias)
    theirs = results(lambda x, weight, bias: F.linear(gated(x, "silu"), weight, bias), x, weight, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sorted(kept) == sorted([2 * inputs, inputs])


def test_linear_with_a_function_outside_of_autograd():
    x, weight = randn(64, 192), randn(128, 96)
    with torch.inference_mode():
        y = gemm.linear(x, weight, before=lambda x: gated(x, "silu"))
    torch.testing.assert_close(y, F.linear(gated(x, "silu"), weight), **TOLERANCE)


@pytest.mark.parametrize("before", [None, torch.tanh], ids=["plain", "of a function"])
def test_compiled_it_stays_one_graph_and_the_same(before):
    x, weight, bias = randn(200, 96), randn(128, 96), randn(128)
    torch.compiler.reset()
    function = partial(gemm.linear, before=before)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(results(compiled, x, weight, bias), results(function, x, weight, bias))


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("before", [None, torch.tanh], ids=["plain", "of a function"])
def test_only_what_is_trained_gets_a_gradient(frozen, before):
    leaves = {"x": randn(200, 96).requires_grad_(), "weight": randn(128, 96).requires_grad_()}
    leaves[frozen].requires_grad_(False)
    y = gemm.linear(leaves["x"], leaves["weight"], before=before)
    y.backward(upstream(y))
    assert leaves[frozen].grad is None
    (trained,) = (leaf for leaf in leaves.values() if leaf.requires_grad)
    got, trained.grad = trained.grad, None
    z = F.linear(before(leaves["x"]) if before else leaves["x"], leaves["weight"])
    z.backward(upstream(z))
    torch.testing.assert_close(got, trained.grad, rtol=1e-5, atol=1e-4)


def test_operands_may_be_parts_of_larger_tensors():
    """oneDNN has no kernel for them, only a loop."""
    x, weight = randn(3, 80, 192)[:, 8:72, ::2], randn(2, 128, 192)[1, :, 32:128]
    torch.testing.assert_close(gemm.linear(x, weight), F.linear(x, weight), **TOLERANCE)
    leaf = weight.clone().requires_grad_()
    gemm.linear(x, leaf).backward(upstream(F.linear(x, leaf)).transpose(0, 1).contiguous().transpose(0, 1))
    expected = weight.clone().requires_grad_()
    F.linear(x, expected).backward(upstream(F.linear(x, expected)))
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_torch(dtype):
    x, weight = randn(64, 128).to(dtype), randn(256, 128).to(dtype)
    assert not gemm.in_onednn(x, weight, 1 << 30)
    assert torch.equal(gemm.linear(x, weight), F.linear(x, weight))


def test_it_can_be_switched_off(library, monkeypatch):
    x = randn(128, 128)
    assert gemm.has_onednn(x) == (library == "oneDNN")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not gemm.has_onednn(x)


def test_small_products_are_left_to_torch():
    x = randn(8, 8)
    assert not gemm.in_onednn(x, x, x.numel() * 8)


def test_the_library_is_said_once(library, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    info_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="cordee"):
        for _ in range(2):
            gemm.linear(randn(64, 128), randn(256, 128))
    assert len(caplog.records) == (library == "oneDNN")


# ---- products without autograd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip_a", [False, True])
@pytest.mark.parametrize("flip_b", [False, True])
@pytest.mark.parametrize("m, n", [(96, 200), (200, 96), (5, 3)])
def test_products(m, n, flip_a, flip_b):
    k = 64
    a, b = randn(k, m) if flip_a else randn(m, k), randn(n, k) if flip_b else randn(k, n)
    a, b = a.t() if flip_a else a, b.t() if flip_b else b
    exact = a.double() @ b.double()
    torch.testing.assert_close(gemm.matmul(a, b).double(), exact, **TOLERANCE)
    torch.testing.assert_close(gemm.transposed_matmul(a.t(), b).double(), exact, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(300, 40), (40, 300)])
@pytest.mark.parametrize("part_bytes", [1 << 24, 1 << 12], ids=["whole", "in parts"])
def test_a_sum_of_products(m, n, part_bytes, dtype, monkeypatch):
    monkeypatch.setattr(gemm, "PART_BYTES", part_bytes)
    total, exact = gemm.TransposedSum(torch.empty(m, n, dtype=dtype)), torch.zeros(m, n, dtype=torch.float64)
    for k in (128, 128, 7):
        a, b = randn(k, m).to(dtype), randn(k, n).to(dtype)
        total.add(a, b)
        exact += a.double().t() @ b.double()
    result = total.times(torch.tensor(0.25))
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    error = {"rtol": 0.01, "atol": 0.1} if dtype == torch.bfloat16 else TOLERANCE
    torch.testing.assert_close(result.double(), exact / 4, **error)


# ---- which processors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "maker, capability, expected",
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_onednn_is_for_processors_on_which_mkl_does_not_use_avx512(maker, capability, expected, monkeypatch):
    monkeypatch.setattr(device, "_processor_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    device._mkl_wastes_avx512.cache_clear()
    try:
        assert device.prefers_onednn(torch.device("cpu")) == expected
        assert not device.prefers_onednn(torch.device("meta"))
    finally:
        device._mkl_wastes_avx512.cache_clear()
