"""AscendSpeed of 2023: names of its parameters, and the forms its converters wrote.

Owns the names and nothing else; the layout of files and of splits is `weights.megatron`. Names are those of Megatron's
legacy format but for the norms and the MLP, of which there are three forms: gate and up apart, under names that changed
in November 2023, or one after the other in one tensor. Megatron of before core 0.6 has the latter's form too.
"""

from __future__ import annotations

from dataclasses import replace

from cordee.weights import megatron_legacy
from cordee.weights.megatron.dialect import Dialect, Names
from cordee.weights.megatron_legacy import MODEL

VOCAB_MULTIPLE = 128  # by default, vocabularies are filled up to a multiple of this and of the tensor ranks

NAMES: Names = {**megatron_legacy.NAMES, "final_norm": f"{MODEL}.encoder.final_layernorm.{{part}}"}
LAYER: Names = {
    **megatron_legacy.LAYER,
    "attention_norm": "input_layernorm.{part}",
    "mlp_norm": "post_attention_layernorm.{part}",
    "mlp.gate_up": ("mlp.gate_proj.{part}", "mlp.dense_h_to_4h.{part}"),
}
EARLY: Names = {
    **LAYER,
    "mlp.gate_up": ("mlp.gate_proj.{part}", "mlp.up_proj.{part}"),
    "mlp.down": "mlp.down_proj.{part}",
}
ASCENDSPEED = replace(
    megatron_legacy.LEGACY,
    title="AscendSpeed's format",
    names=NAMES,
    layer_names=lambda layer: LAYER,
    tail_padding=True,
)
MERGED = replace(ASCENDSPEED, layer_names=lambda layer: {**LAYER, "mlp.gate_up": "mlp.proj.{part}"})


def recognise(names: set[str]) -> Dialect | None:
    """The dialect in which a checkpoint's names are; None if they are not of this format."""
    known = (".input_layernorm.", ".post_attention_layernorm.", ".final_layernorm.")
    if not any(name.startswith(f"{MODEL}.") and any(norm in name for norm in known) for name in names):
        return None
    if any(".mlp.proj." in name for name in names):
        return MERGED
    if any(".mlp.up_proj." in name for name in names):
        return replace(ASCENDSPEED, layer_names=lambda layer: EARLY)
    if any(".mlp.gate_proj." in name for name in names):
        return ASCENDSPEED
    return replace(ASCENDSPEED, layer_names=lambda layer: {**LAYER, "mlp.gate_up": "mlp.dense_h_to_4h.{part}"})
