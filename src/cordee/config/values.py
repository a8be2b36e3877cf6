"""From text to a value of an option's type.

Owns the one conversion of flags, YAML and Python values. Everything arrives as text in one of three shapes (one, many,
map) or as None, and the option's declaration alone decides its type, so `1e-5`, `8` and `no` mean the same everywhere.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from cordee.config.option import Option
from cordee.errors import name_of

Raw = None | str | tuple[str, ...] | Mapping[str, str]

LARGEST = 2**63 - 1  # of whole numbers, here and in what calculates with them
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


class Unfit(Exception):
    """A value that an option cannot take; arguments are those of a `Problem`."""

    def __init__(self, why: str, fix: str, kind: str = "type"):
        super().__init__(why)
        self.why, self.fix, self.kind = why, fix, kind


class Entry(NamedTuple):
    """The value that `field` of a file, such as fp16.enabled, sets `option` to, or why there is none."""

    field: str
    option: str
    value: Raw | Unfit


def convert(option: Option, raw: Raw) -> object:
    """The value that `raw` means for `option`. Raises `Unfit`."""
    if raw is None:
        if option.optional:
            return None
        raise Unfit("null is no value of this option", f"give {describe(option)}, or leave the option out", "missing")
    if option.shape == "map":
        return _map(option, raw)
    if option.shape == "many":
        return _many(option, raw)
    if isinstance(raw, tuple) and len(raw) == 1:
        raw = raw[0]
    if not isinstance(raw, str):
        raise Unfit("the option takes one value", f"give {describe(option)}", "count")
    return _scalar(option, raw)


def to_raw(value: object) -> Raw:
    """The text of a Python value: a scalar, a list or tuple of scalars, or a mapping of scalars. Raises `Unfit`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_text(key): _text(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_text(item) for item in value)
    return _text(value)


def describe(option: Option) -> str:
    """An option's type in words: "a whole number", "one of none, blocks, model"."""
    if option.shape == "map":
        return "pairs: key value key value ..."
    one = f"one of {', '.join(map(str, option.choices))}" if option.choices else _KINDS[option.kind]
    if option.shape == "one":
        return one
    plural = one.removeprefix("one ") if option.choices else one.removeprefix("a ") + "s"
    return f"{option.length} {plural}" if option.length else f"one or more {plural}"


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def whole_numbers(text: str) -> tuple[int, ...] | None:
    """The numbers of "7,8,8,9"; None if it is something else."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 20 for part in parts) else None


def _text(value: object) -> str:
    if isinstance(value, str | int | float | os.PathLike) or hasattr(value, "item"):  # item: numpy scalars
        return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    raise Unfit(f"a {type(value).__name__} is not a value", "give a text, a number, true or false, or a list of them")


def _many(option: Option, raw: Raw) -> tuple[object, ...]:
    if isinstance(raw, Mapping):
        raise Unfit("the option takes a list, not keys and values", f"give {describe(option)}")
    items = (raw,) if isinstance(raw, str) else tuple(raw or ())
    if option.length not in (None, len(items)):
        raise Unfit(f"the option takes {option.length} values, not {len(items)}", f"give {describe(option)}", "count")
    return tuple(_scalar(option, item) for item in items)


def _map(option: Option, raw: Raw) -> dict[str, str | int | bool]:
    """Pairs from a mapping, from `key value key value` or from `key=value key=value`."""
    if isinstance(raw, Mapping):
        return {_proper(key): _loose(value) for key, value in raw.items()}
    items = (raw,) if isinstance(raw, str) else tuple(raw or ())
    if items and all("=" in item for item in items):
        items = tuple(part for item in items for part in item.split("=", 1))
    if len(items) % 2:
        raise Unfit(f"{len(items)} is an odd number of values", f"give an even number: {describe(option)}", "count")
    keys = items[::2]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise Unfit(f"{', '.join(repeated)} is given twice", "give every key once", "repeated")
    return {_proper(key): _loose(value) for key, value in zip(keys, items[1::2], strict=True)}


def _loose(text: str) -> str | int | bool:
    """A value without a declared type: true, false, a whole number, else text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else _proper(text)


def _scalar(option: Option, text: str) -> object:
    text = option.declared.synonyms.get(text, text)
    if option.kind is str:
        value: object = _proper(text, option.declared.empty)
    elif option.kind is bool:
        value = to_boolean(text)
    else:
        value = _integer(text) if option.kind is int else _number(text)
        _in_range(option, value)
    if option.choices and value not in option.choices:
        raise Unfit(f"the value must be {describe(option)}", _nearest_choice(option, text), "choice")
    return value


def _proper(text: str, empty: bool = True) -> str:
    """`text`, which names of files and tokenizers can take."""
    if not (text or empty):
        raise Unfit("the text is empty", "give one, or leave the option out", "empty")
    if "\0" in text or (not text.isascii() and text != text.encode("utf-8", "ignore").decode()):
        raise Unfit("it holds a zero, or bytes that are no UTF-8 text", "give text in UTF-8", "text")
    return text


def to_boolean(raw: Raw) -> bool:
    """The value of a switch. Raises `Unfit`."""
    text = raw if isinstance(raw, str) else ""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise Unfit("the value is neither true nor false", "give true or false")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Unfit("the value is not a number", "give a number such as 0.1 or 1e-5") from None
    if not math.isfinite(value):
        raise Unfit("the value is not finite", "give a number such as 0.1 or 1e-5", "range")
    return value


def _integer(text: str) -> int:
    value = None
    with suppress(ValueError):
        value = int(text)
    with suppress(ValueError):
        if value is None and (number := float(text)).is_integer():  # 1e3
            value = int(number)
    if value is None:
        raise Unfit("the value is not a whole number", "give a whole number such as 8")
    if abs(value) > LARGEST:
        raise Unfit("the value does not fit in 64 bits", f"give a number up to {LARGEST}", "range")
    return value


def _in_range(option: Option, value: float) -> None:
    d = option.declared
    bounds = (
        (d.at_least, lambda limit: value >= limit, "at least"),
        (d.above, lambda limit: value > limit, "above"),
        (d.at_most, lambda limit: value <= limit, "at most"),
        (d.below, lambda limit: value < limit, "below"),
    )
    if any(limit is not None and not holds(limit) for limit, holds, _ in bounds):
        allowed = " and ".join(f"{word} {limit}" for limit, _, word in bounds if limit is not None)
        raise Unfit("the value is out of range", f"give a number {allowed}", "range")


def _nearest_choice(option: Option, text: str) -> str:
    import difflib

    near = difflib.get_close_matches(name_of(text), [name_of(str(choice)) for choice in option.choices], n=1)
    choices = {name_of(str(choice)): choice for choice in option.choices}
    return f"did you mean {choices[near[0]]}?" if near else f"give {describe(option)}"
