"""Tokenizers: one way from the options to ids, for preprocessing, training, generation and evaluation.

Owns which files make which tokenizer. Each kind has its own module; no model's code is ever run."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from cordee.config.laws import changed_options
from cordee.config.option import options_of, to_flag
from cordee.errors import Problem, raise_all
from cordee.tokenizer import hf, spm, tik
from cordee.tokenizer.base import Tokenizer
from cordee.tokenizer.null import NullTokenizer
from cordee.tokenizer.options import TokenizerOptions

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # of which a directory has one
_OF_MODEL: dict[str, Callable[[Path], Tokenizer]] = {  # types that one file is read for
    "SentencePieceTokenizer": spm.sentencepiece,
    "GPTSentencePieceTokenizer": partial(spm.as_it_is, type="GPTSentencePieceTokenizer"),
    "Llama2Tokenizer": partial(spm.as_it_is, type="Llama2Tokenizer"),
    "TikTokenizer": tik.from_file,
}
# The files each type cannot do without; PretrainedFromHF has a directory instead.
_NEEDED = {"GPT2BPETokenizer": ("vocab_file", "merge_file"), "NullTokenizer": ()}
_NEEDED |= dict.fromkeys(_OF_MODEL, ("tokenizer_model",))
_FILES = ("vocab_file", "merge_file", "tokenizer_model")  # of which none may be missing, needed or not
_DIRECTORY = "--tokenizer-name-or-path"
T = TypeVar("T")


def load_tokenizer(options: TokenizerOptions, directory: str | None = None) -> Tokenizer:
    """The tokenizer of the options; without any, that of `directory` (such as the model's).

    Raises `ProblemError` if files are missing or not what they should be."""
    raise_all(check_tokenizer(options, directory))
    if (kind := _type(options)) == "NullTokenizer":
        return NullTokenizer(_given(options.vocab_size))
    if kind == "GPT2BPETokenizer":
        return hf.from_vocabulary_and_merges(Path(_given(options.vocab_file)), Path(_given(options.merge_file)))
    if kind in _OF_MODEL:
        return _OF_MODEL[kind](Path(_given(options.tokenizer_model)))
    return _from_directory(Path(options.tokenizer_name_or_path or _given(directory)), options)


def check_tokenizer(options: TokenizerOptions, directory: str | None = None) -> list[Problem]:
    """What is missing for the options' tokenizer, without reading the files."""
    kind = _type(options)
    if kind == "PretrainedFromHF":
        problems = list(_directory_problems(options, directory))
    else:
        lacking = [to_flag(name) for name in _NEEDED[kind] if getattr(options, name) is None]
        problems = [Problem(flag, None, f"{kind} needs this file", "give it") for flag in lacking]
    for name in _FILES:
        if (path := getattr(options, name)) is not None and not Path(path).is_file():
            problems.append(Problem(to_flag(name), path, "there is no such file", "check the path"))
    if kind == "NullTokenizer" and options.vocab_size is None:
        problems.append(Problem("--vocab-size", None, f"{kind} has no vocabulary of its own", "give it"))
    return problems


def names_tokenizer(options: TokenizerOptions) -> bool:
    """Whether the options say which tokenizer it is."""
    return any(option.name in changed_options(options) for option in options_of(TokenizerOptions))


def holds_tokenizer(directory: str | Path) -> bool:
    """Whether a directory has the files of a tokenizer."""
    return any(is_vocabulary(path.name) and path.is_file() for path in Path(directory).glob("*"))


def _type(options: TokenizerOptions) -> str:
    return options.tokenizer_type or "PretrainedFromHF"


def _given(value: T | None) -> T:
    assert value is not None, "check_tokenizer has seen to it"
    return value


def _directory_problems(options: TokenizerOptions, fallback: str | None) -> Iterator[Problem]:
    directory = options.tokenizer_name_or_path or fallback
    if directory is None:
        yield Problem(_DIRECTORY, None, "no tokenizer is given", "give a directory with a Hugging Face tokenizer")
    elif not Path(directory).is_dir():
        fix = "download the tokenizer and give its directory; nothing is fetched from the network"
        yield Problem(_DIRECTORY, directory, "there is no such directory", fix, "missing")
    elif not holds_tokenizer(directory):
        names = "tokenizer.json, tokenizer.model, *.tiktoken, or vocab.json and merges.txt"
        yield Problem(_DIRECTORY, directory, "it holds no tokenizer", f"give a directory with {names}", "empty")
    elif not options.tokenizer_use_fast and not (Path(directory) / "tokenizer.model").is_file():
        why = "without a tokenizer.model there is only the fast tokenizer"
        yield Problem("--tokenizer-use-fast", False, why, "leave it out", "requires", limit="tokenizer.model")


def is_vocabulary(name: str) -> bool:
    """Whether a file of this name makes its directory one of a tokenizer."""
    return name in VOCABULARIES or name.endswith(".tiktoken")


def _from_directory(directory: Path, options: TokenizerOptions) -> Tokenizer:
    """The most exact reading of what is there: tokenizer.json, the libraries of others, `transformers`' conversion."""
    arguments = options.tokenizer_kwargs
    model = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() and options.tokenizer_use_fast:
        return hf.from_tokenizer_json(directory, arguments)
    if model.is_file():
        # Two formats share the name: SentencePiece's is binary, tiktoken's is lines of text.
        with open(model, "rb") as file:
            start = file.read(64)
        text = len(start.split(b"\n")[0].split()) == 2 and start.isascii()
        return tik.from_directory(directory, model, arguments) if text else spm.from_directory(directory, arguments)
    if files := sorted(path for path in directory.glob("*.tiktoken") if path.is_file()):
        return tik.from_directory(directory, files[0], arguments)
    return hf.from_transformers(directory, arguments)
