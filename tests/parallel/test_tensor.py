"""Tensor and sequence parallelism: every kind of block, the same losses and gradients as one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cordee.model.config import ModelConfig, QKNormConfig
from cordee.model.shards import part_of
from cordee.ops.cross_entropy import IGNORED, chunked_cross_entropy, reference_cross_entropy
from cordee.parallel import laws, tensor
from cordee.parallel.degrees import Degrees, degrees
from cordee.parallel.layout import Layout
from cordee.train.options import TrainConfig
from tests.matrix import sampled
from tests.parallel import models

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4 sp": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "tp2 sp zero3": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 3}),
    "tp2 overlap": (2, {"tensor_model_parallel_size": 2, "tp_comm_overlap": True, "tp_comm_overlap_parts": 3}),
    "tp2 sp overlap": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}),
    "tp2 zero0": (4, {"tensor_model_parallel_size": 2, "zero_stage": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(LAYOUTS, models.MODELS, whole=["tp2 sp"], per_row=2))
def test_equals_one_process(pool, layout: str, name: str):
    ranks, given = LAYOUTS[layout]
    if name == "qk norm" and given["tensor_model_parallel_size"] == 4:
        pytest.skip("refused: see test_what_does_not_fit")
    expected = models.train_alone(name)
    for found in pool.run(models.train_on_ranks, ranks, name, given):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["grads"].keys() == expected["grads"].keys()
        for parameter, grad in expected["grads"].items():
            torch.testing.assert_close(found["grads"][parameter], grad, rtol=1e-4, atol=1e-6, msg=parameter)


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def cross_entropy_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 12, generator=generator) for size in (37, 23))
    labels = torch.randint(0, 23, (37,), generator=generator)
    labels[::5] = IGNORED
    return hidden, weight, labels


def vocabulary_parts(rank: int, world_size: int, softcap: float | None, scale: float):
    layout = Layout(degrees(models.options(tensor_model_parallel_size=world_size), world_size))
    axis = tensor._Axis(layout.group("tp"), rank, world_size)
    part = tensor._Vocabulary.of(23, axis)
    hidden, weight, labels = cross_entropy_inputs()
    begin, end = part_of(23, rank, world_size)
    own = weight[begin:end].clone().requires_grad_()
    hidden.requires_grad_()
    given = {"scale": scale, "softcap": softcap, "part": part}
    loss = chunked_cross_entropy(hidden, own, labels, 8, **given)
    (loss * 3.0).backward()
    with torch.no_grad():
        unlearned = chunked_cross_entropy(hidden, own, labels, 8, **given)
    single = [t.detach().clone().requires_grad_() for t in (hidden, own)]
    losses = chunked_cross_entropy(*single, labels, 8, reduction="none", **given)
    (losses.sum() * 3.0).backward()
    rows = part.lookup(torch.arange(23)[None], own)
    joined = part.join(hidden @ own.t())
    return [
        t.detach()
        for t in (loss, hidden.grad, own.grad, unlearned, rows, joined, losses, single[0].grad, single[1].grad)
    ]


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.7)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_cross_entropy_over_parts_of_unequal_size(pool, ranks: int, softcap: float | None, scale: float):
    hidden, weight, labels = (t.requires_grad_(t.is_floating_point()) for t in cross_entropy_inputs())
    expected = reference_cross_entropy(hidden, weight, labels, scale, softcap)
    (expected * 3.0).backward()
    found = pool.run(vocabulary_parts, ranks, softcap, scale)
    with torch.no_grad():
        separate = [
            reference_cross_entropy(h[None], weight, y[None], scale, softcap)
            for h, y in zip(hidden, labels, strict=True)
        ]
    for loss, _, _, unlearned, _, joined, losses, _, _ in found:
        torch.testing.assert_close(losses, torch.stack(separate))
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(unlearned, expected.detach())
        torch.testing.assert_close(joined, hidden.detach() @ weight.detach().t())
    torch.testing.assert_close(sum(part[1] for part in found), hidden.grad)
    torch.testing.assert_close(torch.cat([part[2] for part in found]), weight.grad)
    torch.testing.assert_close(sum(part[7] for part in found), hidden.grad)
    torch.testing.assert_close(torch.cat([part[8] for part in found]), weight.grad)
    torch.testing.assert_close(sum(part[4] for part in found)[0], weight.detach())


# ---- what is refused -------------------------------------------------------------------------------------------------


def broken(model: ModelConfig, size: int, tokens: int = 16, **options: Any) -> list[tuple[str, str, object]]:
    chosen = TrainConfig(seq_length=tokens, lr=1e-3, tensor_model_parallel_size=size, **options)
    run = laws.PlacedRun(model=model, degrees=Degrees(tp=size), options=chosen)
    return [(problem.option, problem.kind, problem.limit) for problem in laws.tensor(run)]


def test_what_does_not_fit():
    llama, option = models.MODELS["llama"], "--tensor-model-parallel-size"
    assert broken(llama, 3, sequence_parallel=True) == [  # and 48 channels of the MLP are a multiple of 3
        (option, "divides", 4),
        ("--sequence-parallel", "divisible", 3),
    ]
    normed = models.model(models.layer(attention=models.attention(qk_norm=QKNormConfig(norm=models.RMS, over="all"))))
    assert broken(normed, 4) == [(option, "divides", 2)]
    six = models.model(models.layer(attention=models.attention(num_heads=12, num_kv_heads=6)))
    assert broken(six, 4) == [(option, "divides", 6)]
    assert broken(llama, 1) == []
    assert broken(llama, 1, sequence_parallel=True) == [("--sequence-parallel", "requires", f"{option} 2 or more")]
    assert broken(replace(llama, vocab_size=5), 4) == [(option, "at most", 5)]
