"""The small Llamas that the suites measure: one as transformers builds it, and shapes for Cordée's own blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cordee.model.config import ModelConfig

HIDDEN, LAYERS, HEADS, FFN, VOCAB_SIZE = 384, 6, 6, 1024, 32000


def llama(length: int, **changes: Any) -> Any:
    """transformers' model with its own initial weights, for sequences of `length` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": length,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | changes))


def options(length: int) -> dict[str, Any]:
    """The same model as `cordee train` is told of it."""
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": length,
        "seq_length": length,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def save(folder: str, length: int, changes: dict[str, Any]) -> None:
    """Write it to a Hugging Face directory, without tokens that end a text."""
    import torch

    torch.manual_seed(0)
    model = llama(length, **changes, bos_token_id=None, eos_token_id=None)
    model.save_pretrained(folder)


def shape(
    length: int, *, layers: int, hidden: int, heads: int, head_dim: int, ffn: int, vocab_size: int, eps: float = 1e-5
) -> ModelConfig:
    """A model of equal layers for sequences of `length` tokens."""
    from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig

    norm = NormConfig(kind="rms", eps=eps)
    layer = LayerConfig(
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=head_dim, rope=RopeConfig()),
        mlp=MLPConfig(ffn_hidden_size=ffn, activation="silu", gated=True),
        norm=norm,
    )
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        max_position_embeddings=length,
        layers=(layer,) * layers,
        final_norm=norm,
    )
