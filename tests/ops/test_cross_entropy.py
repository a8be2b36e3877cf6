from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cordee.ops import cross_entropy
from cordee.ops.cross_entropy import IGNORED, adjusted, chunked_cross_entropy, reference_cross_entropy

TOKENS, HIDDEN, VOCAB = 13, 6, 11
ADJUSTMENTS = {
    "plain": {},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 2.0},
    "both": {"scale": 1.7, "softcap": 3.0},
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    labels[[0, 7]] = IGNORED
    return torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(VOCAB, HIDDEN, dtype=dtype), labels


@pytest.mark.parametrize("adjustment", ADJUSTMENTS.values(), ids=ADJUSTMENTS)
def test_reference_by_hand(adjustment):
    hidden, weight, labels = inputs()
    scale, cap = adjustment.get("scale", 1.0), adjustment.get("softcap")
    total = 0.0
    for row, label in zip(hidden.double(), labels.tolist(), strict=True):
        if label == IGNORED:
            continue
        logits = [scale * float(row @ w) for w in weight.double()]
        if cap is not None:
            logits = [cap * float(torch.tensor(z / cap).tanh()) for z in logits]
        total += float(torch.tensor(logits).logsumexp(0)) - logits[label]
    loss = reference_cross_entropy(hidden, weight, labels, **adjustment)
    torch.testing.assert_close(loss, torch.tensor(total))


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize("adjustment", ADJUSTMENTS.values(), ids=ADJUSTMENTS)
def test_chunks_are_the_reference_forward_and_backward(adjustment, chunk_size):
    results = []
    for loss in (reference_cross_entropy, lambda *a, **k: chunked_cross_entropy(*a, chunk_size, **k)):
        hidden, weight, labels = inputs()
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        total = loss(hidden, weight, labels, **adjustment)
        (total * 0.3).backward()
        results.append((total.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(results[1], results[0])
    with torch.no_grad():
        hidden, weight, labels = inputs()
        torch.testing.assert_close(
            chunked_cross_entropy(hidden, weight, labels, chunk_size, **adjustment), results[0][0]
        )


@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_only_the_gradient_that_is_asked_for(needs):
    hidden, weight, labels = inputs()
    leaf = {"hidden": hidden, "weight": weight}[needs].requires_grad_()
    chunked_cross_entropy(hidden, weight, labels, softcap=2.0).backward()
    got = leaf.grad.clone()
    leaf.grad = None
    reference_cross_entropy(hidden, weight, labels, softcap=2.0).backward()
    torch.testing.assert_close(got, leaf.grad)


def test_normalisation_is_not_rounded_to_low_precision():
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 64).bfloat16().requires_grad_(), torch.randn(500, 64).bfloat16()
    labels = torch.randint(0, 500, (256,))
    exact = hidden.detach().float().requires_grad_()
    (chunked_cross_entropy(hidden, weight, labels) / 2989).backward()  # bfloat16(1 / 2989) is 0.23 % too small
    (reference_cross_entropy(exact, weight.float(), labels) / 2989).backward()
    size = (hidden.grad.float() * exact.grad).sum() / exact.grad.square().sum()
    assert size.item() == pytest.approx(1.0, abs=7e-4)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("adjustment", ADJUSTMENTS.values(), ids=ADJUSTMENTS)
def test_losses_of_single_tokens(adjustment, chunk_size: int | None):
    """Each token has a gradient of its own, of either sign; what is not counted is 0 and gets none."""
    hidden, weight, labels = inputs()
    factors = torch.randn(len(labels), generator=torch.Generator().manual_seed(2))
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logits = adjusted(exact[0] @ exact[1].t(), **adjustment)
    expected = torch.stack(
        [
            row.new_zeros(()) if label == IGNORED else -row.log_softmax(-1)[label]
            for row, label in zip(logits, labels, strict=True)
        ]
    )
    (expected.sigmoid() * factors.double()).sum().backward()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    losses = chunked_cross_entropy(*ours, labels, chunk_size, reduction="none", **adjustment)
    (losses.sigmoid() * factors).sum().backward()
    torch.testing.assert_close(losses.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for got, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-5, atol=1e-6)
    assert (ours[0].grad[labels == IGNORED] == 0).all()
    with torch.no_grad():
        assert torch.equal(
            chunked_cross_entropy(hidden, weight, labels, chunk_size, reduction="none", **adjustment), losses
        )


def test_losses_of_single_tokens_in_low_precision():
    hidden, weight, labels = inputs(torch.bfloat16)
    weight.requires_grad_()
    losses = chunked_cross_entropy(hidden, weight, labels, 4, reduction="none")
    factors = torch.linspace(-1.0, 1.0, len(labels))
    (losses * factors).sum().backward()
    assert losses.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    exact = weight.detach().float().requires_grad_()
    expected = F.cross_entropy(hidden.float() @ exact.t(), labels, ignore_index=IGNORED, reduction="none")
    (expected * factors).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.1)
    assert F.cosine_similarity(weight.grad.float().flatten(), exact.grad.flatten(), 0) > 0.999


@pytest.mark.parametrize("adjustment", ADJUSTMENTS.values(), ids=ADJUSTMENTS)
def test_low_precision(adjustment):
    hidden, weight, labels = inputs(torch.bfloat16)
    weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, labels, 4, **adjustment)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    exact = weight.detach().float().requires_grad_()
    expected = reference_cross_entropy(hidden.float(), exact, labels, **adjustment)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.1)
    assert F.cosine_similarity(weight.grad.float().flatten(), exact.grad.flatten(), 0) > 0.999


@pytest.mark.parametrize("tokens, hidden_size, vocab", [(300, 64, 900), (257, 48, 40)])
def test_large_ones_too(tokens, hidden_size, vocab):
    """Large enough for every fast kernel, with a last chunk that is not full."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, hidden_size), torch.randn(vocab, hidden_size)
    labels = torch.randint(0, vocab, (tokens,))
    labels[::5] = IGNORED
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    ours = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = chunked_cross_entropy(*ours, labels, 128)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, ours)
    for got, right in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_at_most_one_chunk_of_logits_exists(monkeypatch):
    sizes = []

    def matmul(a, b):
        sizes.append(a.shape[0] * b.shape[1])
        return a @ b

    monkeypatch.setattr(cross_entropy, "matmul", matmul)
    hidden, weight, labels = inputs()
    chunked_cross_entropy(hidden.requires_grad_(), weight, labels, 4)
    assert max(sizes) == 4 * VOCAB


def test_the_default_chunk_is_bounded_and_a_multiple(monkeypatch):
    chunks = []
    monkeypatch.setattr(cross_entropy._ChunkedCrossEntropy, "apply", lambda *args: chunks.append(args[3]))
    for vocab in (100, 32000, 200_000):
        chunked_cross_entropy(torch.empty(1, 8, requires_grad=True), torch.empty(vocab, 8), torch.zeros(1).long())
    assert [chunk % cross_entropy.CHUNK_MULTIPLE for chunk in chunks] == [0, 0, 0]
    assert 4 * 32000 * chunks[1] <= cross_entropy.CHUNK_BYTES
    assert chunks[2] == cross_entropy.CHUNK_MULTIPLE


def test_nothing_that_counts_is_a_loss_of_zero():
    hidden, weight, labels = inputs()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = chunked_cross_entropy(*leaves, labels.fill_(IGNORED), 4)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_what_does_not_count_may_be_anything():
    hidden, weight, labels = inputs()
    hidden[labels == IGNORED] = 1e30
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    results = []
    for loss in (reference_cross_entropy, chunked_cross_entropy):
        total = loss(*leaves, labels)
        results.append((total.detach(), *torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(results[1], results[0])


def test_a_target_that_cannot_be_expected_keeps_its_loss():
    """Its probability, e^-200, is no float32."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [200.0]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0]))
    assert loss.item() == 200.0
    loss.backward()
    assert hidden.grad.item() == 200.0


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_a_label_that_is_no_token_is_an_error(label):
    hidden, weight, labels = inputs()
    labels[3] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        chunked_cross_entropy(hidden.requires_grad_(), weight, labels)


def test_gradients_are_given_once():
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="already taken"):
        loss.backward()
