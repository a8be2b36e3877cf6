"""Cordée from Python: a model that loads, writes and saves, and training with a configuration.

Owns the public signatures; the jobs' own modules do the work."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from cordee.checkpoint import formats
from cordee.config import laws
from cordee.config.load import config_from_dict
from cordee.errors import raise_all
from cordee.families.registry import ModelSpec
from cordee.generate import engine
from cordee.generate.loading import device_of, dtype_of, fill, stop_ids
from cordee.generate.options import DecodingOptions
from cordee.generate.text import continuation, encode_prompts
from cordee.log import logger
from cordee.model import gpt
from cordee.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.train.start import train
from cordee.weights import hf
from cordee.weights.adapter import check_whole
from cordee.weights.load import save_from

__all__ = ["GPTModel", "train"]

Ids = Sequence[int]


class GPTModel(gpt.GPTModel):
    """A model, its `spec` (family and `config.json`), and the directory of its assets: tokenizer, generation config."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        assets: Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(spec.config, device=device, dtype=dtype)
        self.spec = spec
        self.assets = assets

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str | None = "float32", device: str | None = None) -> "GPTModel":
        """The model in a Hugging Face directory or a checkpoint, in evaluation mode.

        dtype: "float32", "bfloat16" or "float16"; None takes the stored type.
        device: None takes the fastest available.
        Peak memory: the model and its largest tensor. Raises ProblemError with what is wrong with the files."""
        source = formats.read(path)
        model = cls(source.spec, assets=source.assets, device=device_of(device), dtype=dtype_of(dtype, source))
        fill(model, source)
        return model

    def save_pretrained(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the model in its family's Hugging Face format, with its assets.

        `overwrite` replaces an existing model, which else raises ProblemError."""
        raise_all(check_whole(self.config))
        with hf.write(path, self.spec, assets=self.assets, overwrite=overwrite) as sink:
            save_from(self, sink, {"base", "head"})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; another can be assigned. ProblemError if there is none."""
        tokenizer = load_tokenizer(TokenizerOptions(), self.assets and str(self.assets))
        if note := tokenizer.beyond(self.config.vocab_size):
            logger.warning(note)
        return tokenizer

    @overload
    def generate(self, prompt: str, max_new_tokens: int = ..., **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], max_new_tokens: int = ..., **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Ids, max_new_tokens: int = ..., **options: Any) -> list[int]: ...
    @overload
    def generate(
        self, prompt: Tensor | Sequence[Ids], max_new_tokens: int = ..., **options: Any
    ) -> list[list[int]]: ...

    def generate(self, prompt, max_new_tokens: int = 64, **options):
        """The continuation of `prompt`: text for a text, token ids for token ids, a list for several.

        prompt: a text, token ids, or several of either; ids also as an int64 tensor `[seq]` or `[batch, seq]`.
        options: fields of `DecodingOptions`, such as do_sample, temperature, top_k, top_p, seed, batch_size.
        A stop token that ends a continuation is the last of its ids, and not in its text."""
        self.spec.without_values("model", [])
        decoding = config_from_dict(DecodingOptions, {"max_new_tokens": max_new_tokens, **options})
        raise_all(laws.problems(decoding))
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if isinstance(prompt, str):
            return self._texts([prompt], decoding)[0]
        if prompt and isinstance(prompt[0], str):
            return self._texts(prompt, decoding)
        if prompt and isinstance(prompt[0], int):
            return self._ids([prompt], decoding)[0]
        return self._ids(prompt, decoding)

    def _texts(self, texts: Sequence[str], options: DecodingOptions) -> list[str]:
        prompts = encode_prompts(self.tokenizer, texts)
        stop = stop_ids(self.spec, self.assets, self.tokenizer)
        written = engine.generate(self, prompts, options, stop_ids=stop, vocab_size=self.tokenizer.vocab_size)
        pairs = zip(prompts, written, strict=True)
        return [continuation(self.tokenizer, prompt, tokens, stop) for prompt, tokens in pairs]

    def _ids(self, prompts: Sequence[Ids], options: DecodingOptions) -> list[list[int]]:
        tokenizer = self.tokenizer if self._has_tokenizer() else None
        stop = stop_ids(self.spec, self.assets, tokenizer)
        vocab_size = None if tokenizer is None else tokenizer.vocab_size
        return engine.generate(self, prompts, options, stop_ids=stop, vocab_size=vocab_size)

    def _has_tokenizer(self) -> bool:
        return "tokenizer" in vars(self) or (self.assets is not None and holds_tokenizer(self.assets))
