"""Sample orders kept on disk, so that only the first start of a run computes them.

Owns where such arrays lie, how they get there (complete or not at all) and when they are not believed. Knows nothing
of what they mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee.files import create_new, sync_directory
from cordee.log import logger

Arrays = dict[str, npt.NDArray[Any]]


def content_key(**facts: object) -> str:
    """A name that only the same facts have: numbers, strings, lists and arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(facts):
        fact = facts[name]
        digest.update(f"{name}=".encode())
        if isinstance(fact, np.ndarray):
            digest.update(f"{fact.dtype}{fact.shape}".encode())
            digest.update(np.ascontiguousarray(fact).data)
        else:
            digest.update(json.dumps(fact).encode())
    return digest.hexdigest()


def cached_arrays(
    directory: Path | None,
    key: str,
    shapes: Mapping[str, tuple[int, ...]],
    build: Callable[[], Arrays],
) -> Arrays:
    """The arrays that `build` makes, from `directory` if it holds them whole, else built and put there.

    Several processes may do this at the same time: each writes under its own name and renames, and all write the
    same. Without a directory, or where it cannot be written, the arrays stay in memory.
    """
    if directory is None:
        return build()
    paths = {name: directory / f"{key}-{name}.npy" for name in shapes}
    if all(path.is_file() for path in paths.values()):
        try:
            return {name: _open(path, shapes[name]) for name, path in paths.items()}
        except (ValueError, OSError, EOFError) as error:
            logger.warning("The sample order in %s is damaged (%s); it is built again.", directory, error)
    arrays = build()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            _save(path, arrays[name])
        sync_directory(directory)
    except OSError as error:
        logger.warning("The sample order cannot be kept in %s (%s); every start builds it anew.", directory, error)
        return arrays
    return {name: _open(path, shapes[name]) for name, path in paths.items()}


def _open(path: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape:
        raise ValueError(f"{path.name} has shape {array.shape} instead of {shape}")
    return np.asarray(array)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with create_new(temporary) as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
