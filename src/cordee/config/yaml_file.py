"""YAML files as text: keys, values and the line each stands on.

Owns reading a run file. Scalars stay text (the option's declaration gives them a type, see `values`), so YAML's
surprises (`1e-5` as text, `no` as false) do not reach a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from cordee.config.values import Raw, Unfit
from cordee.errors import Problem
from cordee.files import read_text

_NULLS = ("", "~", "null", "Null", "NULL")


class Entry(NamedTuple):
    """One top-level key: its value, or why no option could take that."""

    key: str
    value: Raw | Unfit
    line: int


def read(path: str) -> tuple[list[Entry], list[Problem]]:
    """Entries of the file in order, and what is wrong with the file as such."""
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        why = f"the file cannot be read: {reason}"
        return [], [Problem("--config", path, why, "give a readable YAML file", "unreadable")]
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        return [], [_syntax_problem(path, error)]
    except RecursionError:
        why = "the file is nested too deeply, but options are flat"
        return [], [Problem("--config", path, why, "write one option per line", "nested")]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        why = "the file does not hold `option: value` lines"
        return [], [Problem("--config", path, why, "write one option per line", "syntax")]
    entries = list(_entries(root))
    return entries, list(_repeated(path, entries))


def _entries(root: yaml.MappingNode) -> Iterator[Entry]:
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        try:
            raw: Raw | Unfit = _raw(value)
        except Unfit as unfit:
            raw = unfit
        yield Entry(name, raw, key.start_mark.line + 1)


def _raw(node: yaml.Node) -> Raw:
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _NULLS else node.value
    if isinstance(node, yaml.SequenceNode):
        return tuple(_item(item) for item in node.value)
    assert isinstance(node, yaml.MappingNode)
    return {_item(key): _item(value) for key, value in node.value}


def _item(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    raise Unfit("nested, but options are flat", "write the inner options at the top level of the file", "nested")


def _repeated(path: str, entries: list[Entry]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for entry in entries:
        if entry.key in first:
            line, place = first[entry.key], f"{path}:{entry.line}"
            why, fix = f"line {line} sets the same key", "keep one of the lines"
            yield Problem(entry.key, None, why, fix, "repeated", limit=line, place=place)
        first.setdefault(entry.key, entry.line)


def _syntax_problem(path: str, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else path
    why = f"the file is not YAML: {getattr(error, 'problem', None) or error}"
    return Problem("--config", where, why, "write `option: value` lines", "syntax")
