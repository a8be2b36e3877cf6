"""What tests assert of problems: never their prose."""

from __future__ import annotations

import pytest

from cordee.errors import ProblemError


def facts(caught: pytest.ExceptionInfo[ProblemError]) -> list[tuple[str, object, str]]:
    """Option, value and kind of every problem."""
    return [(problem.option, problem.value, problem.kind) for problem in caught.value.problems]


def limits(caught: pytest.ExceptionInfo[ProblemError]) -> list[object]:
    """What each value was held against."""
    return [problem.limit for problem in caught.value.problems]
