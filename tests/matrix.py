"""Samples of a matrix of cases: the others run on demand, by `make test ARGS='-m exhaustive'`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(rows: Iterable[Any], columns: Iterable[Any], *, whole: Iterable[Any] = (), per_row: int = 1) -> list[Any]:
    """Parameters (row, column): all columns of the rows in `whole`, of others `per_row`, other ones in every row."""
    columns, whole = list(columns), set(whole)
    params = []
    for number, row in enumerate(rows):
        chosen = {columns[(number * per_row + i) % len(columns)] for i in range(per_row)}
        for column in columns:
            taken = row in whole or column in chosen
            marks = () if taken else (pytest.mark.slow, pytest.mark.exhaustive)
            params.append(pytest.param(row, column, marks=marks, id=f"{row}-{column}"))
    return params


def on_demand(*cases: Any) -> list[Any]:
    """Cases of a parameter, a tuple for several, that are left to `-m exhaustive`."""
    marks = (pytest.mark.slow, pytest.mark.exhaustive)
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case in cases]
