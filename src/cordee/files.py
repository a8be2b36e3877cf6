"""How files of others are read and copied, and how own files appear.

Owns the distrust of files: a model directory is other people's, and a folder in which output is made may be shared.
Files are copied only from inside a model directory, and own files are made new, never written through what is there."""

import errno
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from cordee.errors import Problem, Problems
from cordee.log import logger

LARGEST = 2**30  # bytes of a file that is copied: tokenizers and licences have far fewer
LARGEST_JSON = 2**26  # bytes of a JSON file: twice the largest that belongs to a model
LARGEST_TEXT = 2**20  # bytes of a text that people write, such as a run file
LEVELS = 100  # of arrays and objects in a JSON file: what walks over its value need not fear for the stack
_NESTED = "it is nested too deeply"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BLOCK = 1 << 16  # bytes read at a time from a file's end


def read_text(path: Path) -> str:
    """A text of some lines, in UTF-8. ValueError if it is something else or has more than `LARGEST_TEXT` bytes; OSError
    if it cannot be read."""
    from_shell = path == Path("/dev/stdin") or path.parent == Path("/dev/fd")  # `--config <(...)`: has a writer
    with open(path, "rb") if from_shell else open_regular(path) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT:,} bytes")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file. ValueError if it holds something else, text that is none, a key with two values, more
    than `LEVELS` levels or more than `LARGEST_JSON` bytes; OSError if it cannot be read."""
    with open_regular(path) as file:
        return load_json(file)


def load_json(file: BinaryIO) -> Any:
    """The value in a file of JSON in UTF-8, from its beginning. As `read_json`."""
    if (size := file.seek(0, io.SEEK_END)) > LARGEST_JSON:
        raise ValueError(f"it has {size:,} bytes, more than {LARGEST_JSON:,}")
    file.seek(0)
    text = file.read(size).decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(_NESTED) from None
    if _deeper(value, LEVELS):
        raise ValueError(_NESTED)
    if _SURROGATE.search(text):  # two of them may be a character
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError if a key of it has two values, of which readers would take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs) and (several := sorted({key for key, value in pairs if found[key] != value})):
        raise ValueError(f"keys that stand twice in an object, with different values: {', '.join(several[:3])}")
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether arrays and objects are in more than `levels` of their kind."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        items = (item for each in layer for item in (each.values() if isinstance(each, dict) else each))
        if not (layer := [item for item in items if isinstance(item, dict | list)]):
            return False
    return True


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights as Hugging Face's libraries save them, whole or in part."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.index.json"))


def copy_files(files: Iterable[Path], target: Path) -> list[Path]:
    """Copy `files` of a model directory into the directory `target`, those that `left_out` has nothing against; which.

    The others are reported once, each with the reason. What already is a name of the same file stays. OSError if a
    copy cannot be made."""
    reasons, copied = {}, []
    for file in files:
        if os.path.realpath(file) == os.path.realpath(target / file.name):
            continue
        try:
            given = _open_inside(file)
        except (OSError, ValueError) as error:
            reasons[file] = error
            continue
        with given:
            _copy(given, target / file.name)
        copied.append(file)
    if reasons:
        logger.warning("not copied: %s", "; ".join(f"{file}: {why}" for file, why in reasons.items()))
    return copied


def left_out(file: Path) -> str | None:
    """Why the content of a file in a model directory must not get into output; None if it may."""
    try:
        _open_inside(file).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _open_inside(file: Path) -> BinaryIO:
    """A file of a model directory, opened to copy its content into output. ValueError if that must not be there.

    A link may lead anywhere inside the directory, or, from a snapshot of Hugging Face's cache, to the blobs of the
    same repository; else it would give away whatever the user can read. What is judged is what was opened, so that a
    link which changes meanwhile changes nothing."""
    directory = file.parent.resolve(strict=True)
    given = open_regular(file)
    try:
        at = Path(f"/proc/self/fd/{given.fileno()}")
        real = Path(os.readlink(at)) if at.is_symlink() else file.resolve(strict=True)
        if not real.is_relative_to(directory) and real.parent not in _blobs(directory):
            raise ValueError("it is a link to a file outside the model directory")
        if (size := os.fstat(given.fileno()).st_size) > LARGEST:
            raise ValueError(f"it has {size:,} bytes, more than {LARGEST:,}")
    except (OSError, ValueError):
        given.close()
        raise
    return given


def open_regular(file: Path) -> io.BufferedReader:
    """A regular file, opened. OSError for others too: a pipe would keep its reader until someone writes, and a device
    may have no end."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return open(descriptor, "rb")


def _blobs(directory: Path) -> Iterable[Path]:
    """Where the files of a snapshot are: `<repository>/snapshots/<revision>/...` beside `<repository>/blobs`."""
    snapshots = (above.parent for above in (directory, *directory.parents) if above.parent.name == "snapshots")
    return (folder.parent / "blobs" for folder in snapshots)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of the user's. OSError or ValueError if that fails."""
    with open_regular(source) as given:
        _copy(given, target)


def _copy(given: BinaryIO, target: Path) -> None:
    """Copy a file to a new `target`, which its owner may write, and no one else use more than the original."""
    with create_new(target, os.fstat(given.fileno()).st_mode & 0o666 | 0o600) as copy:
        shutil.copyfileobj(given, copy, 1 << 20)


class RangeFile(io.RawIOBase):
    """`size` bytes as a file to read: `read(start, length)` gets those that are asked for, never beyond the end."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        data = self._read(self._at, length) if length else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def is_within(path: str | Path | None, folder: str | Path) -> bool:
    """Whether `path` is `folder` or in it, by whatever links; None is nowhere."""
    return path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def unwritable(option: str, given: object, folder: Path) -> Problems:
    """Why nothing can be put in `folder`, which `option` asks for by `given`; it need not be there yet: who writes to
    it makes it."""
    folder = folder.absolute()
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))  # a link may lead nowhere
    if not place.is_dir():
        yield Problem(option, given, f"{place} is not a directory", "give another place", "unwritable")
    else:
        try:
            longest = os.pathconf(place, "PC_PATH_MAX"), os.pathconf(place, "PC_NAME_MAX")
            if len(os.fsencode(folder)) >= longest[0] or any(len(os.fsencode(p)) > longest[1] for p in folder.parts):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            with tempfile.TemporaryFile(dir=place):  # permissions tell neither of /proc nor of what is read-only
                pass
        except OSError as error:
            why, fix = f"{place} cannot be written to: {error.strerror}", "give a place that can be written to"
            yield Problem(option, given, why, fix, "unwritable")


def create_new(path: Path, mode: int = 0o666) -> BinaryIO:
    """A new file, open for reading and writing; what was at `path` is removed, and what a link there led to is left
    as it was. `mode`: permissions, from which the user's umask takes its part. OSError if that fails."""
    path.unlink(missing_ok=True)
    return cast(BinaryIO, open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "w+b"))


@contextmanager
def durable(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A stream to a file that is afterwards either the old or the new one, also after a power cut. OSError if not.

    `mode`: as for `create_new`."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        with create_new(scratch, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    except Exception:
        scratch.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Write a small file, which is `durable`."""
    with durable(path) as file:
        file.write(text.encode())


def end_last_line(path: Path) -> None:
    """Let a file of JSON lines, if there is one, end with a whole line: a last one that has no end gets it if it is a
    record, and is cut off if it is part of one."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = start = file.seek(0, io.SEEK_END)
        last = b""
        while start and b"\n" not in last:
            length = min(start, _BLOCK)
            start = file.seek(start - length)
            last = file.read(length) + last
        last = last.rpartition(b"\n")[2]
        if not last:
            return
        try:
            json.loads(last)
            file.seek(size)
            file.write(b"\n")
        except ValueError:
            file.truncate(size - len(last))
            logger.warning("%s ended inside a record, of which %d bytes were cut off", path, len(last))


def append_durably(path: Path, text: str) -> None:
    """Add `text` to the end of a file, which is made if need be; it is on the disk afterwards. OSError if not."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames inside a directory last through a power cut. OSError if that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a file, a directory with all that is in it, or a link without what it leads to, if there is one. OSError
    if that fails."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
