"""The Llama and GPT-2 lines against transformers, weights copied by hand: logits, loss, gradients, padding, cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cordee.model.cache import KVCache
from cordee.model.config import (
    AttentionConfig,
    LayerConfig,
    Llama3Scaling,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from cordee.model.gpt import GPTModel

VOCAB, HIDDEN, FFN, LAYERS, HEADS, LENGTH = 61, 24, 40, 2, 6, 32
DIM = HIDDEN // HEADS
Pair = tuple[GPTModel, nn.Module, Callable[[], dict[str, Tensor]]]


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that every part is felt, biases and norms too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def grouped(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """`[groups, q heads + 2, head_dim, ...]` from rows of q, k and v."""
    return torch.cat([part.unflatten(0, (groups, -1, DIM)) for part in (q, k, v)], 1)


def llama(groups: int, tied: bool, biases: bool, scaled: bool) -> Pair:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    scaling = None
    if scaled:
        factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 16, **factors}
        scaling = Llama3Scaling(**factors, original_max_position_embeddings=16)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=groups,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            tie_word_embeddings=tied,
            attention_bias=biases,
            mlp_bias=biases,
            attn_implementation="eager",
        )
    )
    norm = NormConfig(kind="rms", eps=1e-5)
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=HEADS,
            num_kv_heads=groups,
            head_dim=DIM,
            qkv_bias=biases,
            out_bias=biases,
            rope=RopeConfig(theta=5000.0, scaling=scaling),
        ),
        mlp=MLPConfig(ffn_hidden_size=FFN, activation="silu", gated=True, bias=biases),
        norm=norm,
    )
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_position_embeddings=LENGTH,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        tie_word_embeddings=tied,
    )

    def canonical(read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        model = theirs.model
        found = {"embedding.weight": read(model.embed_tokens.weight), "final_norm.weight": read(model.norm.weight)}
        if not tied:
            found["head.weight"] = read(theirs.lm_head.weight)
        for i, their in enumerate(model.layers):
            name, attention, mlp = f"layers.{i}.", their.self_attn, their.mlp
            found[f"{name}attention_norm.weight"] = read(their.input_layernorm.weight)
            found[f"{name}mlp_norm.weight"] = read(their.post_attention_layernorm.weight)
            for kind in ("weight", "bias") if biases else ("weight",):
                q, k, v, o = (read(getattr(getattr(attention, f"{part}_proj"), kind)) for part in "qkvo")
                gate, up, down = (read(getattr(getattr(mlp, f"{part}_proj"), kind)) for part in ("gate", "up", "down"))
                found[f"{name}attention.qkv.{kind}"] = grouped(q, k, v, groups)
                found[f"{name}attention.out.{kind}"] = o
                found[f"{name}mlp.gate_up.{kind}"] = torch.stack((gate, up))
                found[f"{name}mlp.down.{kind}"] = down
        return found

    return pair(theirs, config, canonical)


def gpt2() -> Pair:
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=LENGTH,
            attn_implementation="eager",
        )
    )
    norm = NormConfig(kind="layer", eps=1e-5)
    layer = LayerConfig(
        attention=AttentionConfig(num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, qkv_bias=True, out_bias=True),
        mlp=MLPConfig(ffn_hidden_size=4 * HIDDEN, activation="gelu_tanh", gated=False, bias=True),
        norm=norm,
    )
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_position_embeddings=LENGTH,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        learned_positions=True,
        tie_word_embeddings=True,
    )

    def canonical(read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        model = theirs.transformer
        found = {"embedding.weight": read(model.wte.weight), "position_embedding.weight": read(model.wpe.weight)}
        for kind in ("weight", "bias"):
            found[f"final_norm.{kind}"] = read(getattr(model.ln_f, kind))
            for i, their in enumerate(model.h):
                name = f"layers.{i}."
                found[f"{name}attention_norm.{kind}"] = read(getattr(their.ln_1, kind))
                found[f"{name}mlp_norm.{kind}"] = read(getattr(their.ln_2, kind))
                # Its linear layers keep their weights as [in, out]; .T leaves a bias as it is.
                qkv, out, up, down = (
                    read(getattr(linear, kind)).t()
                    for linear in (their.attn.c_attn, their.attn.c_proj, their.mlp.c_fc, their.mlp.c_proj)
                )
                found[f"{name}attention.qkv.{kind}"] = grouped(*qkv.chunk(3), HEADS)
                found[f"{name}attention.out.{kind}"] = out
                found[f"{name}mlp.up.{kind}"], found[f"{name}mlp.down.{kind}"] = up, down
        return found

    return pair(theirs, config, canonical)


def pair(theirs: nn.Module, config: ModelConfig, canonical: Callable) -> Pair:
    """Ours with the weights of theirs, theirs, and how to read their gradients under canonical names."""
    randomise(theirs)
    ours = GPTModel(config).eval()
    ours.load_state_dict(canonical(lambda p: p.detach()) | tied(ours, canonical))
    return ours, theirs, lambda: canonical(lambda p: p.grad)


def tied(model: GPTModel, canonical: Callable) -> dict[str, Tensor]:
    if not model.config.tie_word_embeddings:
        return {}
    return {"head.weight": canonical(lambda p: p.detach())["embedding.weight"]}


MODELS: dict[str, Callable[[], Pair]] = {
    "llama": lambda: llama(HEADS, tied=False, biases=False, scaled=False),
    "llama with groups, biases, llama3 scaling": lambda: llama(2, tied=False, biases=True, scaled=True),
    "llama with one group, tied": lambda: llama(1, tied=True, biases=False, scaled=False),
    "gpt2": gpt2,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def tokens(batch: int = 3, seq: int = 20) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(1))


@every_model
def test_logits_loss_and_gradients(make):
    ours, theirs, gradients = make()
    ids = tokens()
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    labels = ids.clone()
    labels[0, 5:9] = -100
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    targets = torch.cat((labels[:, 1:], torch.full((3, 1), -100)), 1)
    total, count = ours(ids, output=lambda head, hidden: head.loss(hidden, targets))
    assert count == 3 * 19 - 4
    torch.testing.assert_close(total / count, expected)
    (total / count).backward()
    theirs_grads = gradients()
    assert theirs_grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_grads[name], rtol=1e-4, atol=1e-5, msg=name)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make, side):
    """Neither beside transformers with the same padding, nor beside each sequence alone."""
    ours, theirs, _ = make()
    ids = tokens()
    lengths = (20, 13, 1)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = ours(ids, mask)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    for row, length in enumerate(lengths):
        alone = ours(ids[row][real[row]][None])
        torch.testing.assert_close(logits[row][real[row]], alone[0], rtol=1e-4, atol=1e-4)
        assert alone.shape[1] == length


@every_model
def test_positions_may_be_given(make):
    ours, theirs, _ = make()
    positions = torch.arange(20).flip(0)[None].expand(3, -1)
    expected = theirs(tokens(), position_ids=positions).logits
    torch.testing.assert_close(ours(tokens(), position_ids=positions), expected, rtol=1e-4, atol=1e-4)


@every_model
def test_a_cache_changes_nothing(make):
    ours, theirs, _ = make()
    ids = tokens()
    cache = KVCache(ours.config, batch_size=3, max_length=20)
    with torch.inference_mode():
        parts = [ours(part, cache=cache) for part in ids.split((7, 1, 1, 11), 1)]
        torch.testing.assert_close(torch.cat(parts, 1), theirs(ids).logits, rtol=1e-4, atol=1e-4)
