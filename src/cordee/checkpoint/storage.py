"""Where checkpoints are kept: the local file system, or a store of objects behind a URL.

Owns what is asked of such a store (`Storage`), the stores that `fsspec` knows (s3, gs, abfs, hdfs, memory, ...), and a
path in a store, which is read like one of pathlib. Knows neither torch nor checkpoints: how one is committed is in
`directory.py`.

What is assumed of a store: who reads an object after its `write` has ended sees all of it, and after `delete` nothing.
Not assumed: renaming, appending, an atomic overwrite, that an object whose `write` did not end is absent or whole, or
that `list` shows what was written a moment ago.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from cordee.errors import Problem, ProblemError
from cordee.files import RangeFile

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://.*", re.DOTALL)
BUFFER = 1 << 16  # bytes that are read at least, from where one is looking for something


class Storage(Protocol):
    """Objects by their URL. OSError, FileNotFoundError where that is the reason, if an operation fails."""

    def list(self, folder: str) -> list[str]:
        """Names of the objects and folders directly in a folder; none if there is no such folder."""
        ...

    def size(self, url: str) -> int | None:
        """Bytes of an object; None if there is none (a folder is none)."""
        ...

    def read(self, url: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length` of an object, fewer where it ends before."""
        ...

    def write(self, url: str) -> AbstractContextManager[BinaryIO]:
        """A stream to an object, which is there in place of an older one once the context has been left."""
        ...

    def delete(self, url: str) -> None:
        """Remove an object, or a folder with all that is in it, if it is there."""
        ...


@dataclass(frozen=True)
class StoragePath:
    """A URL in a store, without a slash at its end. It has what reading checkpoints takes of `pathlib.Path`."""

    storage: Storage
    url: str

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(self.storage, f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        return StoragePath(self.storage, self.url.rpartition("/")[0])

    def is_file(self) -> bool:
        return self.storage.size(self.url) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        return bool(self.storage.list(self.url))

    def iterdir(self) -> Iterator[StoragePath]:
        return (self / name for name in self.storage.list(self.url))

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The object as a file to read; only what is asked for is transferred, `BUFFER` bytes at least."""
        if (size := self.storage.size(self.url)) is None:
            raise FileNotFoundError(f"{self} is missing")
        read = partial(self.storage.read, self.url)
        return cast(BinaryIO, io.BufferedReader(RangeFile(size, read), BUFFER))

    def write(self) -> AbstractContextManager[BinaryIO]:
        return self.storage.write(self.url)

    def delete(self) -> None:
        self.storage.delete(self.url)


Place = Path | StoragePath


@dataclass(frozen=True)
class FsspecStorage:
    """What fsspec's file system for the URLs that begin as `root` does. Credentials are where its package looks for
    them, or in fsspec's own configuration (~/.config/fsspec, FSSPEC_S3_KEY and the like).
    """

    root: str

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        with _as_os_errors():
            return fsspec.url_to_fs(self.root)[0]

    def list(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError), _as_os_errors():
            here = self._fs._strip_protocol(folder).strip("/")  # which some list as an object in itself
            found = {str(name).strip("/") for name in self._fs.ls(folder, detail=False)} - {here}
            return sorted(name.rpartition("/")[2] for name in found)
        return []

    def size(self, url: str) -> int | None:
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError), _as_os_errors():  # `exists` would take every error for an absence
            found = self._fs.info(url)
            return found["size"] if found["type"] == "file" else None
        return None

    def read(self, url: str, start: int, length: int) -> bytes:
        with _as_os_errors():
            return self._fs.cat_file(url, start=start, end=start + length)

    @contextmanager
    def write(self, url: str) -> Iterator[BinaryIO]:
        with _as_os_errors():
            try:
                file = self._fs.open(url, "wb")
            except FileNotFoundError:  # where folders are more than names
                self._fs.makedirs(url.rpartition("/")[0], exist_ok=True)
                file = self._fs.open(url, "wb")
            with file:
                yield file

    def delete(self, url: str) -> None:
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError), _as_os_errors():
            self._fs.rm(url, recursive=True)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Every package has errors of its own for a store that does not answer or refuses."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_url(given: str) -> bool:
    """Whether a place is one in a store: a URL with a scheme."""
    return _URL.fullmatch(given) is not None


def place_of(given: str | Path | StoragePath, option: str = "--load") -> Place:
    """The place that `given` names: a URL with a scheme one in a store, anything else a local path.

    ProblemError, about `option`, if a package that such a store needs is missing, or nobody knows the scheme.
    """
    if isinstance(given, StoragePath) or (match := _URL.fullmatch(str(given))) is None:
        return given if isinstance(given, StoragePath) else Path(given)
    why, fix = None, 'pip install "cordee[storage]"'
    if importlib.util.find_spec("fsspec") is None:
        why = f"the package fsspec, which reads and writes {match[1]}, is not installed"
    else:
        import fsspec

        try:
            fsspec.get_filesystem_class(match[1])
        except ImportError as error:
            why, fix = f"a package is missing: {error}", "install the package that it names with pip"
        except ValueError:
            why, fix = f"fsspec knows no {match[1]}", f"give one of {', '.join(fsspec.available_protocols())}"
    if why is not None:
        raise ProblemError([Problem(option, str(given), why, fix)])
    url = str(given).rstrip("/")
    return StoragePath(FsspecStorage(url), url)


@contextmanager
def reached(option: str, given: str) -> Iterator[None]:
    """ProblemError, about `option`, where a place cannot be reached or refuses."""
    try:
        yield
    except OSError as error:
        fix = "check the address, the network and the credentials, or give another place"
        raise ProblemError([Problem(option, given, f"it cannot be read or written: {error}", fix)]) from error


def same(one: Place, other: Place) -> bool:
    """Whether two places are one; those that are not there are compared by name."""
    if isinstance(one, StoragePath) or isinstance(other, StoragePath):
        return str(one) == str(other)
    return one.absolute() == other.absolute() or (one.exists() and other.exists() and one.samefile(other))


def size_of(place: Place) -> int | None:
    """Bytes of a file or object; None if there is none."""
    if isinstance(place, StoragePath):
        return place.storage.size(place.url)
    return place.stat().st_size if place.is_file() else None
