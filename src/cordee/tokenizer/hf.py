"""Tokenizers that the `tokenizers` library runs: `tokenizer.json`, or a byte-level vocabulary with its merges.

Owns how such files become a tokenizer, and `transformers`' conversion of formats that nothing here reads. A
`tokenizer.json` is taken as it is written. (transformers 5 builds Llama-class tokenizers anew from its vocabulary
instead, which for text that begins with spaces, has characters outside the vocabulary, or follows a special token
(`legacy: false`), gives other ids than the file and than SentencePiece do: docs/tokenizers.md.)"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.errors import Problem, ProblemError, raise_all
from cordee.tokenizer.base import ESCAPE, Roles, Tokenizer
from cordee.tokenizer.matching import Matcher, encode_pieces, library_token
from cordee.tokenizer.special import (
    AROUND,
    MATCHING,
    NAMES,
    AddedToken,
    Arguments,
    SpecialTokens,
    read_special_tokens,
    report_deviations,
    save_directory,
)

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
SPACE, BYTE_SPACE = "\u2581", "\u0120"  # how SentencePiece and byte-level BPE write a space


class HFTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with the special tokens of its directory."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialTokens,
        type: str = "PretrainedFromHF",
        directory: Path | None = None,
    ):
        # A file may carry the truncation and padding of some earlier use; here they would lose or invent tokens.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = special.switches.get("split_special_tokens", False)
        self.type = type
        self._backend = backend
        self._special = special
        self._directory = directory
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.roles = special.roles_in(ids, Roles())
        # It would take spaces of the text away from what BPE gives back exactly, so there it has no effect.
        cleans_up = special.switches.get("clean_up_tokenization_spaces", False)
        self._cleans_up = cleans_up and backend.model.__class__.__name__ != "BPE"
        if special.arguments.keys() & set(AROUND):
            self._put_around()

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        # The fast form leaves out the character offsets, which nobody asks for here.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def added_tokens(self) -> dict[str, bool]:
        return {token.content: token.special for token in self._backend.get_added_tokens_decoder().values()}

    def encode_escaped(self, text: str) -> list[int]:
        if ESCAPE not in text:
            return self.encode(text, add_special_tokens=False)
        return encode_pieces(self._matcher, text, self._encode_piece)

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        """Ids of a text as no added token matches it. One before it, whose id is dropped, makes it no beginning."""
        ids = self._plain.encode(text if first else ESCAPE + text, add_special_tokens=False).ids
        return ids if first else ids[1:]

    @cached_property
    def _matcher(self) -> Matcher:
        added = {
            i: AddedToken(token.content, i, token.special, **{name: getattr(token, name) for name in MATCHING})
            for i, token in self._backend.get_added_tokens_decoder().items()
        }
        return Matcher(added, self._backend.encode_special_tokens)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        import tokenizers

        described = json.loads(self._backend.to_str()) | {"added_tokens": [], "post_processor": None}
        plain = tokenizers.Tokenizer.from_str(json.dumps(described))
        plain.add_special_tokens([ESCAPE])
        return plain

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            # A vocabulary file does not always mark them as special.
            ids = (i for i in ids if i not in (self.bos, self.eos, self.pad))
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self._cleans_up else text

    def vocabulary(self) -> dict[int, str]:
        return {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    def save(self, directory: str | Path) -> None:
        target = Path(directory)
        if self._directory is not None:
            save_directory(self._directory, target, self._special.arguments)
            if (target / "tokenizer.json").is_file() and self._special.arguments.keys() & set(AROUND):
                # What goes around a text stands in this file, whatever the config says.
                self._backend.save(str(target / "tokenizer.json"))
            return
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special.named}
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _put_around(self) -> None:
        """Add bos before and eos after every text, or not, as the arguments set it and else as now."""
        added_now, around = self.encode(""), []
        for role, own in (("bos", self.bos), ("eos", self.eos)):
            on = own is not None and self._special.flags.get(f"add_{role}_token", own in added_now)
            around.append(self._backend.id_to_token(own) if on and own is not None else None)
        put_around(self._backend, *around)

    def __reduce__(self) -> tuple[type[HFTokenizer], tuple[object, ...]]:
        return type(self), (self._backend, self._special, self.type, self._directory)


def put_around(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Make `backend` add these tokens to every text, and no others."""
    from tokenizers.processors import TemplateProcessing

    single = [*[before] * bool(before), "$A", *[after] * bool(after)]
    ids = [(token, backend.token_to_id(token)) for token in (before, after) if token]
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=ids)


def from_tokenizer_json(directory: Path, arguments: Arguments) -> HFTokenizer:
    """The tokenizer of a directory with a `tokenizer.json`."""
    import tokenizers

    path = directory / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain `Exception` for every damage
        raise ProblemError.of("tokenizer", path, f"it cannot be read: {error}", "copy it again") from error
    special = read_special_tokens(directory, arguments)
    _add_tokens(backend, special)
    report_deviations(directory, special, _deviations(backend, special))
    return HFTokenizer(backend, special, directory=directory)


def from_vocabulary_and_merges(vocabulary: Path, merges: Path) -> HFTokenizer:
    """GPT-2's byte-level BPE. As in Megatron, `<|endoftext|>` inside a text is plain text, and only --append-eod or
    the model writes the token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises plain `Exception` for every damage
        option, path = ("--merge-file", merges) if "erge" in str(error) else ("--vocab-file", vocabulary)
        raise ProblemError.of(option, path, f"it cannot be read: {error}", "copy it again") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is None:
        why = f"it has no {END_OF_TEXT}, which ends a document"
        raise ProblemError.of("--vocab-file", vocabulary, why, "take the vocabulary of a GPT-2 tokenizer")
    return HFTokenizer(backend, SpecialTokens(named={"eos_token": END_OF_TEXT}), "GPT2BPETokenizer")


def from_transformers(directory: Path, arguments: Arguments) -> HFTokenizer:
    """What `transformers` makes of the directory, run by the `tokenizers` library. Remote code is never run."""
    special = read_special_tokens(directory, arguments)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True, **arguments
        )
    except Exception as error:  # its errors depend on the format
        why = f"there is no tokenizer that can be read: {error}"
        fix = "give a directory with tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        raise ProblemError.of("--tokenizer-name-or-path", directory, why, fix) from error
    if not tokenizer.is_fast:
        why = f"its {type(tokenizer).__name__} has no fast form"
        raise ProblemError.of("--tokenizer-name-or-path", directory, why, "save it with a tokenizer.json")
    _raise_contradictions(tokenizer.backend_tokenizer, special)
    # Class defaults count too: what transformers calls the bos token is one even if no file says so.
    found = {name: getattr(tokenizer, name) for name in NAMES if getattr(tokenizer, name) is not None}
    complete = dataclasses.replace(special, named=found | dict(special.named))
    return HFTokenizer(tokenizer.backend_tokenizer, complete, directory=directory)


def _add_tokens(backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Make text match the tokens of the directory; those that the vocabulary lacks get the next ids. How a token is
    matched is set by the config, else by the file, else by its role.

    Raises `ProblemError` if the vocabulary has another id for a token than its neighbours state."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    stated = [token for token in special.stated if special.in_config or token.content not in known]
    known |= {token.content for token in stated}
    tokens = [*stated, *(token for token in special.tokens() if token.content not in known)]
    backend.add_tokens([library_token(token) for token in tokens if token.content])
    _raise_contradictions(backend, special)


def _raise_contradictions(backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    got = {token: backend.token_to_id(token.content) for token in special.stated}
    why = "in the vocabulary its id is {}; new tokens get the ids behind it in their order"
    raise_all(
        Problem("added tokens", f"{token.content} = {token.id}", why.format(i), "correct the id, or the vocabulary")
        for token, i in got.items()
        if i != token.id
    )


def _deviations(backend: tokenizers.Tokenizer, special: SpecialTokens) -> Iterator[str]:
    """Where ids are not those of `transformers` 5, and which settings have no effect beside a `tokenizer.json`."""

    def plain(text: str) -> list[str]:
        return backend.encode(text, add_special_tokens=False).tokens

    spaced = any(token.startswith((SPACE, BYTE_SPACE)) for token in plain("x")[:1])
    if special.tokenizer_class == "LlamaTokenizer" and spaced:
        yield "tokenizer.json is read as written; LlamaTokenizer of transformers 5 cuts spaces before a text otherwise"
        if not special.switches.get("legacy", True) and plain("x")[:1] == _behind_special(backend, plain):
            yield "`legacy: false` is ignored: by tokenizer.json, text behind a special token begins with a space"
    if special.switches.get("add_prefix_space", spaced) != spaced:
        yield "add_prefix_space is ignored: tokenizer.json says how text begins"
    if special.switches.get("do_lower_case") and plain("X") != plain("x"):
        yield "do_lower_case is ignored: tokenizer.json says how text is normalized"
    if special.arguments.keys() & set(AROUND):
        yield "of add_bos_token and add_eos_token, the one that is not given stays as in tokenizer.json"


def _behind_special(backend: tokenizers.Tokenizer, plain: Callable[[str], list[str]]) -> list[str] | None:
    """How "x" is cut behind a special token."""
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return plain(special[0] + "x")[1:2] if special else None


def _clean_up(text: str) -> str:
    """What WordPiece puts a space before belongs to the word before it, in English."""
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1:])
    text = text.replace(" ' ", "'")
    for ending in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending[1:])
    return text
