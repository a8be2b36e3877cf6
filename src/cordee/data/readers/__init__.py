"""Readers: files of text as streams of records.

Owns which reader reads which file, and what is read of a directory. A module in this package that has `EXTENSIONS` and
`read(path, keys)` is a reader; adding one adds its format. With `read_whole(path, keys)` it can also take a
file as one document."""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from cordee.data.readers.chunk import Chunk
from cordee.errors import Problem, ProblemError, either
from cordee.log import counted, logger

Reader = Callable[[Path, Sequence[str]], Iterator[Chunk]]


@cache
def readers(function: str = "read") -> dict[str, Reader]:
    """The reader of every file name extension that has such a function."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    known = [module for module in modules if hasattr(module, function)]
    return {ending: getattr(module, function) for module in known for ending in getattr(module, "EXTENSIONS", ())}


def read_file(path: Path, keys: Sequence[str], *, whole: bool = False) -> Iterator[Chunk]:
    """The records of one file, whose extension must be known, by `keys`; without any, each is one mapping of all that
    it has. `whole`: the file is one record."""
    ending = extension(path)
    assert ending is not None
    return readers("read_whole" if whole else "read")[ending](path, keys)


@contextmanager
def reading(option: str, given: object) -> Iterator[None]:
    """While a source is read that `option` names by `given`: ProblemError for files that cannot be read, and problems
    of readers, which know --input only, are about `option`."""
    try:
        yield
    except ProblemError as error:
        named = (replace(each, option=option) if each.option == "--input" else each for each in error.problems)
        raise ProblemError(named, error.everywhere) from error
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        why, fix = f"it cannot be read: {error.strerror or error}", "check that it is there, whole, and may be read"
        raise ProblemError.of(option, given, why, fix, kind) from error


def extension(path: Path) -> str | None:
    """The extension that names the format, such as `.jsonl.gz`, in whatever case; None if it is unknown."""
    name = path.name.lower()
    return next((ending for ending in sorted(readers(), key=len, reverse=True) if name.endswith(ending)), None)


def input_files(path: Path, instead: str = "", *, whole: bool = False) -> list[Path]:
    """The files to read, in the order of their paths: `path`, or those in the directory `path` and its subfolders that
    have the most frequent known extension, `whole` the most frequent of those of which a file is one document. Raises
    `ProblemError` if there are none; `instead` is what else could be given. OSError if a folder cannot be read."""
    files = _known_files(path, instead, preferred := readers("read_whole") if whole else {})
    if whole and (ending := extension(files[0])) not in preferred:
        raise ProblemError([no_whole_files(f"{ending} files")])
    return files


def no_whole_files(what: str) -> Problem:
    """That `what` is read holds documents, however it is cut in files."""
    why, formats = f"the documents of {what} are their records", tuple(readers("read_whole"))
    fix = f"give files that end in {' or '.join(formats)}, or leave it out: --json-keys names the fields that hold text"
    return Problem("--whole-files", True, why, fix, "format", limit=formats)


def _known_files(path: Path, instead: str, preferred: Collection[str]) -> list[Path]:
    known = ", ".join(ending for ending in readers() if not ending.endswith(".gz"))
    if path.is_file():
        if extension(path) is None:
            why = "the format of this file is unknown"
            fix = f"give a file that ends in {known}, or such with .gz"
            raise ProblemError.of("--input", path, why, fix, "format")
        return [path]
    if not path.is_dir():
        why, fix = "there is no such file or directory", either("check the path", instead)
        raise ProblemError.of("--input", path, why, fix, "missing")
    files = sorted(_files(path))
    counts = Counter(ending for file in files if (ending := extension(file)))
    if not counts:
        why = f"it holds no file that ends in {known}"
        raise ProblemError.of("--input", path, why, "check the path", "empty")
    chosen = max(counts, key=lambda ending: (ending in preferred, counts[ending]))
    others = [str(file.relative_to(path)) for file in files if extension(file) != chosen]
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        left = counted(len(others), "other file")
        logger.warning("Of %s only the files ending in %s are read; %s left out: %s", path, chosen, left, shown)
    return [file for file in files if extension(file) == chosen]


def _files(path: Path) -> Iterator[Path]:
    """All files below a directory, hidden ones left out; links are followed, but not into a folder that they are in."""
    waiting: list[tuple[Path, frozenset[Path]]] = [(path, frozenset())]
    while waiting:
        folder, around = waiting.pop()
        if (real := folder.resolve()) in around:
            continue
        for entry in folder.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append((entry, around | {real}))
            elif entry.is_file() and not (entry.suffix == ".json" and entry.with_suffix(".idx").exists()):
                yield entry  # the others are manifests of preprocessed data
