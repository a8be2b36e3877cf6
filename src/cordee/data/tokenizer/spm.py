"""Tokenizers of a SentencePiece model file, run by the `sentencepiece` library itself.

Owns the three ways Megatron uses such a file, and the one of a Hugging Face directory that has nothing but it: they
differ in which special tokens exist and which of them text may contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.data.tokenizer.base import Tokenizer
from cordee.data.tokenizer.special import NAMES, Arguments, copy_files, read_special_tokens
from cordee.errors import Problem, ProblemError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Ids of the special tokens; without `eod` it is `eos`, without `pad` it is `eod`."""

    bos: int | None
    eos: int | None
    pad: int | None = None
    eod: int | None = None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with special tokens laid over it.

    `matched` are the special tokens, by text, that stand for themselves inside a text; the pieces between them are
    encoded each on its own. `added` are tokens behind the model's own.
    """

    def __init__(
        self,
        type: str,
        model: SentencePieceProcessor,
        roles: Roles,
        *,
        matched: Mapping[str, int] | None = None,
        added: Mapping[int, str] | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        directory: Path | None = None,
        said: Arguments | None = None,
    ):
        self.type = type
        self.bos, self.eos = roles.bos, roles.eos
        self._roles = roles
        self._model = model
        self._matched = dict(matched or {})
        self._added = dict(added or {})
        self._before = [self.bos] if add_bos and self.bos is not None else []
        self._after = [self.eos] if add_eos and self.eos is not None else []
        self._directory = directory
        self._said = dict(said or {})
        self.vocab_size = max([model.vocab_size() - 1, *self._added]) + 1
        # The longest first, so that no token hides behind another that begins like it.
        longest_first = sorted(self._matched, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self._matched else None

    @property
    def eod(self) -> int | None:
        return self.eos if self._roles.eod is None else self._roles.eod

    @property
    def pad(self) -> int | None:
        return self.eod if self._roles.pad is None else self._roles.pad

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        batch = [self._encode(text) for text in texts]
        if add_special_tokens and (self._before or self._after):
            return [[*self._before, *ids, *self._after] for ids in batch]
        return batch

    def _encode(self, text: str) -> list[int]:
        if self._splitter is None:
            return self._model.encode(text)
        ids: list[int] = []
        for piece in self._splitter.split(text):
            if piece in self._matched:
                ids.append(self._matched[piece])
            elif piece:
                ids += self._model.encode(piece)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        special = {i: text for text, i in self._matched.items()} | self._added
        skipped = {self.bos, self.eos, self.eod, self.pad, *special} if skip_special_tokens else set()
        text: list[str] = []
        run: list[int] = []
        for i in ids:
            if i in skipped:
                continue
            if i in special:
                text += [self._model.decode(run), special[i]]
                run = []
            else:
                run.append(i)
        return "".join([*text, self._model.decode(run)])

    def vocabulary(self) -> dict[int, str]:
        model = self._model
        return {i: model.id_to_piece(i) for i in range(model.vocab_size())} | self._added

    def save(self, directory: str | Path) -> None:
        target = Path(directory)
        if self._directory is not None:
            copy_files(self._directory, target, self._said)
            return
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.model").write_bytes(self._model.serialized_model_proto())
        words = self.vocabulary()
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self._roles.pad}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            **{name: words[i] for name, i in named.items() if i is not None},
            "add_bos_token": bool(self._before),
            "add_eos_token": bool(self._after),
            "added_tokens_decoder": {
                str(i): {"content": token, "special": True, "normalized": False} for i, token in self._added.items()
            },
        }
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_model(path: Path, option: str) -> SentencePieceProcessor:
    """Raises `ProblemError` if the file is no SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, TypeError, OSError) as error:
        why = f"it is no SentencePiece model: {error}"
        raise ProblemError(
            [Problem(option, path, why, "give the tokenizer.model of a SentencePiece tokenizer")]
        ) from error


def llama2(path: Path) -> SentencePieceTokenizer:
    """Megatron's Llama2Tokenizer: bos before every text."""
    model = read_model(path, "--tokenizer-model")
    return SentencePieceTokenizer("Llama2Tokenizer", model, _own_roles(model), add_bos=True)


def gpt_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Megatron's GPTSentencePieceTokenizer: the model as it is, eos ends a document."""
    model = read_model(path, "--tokenizer-model")
    return SentencePieceTokenizer("GPTSentencePieceTokenizer", model, _own_roles(model))


def sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Megatron's SentencePieceTokenizer: behind the model's tokens come <CLS>, <SEP>, <EOD>, <MASK> and those of pad,
    bos and eos that the model lacks; <EOD> ends a document, and text may contain all of them."""
    model = read_model(path, "--tokenizer-model")
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    added: dict[int, str] = {}

    def add(token: str) -> int:
        if token not in pieces:
            pieces[token] = len(pieces)
            added[pieces[token]] = token
        return pieces[token]

    matched = {token: add(token) for token in ("<CLS>", "<SEP>", "<EOD>", "<MASK>")}
    own = (("pad", model.pad_id()), ("bos", model.bos_id()), ("eos", model.eos_id()))
    texts = {role: model.id_to_piece(i) if i >= 0 else f"<{role.upper()}>" for role, i in own}
    matched |= {text: add(text) for text in texts.values()}
    ids = {role: matched[text] for role, text in texts.items()}
    roles = Roles(bos=ids["bos"], eos=ids["eos"], pad=ids["pad"], eod=matched["<EOD>"])
    return SentencePieceTokenizer("SentencePieceTokenizer", model, roles, matched=matched, added=added)


def from_directory(directory: Path, arguments: Arguments) -> SentencePieceTokenizer:
    """The tokenizer of a Hugging Face directory with a SentencePiece `tokenizer.model`: special tokens stand for
    themselves inside a text, and bos and eos go around it as `tokenizer_config.json` says (Llama-class tokenizers
    add bos if nothing is said)."""
    special = read_special_tokens(directory, arguments)
    model = read_model(directory / "tokenizer.model", "--tokenizer-name-or-path")
    own = _own_roles(model)
    added = {i: str(token["content"]) for i, token in special.added.items() if i >= model.vocab_size()}
    ids = {text: i for i, text in added.items()}
    ids |= {str(token["content"]): i for i, token in special.added.items() if i < model.vocab_size()}
    for name in NAMES:
        token = special.named.get(name)
        if token is not None and token not in ids:
            ids[token] = _id_of(model, token, ids, added)
    bos, eos = special.id("bos", ids), special.id("eos", ids)
    roles = Roles(bos=own.bos if bos is None else bos, eos=own.eos if eos is None else eos, pad=special.id("pad", ids))
    return SentencePieceTokenizer(
        "PretrainedFromHF",
        model,
        roles,
        matched=ids,
        added=added,
        add_bos=special.flags.get("add_bos_token", True),
        add_eos=special.flags.get("add_eos_token", False),
        directory=directory,
        said=special.said,
    )


def _id_of(model: SentencePieceProcessor, token: str, ids: Mapping[str, int], added: dict[int, str]) -> int:
    """Id of a named special token; one that neither the model nor the config holds is put behind all others."""
    i = model.piece_to_id(token)
    if model.id_to_piece(i) == token:
        return i
    i = max([model.vocab_size() - 1, *ids.values()]) + 1
    added[i] = token
    return i


def _own_roles(model: SentencePieceProcessor) -> Roles:
    bos, eos, pad = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id(), model.pad_id()))
    return Roles(bos=bos, eos=eos, pad=pad)
