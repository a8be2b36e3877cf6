"""A store of objects in memory that fails as told: what no store promises not to do. And one that processes share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cordee.checkpoint.storage import Location, Storage

ROOT = "toy://bucket/run"


SHARED = "shared"


class Shared(LocalFileSystem):
    """Files, spoken to as a store is: `shared://` before a path."""

    protocol = SHARED

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{SHARED}://"))


fsspec.register_implementation(SHARED, Shared, clobber=True)


class Killed(BaseException):
    """The process ends here."""


class FaultyStorage(Storage):
    """Objects in a dict. Operation number `fail_at`, counted from 0, raises `error` instead of being done.

    tear: a write that fails leaves the first half of its object behind, a removal of a folder half of that; else an
    unfinished object is lost and the removal has removed nothing.
    before: called ahead of each operation with its name and URL.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # operation, URL, bytes
        self.fail_at: int | None = None
        self.tear = False
        self.error: type[BaseException] = Killed
        self.before: Callable[[str, str], None] = lambda operation, url: None

    @property
    def root(self) -> Location:
        return Location(self, ROOT)

    def arm(self, fail_at: int | None, tear: bool = False, error: type[BaseException] = Killed) -> None:
        self.requests.clear()
        self.fail_at, self.tear, self.error = fail_at, tear, error

    def _begin(self, operation: str, url: str, size: int = 0) -> bool:
        """Whether this operation is to fail."""
        self.before(operation, url)
        self.requests.append((operation, url, size))
        return self.fail_at == len(self.requests) - 1

    def _require(self, operation: str, url: str, size: int = 0) -> None:
        if self._begin(operation, url, size):
            raise self.error(f"{operation} {url}")

    def list(self, folder: str) -> list[str]:
        self._require("list", folder)
        inside = [url.removeprefix(folder + "/") for url in self.objects if url.startswith(folder + "/")]
        return sorted({name.partition("/")[0] for name in inside})

    def size(self, url: str) -> int | None:
        self._require("size", url)
        return len(self.objects[url]) if url in self.objects else None

    def read(self, url: str, start: int, length: int) -> bytes:
        self._require("read", url, length)
        if url not in self.objects:
            raise FileNotFoundError(url)
        return self.objects[url][start : start + length]

    @contextmanager
    def write(self, url: str, mode: int = 0o666) -> Iterator[BinaryIO]:
        stream, fails = io.BytesIO(), self._begin("write", url)
        yield stream
        data = stream.getvalue()
        if fails and self.tear:
            self.objects[url] = data[: len(data) // 2]
        if fails:
            raise self.error(f"write {url}")
        self.objects[url] = data

    def delete(self, url: str) -> None:
        found = [name for name in self.objects if name == url or name.startswith(url + "/")]
        fails = self._begin("delete", url)
        for name in found[: len(found) // 2 if self.tear else 0] if fails else found:
            del self.objects[name]
        if fails:
            raise self.error(f"delete {url}")
