"""What a Hugging Face tokenizer directory says beside its vocabulary, and what the user puts in its place.

Owns the reading of `tokenizer_config.json` and its neighbours, in the order of precedence that `transformers` 5 has:
one description that every kind of tokenizer obeys. Knows nothing of how text is cut."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cordee import files
from cordee.errors import Problem, ProblemError, raise_all
from cordee.log import logger
from cordee.tokenizer.base import Roles

Arguments = Mapping[str, str | int | bool]  # of --tokenizer-kwargs

# In the order in which transformers gives ids to those that the vocabulary lacks.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
AROUND = ("add_bos_token", "add_eos_token")  # what is put around a text
EXTRA = ("extra_special_tokens", "additional_special_tokens")
SWITCHES = ("legacy", "add_prefix_space", "split_special_tokens", "clean_up_tokenization_spaces", "do_lower_case")
IGNORED = ("sp_model_kwargs", "fix_mistral_regex")
MATCHING = ("lstrip", "rstrip", "single_word", "normalized")
# What of a model directory belongs to the tokenizer and is copied with it.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
)


@dataclass(frozen=True)
class AddedToken:
    """A token that text may contain as it stands. `id` is None if no file states it; the flags say how it is matched
    and whether it is left out of decoded text, as in the `tokenizers` library."""

    content: str
    id: int | None = None
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """What the files of a directory say, with the user's arguments laid over it.

    `named` are the tokens by their role, `ids` the ids that the model's files give where no token is named, `stated`
    the tokens whose ids the files state, in the order of those (`in_config`: tokenizer_config.json states them, and so
    how they are matched), `roles` how the named ones are matched, `extra` further special tokens (`lists_extra`: a file
    has a list of them, be it empty), `absent` the roles that the config says no token has, `flags` whether bos and eos
    go around a text and `switches` the other settings that change ids (absent: not set), `notes` what of the files
    is ignored or read otherwise than `transformers` does, `arguments` those of the user."""

    named: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    stated: tuple[AddedToken, ...] = ()
    in_config: bool = False
    roles: tuple[AddedToken, ...] = ()
    extra: tuple[AddedToken, ...] = ()
    lists_extra: bool = False
    absent: frozenset[str] = frozenset()
    flags: Mapping[str, bool] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    tokenizer_class: str = ""
    notes: tuple[str, ...] = ()
    arguments: Arguments = field(default_factory=dict)

    def roles_in(self, vocabulary: Mapping[str, int], own: Roles) -> Roles:
        """The roles of tokens of a vocabulary; `own` are those of its format, where the files name none."""
        found = {role: self.id(role, vocabulary) for role in ("bos", "eos", "pad", "unk")}
        return replace(own, **{role: i for role, i in found.items() if i is not None})

    def id(self, role: str, vocabulary: Mapping[str, int]) -> int | None:
        """Id of the token in the role `role` ("bos", "eos", "pad", "unk"); named tokens are in the vocabulary."""
        token = self.named.get(f"{role}_token")
        if token is None:
            return self.ids.get(f"{role}_token_id")
        return vocabulary.get(token)

    def tokens(self) -> list[AddedToken]:
        """Every token that text may contain as it stands, in the order in which new ids are given."""
        return unique([*self.stated, *self.roles, *self.extra])

    def all_tokens(self) -> list[str]:
        """How the tokens of `tokens` are written."""
        return [token.content for token in self.tokens()]


UNSAID = SpecialTokens()  # where no file says anything


def unique(tokens: Iterable[AddedToken]) -> list[AddedToken]:
    """The first token of each content, in their order."""
    found: dict[str, AddedToken] = {}
    for token in tokens:
        found.setdefault(token.content, token)
    return list(found.values())


def read_special_tokens(directory: Path, arguments: Arguments) -> SpecialTokens:
    """Raises `ProblemError` for arguments that are unknown and for files that do not say what such files say."""
    raise_unknown(arguments)
    config = read_json(directory / "tokenizer_config.json")
    model = {**read_json(directory / "config.json"), **read_json(directory / "generation_config.json")}
    reader = _Reader()
    notes = []
    in_config = config.get("added_tokens_decoder") is not None
    if in_config:
        stated = reader.decoder(config["added_tokens_decoder"])
        missing = read_json(directory / "added_tokens.json").keys() - {token.content for token in stated}
        if missing:
            notes.append(f"added_tokens.json is not read beside added_tokens_decoder, which lacks {sorted(missing)}")
    else:  # the files of older versions; a token's entry there is the newer one
        older = read_json(directory / "special_tokens_map.json")
        if config.get("extra_special_tokens", config.get("additional_special_tokens")) is not None:
            older = {key: value for key, value in older.items() if not key.endswith("_special_tokens")}
        if older.get("additional_special_tokens"):
            notes.append("transformers 5 loses some of the additional_special_tokens of special_tokens_map.json")
        config |= older
        stated = reader.encoder(read_json(directory / "added_tokens.json"))
    config |= arguments
    roles = reader.roles(config)
    extra = reader.extra(config)
    further = config.get("extra_special_tokens")
    if isinstance(further, dict):  # tokens with roles of their own
        roles |= reader.roles(further, every=True)
    flags, switches = reader.booleans(config, AROUND), reader.booleans(config, SWITCHES)
    ids = reader.role_ids(model)
    reader.distinct(stated)
    ignored = [name for name in IGNORED if config.get(name)]
    notes += [f"{name} is ignored: it makes other ids of the same text" for name in ignored]
    raise_all(reader.problems)
    named = {token.content for token in roles.values()}
    known_special = named | {token.content for token in extra}
    return SpecialTokens(
        named={name: token.content for name, token in roles.items()},
        ids=ids,
        stated=tuple(
            replace(token, special=token.special or token.content in named)
            if in_config
            else replace(token, special=token.content in known_special, normalized=token.content not in known_special)
            for token in sorted(stated, key=lambda token: token.id or 0)
        ),
        in_config=in_config,
        roles=tuple(replace(token, special=True) for token in unique(roles.values())),
        extra=tuple(replace(token, special=token.special or token.content in named) for token in extra),
        lists_extra=any(isinstance(config.get(key, {}), list | None) for key in EXTRA),
        absent=frozenset(name for name in NAMES if name in config and config[name] is None),
        flags=flags,
        switches=switches,
        tokenizer_class=str(config.get("tokenizer_class") or "").removesuffix("Fast"),
        notes=tuple(notes),
        arguments=dict(arguments),
    )


class _Reader:
    """Turns the values of the files into tokens and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def wrong(self, key: str, value: object, why: str) -> None:
        text = json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= 80 else text[:77] + "..."
        self.problems.append(Problem(key, shown, why, "correct the tokenizer's files, or copy them again"))

    def token(self, key: str, value: Any, special: bool, id: int | None = None) -> AddedToken | None:
        """A token is written as text, or as an object with its text and how it is matched."""
        if isinstance(value, str):
            return AddedToken(value, id, special, normalized=not special)
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            self.wrong(key, value, "it is neither text nor an object with a content that is text")
            return None
        flags = {name: value[name] for name in (*MATCHING, "special") if value.get(name) is not None}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            self.wrong(key, value, f"{', '.join(flags)} are true or false")
            return None
        flags.setdefault("special", special)
        flags.setdefault("normalized", not flags["special"])
        return AddedToken(value["content"], id, **flags)

    def decoder(self, value: Any) -> list[AddedToken]:
        """`added_tokens_decoder`: tokens by id."""
        key = "added_tokens_decoder"
        if not isinstance(value, dict):
            self.wrong(key, value, "it is no object of tokens by id")
            return []
        found = []
        for i, token in value.items():
            if not (i.isascii() and i.isdigit() and len(i) <= 10 and _is_id(int(i))):
                self.wrong(key, i[:40], "it is no id")
            elif not isinstance(token, dict):
                self.wrong(key, token, "it is no object with a content that is text")
            else:
                found.append(self.token(key, token, False, int(i)))
        return [token for token in found if token is not None]

    def encoder(self, value: Mapping[str, Any]) -> list[AddedToken]:
        """`added_tokens.json`: ids by token."""
        for token, i in value.items():
            if not _is_id(i):
                self.wrong("added_tokens.json", {token: i}, "it is no id")
        return [AddedToken(token, i) for token, i in value.items() if _is_id(i)]

    def roles(self, config: Mapping[str, Any], every: bool = False) -> dict[str, AddedToken]:
        """The named tokens by role; a config may have roles of its own, such as `image_token`."""
        named = [name for name in NAMES if name in config and not every]
        named += [
            key
            for key, value in config.items()
            if key not in named and (every or (key.endswith("_token") and (isinstance(value, str) or _is_token(value))))
        ]
        told = {name: config[name] for name in named if config[name] not in (None, "")}
        tokens = {name: self.token(name, value, not _is_token(value)) for name, value in told.items()}
        return {name: token for name, token in tokens.items() if token is not None and token.content}

    def extra(self, config: Mapping[str, Any]) -> list[AddedToken]:
        """`extra_special_tokens`, which older versions call `additional_special_tokens`."""
        key = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
        value = config.get(key)
        if value is None or (isinstance(value, dict) and key == "extra_special_tokens"):
            return []
        if not isinstance(value, list):
            self.wrong(key, value, "it is no list of tokens")
            return []
        tokens = [self.token(key, token, not _is_token(token)) for token in value]
        return unique(token for token in tokens if token is not None and token.content)

    def booleans(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, bool]:
        given = {name: config[name] for name in names if config.get(name) is not None}
        for name, value in given.items():
            if not isinstance(value, bool):
                self.wrong(name, value, "it is neither true nor false")
        return given

    def role_ids(self, model: Mapping[str, Any]) -> dict[str, int]:
        """Ids that the model's own files give to roles, the first where there are several; a negative one is none."""
        found = {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = model.get(name)
            several = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in several):
                self.wrong(name, value, "it is neither an id nor a list of ids")
            elif several and several[0] >= 0:
                found[name] = several[0]
        return found

    def distinct(self, tokens: Iterable[AddedToken]) -> None:
        """One id has one token, and one token one id."""
        by_id: dict[int | None, str] = {}
        by_content: dict[str, int | None] = {}
        for token in tokens:
            if by_id.setdefault(token.id, token.content) != token.content:
                self.wrong("added tokens", {token.content: token.id}, f"{by_id[token.id]!r} has this id too")
            if by_content.setdefault(token.content, token.id) != token.id:
                self.wrong("added tokens", {token.content: token.id}, f"it also has the id {by_content[token.content]}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_token(value: Any) -> bool:
    """Whether an object of the config is a token written out in full (by transformers 4 and later)."""
    return isinstance(value, dict) and value.get("__type") == "AddedToken"


def raise_unknown(arguments: Arguments) -> None:
    """Raise `ProblemError` for arguments that would have no effect, or not the one that is meant."""
    known = (*NAMES, *AROUND)
    fix = f"only these are understood: {', '.join(known)}"
    problems = [Problem("--tokenizer-kwargs", name, "it has no effect", fix) for name in arguments if name not in known]
    problems += [
        Problem("--tokenizer-kwargs", f"{name} {arguments[name]}", "it is neither true nor false", "write one of them")
        for name in AROUND
        if not isinstance(arguments.get(name, True), bool)
    ]
    problems += [
        Problem("--tokenizer-kwargs", f"{name} {arguments[name]}", "it is no token", "write the token")
        for name in NAMES
        if not isinstance(arguments.get(name, ""), str)
    ]
    raise_all(problems)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. Raises `ProblemError` if the file holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        raise ProblemError.of("tokenizer", path, f"it is not JSON: {error}", "copy it again") from error
    if not isinstance(value, dict):
        raise ProblemError.of("tokenizer", path, "it is no JSON object", "copy it again")
    return value


def chat_sources(directory: Path) -> dict[str, str]:
    """The chat templates of a tokenizer's directory by their names, in the order of precedence of `transformers`."""
    if (file := directory / "chat_template.jinja").is_file():
        try:
            given: Any = files.read_text(file)
        except (OSError, ValueError) as error:
            raise ProblemError.of("--hf-chat-template", file, str(error), "copy it again", "unreadable") from error
    else:
        given = read_json(directory / "chat_template.json").get("chat_template")
        given = given or read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    found = given if isinstance(given, dict) else {"default": given} if given else {}
    if not all(isinstance(value, str) and len(value) <= files.LARGEST_TEXT for value in found.values()):
        why = f"a template is no text of at most {files.LARGEST_TEXT:,} characters"
        raise ProblemError.of("--hf-chat-template", directory, why, "correct it")
    return found


def save_directory(source: Path, target: Path, arguments: Arguments) -> None:
    """Copy the tokenizer's files with the user's arguments in the copy.

    ProblemError for files that must not be copied: without one of them the others are another tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    found = [path for pattern in FILES for path in source.glob(pattern)]
    reasons = ((path, files.left_out(path)) for path in found)
    raise_all(Problem("tokenizer", path, why, "put the file in the link's place") for path, why in reasons if why)
    files.copy_files(found, target)
    changed = {"tokenizer_config.json": dict(arguments)}
    if (target / "special_tokens_map.json").is_file():  # without added_tokens_decoder it comes before the config
        changed["special_tokens_map.json"] = {name: arguments[name] for name in NAMES if name in arguments}
    for path, values in ((target / name, values) for name, values in changed.items() if values):
        files.write_durably(path, json.dumps(read_json(path) | values, indent=2, ensure_ascii=False) + "\n")


def report_deviations(directory: Path, special: SpecialTokens, deviations: Iterable[str]) -> None:
    """Log once where the ids of a directory's tokenizer are not those of `transformers` 5, and why."""
    if deviations := [*special.notes, *deviations]:
        logger.info("tokenizer %s, where it differs from transformers 5: %s", directory, "; ".join(deviations))
