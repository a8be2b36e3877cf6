"""Every spelling of an option, and the nearest ones to an unknown word.

Owns the table from a spelling (`norm_epsilon`, `layernorm_epsilon`, `no_swiglu`, `use_distributed_optimizer`) to the
option that it sets, and how, and that from a name of other programs to the option that it means. Flags and YAML keys
share the tables: a flag is its key with dashes."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cordee.config.option import Option, options_of
from cordee.errors import Problem, name_of


@dataclass(frozen=True)
class Spelling:
    """One way to write `option`: with its value, or alone (or with `true`), which sets `constant`."""

    option: Option
    flag: str
    kind: Literal["value", "negation", "shorthand"]
    constant: object = None


@functools.cache
def spellings(schema: type) -> dict[str, Spelling]:
    """All spellings of all options of `schema`, by key."""
    table: dict[str, Spelling] = {}
    for option in options_of(schema):
        for spelling in _spellings_of(option):
            known = table.setdefault(name_of(spelling.flag), spelling)
            assert known.option is option, f"{spelling.flag} means {option.name} and {known.option.name}"
    return table


@functools.cache
def elsewhere(schema: type) -> dict[str, Option]:
    """The option of `schema` that is meant by a name which only other programs have, such as transformers."""
    return {name: option for option in options_of(schema) for name in option.declared.elsewhere}


def _spellings_of(option: Option) -> Iterable[Spelling]:
    for flag in option.value_flags:
        yield Spelling(option, flag, "value")
    for flag in option.negations:
        yield Spelling(option, flag, "negation", False)
    for flag, constant in option.declared.shorthands.items():
        yield Spelling(option, flag, "shorthand", constant)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most like `word`, best first, then those that contain it (`batch_size`)."""
    import difflib

    known = sorted(known)
    alike = difflib.get_close_matches(word, known, n=count, cutoff=0.7)
    return list(dict.fromkeys([*alike, *[name for name in known if len(word) > 3 and word in name]]))[:count]


def unknown(option: str, word: str, known: Iterable[str], why: str) -> Problem:
    """The problem of a word that is not `known`; its limit are the known ones nearest to it."""
    near = tuple(nearest(word, known))
    fix = f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(sorted(known))}"
    return Problem(option, word, why, fix, "unknown", limit=near)
