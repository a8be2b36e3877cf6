"""Problems that a user can mend: what is wrong, where, why, and what to do.

Owns the one error type that reaches a user as text instead of a traceback. Knows nothing of options or jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing a user has to mend.

    `option` is the flag, key or file it is about, `value` what was given there, `why` what is wrong with it
    and `fix` what to do instead.
    """

    option: str
    value: object = field(hash=False)  # it may be a list, which has no hash
    why: str
    fix: str

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {self.value}"
        return f"{self.option}{value}\n    why: {self.why}\n    fix: {self.fix}"


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

    def __str__(self) -> str:
        return "\n".join(f"{n}. {problem}" for n, problem in enumerate(self.problems, 1))

    def __reduce__(self):
        return type(self), (self.problems, self.everywhere)


class RankLostError(ProblemError):
    """Other ranks are gone or do not answer. The cause is theirs, so its exit code is told from that of a failure."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command may work the next time


@dataclass
class Findings:
    """What is wrong, and what a person should know, as far as checks have come: they go on after a problem."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[[], T]) -> T | None:
        """What `function` returns; None if it finds problems instead."""
        try:
            return function()
        except ProblemError as error:
            self.problems += error.problems
            return None


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise `ProblemError` with all `problems` if there are any."""
    if problems := list(problems):
        raise ProblemError(problems)
