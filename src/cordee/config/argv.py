"""The command line of one command: its flags, its help, and what was given.

Owns the argparse parser made from a schema. argparse splits the line and prints the help; values stay text, so that
missing values, types, choices and unknown flags are checked in one place with those of YAML files, and all at once."""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from cordee.config.option import Option, options_of
from cordee.config.values import Raw
from cordee.errors import Problem


@dataclass(frozen=True)
class CommandLine:
    """What a command line gives: `options` as (flag as written, text), `unknown` as (word, what follows it).

    The text of a switch, and of a flag whose value is missing, is ()."""

    options: list[tuple[str, Raw]]
    unknown: list[tuple[str, str]]
    files: tuple[str, ...]
    print_config: bool
    problems: list[Problem]


@dataclass(frozen=True)
class Teaching:
    """Head and foot of a command's help."""

    prog: str = "cordee"
    about: str = ""
    example: str = ""


def parse(schema: type, argv: Sequence[str], teaching: Teaching | None = None) -> CommandLine:
    """Split `argv` by the options of `schema`. `--help` prints and raises SystemExit(0): all options, or those that
    words after it are about."""
    given = argparse.Namespace(options=[], config=[], print_config=False, help=None)
    teaching = teaching or Teaching()
    try:
        given, rest = _parser(options_of(schema), teaching).parse_known_args(list(argv), given)
        problems = []
    except argparse.ArgumentError as error:
        rest = []
        problems = [Problem(error.argument_name or "command line", None, error.message, "see --help", "syntax")]
    if given.help is not None:
        _parser([option for option in options_of(schema) if _is_about(option, given.help)], teaching).print_help()
        raise SystemExit(0)
    return CommandLine(given.options, list(_unknown(rest)), tuple(given.config), given.print_config, problems)


class _Collect(argparse.Action):
    """Appends the flag as it was written, and its values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string or values is not None:  # else a positional that is not given
            flag = option_string or self.dest
            namespace.options.append((flag, values if isinstance(values, str) else tuple(values or ())))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps words whole, for searching, and shows of values the metavar alone: to argparse every value is optional."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        assert isinstance(action.metavar, str)
        return action.metavar


def _is_about(option: Option, words: Sequence[str]) -> bool:
    """Whether each of `words` is part of its names, here or in other programs, of its help or of its group."""
    names = (*option.value_flags, *option.negations, *option.declared.shorthands, *option.declared.elsewhere)
    text = " ".join((option.group, option.declared.help, *names)).lower().replace("_", "-")
    return all(word.lower().lstrip("-").replace("_", "-") in text for word in words)


def _parser(options: Sequence[Option], teaching: Teaching) -> argparse.ArgumentParser:
    positionals = [option for option in options if option.declared.positional]
    parser = argparse.ArgumentParser(
        prog=teaching.prog,
        usage=" ".join([teaching.prog, *(_metavar(o) for o in positionals), "[--config run.yaml] [options]"]),
        description=teaching.about,
        epilog=f"example:\n  {teaching.example}" if teaching.example else None,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34),
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    _add_general(parser)
    for group, members in groupby(options, key=lambda option: option.group):
        title, _, text = group.partition(": ")
        section = parser.add_argument_group(title, text or None)
        for option in members:
            _add(section, option)
    return parser


def _add_general(parser: argparse.ArgumentParser) -> None:
    section = parser.add_argument_group("General", "[...] in a help text: what holds where the option is not given")
    section.add_argument("-h", "--help", nargs="*", metavar="[WORD ...]", help="show this, or the options about it")
    section.add_argument("--config", nargs="+", action="extend", metavar="FILE ...", help="YAML of options; later wins")
    section.add_argument("--print-config", action="store_true", help="write all options and their origin as YAML, stop")


def _add(section: argparse._ArgumentGroup, option: Option) -> None:
    nargs = 0 if option.is_switch else "?" if option.shape == "one" else "*"
    form: dict[str, Any] = {"action": _Collect, "dest": option.name, "nargs": nargs}
    if not option.is_switch:
        form["metavar"] = _metavar(option)
    if option.declared.positional:
        section.add_argument(**form, help=_help(option))
        section.add_argument(*option.value_flags, **form, help=argparse.SUPPRESS)
        return
    shown = [option.flag]
    if option.kind is bool and option.default is not False:
        shown.append(option.negations[0])
    hidden = [flag for flag in (*option.value_flags, *option.negations) if flag not in shown]
    section.add_argument(*shown, **form, help=_help(option))
    if hidden:
        section.add_argument(*hidden, **form, help=argparse.SUPPRESS)
    for flag, constant in option.declared.shorthands.items():
        section.add_argument(flag, action=_Collect, nargs=0, help=f"the same as {option.flag} {constant}")


def _metavar(option: Option) -> str:
    choices = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else ""
    one = option.declared.metavar or choices or {int: "N", float: "X"}.get(option.kind, "TEXT")
    if option.length:
        return " ".join([one] * option.length)
    return one if option.shape == "one" else f"{one} ..."


def _help(option: Option) -> str:
    others = (*option.declared.aliases, *option.declared.negations)
    notes = [f"also {', '.join(others)}"] if others else []
    if option.required:
        notes.append("required")
    elif option.kind is bool and option.default is True:
        notes.append("default on")
    elif isinstance(option.default, tuple):
        notes += [f"default {' '.join(option.default)}"] if option.default else []
    elif isinstance(option.default, str | float) or type(option.default) is int:
        notes.append(f"default {option.default}")
    return (option.declared.help + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")


def _unknown(rest: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The words that belong to no option, in groups: each unknown flag with what follows it."""
    words: list[str] = []
    for word in rest:
        if words and (word.startswith("-") or "=" in words[0]):
            yield words[0], " ".join(words[1:])
            words = []
        words.append(word)
    if words:
        yield words[0], " ".join(words[1:])
