"""Megatron before Megatron-Core ("legacy", as of core 0.6 and MindSpeed-LLM 1.0.RC3), and AscendSpeed of 2023: names of
their parameters.

Owns the names and nothing else. The model is dicts in dicts, except for the layers, whose names stand flat in one of
them. It has no experts. AscendSpeed's names differ in the norms and the MLP, of which there are three forms: gate and
up apart, under names that changed in November 2023, or one after the other in one tensor. Megatron of before core 0.6
has the latter's form too."""

from dataclasses import replace

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

ASCENDSPEED_VOCAB_MULTIPLE = 128  # by default, vocabularies are padded to a multiple of this and of the tensor ranks
_ASCENDSPEED: Names = {
    **LAYER,
    "attention_norm": "input_layernorm.{part}",
    "mlp_norm": "post_attention_layernorm.{part}",
    "mlp.gate_up": ("mlp.gate_proj.{part}", "mlp.dense_h_to_4h.{part}"),
}
_EARLY: Names = {
    **_ASCENDSPEED,
    "mlp.gate_up": ("mlp.gate_proj.{part}", "mlp.up_proj.{part}"),
    "mlp.down": "mlp.down_proj.{part}",
}


def _ascendspeed(layer_names: Names) -> Dialect:
    return replace(
        LEGACY,
        title="AscendSpeed's format",
        names={**NAMES, "final_norm": f"{MODEL}.encoder.final_layernorm.{{part}}"},
        layer_names=lambda layer: layer_names,
        tail_padding=True,
    )


ASCENDSPEED = _ascendspeed(_ASCENDSPEED)
ASCENDSPEED_MERGED = _ascendspeed({**_ASCENDSPEED, "mlp.gate_up": "mlp.proj.{part}"})


def recognise(names: set[str]) -> Dialect | None:
    """The dialect in which a checkpoint's names are; None if they are none of these formats."""

    def has(*parts: str) -> bool:
        return any(part in name for name in names if name.startswith(f"{MODEL}.") for part in parts)

    if has(".input_norm.", ".post_attention_norm.", ".final_norm."):
        return LEGACY
    if not has(".input_layernorm.", ".post_attention_layernorm.", ".final_layernorm."):
        return None
    if has(".mlp.proj."):
        return ASCENDSPEED_MERGED
    if has(".mlp.up_proj."):
        return _ascendspeed(_EARLY)
    if has(".mlp.gate_proj."):
        return ASCENDSPEED
    return _ascendspeed({**_ASCENDSPEED, "mlp.gate_up": "mlp.dense_h_to_4h.{part}"})
