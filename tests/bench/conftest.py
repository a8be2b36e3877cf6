"""What tests of the benchmarks that compare layouts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cordee.bench import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory, pool) -> Path:
    """Data and initial weights of the tiny models."""
    path = tmp_path_factory.mktemp("tiny")
    pool.run(tiny.prepare, 1, str(path))
    return path
