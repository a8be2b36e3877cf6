"""Tokenizers of a tiktoken file: ranked byte strings, which the `tiktoken` library merges.

Owns the two forms of such a file (lines of base64 and rank, as Llama 3 and Qwen have them; Megatron's JSON list) and
what the files do not say: the pattern that cuts text into words, and the special tokens."""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cordee.errors import Problem, ProblemError, raise_all
from cordee.files import copy_file, read_json
from cordee.log import logger
from cordee.tokenizer.base import Roles
from cordee.tokenizer.matching import MatchingTokenizer
from cordee.tokenizer.special import (
    UNSAID,
    AddedToken,
    Arguments,
    SpecialTokens,
    read_special_tokens,
    report_deviations,
    unique,
)

# How text is cut, in parts that the patterns of several vocabularies are made of.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*")
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Kind:
    """What a file of a known number of ranks does not say itself."""

    pattern: str
    special: tuple[str, ...]  # the tokens behind the ranks
    bos: str | None
    eos: str

    def roles_in(self, added: Mapping[int, AddedToken]) -> Roles:
        ids = {token.content: i for i, token in added.items()}
        return Roles(bos=ids.get(self.bos or ""), eos=ids.get(self.eos))


_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3 = _Kind(
    pattern=rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    special=(
        *("<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"),
        *(_RESERVED[4], "<|eot_id|>", *_RESERVED[5:]),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)
QWEN = _Kind(
    pattern=rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    bos=None,
    eos="<|endoftext|>",
)
_KINDS = {128000: LLAMA3, 151643: QWEN}

# Megatron's own tiktoken vocabularies: the special tokens come first, then as many ranks as the vocabulary has room
# for. (Its pattern "v2"; the numbers are its defaults.)
MEGATRON_PATTERN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{CASED_REST}"
_MEGATRON_NAMED = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_SPECIAL = 1000
_MEGATRON_VOCAB_SIZE = 1 << 17


_MOST_GAPS = 1 << 14  # ids between the ranks and the last special token: Llama 3 has 256, Qwen 208


class TikTokenizer(MatchingTokenizer):
    """Ranked byte strings with added tokens laid over them. `source` is the file or directory they were read from."""

    def __init__(
        self,
        type: str,
        ranks: Mapping[bytes, int],
        pattern: str,
        roles: Roles,
        added: Mapping[int, AddedToken],
        source: Path,
        special: SpecialTokens = UNSAID,
    ):
        import tiktoken

        super().__init__(type, roles, added, special, source if source.is_dir() else None)
        self._ranks = dict(ranks)
        words = {token.content: i for i, token in self._added.items()}
        ranks = self._ranks
        self._encoding = tiktoken.Encoding(source.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=words)
        self._source = source
        self.vocab_size = self._encoding.n_vocab

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        try:
            return self._encoding.encode(text, disallowed_special=())  # `encode_ordinary` panics instead
        except ValueError as error:  # the library's regular expressions have a stack of limited size
            why = f"it cannot cut a text of {len(text):,} characters that holds a run of spaces too long: {error}"
            fix = "take such texts out of the input"
            raise ProblemError.of("tokenizer", self._source, why, fix, "too long", limit=len(text)) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        skipped = {i for i, token in self._added.items() if token.special} if skip_special_tokens else set()
        return self._encoding.decode([i for i in ids if i not in skipped])

    def vocabulary(self) -> dict[int, str]:
        letters = _byte_letters()
        ranked = {i: "".join(letters[byte] for byte in token) for token, i in self._ranks.items()}
        return ranked | {i: token.content for i, token in self._added.items()}

    def _save_vocabulary(self, target: Path) -> dict[str, Any] | None:
        if self._source.suffix == ".json":
            copy_file(self._source, target / self._source.name)
            logger.warning("Megatron's tiktoken vocabulary has no Hugging Face form; its own file was copied.")
            return None
        copy_file(self._source, target / "tokenizer.model")
        words = {i: token.content for i, token in self._added.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(i): {"content": token, "special": True, "normalized": False} for i, token in sorted(words.items())
            },
            **{name: words[i] for name, i in (("bos_token", self.bos), ("eos_token", self.eos)) if i is not None},
        }


def from_file(path: Path) -> TikTokenizer:
    """The tokenizer of a file of ranks, or of Megatron's JSON list. Raises `ProblemError` if it is neither."""
    if path.suffix == ".json":
        return _from_megatron(path)
    ranks = read_ranks(path, "--tokenizer-model")
    kind = _kind(ranks, path, "--tokenizer-model")
    added = {len(ranks) + i: AddedToken(content) for i, content in enumerate(kind.special)}
    return TikTokenizer("TikTokenizer", ranks, kind.pattern, kind.roles_in(added), added, path)


def from_directory(directory: Path, path: Path, arguments: Arguments) -> TikTokenizer:
    """The tokenizer of a Hugging Face directory whose vocabulary is the file of ranks `path`; its config names the
    special tokens, and where it names none the known ones are taken."""
    config = read_special_tokens(directory, arguments)
    ranks = read_ranks(path, "--tokenizer-name-or-path")
    kind = _kind(ranks, path, "--tokenizer-name-or-path")
    added = _with_ids(ranks, kind, config, path)
    report_deviations(directory, config, _deviations(kind, config))
    roles = config.roles_in({token.content: i for i, token in added.items()}, kind.roles_in(added))
    return TikTokenizer("PretrainedFromHF", ranks, kind.pattern, roles, added, directory, config)


def _with_ids(ranks: Mapping[bytes, int], kind: _Kind, config: SpecialTokens, path: Path) -> dict[int, AddedToken]:
    """The added tokens by id. As in `transformers`, those of the files are all special, ids that are left out get
    tokens that nothing is written like, and further tokens come before those with a role."""
    letters = _byte_letters()
    words = {i: "".join(letters[byte] for byte in token) for token, i in ranks.items()}
    own = {word: i for i, word in words.items()}
    why = f"{path.name} has another token with this id, or this token with another id"
    raise_all(
        Problem("added tokens", f"{token.content} = {token.id}", why, "correct the id")
        for token in config.stated
        if token.id is not None
        and (words.get(token.id, token.content) != token.content or own.get(token.content, token.id) != token.id)
    )
    special = {token.id: replace(token, special=True) for token in config.stated if token.id is not None}
    if not special:
        special = {len(ranks) + i: AddedToken(content) for i, content in enumerate(kind.special)}
    if (largest := max(special)) - len(ranks) > _MOST_GAPS:
        why = f"its id is {largest}, and the file of ranks has {len(ranks)}"
        raise ProblemError.of("added tokens", special[largest].content, why, "correct the id")
    for i in range(len(ranks), largest):
        special.setdefault(i, AddedToken(f"<|reserved_token_{i}|>"))
    known = {token.content for token in special.values()}
    for token in unique([*config.extra, *config.roles]):
        if token.content not in known:
            special[own.get(token.content, max([len(ranks) - 1, *special]) + 1)] = token
    return special


def _deviations(kind: _Kind, config: SpecialTokens) -> Iterator[str]:
    """Where ids are not those of `transformers` 5, and which settings have no effect beside a file of ranks."""
    if not config.stated:
        yield "no file states its special tokens, so the known ones are taken; transformers 5 has none"
    if kind is not LLAMA3:
        yield "text is cut as the model's own code cuts it; transformers 5 cuts every such file as Llama 3"
    if config.switches.get("add_prefix_space"):
        yield "add_prefix_space is ignored: such a tokenizer has none"


def read_ranks(path: Path, option: str) -> dict[bytes, int]:
    """The byte strings of a file with lines of base64 and rank. Raises `ProblemError` if it is none."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error, OSError) as error:
        why = f"it is no tiktoken file: {error}"
        raise ProblemError.of(option, path, why, "give a file with lines of base64 and rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        why = "its ranks are not the numbers from 0 on, so lines are missing or doubled"
        raise ProblemError.of(option, path, why, "copy it again")
    return ranks


def _kind(ranks: Mapping[bytes, int], path: Path, option: str) -> _Kind:
    if len(ranks) not in _KINDS:
        why = f"it has {len(ranks)} ranks; how it cuts text is known only for {sorted(_KINDS)} (Llama 3, Qwen)"
        raise ProblemError.of(option, path, why, "give a Hugging Face directory with a tokenizer.json")
    return _KINDS[len(ranks)]


def _from_megatron(path: Path) -> TikTokenizer:
    special = [*_MEGATRON_NAMED, *(f"<SPECIAL_{i}>" for i in range(len(_MEGATRON_NAMED), _MEGATRON_SPECIAL))]
    try:
        entries = read_json(path)[: _MEGATRON_VOCAB_SIZE - len(special)]
        ranks = {base64.b64decode(entry["token_bytes"]): len(special) + entry["rank"] for entry in entries}
    except (ValueError, TypeError, KeyError, OSError) as error:
        why = f"it is no list of rank, token_bytes and token_str: {error}"
        fix = "give Megatron's JSON vocabulary, or a file with lines of base64 and rank"
        raise ProblemError.of("--tokenizer-model", path, why, fix) from error
    ids = {token: i for i, token in enumerate(special)}
    roles = Roles(bos=ids["<s>"], eos=ids["</s>"], pad=ids["<pad>"])
    added = {i: AddedToken(token) for token, i in ids.items()}
    return TikTokenizer("TikTokenizer", ranks, MEGATRON_PATTERN, roles, added, path)


def _byte_letters() -> list[str]:
    """How GPT-2 writes each byte: printable ones as themselves, the others as the letters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
