"""How a layer's halves are put together, against transformers and written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cordee.model.config import MLPConfig, NormConfig
from cordee.model.inputs import Context
from cordee.model.layer import Layer
from cordee.model.rotary import Positions
from cordee.ops.dropout import DropoutRNG
from cordee.ops.mask import AttentionMask
from tests.model import tiny

SEQ = 7


def built(**changes) -> tuple[Layer, Tensor, Context]:
    model = tiny.model(tiny.config(tiny.layer(**changes)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, which begin as ones
            parameter.data.normal_(1.0, 0.3)
    context = Context(Positions(torch.arange(SEQ)[None]), AttentionMask(SEQ, SEQ))
    return model.layers["0"], torch.randn(2, SEQ, 24), context


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("from_norm", [False, True])
def test_norms_before(scale, from_norm):
    layer, x, context = built(residual_scale=scale, residual_from_norm=from_norm)
    normed = layer.attention_norm(x)
    h = (normed if from_norm else x) + scale * layer.attention(normed, context)
    normed = layer.mlp_norm(h)
    torch.testing.assert_close(layer(x, context), (normed if from_norm else h) + scale * layer.mlp(normed))


def test_norms_after():
    layer, x, context = built(norm_placement="post")
    h = x + layer.attention_norm(layer.attention(x, context))
    torch.testing.assert_close(layer(x, context), h + layer.mlp_norm(layer.mlp(h)))
    assert not hasattr(layer.attention_post_norm, "weight")


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_norms_on_both_sides(scale):
    layer, x, context = built(norm_placement="sandwich", residual_scale=scale)
    h = x + scale * layer.attention_post_norm(layer.attention(layer.attention_norm(x), context))
    expected = h + scale * layer.mlp_post_norm(layer.mlp(layer.mlp_norm(h)))
    torch.testing.assert_close(layer(x, context), expected)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("pre", ["attention_norm", "mlp_norm"]),
        ("post", ["attention_norm", "mlp_norm"]),
        ("sandwich", ["attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"]),
    ],
)
def test_canonical_names_of_norms(placement, expected):
    norm = NormConfig(kind="layer", eps=1e-5)
    config = tiny.config(tiny.layer(norm_placement=placement, norm=norm))
    names = [name for name in tiny.model(config).parameter_specs() if "_norm" in name and "final" not in name]
    assert sorted(names) == sorted(f"layers.0.{norm}.{part}" for norm in expected for part in ("weight", "bias"))


def test_dropout_comes_before_the_scale_and_in_training_only():
    mlp = MLPConfig(ffn_hidden_size=8, activation="relu", gated=False)
    config = tiny.config(tiny.layer(mlp=mlp, residual_scale=0.5), hidden_dropout=0.5)
    layer = tiny.model(config).layers["0"]
    places = torch.arange(SEQ)[None]
    context = Context(Positions(places), AttentionMask(SEQ, SEQ))
    x = torch.randn(2, SEQ, 24)
    assert torch.equal(layer(x, context), layer(x, context))
    first, other = (
        Context(
            Positions(places),
            AttentionMask(SEQ, SEQ),
            dropout_rng=DropoutRNG(seed, torch.arange(2)),
            residual_indices=places,
        )
        for seed in (1, 2)
    )
    assert torch.equal(layer(x, first), layer(x, first))
    assert not torch.equal(layer(x, first), layer(x, other))
