"""Tokenizers of a SentencePiece model file, run by the `sentencepiece` library itself.

Owns the three ways Megatron uses such a file, and the one of a Hugging Face directory that has nothing but it: they
differ in which special tokens exist and which of them text may contain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cordee.errors import Problem, ProblemError, raise_all
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

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # how SentencePiece writes a space
# In protobuf a later value takes the place of an earlier one: the model again, with normalizer_spec (field 3) having
# add_dummy_prefix (field 3) false.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(MatchingTokenizer):
    """A SentencePiece model with added tokens laid over it, between which pieces of text are encoded each on its own.

    SentencePiece puts a space before a text: before every piece (`prefix` "always"), only before a text that does not
    begin with an added token ("first"), or never."""

    def __init__(
        self,
        type: str,
        model: SentencePieceProcessor,
        roles: Roles,
        added: Mapping[int, AddedToken] | None = None,
        special: SpecialTokens = UNSAID,
        directory: Path | None = None,
        *,
        prefix: Literal["always", "first", "never"] = "always",
        add_bos: bool = False,
    ):
        super().__init__(type, roles, added or {}, special, directory, add_bos)
        self._model = model
        bare = model if prefix == "always" else _model_of(model.serialized_model_proto() + _NO_PREFIX)
        self._first = bare if prefix == "never" else model
        self._later = bare
        self.vocab_size = max([model.vocab_size() - 1, *self._added]) + 1

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        return (self._first if first else self._later).encode(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        skipped = set()
        if skip_special_tokens:
            skipped = {self.bos, self.eos, self.eod, self.pad}
            skipped |= {i for i, token in self._added.items() if token.special}
        text: list[str] = []
        run: list[int] = []
        for i in ids:
            if i in skipped:
                continue
            if i in self._added:
                text += [self._decode(run, text), self._added[i].content]
                run = []
            else:
                run.append(i)
        return "".join([*text, self._decode(run, text)])

    def _decode(self, run: list[int], before: list[str]) -> str:
        """The text of ids without added tokens, behind the text `before`: SentencePiece takes the space that it puts
        before a text away again, `transformers` only at the beginning of the whole text."""
        text = self._first.decode(run)
        if self._directory is None or not before or not run:
            return text
        taken = self._first.id_to_piece(run[0]).startswith(SPACE) and self._first.decode_pieces([SPACE + "a"]) == "a"
        return " " + text if taken else text

    def vocabulary(self) -> dict[int, str]:
        model = self._model
        words = {i: model.id_to_piece(i) for i in range(model.vocab_size())}
        return words | {i: token.content for i, token in self._added.items()}

    def _save_vocabulary(self, target: Path) -> dict[str, Any]:
        (target / "tokenizer.model").write_bytes(self._model.serialized_model_proto())
        words = self.vocabulary()
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.roles.pad}
        added = {i: asdict(token) for i, token in self._added.items() if i >= self._model.vocab_size()}
        return {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            **{name: words[i] for name, i in named.items() if i is not None},
            "add_bos_token": bool(self._before),
            "add_eos_token": bool(self._after),
            "added_tokens_decoder": {
                str(i): {key: value for key, value in token.items() if key != "id"} for i, token in added.items()
            },
        }


def _model_of(proto: bytes) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=proto)


def read_model(path: Path, option: str) -> SentencePieceProcessor:
    """Raises `ProblemError` if the file is no SentencePiece model."""
    try:
        return _model_of(path.read_bytes())
    except (RuntimeError, TypeError, OSError) as error:
        why = f"it is no SentencePiece model: {error}"
        raise ProblemError.of(option, path, why, "give the tokenizer.model of a SentencePiece tokenizer") from error


def as_it_is(path: Path, type: str) -> SentencePieceTokenizer:
    """Megatron's GPTSentencePieceTokenizer: the model as it is, eos ends a document; and its Llama2Tokenizer, which
    puts bos before every text."""
    model = read_model(path, "--tokenizer-model")
    return SentencePieceTokenizer(type, model, _own_roles(model), add_bos=type == "Llama2Tokenizer")


def sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Megatron's SentencePieceTokenizer: behind the model's tokens come <CLS>, <SEP>, <EOD>, <MASK> and those of pad,
    bos and eos that the model lacks; <EOD> ends a document, and text may contain all of them."""
    model = read_model(path, "--tokenizer-model")
    own = (("pad", model.pad_id()), ("bos", model.bos_id()), ("eos", model.eos_id()))
    texts = {role: model.id_to_piece(i) if i >= 0 else f"<{role.upper()}>" for role, i in own}
    tokens = [AddedToken(content) for content in ("<CLS>", "<SEP>", "<EOD>", "<MASK>", *texts.values())]
    matched = _with_ids(model, tokens)
    ids = {token.content: i for i, token in matched.items()}
    roles = Roles(bos=ids[texts["bos"]], eos=ids[texts["eos"]], pad=ids[texts["pad"]], eod=ids["<EOD>"])
    return SentencePieceTokenizer("SentencePieceTokenizer", model, roles, matched)


def from_directory(directory: Path, arguments: Arguments) -> SentencePieceTokenizer:
    """The tokenizer of a Hugging Face directory with a SentencePiece `tokenizer.model`: added tokens stand for
    themselves inside a text; bos and eos go around it as `tokenizer_config.json` says (Llama-class tokenizers add bos
    if nothing is set)."""
    special = read_special_tokens(directory, arguments)
    model = read_model(directory / "tokenizer.model", "--tokenizer-name-or-path")
    _raise_contradictions(model, special)
    matched = _with_ids(model, [*special.tokens(), *_control_tokens(model, special)])
    report_deviations(directory, special, _deviations(model, special, matched))
    ids = {token.content: i for i, token in matched.items()}
    absent = {role: None for role in ("bos", "eos", "unk") if f"{role}_token" in special.absent}
    own = replace(_own_roles(model), pad=None, **absent)
    legacy = special.switches.get("legacy", True)
    return SentencePieceTokenizer(
        "PretrainedFromHF",
        model,
        special.roles_in(ids, own),
        matched,
        special,
        directory,
        prefix="never" if not special.switches.get("add_prefix_space", True) else "always" if legacy else "first",
        add_bos=True,
    )


def _control_tokens(model: SentencePieceProcessor, special: SpecialTokens) -> list[AddedToken]:
    """The model's own tokens in roles left open, and all control tokens if no file lists further special ones."""
    own = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    ids = [i for name, i in own.items() if i >= 0 and name not in special.named and name not in special.absent]
    if not special.lists_extra:
        ids += [i for i in range(model.vocab_size()) if model.is_control(i)]
    return [AddedToken(model.id_to_piece(i)) for i in ids]


def _with_ids(model: SentencePieceProcessor, tokens: Iterable[AddedToken]) -> dict[int, AddedToken]:
    """The tokens by id: the one that is stated, that of the model's piece, or else the next one behind all others."""
    matched: dict[int, AddedToken] = {}
    for token in unique(tokens):
        i = _piece(model, token.content) if token.id is None else token.id
        matched[max([model.vocab_size() - 1, *matched]) + 1 if i is None else i] = token
    return matched


def _piece(model: SentencePieceProcessor, content: str) -> int | None:
    """Id of the model's piece that is written so."""
    i = model.piece_to_id(content)
    return i if model.id_to_piece(i) == content else None


def _raise_contradictions(model: SentencePieceProcessor, special: SpecialTokens) -> None:
    own = {token: _piece(model, token.content) for token in special.stated}
    raise_all(
        Problem("added tokens", f"{token.content} = {token.id}", f"in tokenizer.model it is {i}", "correct the id")
        for token, i in own.items()
        if i not in (None, token.id)
    )


def _deviations(
    model: SentencePieceProcessor, special: SpecialTokens, matched: Mapping[int, AddedToken]
) -> Iterator[str]:
    """Where ids are not those of `transformers` 5, and why."""
    if "add_bos_token" not in special.flags:
        yield "bos is put before a text, as LlamaTokenizer documents; transformers 5 needs add_bos_token for it"
    if special.tokenizer_class == "LlamaTokenizer":
        yield "text is cut by SentencePiece; LlamaTokenizer of transformers 5 cuts runs of spaces otherwise"
        if "legacy" not in special.switches:
            yield "without `legacy`, text behind a special token begins with a space; with `legacy: false` it does not"
    elif (kind := special.tokenizer_class) not in (None, "", "PreTrainedTokenizerFast"):
        yield f"text is cut by SentencePiece; {kind} of transformers 5 may be built from the vocabulary instead"
    if special.tokenizer_class != "LlamaTokenizer" and not special.switches.get("legacy", True):
        yield "a space is put before a text that begins with one too; transformers 5 does not with `legacy: false`"
    if special.switches.get("split_special_tokens") or {model.bos_id(), model.eos_id()} - {-1, *matched}:
        yield "text never becomes a control token that it is not to match; with some models transformers 5 lets it"
    if model.normalize("x\uff21").lower().endswith("xa"):  # the full-width letter
        yield "SentencePiece normalizes the text; transformers 5 treats line ends otherwise"
    behind = [token.id for token in special.stated if token.id is not None and token.id >= model.vocab_size()]
    if behind != list(range(model.vocab_size(), model.vocab_size() + len(behind))):
        yield "the ids of added tokens are those of its files; transformers 5 closes the gaps between them"
    if special.switches.get("do_lower_case"):
        yield "do_lower_case is ignored: the model's own rules normalize text"


def _own_roles(model: SentencePieceProcessor) -> Roles:
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
    return Roles(**{role: i for role, i in ids.items() if i >= 0})
