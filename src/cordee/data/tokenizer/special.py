"""Special tokens of a Hugging Face tokenizer directory: which there are, and what the user puts in their place.

Owns the reading of `tokenizer_config.json` and its neighbours. Knows nothing of how text is cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cordee import files
from cordee.errors import Problem, ProblemError, raise_all

Arguments = Mapping[str, str | int | bool]  # of --tokenizer-kwargs

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
FLAGS = ("add_bos_token", "add_eos_token")
# What of a model directory belongs to the tokenizer and travels with it.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
)


@dataclass(frozen=True)
class SpecialTokens:
    """What the files of a directory say, with the user's arguments laid over it.

    `named` are the tokens by their role, `ids` the ids that the model's files give where no token is named, `added`
    the tokens with fixed ids outside the vocabulary file, `flags` whether bos and eos go around a text (None: not
    said), `said` the arguments themselves.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    said: Arguments = field(default_factory=dict)

    def id(self, role: str, vocabulary: Mapping[str, int]) -> int | None:
        """Id of the token in the role `role` ("bos", "eos", "pad"); named tokens are in the vocabulary."""
        token = self.named.get(f"{role}_token")
        if token is None:
            return self.ids.get(f"{role}_token_id")
        return vocabulary.get(token)

    def all_tokens(self) -> list[str]:
        """Every special token that text may contain, those with fixed ids first and in their order."""
        fixed = [str(self.added[i]["content"]) for i in sorted(self.added)]
        return list(dict.fromkeys([*fixed, *(self.named[name] for name in NAMES if name in self.named)]))


def read_special_tokens(directory: Path, arguments: Arguments) -> SpecialTokens:
    """Raises `ProblemError` for arguments that are unknown or files that are no JSON."""
    raise_unknown(arguments)
    named_by_user = {name: str(arguments[name]) for name in NAMES if name in arguments}
    config = read_json(directory / "tokenizer_config.json")
    older = read_json(directory / "special_tokens_map.json")
    model = {**read_json(directory / "config.json"), **read_json(directory / "generation_config.json")}
    named = {name: _content(config.get(name, older.get(name))) for name in NAMES} | named_by_user
    ids = {name: _first(model.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    flags = {name: bool(config[name]) for name in FLAGS if isinstance(config.get(name), bool)}
    return SpecialTokens(
        named={name: token for name, token in named.items() if token is not None},
        ids={name: i for name, i in ids.items() if i is not None},
        added={int(i): token for i, token in config.get("added_tokens_decoder", {}).items()},
        flags=flags | {name: bool(arguments[name]) for name in FLAGS if name in arguments},
        said=dict(arguments),
    )


def raise_unknown(arguments: Arguments) -> None:
    """Raise `ProblemError` for arguments that would have no effect, or not the one that is meant."""
    known = (*NAMES, *FLAGS)
    fix = f"only these are understood: {', '.join(known)}"
    problems = [
        Problem("--tokenizer-kwargs", name, "it has no effect here", fix) for name in arguments if name not in known
    ]
    problems += [
        Problem("--tokenizer-kwargs", f"{name} {arguments[name]}", "it is neither true nor false", "write one of them")
        for name in FLAGS
        if not isinstance(arguments.get(name, True), bool)
    ]
    raise_all(problems)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProblemError([Problem("tokenizer", path, f"it is not JSON: {error}", "copy it again")]) from error
    return value if isinstance(value, dict) else {}


def copy_files(source: Path, target: Path, said: Arguments) -> None:
    """Copy the tokenizer's files, with the user's arguments written into its config."""
    target.mkdir(parents=True, exist_ok=True)
    files.copy_files((path for pattern in FILES for path in source.glob(pattern)), target)
    if said:
        path = target / "tokenizer_config.json"
        config = read_json(path) | dict(said)
        files.write_durably(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _content(token: Any) -> str | None:
    """A token is written as text, or as an object with its text and how it is matched."""
    return token.get("content") if isinstance(token, dict) else token


def _first(ids: Any) -> int | None:
    """Some models have several ids in one role."""
    return (ids[0] if ids else None) if isinstance(ids, list) else ids
