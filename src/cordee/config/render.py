"""A configuration as text: YAML that loads again, and the options that are not at their default.

Owns how values are written. Reads `Loaded` only."""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from cordee.config.laws import changed_options
from cordee.config.load import Loaded
from cordee.config.option import options_of
from cordee.errors import Problem

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*")  # needs no quotes in YAML, unless it reads as one of:
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off"}


def to_yaml(loaded: Loaded[Any]) -> str:
    """All options by topic, each with the origin of its value; `--config` reads the text back to the same run."""
    topics = groupby(options_of(type(loaded.config)), key=lambda option: option.group)
    blocks = (f"# {name.partition(': ')[0]}\n{_block(loaded, [each.name for each in group])}" for name, group in topics)
    return "\n\n".join(blocks) + "\n"


def changes(loaded: Loaded[Any]) -> str:
    """The options that are not at their default, each with the origin of its value."""
    changed = changed_options(loaded.config)
    return _block(loaded, [each.name for each in options_of(type(loaded.config)) if each.name in changed])


def with_origins(problems: Iterable[Problem], loaded: Loaded[Any]) -> list[Problem]:
    """The problems, each with the file and line that sets its option, if a file does."""
    return [replace(each, place=_place(loaded.origins.get(each.subject, "")) or each.place) for each in problems]


def _place(origin: str) -> str:
    return "" if origin.startswith("--") or origin in ("default", "python") else origin


def _block(loaded: Loaded[Any], names: Iterable[str]) -> str:
    lines = {name: f"{name}: {_value(getattr(loaded.config, name))}" for name in names}
    width = min(max(map(len, lines.values()), default=0), 60)
    return "\n".join(f"{line:<{width}}  # {loaded.origins[name]}" for name, line in lines.items())


def _value(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(key)}: {_value(item)}" for key, item in value.items()) + "}"
    return _text(value) if isinstance(value, str) else _scalar(value)


def _scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    # YAML 1.1 reads 1e-05 as text and 1.0e-05 as a number.
    return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    import yaml

    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")
