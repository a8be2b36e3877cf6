"""What a tokenizer is to everything else.

Owns the interface and the fingerprint that tells whether two tokenizers give the same ids. Knows no format."""

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Text that tokenizers with the same vocabulary may cut differently: runs of spaces, digits, line ends, scripts, emoji.
_PROBES = (
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "  leading,   inner \t and trailing  \n\n\r\n  ",
    "def f(x: int) -> str:\n    return '%05d' % (x ** 2)\n",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u00c9cole e\u0301t\u00e9 \ufb01 \U0001f600\u200d\U0001f680 \u00a0 \u2014 \u201cquote\u201d",
    "https://example.org/?q=1&r=2",
)

# Inside what looks like an added token it makes that plain text (`encode_escaped`). A noncharacter: no text has it.
ESCAPE = "\ufdd0"


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Ids of special tokens, None for one that a format does not have."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    eod: int | None = None
    unk: int | None = None


def outside(ids: Iterable[int], vocab_size: int) -> int | None:
    """The first of `ids` that is not one of so many; None if all are."""
    return next((i for i in ids if not 0 <= i < vocab_size), None)


class Tokenizer(ABC):
    """Text to ids and back. Ids are `0 <= id < vocab_size`; a special token that does not exist is None.

    `eod` ends a document and is the end-of-sequence token unless the format has one of its own; without a padding
    token `pad` is `eod`."""

    type: str  # the --tokenizer-type that reads it
    probes: Sequence[str] = _PROBES  # sample texts for the fingerprint
    vocab_size: int
    roles: Roles

    @property
    def bos(self) -> int | None:
        return self.roles.bos

    @property
    def eos(self) -> int | None:
        return self.roles.eos

    @property
    def eod(self) -> int | None:
        return self.eos if self.roles.eod is None else self.roles.eod

    @property
    def pad(self) -> int | None:
        return self.eod if self.roles.pad is None else self.roles.pad

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text; `add_special_tokens` puts what the tokenizer adds by itself (such as bos) around it."""

    @abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the ids; bytes that are no text become U+FFFD."""

    @abstractmethod
    def vocabulary(self) -> dict[int, str]:
        """How every token is written, by id. For byte-level tokenizers each byte is written as GPT-2 writes it."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the files of a Hugging Face tokenizer that gives the same ids."""

    def beyond(self, rows: int) -> str | None:
        """A note if there are more tokens than a model has rows, which is no fault before such a token occurs."""
        if self.vocab_size <= rows:
            return None
        ids = f"id {rows} is" if self.vocab_size == rows + 1 else f"ids {rows} to {self.vocab_size - 1} are"
        return (
            f"the tokenizer has {self.vocab_size} tokens, the model's embedding {rows} rows: "
            f"{ids} refused where a text has such a token"
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def added_tokens(self) -> dict[str, bool]:
        """The tokens that a text may contain as it stands, each with whether it is special."""
        return {}

    def encode_escaped(self, text: str) -> list[int]:
        """Ids of a text, nothing put around it. An added token in it that holds `ESCAPE` is plain text."""
        return self.encode(text.replace(ESCAPE, ""), add_special_tokens=False)

    def fingerprint(self) -> str:
        """A hash of the vocabulary and of how sample texts are cut: equal for equal tokenizers, whatever files they
        were read from, and for nothing else but by chance. What is added around a text does not count."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        vocabulary = self.vocabulary()
        ids = sorted(vocabulary)
        digest.update("\0".join([vocabulary[i] for i in ids]).encode())
        digest.update(array("q", ids).tobytes())
        digest.update(json.dumps(self.encode_batch(self.probes, add_special_tokens=False)).encode())
        return digest.hexdigest()
