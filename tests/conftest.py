"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What torch.compile keeps is not keyed by all that it depends on: a kernel for another instruction set gives NaN.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name

import pytest  # noqa: E402

from cordee.bench.pool import Pool  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden vectors and real data; a stranger's clone does not have it."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("needs the golden vectors and real data beside the checkout, which are not part of it")
    return SHARED


@pytest.fixture(scope="session")
def pool():
    """Warm worker processes for tests over several ranks."""
    with Pool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def untouched_logger():
    """Jobs set the logger up, also those of fixtures that live longer: every test finds it as at the import."""
    logger = logging.getLogger("cordee")
    _reset(logger)
    yield
    _reset(logger)


def _reset(logger: logging.Logger) -> None:
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
