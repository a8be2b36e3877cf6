"""What a directory of checkpoints looks like, and which of its checkpoints are whole.

Owns names, the manifest and the order in which files appear and vanish, so that a process may be killed between any
two of them. Knows neither torch nor what a checkpoint holds.

    <root>/iter_0000010/             a whole checkpoint: its data files and cordee.json, the manifest
    <root>/latest_checkpointed_iteration.txt
    <root>/.iter_0000020.new         being written; never read
    <root>/.iter_0000020.old         being replaced or removed
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cordee import sealed
from cordee.files import remove_tree, sync_directory, write_durably
from cordee.log import logger

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "cordee.json"
FORMAT = 2  # 1 had no checksum: what was changed in it, and what its data were, nobody can tell any more
_FILE = sealed.record({"bytes": sealed.count(), "crc32": sealed.count()}, exact=True)
_MANIFEST = sealed.record(
    {
        "iteration": sealed.count(),
        "files": sealed.table(_FILE, r"(?!\.\.?$)[A-Za-z0-9._-]{1,255}", least=1),
    }
)
_NAME = re.compile(r"iter_([0-9]{7,18})")
_UNFINISHED = re.compile(r"\.(iter_[0-9]{7,18})\.(new|old)")
_THREADS = 4  # that read a checkpoint's files to check them; zlib lets others run meanwhile


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations of all checkpoints under `root`, whole or not, the newest first."""
    if not root.is_dir():
        return []
    found = (_iteration_of(path) for path in root.iterdir() if path.is_dir())
    return sorted((iteration for iteration in found if iteration is not None), reverse=True)


def _iteration_of(path: Path) -> int | None:
    """The iteration that the name of a directory says; None if it is no name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and name_of(int(match[1])) == path.name else None


def is_root(path: Path) -> bool:
    """Whether `path` is a directory that checkpoints were saved to."""
    return (path / TRACKER).is_file() or bool(iterations(path))


def damage(directory: Path, *, contents: Collection[str] = ()) -> str | None:
    """What is wrong with the checkpoint in `directory`, None if nothing is: a manifest that was changed, missing or
    short files, and changed bytes in the files named in `contents`, which are read for that.
    """
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        return str(error)
    named = _iteration_of(directory)
    if named is not None and manifest["iteration"] != named:
        return f"it is the checkpoint of iteration {manifest['iteration']}, which its name is not"
    sizes = (_misfit(directory / name, expected) for name, expected in manifest["files"].items())
    return next((why for why in sizes if why), None) or changed(directory, manifest, contents)


def _misfit(path: Path, expected: dict[str, int]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    return None if size == expected["bytes"] else f"{path.name} has {size} bytes instead of {expected['bytes']}"


def changed(directory: Path, manifest: dict[str, Any], names: Iterable[str]) -> str | None:
    """Which of the files `names` of a checkpoint has other bytes than were saved, in words; None if none has.

    They are read, several at a time, in blocks. A file that the manifest does not know counts as changed.
    """

    def fault(name: str) -> str | None:
        expected = manifest["files"].get(name)
        if expected is None:
            return f"{name} is none of its files"
        try:
            same = checksum(directory / name) == expected["crc32"]
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return None if same else f"{name} was changed: its checksum is not the one it was saved with"

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="checksum") as threads:
        return next((why for why in threads.map(fault, sorted(set(names))) if why), None)


def read_manifest(directory: Path, form: sealed.Form | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint, what is in it besides files of `form`; ValueError if it is not to be believed."""
    try:
        manifest = sealed.read(directory / MANIFEST, _MANIFEST, FORMAT)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if form is not None and (why := form(manifest)) is not None:
        raise ValueError(f"{MANIFEST} is of another form: {why}")
    return manifest


def file_entry(path: Path) -> dict[str, int]:
    """What the manifest keeps of a data file."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def tracked(root: Path) -> int | None:
    """The iteration that the tracker file names, None without that file; ValueError if it names none."""
    if not (root / TRACKER).exists():
        return None
    try:
        if not (root / TRACKER).is_file():
            raise OSError("it is no file")  # opening a named pipe would wait for its writer
        with (root / TRACKER).open("rb") as file:
            told = file.read(64).strip()
    except OSError as error:
        raise ValueError(f"{root / TRACKER} cannot be read: {error}") from error
    if not re.fullmatch(rb"[0-9]{1,18}", told):
        raise ValueError(f"{root / TRACKER} names no iteration")
    return int(told)


def latest(root: Path, avoid: Mapping[int, str] | None = None) -> tuple[int | None, list[str]]:
    """The newest whole checkpoint, and what had to be skipped to find it, in words.

    `avoid` are iterations that are known to be damaged, and how.

    The tracker file has the first word, so that it can be edited to go back; if what it names is damaged, older
    checkpoints come before newer ones.
    """
    skipped = []
    try:
        named = tracked(root)
    except ValueError as error:
        named = None
        skipped.append(f"ignored: {error}; the newest checkpoint counts")
    present = iterations(root)
    if named is None:
        order = present
    else:
        order = [named, *(i for i in present if i < named), *(i for i in present if i > named)]
    for iteration in order:
        if (why := (avoid or {}).get(iteration) or damage(root / name_of(iteration))) is None:
            return iteration, skipped
        skipped.append(f"skipping corrupt checkpoint {root / name_of(iteration)}: {why}")
    return None, skipped


def temporary(root: Path, iteration: int) -> Path:
    """Where checkpoint `iteration` is written until it is whole."""
    return root / f".{name_of(iteration)}.new"


def publish(root: Path, iteration: int, manifest: dict[str, Any]) -> None:
    """Complete the checkpoint in its temporary directory and give it its name; then the tracker names it."""
    new, final = temporary(root, iteration), root / name_of(iteration)
    write_durably(new / MANIFEST, sealed.seal(manifest))
    sync_directory(new)
    old = _set_aside(final) if final.exists() else None
    new.rename(final)
    sync_directory(root)
    write_durably(root / TRACKER, str(iteration))
    if old is not None:
        discard(old)


def retain(root: Path, newest: int, keep: int) -> list[int]:
    """Remove the oldest whole checkpoints up to iteration `newest` until `keep` of them are left; those removed.

    Later iterations belong to a run that was rewound. They and damaged checkpoints are left to the user.
    """
    assert keep > 0
    whole = [i for i in iterations(root) if i <= newest and damage(root / name_of(i)) is None]
    for iteration in whole[keep:]:
        discard(_set_aside(root / name_of(iteration)))
    return whole[keep:]


def _set_aside(directory: Path) -> Path:
    """Rename a checkpoint so that nobody reads it any more: removing it takes time, and a kill may come between."""
    old = directory.with_name(f".{directory.name}.old")
    discard(old)
    return directory.rename(old)


def tidy(root: Path) -> list[str]:
    """Finish what a killed process left behind; names of what was removed."""
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "old" and not (root / match[1]).exists() and damage(path) is None:
            path.rename(root / match[1])  # killed between the two renames of `publish`
            continue
        discard(path)
        removed.append(path.name)
    return removed


def discard(path: Path) -> None:
    """Remove a directory if it is there. What cannot be removed is in nobody's way, but takes room: a warning."""
    try:
        remove_tree(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
