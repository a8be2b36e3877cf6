"""Where added tokens stand in a text.

Owns the cutting of a text at its added tokens, which the `tokenizers` library does, so that every flag means there what
it means in a `tokenizer.json`, what is put around a text, and how such tokenizers are written to files. Knows nothing
of how the text between the tokens is cut."""

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.tokenizer.base import ESCAPE, Roles, Tokenizer
from cordee.tokenizer.special import MATCHING, AddedToken, SpecialTokens, save_directory

if TYPE_CHECKING:
    import tokenizers


_FEW = 50  # tokens that do not begin alike, which a search tries at every letter


def library_token(token: AddedToken) -> "tokenizers.AddedToken":
    """The token as the `tokenizers` library describes it."""
    from tokenizers import AddedToken as LibraryToken

    return LibraryToken(token.content, special=token.special, **{name: getattr(token, name) for name in MATCHING})


def encode_pieces(matcher: "Matcher", text: str, encode: Callable[[str, bool], list[int]]) -> list[int]:
    """Ids of a text, in which `ESCAPE` keeps added tokens from being found. `encode` is told of each piece between them
    whether the text begins with it."""
    ids: list[int] = []
    for number, piece in enumerate(matcher.pieces(text)):
        if isinstance(piece, int):
            ids.append(piece)
            continue
        found = encode(piece.replace(ESCAPE, ""), number == 0)
        if ESCAPE in piece and not matcher.ids.isdisjoint(found):  # a model may have them by itself
            found = [i for n, part in enumerate(piece.split(ESCAPE)) for i in encode(part, number + n == 0)]
        ids += found
    return ids


class MatchingTokenizer(Tokenizer):
    """A tokenizer that cuts a text at `added` tokens, given by id, which stand for themselves inside it.

    `special` is what the files of a Hugging Face `directory` say, if it was read from one; of the tokens that go around
    a text, `add_bos` says what holds where they say nothing."""

    def __init__(
        self,
        type: str,
        roles: Roles,
        added: Mapping[int, AddedToken],
        special: SpecialTokens,
        directory: Path | None,
        add_bos: bool = False,
    ):
        self.type = type
        self.roles = roles
        self._added = dict(added)
        self._special = special
        self._directory = directory
        self._matcher = Matcher(self._added, special.switches.get("split_special_tokens", False))
        self._before = [i for i in (roles.bos,) if i is not None and special.flags.get("add_bos_token", add_bos)]
        self._after = [i for i in (roles.eos,) if i is not None and special.flags.get("add_eos_token", False)]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        batch = [self._encode(text) for text in texts]
        if add_special_tokens and (self._before or self._after):
            return [[*self._before, *ids, *self._after] for ids in batch]
        return batch

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, without what is put around it."""
        ids: list[int] = []
        for number, piece in enumerate(self._matcher.pieces(text)):
            ids += [piece] if isinstance(piece, int) else self._encode_piece(piece, first=number == 0)
        return ids

    def added_tokens(self) -> dict[str, bool]:
        return {token.content: token.special for token in self._added.values()}

    def save(self, directory: str | Path) -> None:
        target = Path(directory)
        if self._directory is not None:
            save_directory(self._directory, target, self._special.arguments)
            return
        target.mkdir(parents=True, exist_ok=True)
        if (config := self._save_vocabulary(target)) is not None:
            (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode_escaped(self, text: str) -> list[int]:
        return encode_pieces(self._matcher, text, self._encode_piece) if ESCAPE in text else self._encode(text)

    @abstractmethod
    def _encode_piece(self, text: str, first: bool) -> list[int]:
        """Ids of what stands between added tokens; `first`: the text begins with it."""

    @abstractmethod
    def _save_vocabulary(self, target: Path) -> dict[str, Any] | None:
        """Write the vocabulary into `target`; the `tokenizer_config.json` that belongs to it, None if there is none."""


class Matcher:
    """Cuts texts at added tokens, given by id. `split_special` leaves special ones to be cut as text."""

    def __init__(self, tokens: Mapping[int, AddedToken], split_special: bool = False):
        self._tokens = dict(tokens)
        self._split_special = split_special
        self._ids = list(tokens)
        self.ids = frozenset(tokens)
        matched = [token.content for token in tokens.values() if not (split_special and token.special)]
        self._matches = bool(matched)
        # Most texts have no added token: one search tells, and is faster than the library unless it has to try many
        # tokens at every letter. The longest first is what a token hides behind.
        quick = 0 < len(matched) <= _FEW or len({content[:1] for content in matched}) == 1
        self._any = re.compile("|".join(map(re.escape, sorted(matched, key=len, reverse=True)))) if quick else None
        # Without flags the longest token at a place is what the library finds too.
        flagged = any(getattr(token, name) for token in tokens.values() for name in MATCHING)
        self._by_content = None if flagged else {token.content: i for i, token in tokens.items()}
        self._library = self._build()

    def _build(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer, models

        library = Tokenizer(models.BPE())  # without a vocabulary: it drops the text between the tokens
        library.add_tokens([library_token(token) for token in self._tokens.values()])
        library.encode_special_tokens = self._split_special
        return library

    def pieces(self, text: str) -> Iterator[str | int]:
        """The text in order: what stands between added tokens, and their ids. Nothing of it is empty, so only the
        first piece can begin where the text does."""
        if not self._matches or (self._any is not None and self._any.search(text) is None):
            if text:
                yield text
            return
        end = 0
        for i, start, stop in self._found(text):
            if start > end:
                yield text[end:start]
            yield i
            end = stop
        if end < len(text):
            yield text[end:]

    def _found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The id of every token in the text, where it begins and where it ends with the spaces that it takes."""
        if self._by_content is not None and self._any is not None:
            for match in self._any.finditer(text):
                yield self._by_content[match.group()], match.start(), match.end()
            return
        found = self._library.encode(text, add_special_tokens=False)
        for i, (start, stop) in zip(found.ids, found.offsets, strict=True):
            yield self._ids[i], start, stop

    def __reduce__(self) -> "tuple[type[Matcher], tuple[Mapping[int, AddedToken], bool]]":
        return type(self), (self._tokens, self._split_special)
