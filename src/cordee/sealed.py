"""JSON files that verify themselves, and the form that what is read from one must have.

Owns the checksum in such a file, reading one without believing it, and a few words to declare a form with. Knows no
file in particular.

A form is a function of a value that returns what is wrong with it, in words, or None."""

import json
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cordee.files import read_json

CHECKSUM = "checksum"
_LARGEST = 2**63 - 1

Form = Callable[[Any], str | None]


class OlderFormat(ValueError):
    """A file that an older version has written."""


def seal(content: Mapping[str, Any]) -> str:
    """The text of a file with `content` and the CRC-32 of their canonical JSON (sorted keys, ASCII)."""
    plain = json.loads(json.dumps(content))  # as it will be read: tuples are lists, all keys are text
    return json.dumps({**plain, CHECKSUM: _checksum(plain)}, indent=1)


def read(path: Path, form: Form, version: int) -> dict[str, Any]:
    """The content of a sealed file, as `opened` has it. FileNotFoundError and other OSErrors as they come."""
    return opened(read_json(path), form, version)


def opened(found: Any, form: Form, version: int) -> dict[str, Any]:
    """The fields of the JSON value of a sealed file whose "format" is `version`, without that and the checksum.

    ValueError with what is wrong: no object, another format (`OlderFormat`), changed since it was sealed, or not of
    `form`."""
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    if (given := found.pop("format", None)) != version:
        kind = OlderFormat if type(given) is int and 0 < given < version else ValueError
        raise kind(f"it is not of format {version}, the one that this version of Cordée reads")
    if found.pop(CHECKSUM, None) != _checksum({"format": version, **found}):
        raise ValueError("it was changed: its checksum is not the one it was written with")
    if (why := form(found)) is not None:
        raise ValueError(why)
    return found


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode("ascii"))


def count(least: int = 0) -> Form:
    """A whole number from `least` on that fits in 64 bits."""
    return _from(least, int, "whole")


def number(least: float = -_LARGEST) -> Form:
    """A finite number from `least` on."""
    return _from(least, int | float, "finite")


def _from(least: float, kind: type | UnionType, word: str) -> Form:
    def fault(value: Any) -> str | None:
        fits = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= _LARGEST
        return None if fits else f"{_shown(value)} is no {word} number from {least} on"

    return fault


def text(*choices: str) -> Form:
    """A text, or one of `choices`."""

    def fault(value: Any) -> str | None:
        if isinstance(value, str) and (not choices or value in choices):
            return None
        return f"{_shown(value)} is " + (f"none of {', '.join(choices)}" if choices else "no text")

    return fault


def flag(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else f"{_shown(value)} is neither true nor false"


def maybe(form: Form) -> Form:
    """Null, or what has the form `form`."""
    return lambda value: None if value is None else form(value)


def listed(form: Form) -> Form:
    """An array of what has the form `form`."""

    def fault(value: Any) -> str | None:
        if not isinstance(value, list):
            return f"{_shown(value)} is no array"
        return next((f"{place}: {why}" for place, item in enumerate(value) if (why := form(item))), None)

    return fault


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None, *, exact: bool = False) -> Form:
    """An object with the `required` keys; others, unless it is `exact`, may hold anything but `optional` ones."""
    known = {**required, **(optional or {})}

    def fault(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"{_shown(value)} is no object"
        if missing := [name for name in required if name not in value]:
            return f"it lacks {', '.join(missing)}"
        if exact and (strange := [name for name in value if name not in known]):
            return f"it has {_shown(strange[0])}, which means nothing"
        return next((f"{name}: {why}" for name in known if name in value and (why := known[name](value[name]))), None)

    return fault


def row(*forms: Form) -> Form:
    """An array of as many values as there are `forms`, each of its own form."""

    def fault(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != len(forms):
            return f"{_shown(value)} is no array of {len(forms)}"
        return next((why for form, item in zip(forms, value, strict=True) if (why := form(item))), None)

    return fault


def of(kind: type, *, added: Collection[str] = (), **special: Form) -> Form:
    """An object with the fields of a dataclass and no others, each as its type says, or `special`. Those in `added` may
    be absent: what was written before the dataclass had them stands for their defaults."""
    types = get_type_hints(kind)
    forms = {field.name: special.get(field.name) or _of_type(types[field.name]) for field in fields(kind)}
    return record(forms, {name: forms.pop(name) for name in added}, exact=True)


def _of_type(kind: Any) -> Form:
    simple = {int: count(), float: number(), str: text(), bool: flag}
    if kind in simple:
        return simple[kind]
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return text(*arguments)
    if get_origin(kind) is dict:
        return table(_of_type(arguments[1]))
    if NoneType in arguments:
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return maybe(_of_type(other))
    return of(kind)


def table(form: Form, names: str = ".*", least: int = 0) -> Form:
    """An object of at least `least` keys, all of which match the expression `names`, with values as `form` says."""
    pattern = re.compile(names, re.DOTALL)

    def fault(value: Any) -> str | None:
        if not isinstance(value, dict) or len(value) < least:
            return f"{_shown(value)} is no object of {least} or more keys"
        if strange := [name for name in value if not pattern.fullmatch(name)]:
            return f"{_shown(strange[0])} is no name for what it holds"
        return next((f"{name}: {why}" for name, item in value.items() if (why := form(item))), None)

    return fault


def _shown(value: Any) -> str:
    """A value in a message: what is long is cut, and what is no character is escaped."""
    if isinstance(value, dict | list):
        return "an array" if isinstance(value, list) else "an object"
    kept = ascii(value)
    return kept if len(kept) <= 40 else f"{kept[:40]}..."
