"""The options of vocabularies and tokenizers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cordee.config.option import option


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """Vocabulary."""

    vocab_size: int | None = option(
        None, "vocabulary size in tokens, before padding [that of the checkpoint, the preset or the tokenizer]", above=0
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(VocabularyOptions):
    """Tokenizer."""

    tokenizer_type: (
        Literal[
            "PretrainedFromHF",
            "GPT2BPETokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "TikTokenizer",
            "NullTokenizer",
        ]
        | None
    ) = option(None, "tokenizer class [PretrainedFromHF with the tokenizer in --load, if there is one]")
    tokenizer_name_or_path: str | None = option(None, "PretrainedFromHF: Hugging Face tokenizer", metavar="DIR")
    tokenizer_model: str | None = option(None, "SentencePiece, Llama2 and TikTokenizer: the model file", metavar="FILE")
    vocab_file: str | None = option(None, "GPT2BPETokenizer: vocabulary, JSON", metavar="FILE")
    merge_file: str | None = option(None, "GPT2BPETokenizer: BPE merges, text", metavar="FILE")
    tokenizer_kwargs: Mapping[str, str | int | bool] = option({}, "PretrainedFromHF: further arguments: KEY VALUE ...")
    tokenizer_use_fast: bool = option(True, "PretrainedFromHF: fast (Rust)", negations=("--tokenizer-not-use-fast",))
