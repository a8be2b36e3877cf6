"""Problems that a user can fix: what is wrong, where, why, and what to do.

Owns the one error type that reaches a user as text instead of a traceback, what becomes of an error that the world
outside caused, and the laws between numbers that most checks are made of. Knows no option and no job."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

T = TypeVar("T")


def name_of(flag: str) -> str:
    """`seq_length` of `--seq-length`."""
    return flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Problem:
    """One thing a user has to fix.

    `option` is the flag, key or file it is about, `value` what was given there. `why` says what is wrong with it and
    `fix` what to do instead: prose for people, which nothing decides by.

    kind: which law is broken, "invalid" for what is a case of its own; the functions below have the others.
    involves: names of further options, a change of which may solve it too, or without which it is not known.
    limit: what `value` was held against.
    place: where the option was given, such as `run.yaml:3`, if not on the command line."""

    option: str
    value: object = field(hash=False)  # it may be anything that was given, a list too
    why: str
    fix: str
    kind: str = "invalid"
    involves: Collection[str] = field(default=(), hash=False)
    limit: object = field(default=None, hash=False)
    place: str = ""

    @property
    def subject(self) -> str:
        """Name of the option: `seq_length` of `--seq-length`."""
        return name_of(self.option)

    @property
    def names(self) -> frozenset[str]:
        """Names of all options that it is about."""
        return frozenset((self.subject, *self.involves))

    def involving(self, *names: str) -> Self:
        """The same problem, about these options too."""
        return replace(self, involves=(*self.involves, *names))

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        value = "" if self.value is None else f" = {self.value}"
        return f"{self.option}{place}{value}\n    why: {self.why}\n    fix: {self.fix}"


Problems: TypeAlias = Iterator[Problem]


class ProblemError(ValueError):
    """All problems found at once. Never raised empty.

    `exit_code` is that of a process which it ends. `everywhere`: every rank raises it alike, so one may speak for all.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Iterable[Problem], everywhere: bool = False):
        self.problems = list(problems)
        self.everywhere = everywhere
        assert self.problems, "ProblemError needs at least one problem"
        super().__init__(self.problems)

    @classmethod
    def of(cls, option: str, value: object, why: str, fix: str, *more: Any, **details: Any) -> Self:
        """With one `Problem`, of these fields."""
        return cls([Problem(option, value, why, fix, *more, **details)])

    def __str__(self) -> str:
        return "\n".join(f"{n}. {problem}" for n, problem in enumerate(self.problems, 1))

    def __reduce__(self):
        return type(self), (self.problems, self.everywhere)


# What files, places and texts can cause wherever they are touched, whatever was checked before.
OUTSIDE = (OSError, UnicodeError)


def problem_of(error: OSError | UnicodeError) -> Problem:
    """What the world outside caused, about the file that the error names, if it names one."""
    if isinstance(error, OSError):
        fix = "check that it is there, that its name is valid and that it may be used as meant"
        named = error.filename is not None
        name, why = (str(error.filename), error.strerror or str(error)) if named else ("system", str(error))
        return Problem(name, None, why or type(error).__name__, fix, "outside")
    return Problem("text", None, str(error), "give text in UTF-8", "outside")


class RankLostError(ProblemError):
    """Other ranks are gone or do not answer. The cause is theirs, so its exit code differs from that of a failure."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command may work the next time


@dataclass
class Findings:
    """What is wrong, and what a person should know, as far as checks have come: they go on after a problem, and after
    what was caused from `OUTSIDE`."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[[], T], involves: Collection[str] = ()) -> T | None:
        """What `function` returns; None if it finds problems instead, each of which is about `involves` too."""
        try:
            return function()
        except ProblemError as error:
            found = error.problems
        except OUTSIDE as error:
            found = [problem_of(error)]
        self.problems += [problem.involving(*involves) for problem in found]
        return None


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise `ProblemError` with all `problems` if there are any."""
    if problems := list(problems):
        raise ProblemError(problems)


def unique(problems: Iterable[Problem]) -> list[Problem]:
    """Of problems that say the same, one law about one option in whatever words, the first."""
    found: dict[object, Problem] = {}
    for problem in problems:
        law = (problem.subject, problem.kind, str(problem.limit))
        found.setdefault(problem if problem.kind == "invalid" else law, problem)
    return list(found.values())


# Each yields a problem where it is broken. `what` says what a number counts, `involves` names other options in it,
# `instead` is what else would do.


def divides(option: str, value: int, number: int, what: str, *involves: str, instead: str = "") -> Problems:
    """`value` must divide `number`."""
    if number % value:
        why, fix = f"{number} {what} are not divisible by {value}", either(f"give a divisor of {number}", instead)
        yield Problem(option, value, why, fix, "divides", involves, number)


def divisible(option: str, value: int, by: int, what: str, *involves: str, instead: str = "") -> Problems:
    """`value` must be a multiple of `by`."""
    if value % by:
        fix = either(f"give a multiple of {by}, such as {-(-value // by) * by}", instead)
        yield Problem(option, value, f"{value} is not divisible by {by} = {what}", fix, "divisible", involves, by)


def at_most(
    option: str, value: float | None, limit: float | None, what: str, *involves: str, instead: str = ""
) -> Problems:
    """`value`, where it is given, must not be above `limit`, where there is one."""
    if value is not None and limit is not None and value > limit:
        fix = either(f"give at most {limit}", instead)
        yield Problem(option, value, f"it is above {what}", fix, "at most", involves, limit)


def either(fix: str, instead: str) -> str:
    return f"{fix}, or {instead}" if instead else fix


def requires(option: str, value: object, needed: str, why: str, *involves: str) -> Problems:
    """`value`, where it is given, has a meaning only with what is `needed`, a flag; `why` says what is instead."""
    if given(value):
        fix = f"give {needed}, or leave this out"
        yield Problem(option, value, f"it has no effect: {why}", fix, "requires", involves, needed)


def excludes(option: str, value: object, other: str, other_value: object, why: str = "") -> Problems:
    """Not both options may be given."""
    if given(value) and given(other_value):
        why = why or f"{other} is given too"
        yield Problem(option, value, why, "give one of the two", "excludes", (name_of(other),), other)


def given(value: object) -> bool:
    """Whether an option was given something, 0 too."""
    return value is not None and value is not False and value not in ((), {}, "")
