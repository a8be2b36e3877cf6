"""Flags, YAML files and Python values to one checked configuration, with where each value came from.

Owns the order of precedence (defaults, files that options name, files in order, flags, overrides), also among options
that exclude each other, and finds every unknown name, bad value and missing option before it raises. Judges each option
alone; how options fit together is said by their laws."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Generic, TypeVar

from cordee.config import laws
from cordee.config.argv import CommandLine, Teaching, parse
from cordee.config.option import options_of, to_flag
from cordee.config.spelling import Spelling, elsewhere, nearest, spellings
from cordee.config.values import Raw, Unfit, convert, describe, to_boolean, to_raw
from cordee.errors import Problem, given, name_of, raise_all

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A configuration and, per option, its origin: `default`, `run.yaml:12`, `--lr`, `python` or `derived`.

    With `problems` the configuration only serves to find more of them: the options that these name have stand-ins, so
    further problems of those options mean nothing. `notes`: which values another option's of a later source replaced.
    """

    config: T
    origins: Mapping[str, str]
    print_config: bool = False
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()

    def derive(self, **values: object) -> "Loaded[T]":
        """Set values that follow from the machine or from other options."""
        config: Any = self.config
        origins = {**self.origins, **dict.fromkeys(values, "derived")}
        return replace(self, config=replace(config, **values), origins=origins)


def load_config(
    schema: type[T],
    argv: Sequence[str] = (),
    *,
    overrides: Mapping[str, object] | None = None,
    teaching: Teaching | None = None,
) -> Loaded[T]:
    """Build a `schema` from the YAML files of `--config`, then the flags in `argv`, then `overrides`.

    Raises `ProblemError` with every problem there is. `--help` in `argv` prints the help and raises SystemExit(0)."""
    loaded = load_as_far_as_possible(schema, argv, overrides=overrides, teaching=teaching)
    raise_all(loaded.problems)
    return loaded


def load_as_far_as_possible(
    schema: type[T],
    argv: Sequence[str] = (),
    *,
    overrides: Mapping[str, object] | None = None,
    teaching: Teaching | None = None,
) -> Loaded[T]:
    """As `load_config`, but with the problems in `Loaded.problems`, so that checks of the whole run may find others.

    Raises `ProblemError` where a source could not be read, or nothing can stand in for an option."""
    line = parse(schema, argv, teaching)
    collected = _Collected(schema)
    for path in line.files:
        collected.add_file(path)
    collected.add_command_line(line)
    for key, value in (overrides or {}).items():
        collected.add_python(key, value)
    collected.add_referenced()
    collected.require_all()
    if collected.problems and not collected.stand_in():
        raise_all(collected.problems)
    return Loaded(schema(**collected.values), collected.origins, line.print_config, collected.problems, collected.notes)


def config_from_dict(schema: type[T], values: Mapping[str, object]) -> T:
    """Build a `schema` from Python values by option name. Raises `ProblemError` with every problem there is."""
    return load_config(schema, overrides=values).config


@dataclass(frozen=True)
class _Source:
    """Where a value is given: `label` and `place` for problems, `origin` for listings, `layer` to compare sources."""

    label: str
    origin: str
    layer: str
    place: str = ""


class _Collected:
    """Values found so far, and their problems."""

    def __init__(self, schema: type):
        self.options = options_of(schema)
        self.table = spellings(schema)
        self.elsewhere = elsewhere(schema)
        self.replaced = laws.replaced(schema)
        self.values: dict[str, object] = {o.name: o.default for o in self.options if not o.required}
        self.origins = dict.fromkeys((o.name for o in self.options), "default")
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._given: dict[str, tuple[str, Spelling]] = {}  # option -> layer and spelling that gave it last
        self._failed: set[str] = set()
        self._incomplete = False  # a source could not be read at all

    def add_file(self, path: str) -> None:
        from cordee.config import yaml_file  # PyYAML costs 15 ms, which a help text should not pay

        entries, problems = yaml_file.read(path)
        self.problems += problems
        self._incomplete |= not entries and bool(problems)
        for entry in entries:
            where = f"{path}:{entry.line}"
            self._add(entry.key, entry.value, _Source(entry.key, where, path, where))

    def add_command_line(self, line: CommandLine) -> None:
        self.problems += line.problems
        self._incomplete |= bool(line.problems)
        for flag, raw in line.options:
            name = flag if flag.startswith("--") else to_flag(flag)  # a positional is named by its field
            spelling = self.table[name_of(flag)]
            missing = raw == () and spelling.kind == "value" and not spelling.option.is_switch
            value = Unfit("no value follows it", f"give {describe(spelling.option)}", "missing") if missing else raw
            self._add(flag, value, _Source(name, name, "the command line"))
        for word, rest in line.unknown:
            self.problems.append(self._unknown_word(word, rest))

    def add_python(self, key: str, value: object) -> None:
        try:
            raw: Raw | Unfit = to_raw(value)
        except Unfit as unfit:
            raw = unfit
        self._add(key, raw, _Source(key, "python", "python"))

    def add_referenced(self) -> None:
        """Options that others set by their value, such as a file; whatever else sets them wins."""
        for option in self.options:
            path = self.values.get(option.name)
            if option.declared.reads is None or not isinstance(path, str):
                continue
            module, _, function = option.declared.reads.partition(":")
            entries, problems = getattr(import_module(module), function)(path, self.values, self._given.keys())
            self.problems += problems
            for field, name, value in entries:
                excluded = any(name in self.replaced[other] and given(self.values[other]) for other in self._given)
                if self.origins[name] == "default" and name not in self._failed and not excluded:
                    self._add(name, value, _Source(field, f"{path}: {field}", f"{path} {field}", path))

    def require_all(self) -> None:
        """Report required options that are not given, once each and only if they cannot have been given badly."""
        for option in self.options:
            if option.name in self.values or option.name in self._failed or self._incomplete:
                continue
            fix = f"give {option.flag} on the command line or {option.name} in a --config file: {describe(option)}"
            why = f"the option is required: {option.declared.help}"
            self.problems.append(Problem(option.flag, None, why, fix, "missing"))

    def stand_in(self) -> bool:
        """Set options without a value to one that breaks no law; False if there is none."""
        for option in self.options:
            if option.name not in self.values:
                if option.kind not in (int, float):
                    return False
                self.values[option.name] = option.kind(option.declared.at_least or 1)
        return not self._incomplete

    def _add(self, key: str, raw: Raw | Unfit, source: _Source) -> None:
        spelling = self.table.get(name_of(key))
        if spelling is None:
            self.problems.append(self._unknown_key(key, raw, source))
            return
        name = spelling.option.name
        try:
            value = _value(spelling, raw)
            self._reject_contradiction(spelling, value, source)
        except Unfit as unfit:
            shown = None if isinstance(raw, Unfit) else _shown(raw)
            problem = Problem(source.label, shown, unfit.why, unfit.fix, unfit.kind, (name,), place=source.place)
            self.problems.append(problem)
            self._failed.add(name)
            return
        self.values[name] = value
        self.origins[name] = source.origin
        self._given[name] = (source.layer, spelling)
        for other in self.replaced[name] & self._given.keys() if given(value) else ():
            self._replace(other, source)

    def _replace(self, name: str, by: _Source) -> None:
        """Put an option that the one of source `by` excludes back to its default, unless that source gives both."""
        option = self.table[name].option
        if self._given[name][0] != by.layer:
            del self._given[name]
            if (value := self.values[name]) != option.default:
                self.notes.append(f"{by.label} replaces {name} {value} ({self.origins[name]})")
            self.values[name], self.origins[name] = option.default, "default"

    def _reject_contradiction(self, spelling: Spelling, value: object, source: _Source) -> None:
        """One source must set an option to one value; only a later flag of the same name overrides an earlier one."""
        option = spelling.option
        layer, earlier = self._given.get(option.name, (None, None))
        if layer != source.layer or earlier is None:
            return
        if earlier.flag == spelling.flag and option.shape != "one":
            raise Unfit("the flag is given twice", "give all its values after one flag", "repeated")
        switched = option.kind is bool and source.layer == "the command line"
        if earlier.flag != spelling.flag and not switched and self.values[option.name] != value:
            why = f"{name_of(earlier.flag)} in {layer} sets the same option to {self.values[option.name]}"
            raise Unfit(why, "keep one of the two", "excludes")

    def _unknown_key(self, key: str, raw: Raw | Unfit, source: _Source) -> Problem:
        shown = None if isinstance(raw, Unfit | Mapping) else _shown(raw)
        problem = replace(self._unknown(source.label, shown, key), place=source.place)
        if isinstance(raw, Mapping):
            return replace(problem, fix="options are flat: move the keys to the top level", kind="nested")
        return problem

    def _unknown_word(self, word: str, rest: str) -> Problem:
        if not (word.startswith("-") and word.lstrip("-")[:1].isalpha()):
            why, fix = "the word belongs to no option", "put the flag that it belongs to before it"
            return Problem(word, rest or None, why, fix, "unknown")
        flag, _, value = word.partition("=")
        return self._unknown(flag, value or rest or None, flag.lstrip("-"), to_flag)

    def _unknown(self, label: str, shown: str | None, key: str, write: Callable[[str], str] = str) -> Problem:
        """A problem that names the options that `key` may mean."""
        if (option := self.elsewhere.get(name_of(key))) is not None:
            self._failed.add(option.name)  # and is not missing
            why, fix = "another program's name", f"give {write(option.name)}: {option.declared.help}"
            return Problem(label, shown, why, fix, "unknown", [option.name], option.name)
        meant = nearest(name_of(key), self.table)
        fix = f"did you mean {' or '.join(map(write, meant))}?" if meant else "--help lists all; remove this one"
        return Problem(label, shown, "no such option", fix, "unknown", [self.table[name].option.name for name in meant])


def _value(spelling: Spelling, raw: Raw | Unfit) -> object:
    """The value that `raw` under this spelling sets. A flag of a switch has no value: its `raw` is ()."""
    if isinstance(raw, Unfit):
        raise raw
    option = spelling.option
    if spelling.kind == "value":
        return True if option.is_switch and raw == () else convert(option, raw)
    on = raw == () or to_boolean(raw)
    if spelling.kind == "negation":
        return not on
    if not on:
        why = f"the value can only be true, which sets {option.name} to {spelling.constant}"
        raise Unfit(why, f"set {option.name}", "choice")
    return spelling.constant


def _shown(raw: Raw) -> str | None:
    if isinstance(raw, tuple):
        return " ".join(raw) or None
    return ", ".join(f"{k}: {v}" for k, v in raw.items()) if isinstance(raw, Mapping) else raw
