"""The fused decode path against decoding through the modules."""

from __future__ import annotations

import logging

import pytest
import torch

from cordee.generate import engine
from cordee.generate.decoder import CachedDecoder, FusedDecoder, padded, unsupported_reason
from cordee.generate.engine import generate
from cordee.generate.options import DecodingOptions
from cordee.model.cache import KVCache
from cordee.model.config import (
    DynamicNTKScaling,
    Llama3Scaling,
    LogNScaling,
    LowRankConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    QKNormConfig,
    RopeConfig,
    RouterConfig,
    YarnScaling,
)
from cordee.model.init import initialise
from cordee.model.linear import Linear
from cordee.ops import gemm
from tests.model import tiny
from tests.model.caches import PagedCache, WindowCache

LAYER_NORM = NormConfig(kind="layer", eps=1e-5)
YARN = YarnScaling(factor=2.0, original_max_position_embeddings=64, attention_factor=1.2)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LOW_RANK = LowRankConfig(targets=("down",), rank=2, scale=1.0)


def attention(**changes):
    return tiny.layer(tiny.attention(**changes))


COMMON = {
    "grouped": tiny.config(),
    "multi-head": tiny.config(attention(num_kv_heads=6)),
    "multi-query": tiny.config(attention(num_kv_heads=1)),
    "biases": tiny.config(attention(qkv_bias=True, out_bias=True)),
    "mlp bias": tiny.config(
        tiny.layer(mlp=MLPConfig(ffn_hidden_size=40, activation="gelu_tanh", gated=False, bias=True))
    ),
    "learned positions": tiny.config(
        tiny.layer(tiny.attention(rope=None), norm=LAYER_NORM), learned_positions=True, final_norm=LAYER_NORM
    ),
    "yarn": tiny.config(attention(rope=RopeConfig(scaling=YARN))),
    "llama3": tiny.config(attention(rope=RopeConfig(theta=5e5, scaling=LLAMA3))),
    "two ropes and group sizes": tiny.config(
        attention(rope=RopeConfig(theta=100.0)), attention(num_kv_heads=3), attention(rope=None)
    ),
    "tied head with scale and softcap": tiny.config(tie_word_embeddings=True, logit_scale=0.5, logit_softcap=3.0),
    "own score scale": tiny.config(attention(scale=0.05)),
}
UNCOMMON = {
    "window": tiny.config(tiny.layer(), attention(window=5)),
    "softcap": tiny.config(attention(softcap=3.0)),
    "alibi": tiny.config(attention(rope=None, alibi=True)),
    "sinks": tiny.config(attention(sinks=True)),
    "qk_norm": tiny.config(attention(qk_norm=QKNormConfig(norm=tiny.RMS))),
    "query_scaling": tiny.config(attention(query_scaling=LogNScaling(length=4))),
    "partial": tiny.config(attention(rope=RopeConfig(rotary_dim=4))),
    "change with the length": tiny.config(
        attention(rope=RopeConfig(scaling=DynamicNTKScaling(factor=2.0, original_max_position_embeddings=8)))
    ),
    "LatentAttention": tiny.config(tiny.layer(tiny.latent_attention())),
    "MoE": tiny.config(tiny.layer(mlp=MoEConfig(router=RouterConfig(num_experts=4, top_k=2), expert=tiny.MLP))),
    "unit_offset": tiny.config(final_norm=NormConfig(kind="rms", eps=1e-6, unit_offset=True)),
    "norm_placement": tiny.config(tiny.layer(norm_placement="sandwich")),
    "residual_scale": tiny.config(tiny.layer(residual_scale=0.5)),
    "embedding_scale": tiny.config(embedding_scale=2.0),
    "embedding_norm": tiny.config(embedding_norm=tiny.RMS),
    "low_rank": tiny.config(low_rank=(LOW_RANK,)),
    "num_prefix_tokens": tiny.config(num_prefix_tokens=2),
}


def model_of(config, dtype=torch.float32):
    """With norm weights and biases that are felt."""
    model = tiny.model(config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.to(dtype)


@torch.no_grad()
def check_equal(model, prompts, **tolerance):
    """Logits over several steps, with rows that change places and leave."""
    fused, reference = FusedDecoder(model, 16), CachedDecoder(model, 16)
    assert torch.equal(fused.begin(prompts), reference.begin(prompts))
    tokens = torch.arange(3 * len(prompts)).view(3, -1) % tiny.VOCAB
    for step in tokens:
        torch.testing.assert_close(fused.extend(step), reference.extend(step), **tolerance)
    rows = torch.tensor([len(prompts) - 1, 0, 0])
    for decoder in (fused, reference):
        decoder.keep(rows)
    for step in tokens[:, :1].expand(-1, 3):
        torch.testing.assert_close(fused.extend(step), reference.extend(step), **tolerance)


PROMPTS = {"one": [[1, 2, 3]], "alike": [[1, 2, 3], [9, 8, 7]], "padded": [[1, 2], [5, 6, 7, 8, 9], [3]]}


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", COMMON)
def test_logits_equal_those_of_the_modules(name, prompts):
    model = model_of(COMMON[name])
    assert unsupported_reason(model) is None
    check_equal(model, PROMPTS[prompts])


@pytest.mark.parametrize("name", ["grouped", "learned positions", "biases"])
def test_logits_are_equal_in_low_precision(name):
    check_equal(model_of(COMMON[name], torch.bfloat16), PROMPTS["padded"], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", ["grouped", "biases", "mlp bias"])
def test_logits_are_equal_in_onednn(name, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(gemm, "prefers_onednn", lambda device: True)
    monkeypatch.setattr(gemm, "WORTHWHILE", 0)
    model = model_of(COMMON[name])
    weight = model.head.weight
    assert gemm.in_onednn(weight, weight, 1)
    check_equal(model, PROMPTS["padded"])


@pytest.mark.parametrize("name", UNCOMMON)
def test_other_models_go_through_their_modules(name, caplog):
    model = model_of(UNCOMMON[name])
    why = unsupported_reason(model)
    assert why is not None and name in why
    engine._log_unsupported.cache_clear()
    with caplog.at_level(logging.INFO, "cordee"):
        for _ in range(2):
            generate(model, [[1, 2]], DecodingOptions(max_new_tokens=2))
    assert caplog.text.count(why) == 1  # said once


def test_changed_models_go_through_their_modules():
    class Adapted(torch.nn.Linear):
        pass

    class Derived(Linear):
        pass

    def changed(change):
        model = tiny.model(COMMON["grouped"])
        change(model, model.layers["1"])
        return unsupported_reason(model)

    assert changed(lambda model, layer: None) is None
    assert changed(lambda model, layer: layer.mlp.register_forward_hook(lambda *a: None)) is not None
    assert changed(lambda model, layer: setattr(layer.mlp, "forward", layer.mlp.forward)) is not None
    assert changed(lambda model, layer: setattr(model, "_embed", model._embed)) is not None
    assert changed(lambda model, layer: setattr(layer.mlp.down, "__class__", Derived)) is not None
    assert changed(lambda model, layer: setattr(layer.mlp, "adapter", Adapted(2, 2))) is not None
    assert changed(lambda model, layer: layer.mlp.down.adapt(LOW_RANK, "layers.1.mlp.down", "down")) is not None
    assert changed(lambda model, layer: model.embedding.adapt(LOW_RANK, "embedding", "embedding")) is not None
    assert changed(lambda model, layer: model.head.adapt(LOW_RANK, "head", "head")) is None  # it is called as it is


def placements(model):
    found = {name: getattr(module, "placement", None) for name, module in model.named_modules()}
    return {name: placement for name, placement in found.items() if placement is not None}


SEAMS = [
    (config, name, seam)
    for config in ("grouped", "biases", "learned positions")
    for name, placement in placements(tiny.model(COMMON[config])).items()
    for seam in vars(placement)
    if seam != "applied"
]


def bent(inner):
    """A hook whose result is another."""
    return lambda *inputs, **options: torch.sin(4.0 * inner(*inputs, **options))


@pytest.mark.parametrize(("config", "name", "seam"), SEAMS)
def test_whatever_is_done_at_a_seam_is_not_passed_over(config, name, seam):
    model = model_of(COMMON[config])
    placement = placements(model)[name]
    if seam not in placement.hooks:
        placement.set("test", **{seam: object()})
        assert unsupported_reason(model) is not None
        return
    placement.wrap(seam, "test", bent)
    assert unsupported_reason(model) is not None and placement.applied
    written = generate(model, [[1, 2, 3]], DecodingOptions(max_new_tokens=6))
    assert written == generate(model, [[1, 2, 3]], DecodingOptions(max_new_tokens=6, straight_decoding=False))


def test_a_delta_is_felt_in_what_is_written():
    written = {}
    for seam, hook in (("product", "product"), ("view", "view_of_weight"), ("none", None)):
        model = tiny.model(COMMON["grouped"])
        if hook is not None:
            model.layers["0"].attention.qkv.placement.wrap(hook, "test", bent)
        written[seam] = str(generate(model, [[1, 2, 3]], DecodingOptions(max_new_tokens=12)))
    assert len(set(written.values())) == 3


@pytest.mark.parametrize("kind", [PagedCache, WindowCache])
@torch.inference_mode()
def test_any_cache_serves_the_fused_path(kind):
    """Rows of unequal lengths, of which one leaves and one is doubled, in pages that they share."""
    model = tiny.model(COMMON["grouped"])
    step = model.bind(rows=3, max_length=16)
    caches = kind(model.config, 3, 16), KVCache(model.config, 3, 16)
    ids, mask = padded(PROMPTS["padded"], torch.device("cpu"))
    for cache in caches:
        model(ids, mask, cache=cache)
    for n in range(6):
        tokens = torch.tensor([n, n + 1, 7])
        expected = model(tokens[:, None], cache=caches[1])[:, 0]
        torch.testing.assert_close(step(tokens, caches[0]), expected, rtol=1e-5, atol=1e-5)
        for cache in caches if n == 2 else ():
            cache.keep(torch.tensor([2, 0, 2]))


def test_it_is_taken_where_possible_and_can_be_forced_off(monkeypatch):
    taken = []
    monkeypatch.setattr(
        FusedDecoder, "extend", lambda self, tokens: taken.append(1) or CachedDecoder.extend(self, tokens)
    )
    model = tiny.model(COMMON["grouped"])
    generate(model, [[1]], DecodingOptions(max_new_tokens=3, straight_decoding=False))
    assert not taken
    generate(model, [[1]], DecodingOptions(max_new_tokens=3))
    assert taken


def test_weights_may_change_between_calls():
    model = tiny.model(COMMON["grouped"])
    first = generate(model, [[1, 2]], DecodingOptions(max_new_tokens=8))
    initialise(model, 5)
    expected = generate(model, [[1, 2]], DecodingOptions(max_new_tokens=8, straight_decoding=False))
    assert generate(model, [[1, 2]], DecodingOptions(max_new_tokens=8)) == expected != first
