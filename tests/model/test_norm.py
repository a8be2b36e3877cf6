from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

from cordee.model.config import NormConfig
from cordee.model.norm import Norm

SIZE = 24


def norm(weight: torch.Tensor | None = None, **config) -> Norm:
    norm = Norm(NormConfig(**{"kind": "rms", "eps": 1e-5, **config}), SIZE)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(SIZE) if weight is None else weight)
    return norm


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, SIZE) * 3


@pytest.mark.parametrize(("theirs", "unit_offset"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)])
def test_rms_norm_with_a_weight(theirs, unit_offset, x):
    weight = torch.randn(SIZE)
    module = theirs(SIZE, eps=1e-5)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(norm(weight, unit_offset=unit_offset)(x), module(x))


def test_rms_norm_without_a_weight(x):
    ours = norm(affine=False)
    assert not list(ours.parameters())
    torch.testing.assert_close(ours(x), Llama4TextL2Norm(1e-5)(x))


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine, x):
    ours, module = norm(kind="layer", affine=affine), nn.LayerNorm(SIZE, eps=1e-5, elementwise_affine=affine)
    module.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), module(x))


def test_a_small_distance_from_one_survives_low_precision(x):
    """1 + 2^-9 is 1 in bfloat16; the product with the norm is not."""
    ours = norm(torch.full((SIZE,), 2.0**-9), unit_offset=True).bfloat16()
    theirs = GemmaRMSNorm(SIZE, eps=1e-5).bfloat16()
    theirs.weight.data.fill_(2.0**-9)
    x = x.bfloat16()
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert not torch.equal(ours(x), norm(torch.zeros(SIZE), unit_offset=True).bfloat16()(x))


@pytest.mark.parametrize("unit_offset", [True, False])
def test_initial_norms_only_normalise(unit_offset):
    spec = Norm(NormConfig(kind="rms", eps=1e-5, unit_offset=unit_offset), SIZE).specs["weight"]
    assert spec.fill + unit_offset == 1.0
    assert not spec.decay
