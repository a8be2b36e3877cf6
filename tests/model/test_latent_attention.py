from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from cordee.model.cache import KVCache
from cordee.model.config import LatentAttentionConfig, RopeConfig, YarnScaling
from cordee.model.inputs import Context
from cordee.model.latent_attention import LatentAttention
from cordee.model.rotary import Positions
from cordee.ops.mask import AttentionMask
from tests.model import tiny

HIDDEN, HEADS, NOPE, ROPE, VALUE, LATENT, QUERY = 24, 3, 6, 4, 5, 12, 10
SEQ = 9
YARN = {"factor": 4.0, "original_max_position_embeddings": 4, "attention_factor": 1.2}


def original(q_lora_rank: int | None, bias: bool, interleaved: bool) -> tuple[DeepseekV3Attention, DeepseekV3Config]:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        attention_bias=bias,
        rope_interleave=interleaved,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **YARN},
        attn_implementation="eager",
    )
    module = DeepseekV3Attention(config, 0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module, config


def ours(module: DeepseekV3Attention, q_lora_rank: int | None, bias: bool, interleaved: bool) -> LatentAttention:
    config = LatentAttentionConfig(
        num_heads=HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=LATENT,
        nope_head_dim=NOPE,
        rope_head_dim=ROPE,
        v_head_dim=VALUE,
        norm=tiny.RMS,
        rope=RopeConfig(scaling=YarnScaling(**YARN)),
        scale=module.scaling,
        bias=bias,
    )
    block = LatentAttention(config, tiny.config(hidden_size=HIDDEN), 0)
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    compressed = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    names |= {"q": "q_proj"} if q_lora_rank is None else compressed
    theirs = module.state_dict()
    state = {}
    for name, parameter in block.named_parameters():
        short, kind = name.split(".")
        value = theirs[f"{names[short]}.{kind}"].view(parameter.shape)
        if interleaved and short in ("q", "q_up", "kv_down"):
            first = LATENT if short == "kv_down" else NOPE
            value = halves(value, first, 0 if short == "kv_down" else 1)
        state[name] = value
    block.load_state_dict(state)
    return block


def halves(x: torch.Tensor, first: int, dim: int) -> torch.Tensor:
    """The rotary rows, from `first` on along `dim`, from neighbouring pairs to halves."""
    order = [*range(first), *range(first, first + ROPE, 2), *range(first + 1, first + ROPE, 2)]
    return x.index_select(dim, torch.tensor(order))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, QUERY])
def test_block_is_that_of_transformers(q_lora_rank, bias, interleaved):
    torch.manual_seed(0)
    module, hf = original(q_lora_rank, bias, interleaved)
    block = ours(module, q_lora_rank, bias, interleaved)
    x, ids = torch.randn(2, SEQ, HIDDEN), torch.arange(SEQ)[None]
    theirs, leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    mask = torch.zeros(1, 1, SEQ, SEQ).masked_fill(~torch.ones(SEQ, SEQ).tril().bool(), -1e9)
    angles = DeepseekV3RotaryEmbedding(hf)(x, ids.expand(2, -1))
    expected, _ = module(theirs, position_embeddings=angles, attention_mask=mask)
    y = block(leaf, Context(Positions(ids), AttentionMask(SEQ, SEQ)))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for result in (expected, y):
        (result * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    torch.testing.assert_close(leaf.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        block.kv_up.weight.grad.flatten(0, 1), module.kv_b_proj.weight.grad, rtol=1e-4, atol=1e-5
    )


def test_parameters_have_their_canonical_names_and_shapes():
    config = tiny.config(tiny.layer(tiny.latent_attention(bias=True)))
    specs = tiny.model(config).parameter_specs()
    prefix = "layers.0.attention."
    found = {name.removeprefix(prefix): spec.shape for name, spec in specs.items() if name.startswith(prefix)}
    assert found == {
        "q_down.weight": (QUERY, HIDDEN),
        "q_down.bias": (QUERY,),
        "q_norm.weight": (QUERY,),
        "q_up.weight": (HEADS, NOPE + ROPE, QUERY),
        "kv_down.weight": (LATENT + ROPE, HIDDEN),
        "kv_down.bias": (LATENT + ROPE,),
        "kv_norm.weight": (LATENT,),
        "kv_up.weight": (HEADS, NOPE + VALUE, LATENT),
        "out.weight": (HIDDEN, HEADS * VALUE),
        "out.bias": (HIDDEN,),
    }


def test_cache_holds_one_compressed_vector_a_token():
    """That it gives the right numbers is tested with all blocks in test_attention.py."""
    cache = KVCache(tiny.config(tiny.layer(tiny.latent_attention()), tiny.layer()), 2, 7)
    assert [buffer.shape for buffer in cache.buffers] == [(2, 1, 1, 7, LATENT + ROPE), (2, 2, 2, 7, 8)]
