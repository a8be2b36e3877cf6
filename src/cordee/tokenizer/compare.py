"""Whether two tokenizers give the same ids where added tokens stand in a text.

Owns the texts that show how a token is matched: with or without the spaces beside it, inside a word, before or after
the text is normalised. Knows of a directory only what `special.py` reads."""

from pathlib import Path
from typing import Any, NamedTuple

from cordee.tokenizer.base import Tokenizer
from cordee.tokenizer.special import MATCHING, read_json, read_special_tokens

_PLACES = ("{}", "{}{}", " {} ", "a{}b", "a {} b", "a{} b", "1\n{}\n")


class Difference(NamedTuple):
    """A text, and the ids that either tokenizer gives."""

    text: str
    expected: list[int]
    found: list[int]


def added_tokens(directory: Path) -> dict[str, list[str]]:
    """The tokens of a directory that stand for themselves in a text, each with the flags that it has."""
    listed: list[dict[str, Any]] = read_json(directory / "tokenizer.json").get("added_tokens", [])
    named = [*read_json(directory / "added_tokens.json"), *read_special_tokens(directory, {}).all_tokens()]
    flags = {str(token["content"]): [flag for flag in MATCHING if token.get(flag)] for token in listed}
    return flags | {token: [] for token in named if token not in flags}


def differences(expected: Tokenizer, found: Tokenizer, tokens: list[str]) -> dict[str, Difference]:
    """By token, the first text with it to which the two tokenizers give different ids; only where there is one."""
    texts = [
        (token, text)
        for token, following in zip(tokens, [*tokens[1:], *tokens[:1]], strict=True)
        for text in (*(place.replace("{}", token) for place in _PLACES), token + following)
    ]
    ids = (tokenizer.encode_batch([text for _, text in texts]) for tokenizer in (expected, found))
    different: dict[str, Difference] = {}
    for (token, text), *pair in zip(texts, *ids, strict=True):
        if pair[0] != pair[1]:
            different.setdefault(token, Difference(text, *pair))
    return different
