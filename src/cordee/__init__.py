"""Cordée trains large language models end to end.

The names below are imported when first used, so that `import cordee` costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cordee.api import GPTModel, train
    from cordee.data.indexed import IndexedDataset
    from cordee.errors import ProblemError

__version__ = "0.1.0"
__all__ = ["GPTModel", "IndexedDataset", "ProblemError", "__version__", "train"]

_HOMES = {"GPTModel": "api", "IndexedDataset": "data.indexed", "ProblemError": "errors", "train": "api"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'cordee' has no attribute {name!r}")
    return getattr(import_module(f"cordee.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
