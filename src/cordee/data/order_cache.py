"""Sample orders kept on disk, so that only the first start of a run computes them.

Owns where such arrays lie, how they get there (complete or not at all) and when they are not believed. Knows nothing
of what they mean."""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee import lock
from cordee.files import durable
from cordee.log import logger

Arrays = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

PATIENCE = 600.0  # seconds for which another process may build: one that is hung must not keep this one for ever
_POLL = 0.5
_NOT_KEPT = "The sample order cannot be kept in %s (%s); every start builds it anew."
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
    directory: Path | None, key: str, shapes: Shapes, build: Callable[[], Arrays], verified: bool = False
) -> Arrays:
    """The arrays that `build` makes, from `directory` if it holds them whole, else built and put there.

    Opening reads all bytes and compares them with the checksum at their end, unless they are `verified`: another
    process of this machine has just verified or built them. Of several processes that do this at the same time one
    builds, and the others wait for it, up to `PATIENCE` seconds. Without a directory, or where it cannot be written,
    nobody waits and the arrays stay in memory."""
    if directory is None:
        return build()
    paths = {name: directory / f"{key}-{name}.npy" for name in shapes}
    end, damaged, waiting = time.monotonic() + PATIENCE, None, False
    while True:
        if (state := _state(paths)) not in (None, damaged):
            try:
                known = verified and damaged is None and not waiting
                return {name: _open(path, shapes[name], known) for name, path in paths.items()}
            except _DAMAGE as error:
                damaged = state
                logger.warning("The sample order in %s is damaged (%s); it is built again.", directory, error)
        try:
            own = lock.acquire(directory / f".{key}.lock", patience=0)
        except lock.HeldError as who:
            if time.monotonic() > end:
                logger.warning("The sample order is built in memory: in %.0f s it was not by %s", PATIENCE, who)
                return build()
            if not waiting:
                logger.info("waiting for %s to build the sample order", who)
        except OSError as error:
            logger.warning(_NOT_KEPT, directory, error)
            return build()
        else:
            with own:
                return _build(directory, paths, shapes, build)
        waiting = True
        time.sleep(_POLL)


def _build(directory: Path, paths: Mapping[str, Path], shapes: Shapes, build: Callable[[], Arrays]) -> Arrays:
    """Build and keep the arrays that are not there whole by now; files that are stay, as others may have them open."""
    whole: Arrays = {}
    for name, path in paths.items():
        with suppress(*_DAMAGE):
            whole[name] = _open(path, shapes[name])
    if len(whole) == len(paths):
        return whole
    arrays = build()
    try:
        for name, path in paths.items():
            if name not in whole:
                _save(path, arrays[name])
                whole[name] = _open(path, shapes[name], verified=True)
        return whole
    except _DAMAGE as error:
        logger.warning(_NOT_KEPT, directory, error)
        return arrays


def _state(paths: Mapping[str, Path]) -> list[int] | None:
    """What changes when a file is replaced, in ns; None if not all are there."""
    with suppress(OSError):
        return [path.stat().st_mtime_ns for path in paths.values()]
    return None


def _open(path: Path, shape: tuple[int, ...], verified: bool = False) -> npt.NDArray[Any]:
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
    with durable(path) as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        file.write(_seal(path, np.memmap(file, np.uint8, "r")))
