"""The options of decoding and of `cordee generate`."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import GIVEN, excludes, needs, required_unless
from cordee.config.option import option, required
from cordee.model.options import DTYPE_SYNONYMS
from cordee.parallel.options import InferenceLayoutOptions
from cordee.tokenizer.options import TokenizerOptions
from cordee.tune.options import MergeOptions


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Model to run."""

    load: str = required(
        "model, of any format that cordee convert reads: Hugging Face, Megatron, checkpoints of a run (also a "
        "URL), GGUF",
        metavar="DIR|URL|FILE",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of weights and activations [as stored]", synonyms=DTYPE_SYNONYMS
    )
    device: str | None = option(None, "device to run on [the fastest available]")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Decoding."""

    max_new_tokens: int = option(128, "maximum number of tokens to generate", above=0)
    do_sample: bool = option(False, "sample tokens [off: greedy decoding]")
    temperature: float = option(1.0, "with --do-sample: softmax temperature; lower is more deterministic", above=0)
    top_k: int = option(0, "with --do-sample: sample from the k most likely tokens; 0: no limit", at_least=0)
    top_p: float = option(1.0, "with --do-sample, nucleus: smallest set with this probability", above=0, at_most=1)
    batch_size: int = option(8, "sequences decoded in one batch", above=0)
    use_kv_cache: bool = option(True, "keep keys and values of earlier tokens (KV cache)", negations=("--no-kv-cache",))
    straight_decoding: bool = option(True, "fused decode path for single tokens, if the model supports it")
    seed: int = option(1234, "random seed of --do-sample", at_least=0)

    laws = (needs("temperature", "top_k", "top_p", do_sample=True),)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(InferenceOptions, MergeOptions, InferenceLayoutOptions, TokenizerOptions):
    """A model that runs, and its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DecodingOptions):
    """Generation."""

    prompt: tuple[str, ...] = option((), "prompt text; several are one batch", aliases=("--prompts",), empty=True)
    prompts_file: str | None = option(None, "file with one prompt per line", metavar="FILE")
    adapter: tuple[str, ...] = option(
        (),
        "names in --lora-load of the adapters that answer: one for all prompts, or one each; base: none [all to all]",
        metavar="NAME",
    )
    num_return_sequences: int = option(1, "sequences per prompt, with --do-sample", aliases=("--num-samples",), above=0)
    output: str | None = option(None, "also write one JSON line per generated sequence", metavar="FILE")

    laws = (
        needs("num_return_sequences", do_sample=True),
        required_unless("prompt", prompts_file=GIVEN),
        excludes("prompts_file", "prompt"),
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(InferenceConfig, GenerateOptions):
    """Text from prompts."""
