"""The adapter that `cordee convert` merges into what it reads.

Owns telling what it is and whether what is read can take it. The files are codecs' affair.
"""

from __future__ import annotations

from pathlib import Path

from cordee.config.schema import ConvertConfig
from cordee.errors import Problem, ProblemError
from cordee.weights import peft
from cordee.weights.adapter import Adapter, Given, Merged
from cordee.weights.codec import Source
from cordee.weights.megatron import adapter as megatron
from cordee.weights.megatron.layout import is_megatron
from cordee.weights.megatron.source import MegatronSource


def merged(base: Source, options: ConvertConfig) -> Merged:
    """`base` with the adapter of `--lora-load`. ProblemError with all that is wrong with it."""
    return Merged(base, _read(base, options))


def _read(base: Source, options: ConvertConfig) -> Adapter:
    assert options.lora_load is not None
    path = Path(options.lora_load)
    given = Given(path=path, r=options.lora_r, alpha=options.lora_alpha, modules=options.lora_target_modules)
    if peft.is_adapter(path):
        return peft.read(given, base.spec)
    if not is_megatron(path):
        why = "it is neither of PEFT (there is no adapter_config.json) nor a Megatron checkpoint"
        raise ProblemError([Problem("--lora-load", path, why, "give the directory of an adapter")])
    if not isinstance(base, MegatronSource):
        why = "it has Megatron's names, and what it is to be merged into is no Megatron checkpoint"
        fix = "give the Megatron checkpoint that it was trained on as --load-dir"
        raise ProblemError([Problem("--lora-load", path, why, fix)])
    return megatron.read(given, base.spec, base.dialect)
