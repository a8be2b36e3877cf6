"""Laws between options, declared in the attribute `laws` of a schema class.

Owns the forms of such laws, and the problems of a configuration that breaks them. Knows no option by name: a new
technique declares its options and their laws in one class. Laws with arithmetic stand beside what computes with it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from cordee import errors
from cordee.config.option import options_of, to_flag
from cordee.errors import Problem, Problems, given


class Wanted(NamedTuple):
    """A condition on an option's value: words that follow its flag, and a predicate."""

    words: str
    fits: Callable[[Any], bool]


GIVEN = Wanted("", given)
NOT_GIVEN = Wanted("not given", lambda value: not given(value))
POSITIVE = Wanted("above 0", bool)
SEVERAL = Wanted("2 or more", lambda value: (value or 1) > 1)


def but(value: object) -> Wanted:
    return Wanted(f"other than {value}", lambda given: given != value)


@dataclass(frozen=True)
class Law:
    """A law about each of the options `names`, where that is not at its default, or is "missing".

    `others`: conditions on other options, one of which is enough. `why`: the reason, where `others` is empty and the
    law never holds. `mutual`, of options that exclude each other: either replaces the other of an earlier source."""

    kind: Literal["missing", "requires", "excludes", "at most", "ignored"]
    names: tuple[str, ...]
    others: Mapping[str, Wanted]
    why: str = ""
    mutual: bool = True

    def holds(self, config: Any) -> bool:
        return any(wanted.fits(getattr(config, name)) for name, wanted in self.others.items())

    def reason(self, config: Any) -> str:
        """Why the law does not hold: "--zero-stage is 1"."""
        return self.why or ", ".join(_state(name, getattr(config, name)) for name in self.others)

    @property
    def remedy(self) -> str:
        """What lets the law hold: "--zero-stage 3"."""
        return " or ".join(f"{to_flag(name)} {wanted.words}".rstrip() for name, wanted in self.others.items())


def required_unless(*names: str, **others: object) -> Law:
    """These options must be given, unless another is so: `required_unless("prompt", prompts_file=GIVEN)`."""
    return Law("missing", names, _wanted(others))


def needs(*names: str, **others: object) -> Law:
    """These options require another to be so: `needs("keep_last", save=GIVEN)`."""
    return Law("requires", names, _wanted(others))


def ignored(*names: str, why: str = "", **others: object) -> Law:
    """These options are ignored unless another is so: `ignored("sgd_momentum", optimizer="sgd")`; or always: `why`.

    An ignored option is reported, but no problem: ported scripts are full of them."""
    return Law("ignored", names, _wanted(others), why)


def excludes(name: str, *others: str, mutual: bool = True) -> Law:
    """The option must not be given together with one of `others`.

    Of two sources, such as a file and the command line, the later one's is taken; if that is not `mutual`, as the
    option is only a detail of a run without the others, it replaces none of them."""
    return Law("excludes", (name,), dict.fromkeys(others, GIVEN), mutual=mutual)


def at_most(*names: str, other: str) -> Law:
    """The values of these options must not be above that of another, where both are given."""
    return Law("at most", names, {other: GIVEN})


def _wanted(others: Mapping[str, object]) -> dict[str, Wanted]:
    return {name: value if isinstance(value, Wanted) else _equal(value) for name, value in others.items()}


def _equal(value: object) -> Wanted:
    return Wanted("" if value is True else str(value), lambda given: given == value)


def _state(name: str, value: object) -> str:
    return f"{to_flag(name)} is {value}" if given(value) and value is not True else f"{to_flag(name)} is not given"


@functools.cache
def laws_of(schema: type) -> tuple[Law, ...]:
    """The laws that a schema class and its bases declare."""
    return tuple(law for base in schema.__mro__ for law in vars(base).get("laws", ()))


@functools.cache
def replaced(schema: type) -> Mapping[str, set[str]]:
    """The options that each option excludes, and replaces where an earlier source gives them."""
    found: dict[str, set[str]] = {option.name: set() for option in options_of(schema)}
    for law in laws_of(schema):
        for name, other in product(law.names, law.others if law.kind == "excludes" else ()):
            found[other].add(name)
            found[name] |= {other} if law.mutual else set()
    return found


def problems(config: Any, schema: type | None = None) -> Problems:
    """The problems of all options of `config` that break a law of its class, or of `schema`, one of its bases."""
    given_ones = changed_options(config)
    for law in laws_of(schema or type(config)):
        for name in law.names:
            flag, value = to_flag(name), getattr(config, name)
            if law.kind == "at most":
                (other,) = law.others
                limit = getattr(config, other)
                yield from errors.at_most(flag, value, limit, f"{to_flag(other)} {limit}", other)
            elif law.kind == "missing" and not given(value) and not law.holds(config):
                fix = errors.either("give it", law.remedy)
                yield Problem(flag, None, law.reason(config) or "there is no default", fix, law.kind, tuple(law.others))
            elif law.kind == "requires" and name in given_ones and not law.holds(config):
                yield from errors.requires(flag, value, law.remedy, law.reason(config), *law.others)
            elif law.kind == "excludes" and name in given_ones:
                for other in law.others:
                    yield from errors.excludes(flag, value, to_flag(other), getattr(config, other))


class Ignored(NamedTuple):
    """Options that are given and change nothing."""

    names: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"ignored: {', '.join(map(to_flag, self.names))} ({self.why})"


def ignored_options(config: Any) -> list[Ignored]:
    """All options that are given and change nothing, each once."""
    left, found = changed_options(config), []
    for law in laws_of(type(config)):
        if law.kind == "ignored" and not law.holds(config) and (names := [n for n in law.names if n in left]):
            left -= set(names)
            found.append(Ignored(tuple(names), law.reason(config)))
    return found


def changed_options(config: Any) -> set[str]:
    """The names of the options that are not at their default."""
    return {option.name for option in options_of(type(config)) if getattr(config, option.name) != option.default}
