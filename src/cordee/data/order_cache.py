"""Sample orders kept on disk, so that only the first start of a run computes them.

Owns where such arrays lie, how they get there (complete or not at all) and when they are not believed. Knows nothing
of what they mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee.files import create_new, sync_directory
from cordee.log import logger

Arrays = dict[str, npt.NDArray[Any]]

_SEAL = 4  # bytes of the checksum that ends a file
_DAMAGE = (ValueError, OSError, EOFError)


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
    verified: bool = False,
) -> Arrays:
    """The arrays that `build` makes, from `directory` if it holds them whole, else built and put there.

    Every opening reads all bytes and compares them with the checksum at their end, unless they are `verified`: another
    process of this machine has just verified or built them. Several processes may do this at
    the same time: one builds, and the others wait for it where the file system has locks; where it has none, each
    writes the same under its own name and renames. Without a directory, or where it cannot be written, the arrays
    stay in memory.
    """
    if directory is None:
        return build()
    paths = {name: directory / f"{key}-{name}.npy" for name in shapes}

    def kept(verified: bool = False) -> Arrays:
        return {name: _open(path, shapes[name], verified) for name, path in paths.items()}

    if all(path.is_file() for path in paths.values()):
        try:
            return kept(verified)
        except _DAMAGE as error:
            logger.warning("The sample order in %s is damaged (%s); it is built again.", directory, error)
    with _one_process(directory):
        with suppress(*_DAMAGE):  # another process has built it meanwhile
            return kept()
        arrays = build()
        try:
            for name, path in paths.items():
                _save(path, arrays[name])
            sync_directory(directory)
            return kept()
        except _DAMAGE as error:
            logger.warning("The sample order cannot be kept in %s (%s); every start builds it anew.", directory, error)
            return arrays


@contextmanager
def _one_process(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`, which is made if it can be; go on without where there is none."""
    with ExitStack() as stack:
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _open(path: Path, shape: tuple[int, ...], verified: bool) -> npt.NDArray[Any]:
    content = np.memmap(path, np.uint8, "r")
    if not verified and content[-_SEAL:].tobytes() != _seal(path, content[:-_SEAL]):
        raise ValueError(f"the checksum of {path.name} does not match")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape:
        raise ValueError(f"{path.name} has shape {array.shape} instead of {shape}")
    return np.asarray(array)


def _seal(path: Path, content: npt.NDArray[np.uint8]) -> bytes:
    """Checksum of what a file holds and of its name, which says what that was built from."""
    return zlib.crc32(path.name.encode(), zlib.crc32(content.data)).to_bytes(_SEAL, "little")


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with create_new(temporary) as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            file.write(_seal(path, np.memmap(temporary, np.uint8, "r")))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
