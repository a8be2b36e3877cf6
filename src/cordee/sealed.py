"""JSON files that verify themselves, and the form that what is read from one must have.

Owns the checksum in such a file, reading one without believing it, and a few words to declare a form with. Knows no
file in particular.

A form is a function of a value that returns what is wrong with it, in words, or None.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20  # of a sealed file; what is larger is something else, and would only fill the memory
CHECKSUM = "checksum"
_LARGEST = 2**63 - 1

Form = Callable[[Any], str | None]


def seal(fields: Mapping[str, Any]) -> str:
    """The text of a file with `fields` and the CRC-32 of their canonical JSON (sorted keys, ASCII)."""
    content = json.loads(json.dumps(fields))  # as it will be read: tuples are lists, all keys are text
    return json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1)


def read(path: Path, form: Form, formats: int) -> dict[str, Any]:
    """The fields of a sealed file whose "format" is `formats`, without the checksum.

    ValueError with what is wrong: no file of JSON, another format, changed since it was sealed, or not of `form`.
    FileNotFoundError and other OSErrors as they come.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # opening a named pipe would wait for its writer
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        fields = json.loads(data.decode("utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        if fields.get("format") != formats:
            raise ValueError(f"it is not of format {formats}, the one this version reads")
        if fields.pop(CHECKSUM, None) != _checksum(fields):
            raise ValueError("it was changed: its checksum is not the one it was written with")
        if (why := form(fields)) is not None:
            raise ValueError(why)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return fields


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode("ascii"))


# ---- forms ----------------------------------------------------------------------------------------------------------


def count(least: int = 0) -> Form:
    """A whole number from `least` on that fits in 64 bits."""

    def fault(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST
        return None if fits else f"{_shown(value)} is no whole number from {least} on"

    return fault


def number(least: float = -_LARGEST) -> Form:
    """A finite number from `least` on."""

    def fault(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= _LARGEST
        return None if fits else f"{_shown(value)} is no finite number from {least} on"

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
    """Null, or what `form` says."""
    return lambda value: None if value is None else form(value)


def listed(form: Form) -> Form:
    """An array of what `form` says."""

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
    kept = (
        ascii(value) if not isinstance(value, dict | list) else "an array" if isinstance(value, list) else "an object"
    )
    return kept if len(kept) <= 40 else f"{kept[:40]}..."
