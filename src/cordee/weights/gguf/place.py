"""Where a file of GGUF is: how one is told from other models on disk. Knows no torch."""

from __future__ import annotations

from pathlib import Path

from cordee.errors import Problem, ProblemError
from cordee.weights.gguf.header import MAGIC

FILE = "model.gguf"  # what is written
_SUFFIX = ".gguf"


def recognises(path: Path) -> bool:
    """Whether `path` is such a file, or a directory that has one and no other weights."""
    if path.is_file():
        return path.suffix == _SUFFIX or _begins(path)
    others = any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.index.json"))
    return not others and any(path.glob(f"*{_SUFFIX}"))


def _begins(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def file_of(path: Path) -> Path:
    """The file itself. ProblemError if a directory has several."""
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{_SUFFIX}"))
    if len(found) > 1:
        why = f"it holds several files of GGUF: {', '.join(file.name for file in found)}"
        raise ProblemError([Problem("model directory", path, why, "give the path of one of them")])
    return found[0]
