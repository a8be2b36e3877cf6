"""Tokenizers that the `tokenizers` library runs: `tokenizer.json`, or a byte-level vocabulary with its merges.

Owns how such files become a tokenizer, and `transformers`' conversion of formats that nothing here reads. A
`tokenizer.json` is taken as it is written. (transformers 5 builds Llama-class tokenizers anew from its vocabulary
instead, which for text that begins with spaces, or has characters outside the vocabulary, gives other ids than the
file and than SentencePiece do.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.data.tokenizer.base import Tokenizer
from cordee.data.tokenizer.special import FLAGS, NAMES, Arguments, SpecialTokens, copy_files, read_special_tokens
from cordee.errors import Problem, ProblemError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"


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
        self.type = type
        self._backend = backend
        self._special = special
        self._directory = directory
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.bos = special.id("bos", ids)
        self.eos = special.id("eos", ids)
        self._pad = special.id("pad", ids)
        if special.said.keys() & set(FLAGS):
            self._put_around()

    @property
    def pad(self) -> int | None:
        return self.eod if self._pad is None else self._pad

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        # The fast form leaves out the character offsets, which nobody asks for here.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            # A vocabulary file does not always mark them as special.
            ids = (i for i in ids if i not in (self.bos, self.eos, self._pad))
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def vocabulary(self) -> dict[int, str]:
        return {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    def save(self, directory: str | Path) -> None:
        target = Path(directory)
        if self._directory is not None:
            copy_files(self._directory, target, self._special.said)
            return
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special.named}
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _put_around(self) -> None:
        """Add bos before and eos after every text, or not, as the arguments say and else as now."""
        from tokenizers.processors import TemplateProcessing

        added_now = self.encode("")
        ids = []
        around = []
        for role, own in (("bos", self.bos), ("eos", self.eos)):
            on = self._special.flags.get(f"add_{role}_token", own in added_now) and own is not None
            token = self._backend.id_to_token(own) if on and own is not None else None
            around.append(f"{token}:0" if token else "")
            ids += [(token, own)] if token else []
        before, after = around
        template = f"{before} $A:0 {after}".strip()
        self._backend.post_processor = TemplateProcessing(single=template, pair=f"{template} $B:1", special_tokens=ids)

    def __reduce__(self) -> tuple[type[HFTokenizer], tuple[object, ...]]:
        return type(self), (self._backend, self._special, self.type, self._directory)


def from_tokenizer_json(directory: Path, arguments: Arguments) -> HFTokenizer:
    """The tokenizer of a directory with a `tokenizer.json`."""
    import tokenizers

    path = directory / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain `Exception` for every damage
        raise ProblemError([Problem("tokenizer", path, f"it cannot be read: {error}", "copy it again")]) from error
    special = read_special_tokens(directory, arguments)
    _add_missing(backend, special)
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
        raise ProblemError([Problem(option, path, f"it cannot be read: {error}", "copy it again")]) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is None:
        why = f"it has no {END_OF_TEXT}, which ends a document"
        raise ProblemError([Problem("--vocab-file", vocabulary, why, "take the vocabulary of a GPT-2 tokenizer")])
    return HFTokenizer(backend, SpecialTokens(named={"eos_token": END_OF_TEXT}), "GPT2BPETokenizer")


def from_transformers(directory: Path, arguments: Arguments) -> HFTokenizer:
    """What `transformers` makes of the directory, run by the `tokenizers` library. Remote code is never run."""
    special = read_special_tokens(directory, arguments)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what it raises hangs on the format
        why = f"there is no tokenizer that can be read: {error}"
        fix = "give a directory with tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        raise ProblemError([Problem("--tokenizer-name-or-path", directory, why, fix)]) from error
    if not tokenizer.is_fast:
        why = f"its {type(tokenizer).__name__} has no fast form"
        raise ProblemError([Problem("--tokenizer-name-or-path", directory, why, "save it with a tokenizer.json")])
    # Class defaults count too: what transformers calls the bos token is one even if no file says so.
    found = {name: getattr(tokenizer, name) for name in NAMES if getattr(tokenizer, name) is not None}
    complete = dataclasses.replace(special, named=found | dict(special.named))
    return HFTokenizer(tokenizer.backend_tokenizer, complete, directory=directory)


def _add_missing(backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Special tokens of the config that the file does not match in text as such; those that the vocabulary lacks get
    the next ids, in the order of the config."""
    from tokenizers import AddedToken

    details = {token["content"]: token for token in special.added.values()}
    matched = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in special.all_tokens():
        if content not in matched:
            told = details.get(content, {})
            matching = {key: bool(told.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
            backend.add_tokens([AddedToken(content, special=bool(told.get("special", True)), **matching)])
