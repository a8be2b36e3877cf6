"""Megatron before Megatron-Core ("legacy", as of core 0.6 and MindSpeed-LLM 1.0.RC3): names of its parameters.

Owns the names and nothing else; the layout of files and of splits is `weights.megatron`. The model is dicts in dicts,
except for the layers, whose names stand flat in one of them. It has no experts.
"""

from __future__ import annotations

from cordee.weights.megatron.dialect import Dialect, Names

MODEL = "language_model"
NESTED = (
    f"{MODEL}.embedding.word_embeddings",
    f"{MODEL}.embedding.position_embeddings",
    f"{MODEL}.encoder",
    f"{MODEL}.output_layer",
    "word_embeddings_for_head",
)
NAMES: Names = {
    "embedding": f"{MODEL}.embedding.word_embeddings.{{part}}",
    "position_embedding": f"{MODEL}.embedding.position_embeddings.{{part}}",
    "embedding_norm": f"{MODEL}.embedding.word_embeddings.norm.{{part}}",
    "final_norm": f"{MODEL}.encoder.final_norm.{{part}}",
    "head": f"{MODEL}.output_layer.{{part}}",
}
LAYER: Names = {
    "attention_norm": "input_norm.{part}",
    "attention.qkv": "self_attention.query_key_value.{part}",
    "attention.out": "self_attention.dense.{part}",
    "mlp_norm": "post_attention_norm.{part}",
    "mlp.gate_up": "mlp.dense_h_to_4h.{part}",
    "mlp.up": "mlp.dense_h_to_4h.{part}",
    "mlp.down": "mlp.dense_4h_to_h.{part}",
}
LEGACY = Dialect(
    title="Megatron's legacy format",
    names=NAMES,
    layer_names=lambda layer: LAYER,
    layer_prefix=f"{MODEL}.encoder.layers.{{n}}.",
    tied_head="word_embeddings_for_head.weight",
    nested=NESTED,
)


def recognise(names: set[str]) -> Dialect | None:
    """The dialect in which a checkpoint's names are; None if they are not of this format."""
    known = (".input_norm.", ".post_attention_norm.", ".final_norm.")
    legacy = any(name.startswith(f"{MODEL}.") and any(norm in name for norm in known) for name in names)
    return LEGACY if legacy else None
