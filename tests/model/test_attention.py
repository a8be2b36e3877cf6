"""Attention blocks against those of transformers with the same weights, and step by step against all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.glm.modeling_glm import GlmAttention, GlmRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from cordee.model.attention import Attention
from cordee.model.cache import KVCache
from cordee.model.config import (
    DynamicNTKScaling,
    LogNScaling,
    LongRopeScaling,
    NormConfig,
    QKNormConfig,
    QwenNTKScaling,
    RopeConfig,
    TemperatureScaling,
    YarnScaling,
)
from cordee.model.gpt import GPTModel, Span
from cordee.model.inputs import Context
from cordee.model.rotary import Positions
from cordee.ops.mask import AttentionMask
from tests.model import tiny

HIDDEN, HEADS, GROUPS, DIM, SEQ = 24, 6, 2, 8, 11
SHAPE = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}
UNIT = NormConfig(kind="rms", eps=1e-6, unit_offset=True)
L2 = NormConfig(kind="rms", eps=1e-5, affine=False)


def yarn(**options: Any) -> dict:
    return {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4, "factor": 4.0, **options}


def qk_norm(norm: NormConfig = tiny.RMS, **options: Any) -> QKNormConfig:
    return QKNormConfig(norm=norm, **options)


# The original block, its rotary embedding, its configuration; ours.
CASES: dict[str, tuple[type, type, Any, dict]] = {
    "plain": (LlamaAttention, LlamaRotaryEmbedding, LlamaConfig(**SHAPE), {}),
    "biases": (
        LlamaAttention,
        LlamaRotaryEmbedding,
        LlamaConfig(**SHAPE, attention_bias=True),
        {"qkv_bias": True, "out_bias": True},
    ),
    "qkv bias and yarn": (
        Qwen2Attention,
        Qwen2RotaryEmbedding,
        Qwen2Config(**SHAPE, rope_parameters=yarn(attention_factor=1.3)),
        {
            "qkv_bias": True,
            "rope": RopeConfig(
                scaling=YarnScaling(factor=4.0, original_max_position_embeddings=4, attention_factor=1.3)
            ),
        },
    ),
    "norm of each head": (Qwen3Attention, Qwen3RotaryEmbedding, Qwen3Config(**SHAPE), {"qk_norm": qk_norm()}),
    "norm over all heads": (
        Olmo2Attention,
        Olmo2RotaryEmbedding,
        Olmo2Config(
            **{k: v for k, v in SHAPE.items() if k != "head_dim"} | {"hidden_size": HEADS * DIM}, rms_norm_eps=1e-6
        ),
        {"qk_norm": qk_norm(over="all")},
    ),
    "softcap, scale and window": (
        Gemma2Attention,
        Gemma2RotaryEmbedding,
        Gemma2Config(**SHAPE, query_pre_attn_scalar=3, attn_logit_softcapping=1.5, sliding_window=4),
        {"scale": 3**-0.5, "softcap": 1.5, "window": 4},
    ),
    "norm with unit offset": (
        Gemma3Attention,
        LlamaRotaryEmbedding,
        Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=5, sliding_window=4, layer_types=["sliding_attention"]),
        {"scale": 5**-0.5, "window": 4, "qk_norm": qk_norm(UNIT)},
    ),
    "sinks and window": (
        GptOssAttention,
        GptOssRotaryEmbedding,
        GptOssConfig(**SHAPE, sliding_window=4, rope_parameters=yarn(truncate=False, attention_factor=1.1)),
        {
            "qkv_bias": True,
            "out_bias": True,
            "sinks": True,
            "window": 4,
            "rope": RopeConfig(
                scaling=YarnScaling(
                    factor=4.0, original_max_position_embeddings=4, truncate=False, attention_factor=1.1
                )
            ),
        },
    ),
    "half of the dims turned": (
        Phi3Attention,
        Phi3RotaryEmbedding,
        Phi3Config(**SHAPE, partial_rotary_factor=0.5, pad_token_id=0),
        {"rope": RopeConfig(rotary_dim=4)},
    ),
    "neighbouring dims turned": (
        GlmAttention,
        GlmRotaryEmbedding,
        GlmConfig(**SHAPE, partial_rotary_factor=0.5, attention_bias=True, pad_token_id=0),
        {"qkv_bias": True, "rope": RopeConfig(rotary_dim=4)},
    ),
    "norm after rope, in chunks": (
        Llama4TextAttention,
        Llama4TextRotaryEmbedding,
        Llama4TextConfig(**SHAPE, attention_chunk_size=4, no_rope_layers=[1], use_qk_norm=True),
        {"chunk": 4, "rope": RopeConfig(theta=500000.0), "qk_norm": qk_norm(L2, after_rope=True)},
    ),
    "queries by temperature": (
        Llama4TextAttention,
        Llama4TextRotaryEmbedding,
        Llama4TextConfig(**SHAPE, no_rope_layers=[0], floor_scale=3, attn_scale=0.5),
        {"rope": None, "query_scaling": TemperatureScaling(scale=0.5, floor_scale=3)},
    ),
}


def pairs_to_halves(x: Tensor, rotary_dim: int) -> Tensor:
    """Rows of q or k `[heads, head_dim, ...]` from neighbouring pairs to halves of the first `rotary_dim` dims."""
    return torch.cat((x[:, 0:rotary_dim:2], x[:, 1:rotary_dim:2], x[:, rotary_dim:]), 1)


def separate(module: nn.Module, name: str) -> list[Tensor]:
    """Weights or biases of q, k, v `[heads, head_dim, ...]`."""
    if hasattr(module, "qkv_proj"):
        parts = getattr(module.qkv_proj, name).split((HEADS * DIM, GROUPS * DIM, GROUPS * DIM))
    else:
        parts = [getattr(getattr(module, f"{part}_proj"), name) for part in "qkv"]
    return [part.unflatten(0, (-1, DIM)) for part in parts]


def joined(module: nn.Module, name: str) -> Tensor:
    """Weights or biases of q, k, v as one canonical tensor."""
    q, k, v = separate(module, name)
    if isinstance(module, GlmAttention | Llama4TextAttention):
        rotary_dim = 4 if isinstance(module, GlmAttention) else DIM
        q, k = pairs_to_halves(q, rotary_dim), pairs_to_halves(k, rotary_dim)
    return torch.cat((q.unflatten(0, (GROUPS, -1)), k[:, None], v[:, None]), 1)


def copy_weights(block: Attention, module: nn.Module) -> None:
    state = {"qkv.weight": joined(module, "weight"), "out.weight": module.o_proj.weight}
    if block.qkv.bias is not None:
        state["qkv.bias"] = joined(module, "bias")
    if block.out.bias is not None:
        state["out.bias"] = module.o_proj.bias
    if block.sinks is not None:
        state["sinks"] = module.sinks
    if block.config.qk_norm is not None and block.config.qk_norm.norm.affine:
        state |= {"q_norm.weight": module.q_norm.weight, "k_norm.weight": module.k_norm.weight}
    block.load_state_dict(state)


def mask_of(window: int | None, chunk: int | None) -> Tensor:
    """The float mask that transformers' eager attention adds."""
    query, key = torch.arange(SEQ)[:, None], torch.arange(SEQ)[None]
    seen = key <= query
    if window is not None:
        seen &= query - key < window
    if chunk is not None:
        seen &= query // chunk == key // chunk
    return torch.zeros(1, 1, SEQ, SEQ).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_are_those_of_transformers(case):
    original, rotary, hf, changes = case
    torch.manual_seed(0)
    module = original(hf, layer_idx=0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = tiny.config(hidden_size=hf.hidden_size)
    block = Attention(tiny.attention(**{"rope": RopeConfig(theta=10000.0)} | theta(hf) | changes), config, 0)
    copy_weights(block, module)
    x = torch.randn(2, SEQ, hf.hidden_size)
    ids = torch.arange(SEQ)[None]
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    angles = rotary(rope_config(hf))(x, ids.expand(2, -1))
    mask = mask_of(block.config.window, block.config.chunk)
    expected = module(hidden_states=theirs, position_embeddings=angles, attention_mask=mask)[0]
    y = block(ours, Context(Positions(ids), AttentionMask(SEQ, SEQ)))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for result in (expected, y):
        (result * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    if block.sinks is not None:
        torch.testing.assert_close(block.sinks.grad, module.sinks.grad, rtol=1e-4, atol=1e-5)


def theta(hf: Any) -> dict:
    parameters = hf.rope_parameters
    parameters = parameters.get("sliding_attention", parameters)
    return {"rope": RopeConfig(theta=parameters["rope_theta"])}


def rope_config(hf: Any) -> Any:
    """Gemma 3 has a rope for each kind of layer; that of sliding ones is Llama's with a theta of 10000."""
    if not isinstance(hf, Gemma3TextConfig):
        return hf
    return LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


# ---- step by step ----------------------------------------------------------------------------------------------------

LONGROPE = LongRopeScaling(
    short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0), original_max_position_embeddings=10, attention_factor=1.2
)
BLOCKS = {
    "plain": tiny.attention(),
    "multi-head": tiny.attention(num_kv_heads=6),
    "multi-query": tiny.attention(num_kv_heads=1),
    "window": tiny.attention(window=5),
    "chunk": tiny.attention(chunk=4),
    "softcap": tiny.attention(softcap=1.5),
    "softcap in a window": tiny.attention(softcap=1.5, window=5),
    "sinks": tiny.attention(sinks=True),
    "sinks in a window": tiny.attention(sinks=True, window=4),
    "alibi": tiny.attention(alibi=True, rope=None),
    "norm of each head": tiny.attention(qk_norm=qk_norm()),
    "norm over all heads": tiny.attention(qk_norm=qk_norm(over="all", after_rope=True)),
    "partial rope": tiny.attention(rope=RopeConfig(rotary_dim=4)),
    "dynamic rope": tiny.attention(
        rope=RopeConfig(scaling=DynamicNTKScaling(factor=2.0, original_max_position_embeddings=8))
    ),
    "longrope": tiny.attention(rope=RopeConfig(scaling=LONGROPE)),
    "qwen": tiny.attention(
        rope=RopeConfig(scaling=QwenNTKScaling(original_max_position_embeddings=6)), query_scaling=LogNScaling(length=6)
    ),
    "temperature": tiny.attention(rope=None, query_scaling=TemperatureScaling(scale=0.5, floor_scale=4)),
    "latent": tiny.latent_attention(),
    "latent, queries not compressed": tiny.latent_attention(q_lora_rank=None, bias=True),
    "latent, dynamic rope": tiny.latent_attention(
        rope=RopeConfig(scaling=DynamicNTKScaling(factor=2.0, original_max_position_embeddings=8))
    ),
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@torch.inference_mode()
def test_step_by_step_is_all_at_once(block, padding):
    """A prompt, then two tokens, then one by one, well past every window; the second row is left-padded."""
    model = tiny.model(tiny.config(tiny.layer(block), tiny.layer(block)))
    length = 18
    ids = torch.randint(0, tiny.VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache = KVCache(model.config, 2, length)
    start = 0
    for stop in (7, 9, *range(10, length + 1)):
        whole = model(ids[:, :stop], mask[:, :stop] if padding else None)
        positions = (mask[:, :stop].cumsum(-1) - 1)[:, start:] if padding and start else None
        first_mask = mask[:, :stop] if padding and not start else None
        step = model(ids[:, start:stop], first_mask, positions, cache=cache)
        seen = mask[:, start:stop].bool()
        assert step.shape == (2, stop - start, tiny.VOCAB)
        torch.testing.assert_close(step[seen], whole[:, start:][seen], rtol=1e-4, atol=1e-4)
        start = stop


@pytest.mark.parametrize("name", ["chunk", "dynamic rope", "qwen", "sinks in a window", "latent"])
@torch.inference_mode()
def test_rows_of_a_cache_may_leave_and_be_doubled(name):
    model = tiny.model(tiny.config(tiny.layer(BLOCKS[name]), tiny.layer(BLOCKS[name])))
    ids = torch.randint(0, tiny.VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 0, 0, 2])
    cache = KVCache(model.config, 3, 12)
    model(ids[:, :7], cache=cache)
    cache.keep(rows)
    for n in range(7, 12):
        step = model(ids[rows, n : n + 1], cache=cache)
    torch.testing.assert_close(step, model(ids[rows])[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_packed_documents_do_not_see_each_other(block):
    """Two documents in one row give what each gives alone; all lengths below what changes a rope."""
    model = tiny.model(tiny.config(tiny.layer(block), tiny.layer(block)))
    ids = torch.randint(0, tiny.VOCAB, (1, 11), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 6 + [1] * 5])
    positions = torch.cat((torch.arange(6), torch.arange(5)))[None]
    packed = model(ids, position_ids=positions, segments=segments)
    alone = torch.cat((model(ids[:, :6]), model(ids[:, 6:])), 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_stage_without_tokens_cannot_begin_anew():
    config = tiny.config(tiny.layer(BLOCKS["qwen"]), tiny.layer(BLOCKS["qwen"]))
    stage = GPTModel(config, spans=[Span(1, 2, embedding=False)])
    with pytest.raises(ValueError, match="without a cache"):
        stage(torch.zeros(1, 3, 24), cache=KVCache(config, 1, 8))
