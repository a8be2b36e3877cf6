"""The options of adapters, and of training them.

Owns their names, types, defaults and help texts, and what each needs of others."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cordee.config.laws import GIVEN, Wanted, excludes, ignored, needs
from cordee.config.option import option
from cordee.errors import ProblemError

BASE = "base"  # the name of the model without an adapter
_NAMED = re.compile(r"([\w.-]+)=(.+)")
OF_ADAPTERS = "lora_r lora_alpha use_rslora use_dora lora_modules_to_save lora_dropout lora_plus_lr_ratio".split()


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """LoRA adapters."""

    lora_load: tuple[str, ...] = option(
        (),
        "LoRA adapter: directory of PEFT, or checkpoints of a run; training starts from it or, with checkpoints, "
        "resumes, all else merges it, which a Megatron checkpoint of LoRA training can be, too; generate takes several",
        metavar="[NAME=]DIR",
    )
    lora_r: int | None = option(None, "LoRA rank [as stored, else 16]", above=0)
    lora_alpha: float | None = option(None, "LoRA alpha: updates are scaled by alpha / r [as stored, else 32]", above=0)
    lora_target_modules: tuple[str, ...] | None = option(
        None,
        "modules with LoRA adapters, by what their names end with: canonical (q, v, out, gate, down, experts.up), "
        "Hugging Face's (q_proj), Megatron's (linear_qkv, query_key_value), or all-linear; to merge: as stored",
        metavar="NAME",
    )

    def adapters(self) -> dict[str, str]:
        """Where adapters are by their names, of which a single one may have none (""). ProblemError for names that tell
        several not apart."""
        named = [(each, None if Path(each).exists() else _NAMED.fullmatch(each)) for each in self.lora_load]
        found = {match[1] if match else "": match[2] if match else each for each, match in named}
        if len(found) < len(named) or (len(named) > 1 and "" in found) or BASE in found:
            why = f"names do not tell these adapters apart, or from the model without any, {BASE}"
            fix = "write NAME=DIR NAME=DIR ..., in a YAML file as a list"
            raise ProblemError.of("--lora-load", " ".join(self.lora_load), why, fix, "names")
        return found

    def only_adapter(self) -> str | None:
        """Where the only adapter is, None without. ProblemError if there are several."""
        found = self.adapters()
        if len(found) > 1:
            why, fix = "one adapter goes into a model", "give one; cordee generate takes several"
            raise ProblemError.of("--lora-load", " ".join(self.lora_load), why, fix, "at most", limit=1)
        return next(iter(found.values()), None)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(AdapterOptions):
    """LoRA adapter to merge into the weights."""

    laws = (needs("lora_r", "lora_alpha", "lora_target_modules", lora_load=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(AdapterOptions):
    """What is trained: adapters alone, or parameters by their names."""

    lora_dropout: float | None = option(
        None, "probability of dropout of an adapter's input [as stored, else 0]", at_least=0, below=1
    )
    lora_modules_to_save: tuple[str, ...] | None = option(
        None, "modules that are trained as a whole beside the adapters, such as embed_tokens lm_head", metavar="NAME"
    )
    use_rslora: bool = option(False, "rsLoRA: scale updates by alpha / sqrt(r)", aliases=("--lora-use-rslora",))
    use_dora: bool = option(False, "DoRA: adapters beside which the lengths of rows are learned")
    lora_plus_lr_ratio: float | None = option(
        None, "LoRA+: learning rate of B as a multiple of that of A [1]", aliases=("--loraplus-lr-ratio",), above=0
    )
    num_prefix_tokens: int | None = option(
        None,
        "prefix tuning, P-tuning v2: so many learned keys and values before all others in every layer [as stored]",
        aliases=("--num-virtual-tokens", "--prefix-token-num", "--pre-seq-len"),
        above=0,
    )
    quantise_base: Literal["nf4", "int8"] | None = option(None, "QLoRA: keep frozen weights of layers in few bits")
    freeze: tuple[str, ...] = option((), "parameters not to train, by patterns: embedding layers.0.*", metavar="NAME")
    train_only: tuple[str, ...] = option((), "the only parameters that are trained, by such patterns", metavar="NAME")
    lr_scale: tuple[str, ...] = option((), "factors of learning rates, by patterns: head=0.1", metavar="NAME=FACTOR")
    lora_fusion: bool = option(False, "ignored: an adapter has no communication of its own")
    lora_register_forward_hook: tuple[str, ...] = option(
        ("word_embeddings", "input_layernorm"), "ignored: gradients pass frozen modules without a hook", metavar="NAME"
    )
    lora_adapter_name: str = option("default", "ignored: a run has one adapter", metavar="NAME")

    laws = (
        needs("lora_target_modules", "lora_load", "num_prefix_tokens", load=GIVEN),
        needs(*OF_ADAPTERS, lora_target_modules=GIVEN, load=GIVEN),  # which may have some
        excludes("quantise_base", "tp_comm_overlap"),  # whose GEMMs take whole weights
        needs("use_dora", lora_dropout=Wanted("0", lambda dropout: not dropout)),
        ignored("lora_fusion", "lora_adapter_name", why="a run has one adapter, in the forward of its layers"),
        ignored("lora_register_forward_hook", why="gradients pass frozen modules without a hook"),
    )
