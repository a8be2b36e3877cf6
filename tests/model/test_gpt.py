"""The decoder around its blocks: embedding, head, and whole models of transformers with the same weights."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, Olmo2Config, Olmo2ForCausalLM

from cordee.model.config import (
    AttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    QKNormConfig,
    RopeConfig,
)
from cordee.model.gpt import GPTModel
from tests.model import tiny

HIDDEN, VOCAB, SEQ = 24, tiny.VOCAB, 13

# ---- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale_is_rounded_to_the_type_of_the_model(dtype):
    model = GPTModel(tiny.config(embedding_scale=HIDDEN**0.5), dtype=dtype)
    nn.init.normal_(model.embedding.weight)
    ids = torch.arange(VOCAB)[None]
    seen = []
    model.layers["0"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    factor = torch.tensor(HIDDEN**0.5, dtype=dtype)
    torch.testing.assert_close(seen[0], model.embedding.weight[None] * factor, rtol=0, atol=0)


def test_embedding_norm_comes_after_the_scale():
    norm = NormConfig(kind="layer", eps=1e-5)
    model = tiny.model(tiny.config(embedding_norm=norm, embedding_scale=3.0))
    assert {"embedding_norm.weight", "embedding_norm.bias"} <= model.parameter_specs().keys()
    ids = torch.arange(VOCAB)[None]
    expected = F.layer_norm(3.0 * model.embedding(ids), (HIDDEN,), eps=1e-5)
    seen = []
    model.layers["0"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    torch.testing.assert_close(seen[0], expected)


# ---- head ------------------------------------------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"logit_softcap": 2.0},
    "normalised rows": {"norm_head": True},
    "all": {"logit_scale": 3.0, "logit_softcap": 2.0, "norm_head": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_head(options, tied):
    """Logits written out; the loss, which never has them all, is theirs, and so are its gradients; it is 0 where no
    token counts."""
    model = tiny.model(tiny.config(tie_word_embeddings=tied, **options))
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, 2:5] = -100
    hidden = model(ids, output=lambda head, hidden: hidden)
    rows = model.head.weight
    if options.get("norm_head"):
        rows = rows / rows.norm(dim=1, keepdim=True)
    expected = hidden @ rows.T * options.get("logit_scale", 1.0)
    if cap := options.get("logit_softcap"):
        expected = cap * torch.tanh(expected / cap)
    torch.testing.assert_close(model.head.logits(hidden), expected)

    total, count = model.head.loss(hidden, labels)
    assert count == 2 * (SEQ - 1) - 3
    losses = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(model.head.token_logprobs(hidden, labels), -losses.view_as(labels))
    theirs = losses.sum()
    torch.testing.assert_close(total, theirs)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(total, parameters, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, parameters), rtol=1e-4, atol=1e-5)
    assert model.head.loss(hidden, torch.full_like(labels, -100)) == (0, 0)


# ---- whole models ----------------------------------------------------------------------------------------------------


def qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Weights `[heads * head_dim, embed]` of q, k, v as one canonical tensor."""
    dim = k.shape[0] // groups
    q, k, v = (w.unflatten(0, (groups, -1, dim)) for w in (q, k, v))
    return torch.cat((q, k, v), 1)


def llama_like(state: dict[str, Tensor], num_layers: int, groups: int, norms: dict[str, str]) -> dict[str, Tensor]:
    """Canonical weights from those named as in Llama; `norms`: the canonical name of each of a layer's norms."""
    found = {"embedding.weight": state["model.embed_tokens.weight"], "final_norm.weight": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        found["head.weight"] = state["lm_head.weight"]
    for i in range(num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        projections = (state[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv")
        found[f"{ours}attention.qkv.weight"] = qkv(*projections, groups)
        found[f"{ours}attention.out.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        gate, up, down = (state[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        found |= {f"{ours}mlp.gate_up.weight": torch.stack((gate, up)), f"{ours}mlp.down.weight": down}
        found |= {f"{ours}{name}.weight": state[f"{theirs}{norm}.weight"] for norm, name in norms.items()}
    return found


def gemma2() -> tuple[nn.Module, ModelConfig, dict[str, Tensor]]:
    theirs = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=6,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
    )
    norm = NormConfig(kind="rms", eps=1e-6, unit_offset=True)
    layers = tuple(
        LayerConfig(
            attention=AttentionConfig(
                num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(), scale=6**-0.5, softcap=1.5, window=window
            ),
            mlp=MLPConfig(ffn_hidden_size=32, activation="gelu_tanh", gated=True),
            norm=norm,
            norm_placement="sandwich",
        )
        for window in (5, None)
    )
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_position_embeddings=64,
        layers=layers,
        final_norm=norm,
        embedding_scale=HIDDEN**0.5,
        tie_word_embeddings=True,
        logit_softcap=2.0,
    )
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    }
    randomise(theirs)
    state = {name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    return theirs, config, llama_like(state, 2, 2, norms)


def olmo2() -> tuple[nn.Module, ModelConfig, dict[str, Tensor]]:
    theirs = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            pad_token_id=0,
            attn_implementation="eager",
        )
    )
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=6,
            rope=RopeConfig(theta=theirs.config.rope_parameters["rope_theta"]),
            qk_norm=QKNormConfig(norm=tiny.RMS, over="all"),
        ),
        mlp=tiny.MLP,
        norm=tiny.RMS,
        norm_placement="post",
    )
    norms = {
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "mlp_norm",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
    }
    randomise(theirs)
    return theirs, tiny.config(layer, layer), llama_like(theirs.state_dict(), 2, 2, norms)


def bloom(heads: int, from_norm: bool) -> tuple[nn.Module, ModelConfig, dict[str, Tensor]]:
    theirs = BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            n_layer=2,
            n_head=heads,
            apply_residual_connection_post_layernorm=from_norm,
        )
    )
    norm = NormConfig(kind="layer", eps=1e-5)
    dim = HIDDEN // heads
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=dim, qkv_bias=True, out_bias=True, alibi=True
        ),
        mlp=MLPConfig(ffn_hidden_size=4 * HIDDEN, activation="gelu_tanh", gated=False, bias=True),
        norm=norm,
        residual_from_norm=from_norm,
    )
    config = tiny.config(layer, layer, final_norm=norm, embedding_norm=norm, tie_word_embeddings=True)
    randomise(theirs)
    names = {"self_attention.query_key_value": "attention.qkv", "self_attention.dense": "attention.out"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    names |= {"mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down", "h": "layers", "ln_f": "final_norm"}
    names |= {"word_embeddings_layernorm": "embedding_norm", "word_embeddings": "embedding"}
    state = {}
    for name, value in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        path = f".{name.removeprefix('transformer.')}"
        for their, our in names.items():
            path = path.replace(f".{their}.", f".{our}.")
        state[path[1:]] = value.unflatten(0, (heads, 3, dim)) if ".qkv." in path else value
    return theirs, config, state


def randomise(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.eval()


MODELS: dict[str, Any] = {
    "gemma2": gemma2,
    "olmo2": olmo2,
    "bloom, 4 heads": lambda: bloom(4, False),
    "bloom, 3 heads, sums from the norms": lambda: bloom(3, True),
}


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_whole_models_are_those_of_transformers(build, padding):
    theirs, config, state = build()
    ours = GPTModel(config).eval()
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert set(missing) <= ({"head.weight"} if config.tie_word_embeddings else set())
    assert not unexpected
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, slice(0, 4) if padding == "left" else slice(SEQ - 4, SEQ)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if isinstance(theirs, BloomForCausalLM) else {"position_ids": positions}
    expected = theirs(input_ids=ids, attention_mask=mask, **extra).logits
    logits = ours(ids, mask if padding else None)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)

    weight = torch.linspace(-1, 1, VOCAB)
    grads = []
    for model, result, name in ((ours, logits, "embedding.weight"), (theirs, expected, "model.embed_tokens.weight")):
        if name not in dict(model.named_parameters()):
            name = "transformer.word_embeddings.weight"
        (result[real] * weight).sum().backward()
        grads.append(dict(model.named_parameters())[name].grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


# ---- said once -------------------------------------------------------------------------------------------------------


def test_slow_attention_is_said_once(caplog, monkeypatch):
    layers = [tiny.layer(tiny.attention(softcap=2.0)) for _ in range(3)]
    with caplog.at_level(logging.INFO, logger="cordee"):
        tiny.model(tiny.config())
        assert not caplog.records
        tiny.model(tiny.config(*layers))
    assert ["softcap" in record.message for record in caplog.records] == [True]
