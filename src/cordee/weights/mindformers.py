"""MindFormers: its names for the tensors of models of LLaMA's form, in files of safetensors.

Owns the names, and how a directory of them is distinguished from one with Hugging Face's names. Knows no torch."""

import json
import re
from pathlib import Path

from cordee.errors import ProblemError
from cordee.families.registry import ModelSpec

EMBEDDING = "model.tok_embeddings.embedding_weight"
_MODULES = {
    "model.norm": "model.norm_out",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "lm_head",
}
_NAME = re.compile(r"(model\.layers\.\d+\.)?(.+)\.(weight|bias)")


def renamed(name: str) -> str:
    """The name of a tensor that Hugging Face calls `name`. KeyError if there is none."""
    if name == "model.embed_tokens.weight":
        return EMBEDDING
    match = _NAME.fullmatch(name)
    if match is None:
        raise KeyError(name)
    layer, module, part = match.groups(default="")
    return f"{layer}{_MODULES[module]}.{part}"


def check(spec: ModelSpec) -> None:
    """ProblemError if MindFormers has no names for a model."""
    nameless = set()
    for rule in spec.rules().values():
        for name in rule.foreign:
            try:
                renamed(name)
            except KeyError:
                nameless.add(re.sub(r"\.\d+\.", ".*.", name))
    if nameless:
        why = f"it has no names for {', '.join(sorted(nameless))} of family {spec.family.name}"
        fix = "choose another format; this one is for models of LLaMA's form"
        raise ProblemError.of("--save-model-type", "mindformers", why, fix, "inexpressible", limit=nameless)


_LARGEST = 10**8  # bytes that are read of a header or an index; the library of safetensors takes no larger header


def recognises(path: Path) -> bool:
    """Whether the files of safetensors in a directory have MindFormers' names; not if they cannot be read."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    try:
        if not (path / "config.json").is_file():
            return False
        if not single.is_file():
            if not index.is_file():
                return False
            with index.open(encoding="utf-8", errors="replace") as file:
                return f'"{EMBEDDING}"' in file.read(_LARGEST)
        with single.open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST))
        return EMBEDDING in dict(json.loads(header))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
