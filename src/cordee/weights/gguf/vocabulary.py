"""Tokenizers as files of GGUF hold them: tokens, merges or scores, special tokens, chat template.

Owns both ways between the values of a file and the files of a Hugging Face tokenizer, for the two kinds that models of
the architectures here have: byte-level BPE, and the BPE of SentencePiece. Knows no weights."""

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.errors import ProblemError
from cordee.files import left_out
from cordee.log import logger
from cordee.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer, tik
from cordee.tokenizer.compare import added_tokens, differences
from cordee.tokenizer.hf import SPACE, put_around
from cordee.tokenizer.options import TokenizerOptions
from cordee.tokenizer.special import SpecialTokens, chat_sources, read_json, read_special_tokens
from cordee.weights.gguf.architecture import ROLES, Values, id_key

if TYPE_CHECKING:
    import tokenizers

NONE = ("none", "no_vocab")  # what files without a tokenizer say
_BYTE_LEVEL, _PIECES = "gpt2", "llama"
SHOWN = 8  # tokens that are listed
LONGEST = 4096  # characters of a token that is believed: what it is made of is searched at each of them
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Kind(IntEnum):
    """Kinds of tokens, as llama.cpp numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Cut:
    """How text is cut into words before merging: by these patterns, one after the other.

    names: what llama.cpp calls it; the first is written.
    whole: a word that is a token is one, whatever the merges say.
    nfc: Hugging Face's tokenizers normalise the text before, which llama.cpp leaves out."""

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    whole: bool = False
    nfc: bool = False


_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT_4O = "|".join((*(f"{word}{tik.CONTRACTIONS}?" for word in tik.CASED), r"\p{N}{1,3}", tik.CASED_REST))
CUTS = (
    Cut(("gpt-2",), (_GPT2,)),
    Cut(("smollm", "starcoder", "refact", "command-r"), (_DIGIT, _GPT2)),
    Cut(("llama-bpe", "llama3", "llama-v3"), (tik.LLAMA3.pattern,), whole=True),
    Cut(("qwen2", "deepseek-r1-qwen"), (tik.QWEN.pattern,), nfc=True),
    Cut(("tekken",), (tik.MEGATRON_PATTERN,), whole=True),
    Cut(("gpt-4o",), (_GPT_4O,)),
)


def _patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The patterns of a `pre_tokenizer` of a `tokenizer.json`; None if it does more than to cut by them into bytes."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    patterns: list[str] = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
                patterns += [_GPT2] if rest.get("use_regex", True) else []
            case _:
                return None
    return tuple(patterns) if steps[-1]["type"] == "ByteLevel" else None


def describe(directory: Path | None, rows: int) -> dict[str, Any]:
    """The values that describe the tokenizer of a directory, for a model with `rows` tokens.

    Without a tokenizer they say so. ProblemError if llama.cpp has no such tokenizer."""
    if directory is None or not holds_tokenizer(directory):
        return {"tokenizer.ggml.model": NONE[0]}
    tokenizer, special = load_tokenizer(TokenizerOptions(), str(directory)), read_special_tokens(directory, {})
    if tokenizer.vocab_size > rows:
        why, fix = f"it has {tokenizer.vocab_size} tokens, the model only {rows} rows", "give the model's own tokenizer"
        raise ProblemError.of("tokenizer", directory, why, fix, "at most", limit=rows)
    words, raw = tokenizer.vocabulary(), read_json(directory / "tokenizer.json")
    if raw:
        values = _of_json(raw, words, directory)
        control = {str(token["content"]) for token in raw.get("added_tokens", []) if token.get("special")}
        plain = {str(token["content"]) for token in raw.get("added_tokens", [])} - control
    else:
        values = _of_pieces(directory, words)
        control, plain = set(special.all_tokens()), set()
    pieces = values["tokenizer.ggml.model"] == _PIECES
    kinds = {word: Kind.BYTE for word in words.values() if pieces and _BYTE.fullmatch(word)}
    kinds |= dict.fromkeys(plain, Kind.USER_DEFINED) | dict.fromkeys(control | {*special.named.values()}, Kind.CONTROL)
    if pieces and "unk_token" in special.named:
        kinds[special.named["unk_token"]] = Kind.UNKNOWN
    values["tokenizer.ggml.tokens"] = [words.get(i, f"[PAD{i}]") for i in range(rows)]
    types = (kinds.get(words[i], Kind.NORMAL) if i in words else Kind.UNUSED for i in range(rows))
    values["tokenizer.ggml.token_type"] = list(map(int, types))
    if pieces:
        values["tokenizer.ggml.scores"] += [-float(rows)] * (rows - len(values["tokenizer.ggml.scores"]))
        first = words[tokenizer.encode("a", add_special_tokens=False)[0]]
        values["tokenizer.ggml.add_space_prefix"] = first.startswith(SPACE)
    return values | _roles(tokenizer, special, words) | _template(directory)


def compare_tokenizers(directory: Path, written: Path) -> str | None:
    """The added tokens of a directory for which the tokenizer in `written`, made from what a file says, gives other ids
    than its own, in words; None if there are none.

    llama.cpp finds such tokens as they are written, anywhere, and before it normalises a text; nothing in a file says
    otherwise."""
    added = added_tokens(directory)
    ours, theirs = (load_tokenizer(TokenizerOptions(), str(place)) for place in (directory, written))
    found = differences(ours, theirs, list(added))
    shown = [
        f"{token!r} ({', '.join(added[token]) or 'plain'}): the ids of {text!r} are {expected}, in the file {other}"
        for token, (text, expected, other) in list(found.items())[:SHOWN]
    ]
    return "; ".join(shown + ([f"and so for {len(found) - SHOWN} more"] if len(found) > SHOWN else [])) or None


def _of_json(raw: Mapping[str, Any], words: Mapping[int, str], directory: Path) -> dict[str, Any]:
    """What a `tokenizer.json` says of tokens and merges."""
    model, pre_tokenizer = raw["model"], raw.get("pre_tokenizer")
    fix = "choose another format; this one knows byte-level BPE, cut as GPT-2, Llama 3, Qwen2, ..., and SentencePiece"
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        why = f"it is {model.get('type')}, not BPE"
        raise ProblemError.of("tokenizer", directory, why, fix, "unsupported", limit=model.get("type"))
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if '"ByteLevel"' not in json.dumps(pre_tokenizer):
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        scores = [-float(ranks.get(words.get(i, ""), len(merges))) for i in range(max(words, default=-1) + 1)]
        return {"tokenizer.ggml.model": _PIECES, "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
    patterns = _patterns(pre_tokenizer)
    cut = next((cut for cut in CUTS if cut.patterns == patterns), None)
    if cut is None:
        why = f"llama.cpp has no name for how it cuts text: {json.dumps(pre_tokenizer, ensure_ascii=False)}"
        raise ProblemError.of("tokenizer", directory, why, fix, "unsupported", limit=patterns)
    joined = [" ".join(merge) for merge in merges]
    return {"tokenizer.ggml.model": _BYTE_LEVEL, "tokenizer.ggml.pre": cut.names[0], "tokenizer.ggml.merges": joined}


def _of_pieces(directory: Path, words: Mapping[int, str]) -> dict[str, Any]:
    """What a `tokenizer.model` of SentencePiece says of scores; those of its BPE are 0, -1, -2, ..."""
    if not (directory / "tokenizer.model").is_file():
        why, fix = "it has neither a tokenizer.json nor a tokenizer.model", "save it with a tokenizer.json"
        raise ProblemError.of("tokenizer", directory, why, fix)
    from cordee.tokenizer.spm import read_model

    model = read_model(directory / "tokenizer.model", "tokenizer")
    scores = [float(model.get_score(i)) for i in range(model.vocab_size())]
    if any(score != round(score) for score in scores):
        why = "it is a unigram model, which models of this architecture do not have in llama.cpp"
        raise ProblemError.of("tokenizer", directory, why, "choose another format")
    scores += [-float(len(scores))] * (max(words, default=-1) + 1 - len(scores))
    return {"tokenizer.ggml.model": _PIECES, "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}


def _roles(tokenizer: Tokenizer, special: SpecialTokens, words: Mapping[int, str]) -> dict[str, Any]:
    """Which tokens begin and end a text, and whether they are put around it."""
    ids = {word: i for i, word in words.items()}
    found = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": special.id("unk", ids), "pad": special.id("pad", ids)}
    around = tokenizer.encode("")
    return {id_key(role): i for role, i in found.items() if i is not None} | {
        "tokenizer.ggml.add_bos_token": tokenizer.bos is not None and around[:1] == [tokenizer.bos],
        "tokenizer.ggml.add_eos_token": tokenizer.eos is not None and around[len(around) // 2 :] == [tokenizer.eos],
    }


def _template(directory: Path) -> dict[str, Any]:
    file = directory / "chat_template.jinja"
    if file.is_file() and (why := left_out(file)) is not None:
        logger.warning("not copied: %s: %s", file, why)
        return {}
    given = chat_sources(directory).get("default")
    return {"tokenizer.chat_template": given} if given else {}


def restore(values: Values, directory: Path) -> str | None:
    """Write the tokenizer that `values` describe as a Hugging Face tokenizer; why it is left out, None if it is not."""
    model, tokens = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.tokens", [])
    if model is None or model in NONE:
        return "the file has no tokenizer"
    if model not in (_BYTE_LEVEL, _PIECES):
        return f"the tokenizer is left out: its kind {model!r} is unknown here"
    if (why := _malformed(values)) is not None:
        return f"the tokenizer is left out: {why}"
    kinds = values.get("tokenizer.ggml.token_type") or [Kind.NORMAL] * len(tokens)
    used = (i + 1 for i in reversed(range(len(tokens))) if kinds[i] != Kind.UNUSED)
    tokens = tokens[: next(used, 0)]  # without rows that only fill up
    if len(set(tokens)) < len(tokens):
        return "the tokenizer is left out: some of its tokens are there twice"
    pre = values.get("tokenizer.ggml.pre")
    cut = next((cut for cut in CUTS if pre in cut.names), None)
    if model == _BYTE_LEVEL and cut is None:
        return f"the tokenizer is left out: how it cuts text, {pre!r}, is unknown here"
    try:
        if cut is None or model != _BYTE_LEVEL:
            backend = _pieces(values, tokens, kinds)
        else:
            backend = _byte_level(values, tokens, cut)
    except Exception as error:  # the library raises plain `Exception` for merges of what is no token
        return f"the tokenizer is left out: {error}"
    _write(backend, values, tokens, kinds, directory)
    return None


def strange_ids(values: Values) -> dict[str, object]:
    """Keys of special tokens whose values are no tokens, which llama.cpp ignores; such values are -1 and the like."""
    tokens = values.get("tokenizer.ggml.tokens")
    limit = len(tokens) if isinstance(tokens, list) else 2**32
    given = {key: values[key] for key in map(id_key, ROLES) if key in values}
    return {key: value for key, value in given.items() if type(value) is not int or not 0 <= value < limit}


def _malformed(values: Values) -> str | None:
    """What is wrong with the form of the values that describe a tokenizer."""
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return "its tokens are no list of texts"
    if max(map(len, tokens), default=0) > LONGEST:
        return f"a token has more than {LONGEST:,} characters"
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        return "its merges are no list of pairs"
    for name in ("token_type", "scores"):
        given = values.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(given, list | array) or (given and len(given) != len(tokens)):
            return f"its {name} is no list of a number for each token"
    if not isinstance(values.get("tokenizer.chat_template", ""), str):
        return "its chat template is no text"
    return None


def _byte_level(values: Values, tokens: list[str], cut: Cut) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole))
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(values: Values, tokens: list[str], kinds: Sequence[int]) -> "tokenizers.Tokenizer":
    """SentencePiece's BPE as `tokenizers` runs it: a token of higher score is made first, of any two parts."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = values.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] in (Kind.NORMAL, Kind.USER_DEFINED)}
    pairs = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = values.get(id_key("unk"), kinds.index(Kind.UNKNOWN) if Kind.UNKNOWN in kinds else None)
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[(tokens[left], tokens[right]) for _, left, right in sorted(pairs)],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=Kind.BYTE in kinds,
    )
    backend = Tokenizer(model)
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    begin, end = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return backend


def _write(
    backend: "tokenizers.Tokenizer", values: Values, tokens: list[str], kinds: Sequence[int], directory: Path
) -> None:
    """The files, with the tokens that stand for themselves in a text, and what goes around it."""
    from tokenizers import AddedToken

    for i, token in enumerate(tokens):
        if kinds[i] in (Kind.CONTROL, Kind.UNKNOWN):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kinds[i] == Kind.USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    pieces = values["tokenizer.ggml.model"] == _PIECES
    usual = {"bos": 1, "eos": 2} if pieces else {}  # what llama.cpp takes where a file is silent
    ids = {role: values.get(id_key(role), usual.get(role)) for role in ROLES}
    named = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
    usually = {"add_bos_token": pieces, "add_eos_token": False}
    flags = {name: bool(values.get(f"tokenizer.ggml.{name}", default)) for name, default in usually.items()}
    before, after = (named.get(f"{role}_token") if flags[f"add_{role}_token"] else None for role in ("bos", "eos"))
    if before or after:
        put_around(backend, before, after)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **flags, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if template := values.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
