"""Where other techniques plug in: layer span, layer wrapper, block boundary, parameter descriptions, output."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cordee.model.cache import KVCache
from cordee.model.config import MLPConfig, NormConfig
from cordee.model.gpt import GPTModel, Span
from cordee.model.init import initialise
from cordee.model.parameter import SpecifiedModule, parameter_specs
from cordee.model.placement import Placement, before
from cordee.model.specs import ParameterSpec
from tests.model import tiny

GPT2_LAYER = tiny.layer(
    tiny.attention(num_kv_heads=6, rope=None, qkv_bias=True, out_bias=True),
    mlp=MLPConfig(ffn_hidden_size=32, activation="gelu_tanh", gated=False, bias=True),
    norm=NormConfig(kind="layer", eps=1e-5),
)
CONFIGS = {
    "llama": tiny.config(tiny.layer(), tiny.layer(), tiny.layer()),
    "gpt2": tiny.config(
        GPT2_LAYER, GPT2_LAYER, GPT2_LAYER, final_norm=GPT2_LAYER.norm, learned_positions=True, tie_word_embeddings=True
    ),
}


def ids(batch: int = 2, seq: int = 11) -> torch.Tensor:
    return torch.randint(0, tiny.VOCAB, (batch, seq), generator=torch.Generator().manual_seed(0))


def summed_loss(model: GPTModel, *inputs, **options) -> torch.Tensor:
    total, _ = model(*inputs, output=lambda head, hidden: head.loss(hidden, ids().roll(-1, 1)), **options)
    return total


# ---- span ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_two_spans_are_the_whole(config, cut):
    whole = tiny.model(config)
    spans = (Span(0, cut, head=False), Span(cut, config.num_layers, embedding=False))
    first, second = (GPTModel(config, spans=[span]).eval() for span in spans)
    for stage in (first, second):
        initialise(stage, 0)
        assert stage.parameter_specs().keys() == dict(stage.named_parameters()).keys()
    both = first.parameter_specs() | second.parameter_specs()
    assert both.keys() == whole.parameter_specs().keys()
    assert second.copies_embedding == config.tie_word_embeddings and not first.copies_embedding
    hidden = first(ids())
    assert torch.equal(second(hidden), whole(ids()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_process_runs_its_spans_one_by_one(config):
    whole = tiny.model(config)
    ends = (Span(0, 1, head=False), Span(2, config.num_layers, embedding=False))
    between = GPTModel(config, spans=[Span(1, 2, embedding=False, head=False)]).eval()
    both = GPTModel(config, spans=ends).eval()
    for stage in (both, between):
        initialise(stage, 0)
    assert {name for name in whole.parameter_specs() if not name.startswith("layers.1.")} == set(both.parameter_specs())
    assert torch.equal(both(between(both(ids(), span=ends[0])), span=ends[1]), whole(ids()))


def test_layers_keep_their_numbers_in_a_span():
    stage = GPTModel(CONFIGS["llama"], spans=[Span(1, 2, embedding=False, head=False)])
    assert {name.split(".")[1] for name in stage.parameter_specs()} == {"1"}


def test_gradients_flow_through_spans():
    whole = tiny.model(CONFIGS["llama"])
    summed_loss(whole, ids()).backward()
    first, second = (
        GPTModel(whole.config, spans=[Span(0, 2, head=False)]),
        GPTModel(whole.config, spans=[Span(2, 3, False)]),
    )
    initialise(first, 0)
    initialise(second, 0)
    sent = first(ids())
    received = sent.detach().requires_grad_()
    summed_loss(second, received).backward()
    sent.backward(received.grad)
    for stage in (first, second):
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad)


# ---- layer wrapper ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputed_layers_are_plain_layers(config):
    plain, recomputed = tiny.model(config), tiny.model(config)
    names = [name for name, _ in recomputed.named_parameters()]
    calls = []

    def wrap(index, inner):
        def wrapped(forward, x, context):
            calls.append(index)
            return checkpoint(inner, forward, x, context, use_reentrant=False)

        return wrapped

    for layer in recomputed.own_layers():
        layer.placement.wrap("call", "recompute", partial(wrap, layer.index))
    losses = [summed_loss(model, ids()) for model in (plain, recomputed)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    for loss in losses:
        loss.backward()
    assert calls == [0, 1, 2]
    assert [name for name, _ in recomputed.named_parameters()] == names
    for name, parameter in recomputed.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


def test_wrappers_nest_from_the_inside_out():
    model = tiny.model(CONFIGS["llama"])
    order = []

    for name in ("inner", "outer"):
        for layer in model.own_layers():
            note = partial(order.append, f"{name}{layer.index}")
            layer.placement.wrap("call", name, lambda inner, note=note: lambda *inputs: (note(), inner(*inputs))[1])
    model(ids())
    assert order == ["outer0", "inner0", "outer1", "inner1", "outer2", "inner2"]


# ---- boundary --------------------------------------------------------------------------------------------------------


def test_every_block_is_entered_and_left_once():
    model = tiny.model(CONFIGS["llama"])
    seen = []

    def watched(what: str):
        return before(lambda x: (seen.append(what), x)[1])

    for name, module in model.named_modules():
        placement = getattr(module, "placement", Placement())
        for border in {"enter", "exit"}.intersection(placement.hooks):
            placement.wrap(border, "test", watched(f"{border} {name}"))
    model(ids())
    blocks = [f"layers.{i}.{block}" for i in range(3) for block in ("attention", "mlp")]
    assert seen == ["exit embedding", *(f"{way} {b}" for b in blocks for way in ("enter", "exit")), "enter head"]


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_described(config):
    model = GPTModel(config, device="meta")
    specs = model.parameter_specs()
    for name, parameter in model.named_parameters():
        spec = specs[name]
        assert spec.shape == tuple(parameter.shape)
        assert parameter.device.type == "meta"
        assert spec.decay == (name.endswith("weight") and "norm" not in name)
        assert (spec.std > 0) == spec.decay
        assert spec.fill == (1.0 if name.endswith("norm.weight") else 0.0)
    small = config.init_std / math.sqrt(2 * 3)
    assert specs["layers.0.attention.qkv.weight"].axes == ("kv_group", "slot", "head_dim", "embed")
    assert specs["layers.0.attention.out.weight"].std == pytest.approx(small)
    assert specs["layers.2.mlp.down.weight"].std == pytest.approx(small)
    assert ("head.weight" in specs) != config.tie_word_embeddings


def test_a_parameter_without_description_is_noticed():
    class Forgetful(SpecifiedModule):
        def __init__(self):
            super().__init__(Placement())
            self.declare({"weight": ParameterSpec((2,), ("embed",))}, "weight")
            self.extra = torch.nn.Parameter(torch.zeros(1))

    with pytest.raises(AssertionError, match="extra"):
        parameter_specs(Forgetful())


def test_tied_weights_are_one_parameter():
    model = tiny.model(CONFIGS["gpt2"])
    assert model.head.weight is model.embedding.weight
    summed_loss(model, ids()).backward()
    both = model.embedding.weight.grad
    untied = tiny.model(CONFIGS["gpt2"])
    untied.head.weight = torch.nn.Parameter(untied.embedding.weight.detach().clone())
    summed_loss(untied, ids()).backward()
    torch.testing.assert_close(both, untied.embedding.weight.grad + untied.head.weight.grad)


# ---- output, dropout, cache ------------------------------------------------------------------------------------------


def test_output_sees_the_last_hidden_states_and_the_head():
    model = tiny.model(CONFIGS["llama"])
    head, hidden = model(ids(), output=lambda head, hidden: (head, hidden))
    assert head is model.head
    assert torch.equal(head.logits(hidden), model(ids()))


@pytest.mark.parametrize("kind", ["embedding_dropout", "attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_drops_in_training_only(name, kind):
    layers, options = CONFIGS[name].layers, {"learned_positions": name == "gpt2", kind: 0.5}
    dropping = tiny.model(tiny.config(*layers, **options, final_norm=CONFIGS[name].final_norm))
    plain = tiny.model(tiny.config(*layers, **{**options, kind: 0.0}, final_norm=CONFIGS[name].final_norm))
    assert torch.equal(dropping(ids()), plain(ids()))
    dropping.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        once, again = dropping(ids()), dropping(ids())
        torch.manual_seed(0)
        assert torch.equal(dropping(ids()), once)
    assert not torch.allclose(once, again)


def test_a_full_cache_says_so():
    model = tiny.model(CONFIGS["llama"])
    cache = KVCache(model.config, batch_size=2, max_length=12)
    with torch.inference_mode():
        model(ids(), cache=cache)
        with pytest.raises(ValueError, match="for 12 tokens holds 11 tokens and cannot take 2 more"):
            model(ids(seq=2), cache=cache)
        model(ids(seq=1), cache=cache)
    assert cache.lengths == [12, 12]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1)], ids=["no mask", "mask"])
def test_positions_after_padding_continue_those_of_each_row(mask):
    model = tiny.model(CONFIGS["llama"])
    padding = torch.ones(2, 11)
    padding[0, :3], padding[1, 6:] = 0, 0
    with torch.inference_mode():
        cache = KVCache(model.config, batch_size=2, max_length=20)
        model(ids(), padding, cache=cache)
        assert cache.lengths == [8, 6]
        told = model(ids(seq=1), mask, cache=cache)
        for row in range(2):
            alone = torch.cat((ids()[row][padding[row] == 1], ids(seq=1)[row]))[None]
            torch.testing.assert_close(told[row : row + 1], model(alone)[:, -1:], rtol=1e-4, atol=1e-5)


def test_positions_that_cannot_be_told_are_asked_for():
    """After several documents the number of places is not the next position."""
    model = tiny.model(CONFIGS["llama"])
    segments = torch.tensor([0] * 5 + [1] * 6).expand(2, -1)
    with torch.inference_mode():
        cache = KVCache(model.config, batch_size=2, max_length=20)
        model(ids(), segments=segments, cache=cache)
        with pytest.raises(ValueError, match="position_ids"):
            model(ids(seq=1), cache=cache)
        model(ids(seq=1), position_ids=torch.full((2, 1), 6), segments=torch.ones(2, 1).long(), cache=cache)
    assert cache.lengths == [12, 12]
