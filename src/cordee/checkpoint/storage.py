"""Where checkpoints are kept: the local file system, or a store of objects behind a URL.

Owns what is asked of either (`Storage`), the local one, the stores that `fsspec` knows (s3, gs, abfs, hdfs, memory,
...), and a location in one, which is read like a path of pathlib. Knows neither torch nor checkpoints: how one is
committed is in `directory.py`.

What is assumed of a store: who reads an object after its `write` has ended sees all of it, and after `delete` nothing.
Not assumed, but had by the local file system (`renames`): renaming, an atomic overwrite, that an object whose `write`
did not end is absent, and that `list` shows what was written a moment ago."""

import importlib.util
import io
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, cast

from cordee.errors import ProblemError
from cordee.files import RangeFile, durable, open_regular, remove_tree, sync_directory

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
_HERE = ("file", "local")  # schemes of what is on this machine, as fsspec calls it
BUFFER = 1 << 16  # bytes that are read at least, from where one is looking for something


class Storage(ABC):
    """Objects by their URL. OSError, FileNotFoundError where that is the reason, if an operation fails.

    renames: it has `rename`, and an overwrite is atomic."""

    renames: ClassVar[bool] = False

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Names of the objects and folders directly in a folder; none if there is no such folder."""

    @abstractmethod
    def size(self, url: str) -> int | None:
        """Bytes of an object; None if there is none (a folder is none)."""

    @abstractmethod
    def read(self, url: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length` of an object, fewer where it ends before."""

    @abstractmethod
    def write(self, url: str, mode: int = 0o666) -> AbstractContextManager[BinaryIO]:
        """A stream to an object, which is there in place of an older one once the context has been left.

        `mode`: permissions, less those that the user's umask takes, where objects have any of their own."""

    @abstractmethod
    def delete(self, url: str) -> None:
        """Remove an object, or a folder with all that is in it, if it is there."""

    def open(self, url: str) -> BinaryIO:
        """An object as a file to read; only what is asked for is transferred, `BUFFER` bytes at least."""
        if (size := self.size(url)) is None:
            raise FileNotFoundError(f"{url} is missing")
        return cast(BinaryIO, io.BufferedReader(RangeFile(size, partial(self.read, url)), BUFFER))

    def rename(self, url: str, new: str) -> None:
        """Give a folder another URL, at which nothing is."""
        raise NotImplementedError(f"{type(self).__name__} renames nothing")

    def path(self, url: str) -> Path | None:
        """Where an object or folder lies on this machine; None if it does not."""
        return None


@dataclass(frozen=True)
class LocalStorage(Storage):
    """The local file system; URLs are paths. What was written, renamed or removed is so after a power cut too."""

    renames: ClassVar[bool] = True

    def list(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted(os.listdir(folder))
        return []

    def size(self, url: str) -> int | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(url)
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        return None

    def read(self, url: str, start: int, length: int) -> bytes:
        with self.open(url) as file:
            file.seek(start)
            return file.read(length)

    def write(self, url: str, mode: int = 0o666) -> AbstractContextManager[BinaryIO]:
        path = Path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        return durable(path, mode)

    def delete(self, url: str) -> None:
        remove_tree(Path(url))

    def open(self, url: str) -> BinaryIO:
        return open_regular(Path(url))

    def rename(self, url: str, new: str) -> None:
        os.rename(url, new)
        sync_directory(Path(new).parent)

    def path(self, url: str) -> Path | None:
        return Path(url)


@dataclass(frozen=True)
class Location:
    """An object or folder in a storage, by its URL without a slash at its end, with what reading takes of `Path`."""

    storage: Storage
    url: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.storage, os.path.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return os.path.basename(self.url)

    @property
    def parent(self) -> "Location":
        return Location(self.storage, os.path.dirname(self.url) or ".")

    @property
    def local(self) -> Path | None:
        """The path of what is on this machine, for what takes nothing else; None in a store."""
        return self.storage.path(self.url)

    def size(self) -> int | None:
        """Bytes of an object; None if there is none."""
        return self.storage.size(self.url)

    def is_file(self) -> bool:
        return self.size() is not None

    def is_dir(self) -> bool:
        """Whether it is a folder that something is in."""
        return bool(self.storage.list(self.url))

    def iterdir(self) -> "Iterator[Location]":
        return (self / name for name in self.storage.list(self.url))

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        return self.storage.open(self.url)

    def write(self, mode: int = 0o666) -> AbstractContextManager[BinaryIO]:
        return self.storage.write(self.url, mode)

    def write_text(self, text: str) -> None:
        with self.write() as file:
            file.write(text.encode())

    def delete(self) -> None:
        self.storage.delete(self.url)

    def rename(self, new: "Location") -> None:
        self.storage.rename(self.url, new.url)

    def resolve(self) -> "Location":
        """The same place by the one name that it has without links."""
        return self if self.local is None else Location(self.storage, os.path.realpath(self.url))


@dataclass(frozen=True)
class FsspecStorage(Storage):
    """What fsspec's file system for the URLs that begin as `root` does. Credentials are where its package looks for
    them, or in fsspec's own configuration (~/.config/fsspec, FSSPEC_S3_KEY and the like)."""

    root: str = field(compare=False)  # locations are compared by their own URLs

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
    def write(self, url: str, mode: int = 0o666) -> Iterator[BinaryIO]:
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
    except (OSError, ImportError, MemoryError, ProblemError):  # the last is of whoever is writing
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_url(given: str) -> bool:
    """Whether something is a URL with a scheme."""
    return _URL.fullmatch(given) is not None


def local_path(given: str) -> Path | None:
    """The path of what is on this machine, `file://` before it or not; None for a URL of a store."""
    match = _URL.fullmatch(given)
    return Path(match[2] if match else given) if match is None or match[1] in _HERE else None


def location_of(given: str | Path | Location, option: str = "--load") -> Location:
    """What `given` names: a URL something in a store, a plain path or one behind `file://` something on this machine.

    ProblemError, about `option`, if a package that such a store needs is missing, or nobody knows the scheme."""
    if isinstance(given, Location):
        return given
    if (path := local_path(str(given))) is not None:
        if is_url(str(given)) and not path.is_absolute():
            why, fix = ("it names a host, or no whole path", "give file:/// and the path from the root, or a path")
            raise ProblemError.of(option, str(given), why, fix, "host")
        return Location(LocalStorage(), str(path))
    scheme = str(given).partition("://")[0]
    why, fix = None, 'pip install "cordee[storage]"'
    if importlib.util.find_spec("fsspec") is None:
        why = f"the package fsspec, which reads and writes {scheme}, is not installed"
    else:
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            why, fix = f"a package is missing: {error}", "install the package that it names with pip"
        except ValueError:
            why, fix = f"fsspec knows no {scheme}", f"give one of {', '.join(fsspec.available_protocols())}"
    if why is not None:
        raise ProblemError.of(option, str(given), why, fix)
    url = str(given).rstrip("/")
    return Location(FsspecStorage(url), url)


@contextmanager
def reached(option: str, given: str) -> Iterator[None]:
    """ProblemError, about `option`, where a location cannot be reached or refuses."""
    try:
        yield
    except OSError as error:
        fix = "check the address, the network and the credentials, or give another place"
        raise ProblemError.of(option, given, f"it cannot be read or written: {error}", fix) from error
