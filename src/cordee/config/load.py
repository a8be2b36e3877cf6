"""Flags, YAML files and Python values to one checked configuration, with where each value came from.

Owns the order of precedence (defaults, a DeepSpeed file, files in order, flags, overrides) and finds every unknown
name, bad value and missing option before it raises. Judges each option alone; how options fit together is `check`'s
matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cordee.config.argv import CommandLine, Teaching, parse
from cordee.config.option import options_of, to_flag, to_key
from cordee.config.spelling import Spelling, nearest, spellings
from cordee.config.values import Raw, Unfit, convert, describe, to_boolean, to_raw
from cordee.errors import Problem, raise_all

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A configuration and, per option, its origin: `default`, `run.yaml:12`, `--lr`, `python` or `derived`.

    With `problems` it is only good for finding more of them: options in `doubtful` have stand-ins, so that problems
    with these mean nothing.
    """

    config: T
    origins: Mapping[str, str]
    print_config: bool = False
    problems: Sequence[Problem] = ()
    doubtful: Collection[str] = ()

    def derive(self, **values: object) -> Loaded[T]:
        """Fill in values that follow from the machine or from other options."""
        config: Any = self.config
        origins = {**self.origins, **dict.fromkeys(values, "derived")}
        return dataclasses.replace(self, config=dataclasses.replace(config, **values), origins=origins)


def load_config(
    schema: type[T],
    argv: Sequence[str] = (),
    *,
    files: Sequence[str] = (),
    overrides: Mapping[str, object] | None = None,
    teaching: Teaching | None = None,
) -> Loaded[T]:
    """Build a `schema` from YAML `files`, then those of `--config`, then the flags in `argv`, then `overrides`.

    Raises `ProblemError` with every problem there is. `--help` in `argv` prints the help and raises SystemExit(0).
    """
    loaded = load_as_far_as_possible(schema, argv, files=files, overrides=overrides, teaching=teaching)
    raise_all(loaded.problems)
    return loaded


def load_as_far_as_possible(
    schema: type[T],
    argv: Sequence[str] = (),
    *,
    files: Sequence[str] = (),
    overrides: Mapping[str, object] | None = None,
    teaching: Teaching | None = None,
) -> Loaded[T]:
    """As `load_config`, but what is wrong is noted, so that checks of the whole may find what else is.

    Raises `ProblemError` where that makes no sense: a source could not be read, or nothing can stand in for an option.
    """
    line = parse(schema, argv, teaching)
    collected = _Collected(schema)
    for path in (*files, *line.files):
        collected.add_file(path)
    collected.add_command_line(line)
    for key, value in (overrides or {}).items():
        collected.add_python(key, value)
    collected.add_deepspeed()
    collected.require_all()
    if collected.problems and not collected.stand_in():
        raise_all(collected.problems)
    config, problems = schema(**collected.values), tuple(collected.problems)
    return Loaded(config, collected.origins, line.print_config, problems, collected.doubtful)


def config_from_dict(schema: type[T], values: Mapping[str, object]) -> T:
    """Build a `schema` from Python values by option name. Raises `ProblemError` with every problem there is."""
    return load_config(schema, overrides=values).config


@dataclass(frozen=True)
class _Source:
    """Where a value stands: `label` names it in problems, `origin` in listings, `layer` tells sources apart."""

    label: str
    origin: str
    layer: str


class _Collected:
    """Values found so far, and what is wrong with them."""

    def __init__(self, schema: type):
        self.options = options_of(schema)
        self.table = spellings(schema)
        self.values: dict[str, object] = {o.name: o.default for o in self.options if not o.required}
        self.origins = dict.fromkeys((o.name for o in self.options), "default")
        self.problems: list[Problem] = []
        self._given: dict[str, tuple[str, Spelling]] = {}  # option -> layer and spelling that gave it last
        self.doubtful: set[str] = set()  # options whose values are wrong or missing, or may have been misspelled
        self._failed: set[str] = set()
        self._incomplete = False  # a source could not be read at all

    def add_file(self, path: str) -> None:
        from cordee.config import yaml_file  # PyYAML costs 15 ms, which a help text should not pay

        entries, problems = yaml_file.read(path)
        self.problems += problems
        self._incomplete |= not entries and bool(problems)
        for entry in entries:
            where = f"{path}:{entry.line}"
            self._add(entry.key, entry.value, _Source(f"{entry.key} ({where})", where, path))

    def add_command_line(self, line: CommandLine) -> None:
        self.problems += line.problems
        self._incomplete |= bool(line.problems)
        for flag, raw in line.options:
            name = flag if flag.startswith("--") else to_flag(flag)  # a positional is named by its field
            self._add(flag, raw, _Source(name, name, "the command line"))
        for word, rest in line.unknown:
            self.problems.append(self._unknown_word(word, rest))

    def add_python(self, key: str, value: object) -> None:
        try:
            raw: Raw | Unfit = to_raw(value)
        except Unfit as unfit:
            raw = unfit
        self._add(key, raw, _Source(key, "python", "python"))

    def add_deepspeed(self) -> None:
        """What the file of --deepspeed-config says of options that nothing else gives; `check` compares the others."""
        path = self.values.get("deepspeed_config")
        if not isinstance(path, str):
            return
        from cordee.config import deepspeed

        entries, problems = deepspeed.read(path)
        self.problems += problems
        self._incomplete |= bool(problems)
        for field, option, value in entries:
            if self.origins[option] == "default" and option not in self._failed:
                self._add(option, value, _Source(f"{field} ({path})", f"{path}: {field}", f"{path} {field}"))

    def require_all(self) -> None:
        """Report options that every run must give, once each and only if they cannot have been given badly."""
        for option in self.options:
            if option.name in self.values or option.name in self._failed or self._incomplete:
                continue
            fix = f"give {option.flag} on the command line or {option.name} in a --config file: {describe(option)}"
            self.problems.append(Problem(option.flag, None, f"it is required: {option.declared.help}", fix))

    def stand_in(self) -> bool:
        """Give options without a value one that offends nobody; False if that cannot be."""
        self.doubtful |= self._failed
        for option in self.options:
            if option.name not in self.values:
                if option.kind not in (int, float):
                    return False
                self.values[option.name] = option.kind(option.declared.at_least or 1)
                self.doubtful.add(option.name)
        return not self._incomplete

    def _add(self, key: str, raw: Raw | Unfit, source: _Source) -> None:
        spelling = self.table.get(to_key(key))
        if spelling is None:
            self.problems.append(self._unknown_key(key, raw, source))
            return
        name = spelling.option.name
        try:
            value = _value(spelling, raw)
            self._reject_contradiction(spelling, value, source)
        except Unfit as unfit:
            shown = None if isinstance(raw, Unfit) else _shown(raw)
            self.problems.append(Problem(source.label, shown, unfit.why, unfit.fix))
            self._failed.add(name)
            return
        self.values[name] = value
        self.origins[name] = source.origin
        self._given[name] = (source.layer, spelling)

    def _reject_contradiction(self, spelling: Spelling, value: object, source: _Source) -> None:
        """One source may not say two things; only a later flag of the same name overrides, as on any command line."""
        option = spelling.option
        layer, earlier = self._given.get(option.name, (None, None))
        if layer != source.layer or earlier is None:
            return
        if earlier.flag == spelling.flag and option.shape != "one":
            raise Unfit("the flag is given twice", "give all its values after one flag")
        switched = option.kind is bool and source.layer == "the command line"
        if earlier.flag != spelling.flag and not switched and self.values[option.name] != value:
            why = f"{to_key(earlier.flag)} in {layer} already says {self.values[option.name]} for the same option"
            raise Unfit(why, "keep one of the two")

    def _unknown_key(self, key: str, raw: Raw | Unfit, source: _Source) -> Problem:
        names = self._meant(key)
        fix = f"did you mean {' or '.join(names)}?" if names else "--help lists all options; remove this one"
        if isinstance(raw, Mapping):
            return Problem(source.label, None, "no such option, and options are flat", "move its keys to the top level")
        shown = None if isinstance(raw, Unfit) else _shown(raw)
        return Problem(source.label, shown, "no such option", fix)

    def _meant(self, key: str) -> list[str]:
        """What an unknown name may have been meant to be."""
        names = nearest(to_key(key), self.table)
        self.doubtful |= {self.table[name].option.name for name in names}
        return names

    def _unknown_word(self, word: str, rest: str) -> Problem:
        if not (word.startswith("-") and word.lstrip("-")[:1].isalpha()):
            return Problem(word, rest or None, "it belongs to no option", "put the flag that it belongs to before it")
        flag, _, value = word.partition("=")
        names = [to_flag(name) for name in self._meant(flag.lstrip("-"))]
        fix = f"did you mean {' or '.join(names)}?" if names else "--help lists all options; remove this one"
        return Problem(flag, value or rest or None, "no such option", fix)


def _value(spelling: Spelling, raw: Raw | Unfit) -> object:
    """What writing `raw` under this spelling sets. A flag of a switch carries no value: its `raw` is ()."""
    if isinstance(raw, Unfit):
        raise raw
    option = spelling.option
    is_switch = option.kind is bool and option.shape == "one"
    if spelling.kind == "value":
        return True if is_switch and raw == () else convert(option, raw)
    on = raw == () or to_boolean(raw)
    if spelling.kind == "negation":
        return not on
    if not on:
        raise Unfit(f"it can only be true, which sets {option.name} to {spelling.constant}", f"set {option.name}")
    return spelling.constant


def _shown(raw: Raw) -> str | None:
    if isinstance(raw, tuple):
        return " ".join(raw) or None
    return ", ".join(f"{k}: {v}" for k, v in raw.items()) if isinstance(raw, Mapping) else raw
