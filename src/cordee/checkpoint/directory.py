"""What a directory of checkpoints looks like, and which of its checkpoints are good: complete and not corrupt.

Owns names, the manifest and the order in which files appear and vanish, so that a process may be killed between any
two of them. Knows neither torch nor what a checkpoint holds.

    <root>/iter_0000010/             a whole checkpoint: its data files and cordee.json, the manifest
    <root>/latest_checkpointed_iteration.txt

On a file system a checkpoint gets its name, and loses it, by renaming its directory, which is atomic:

    <root>/.iter_0000020.new         being written; never read
    <root>/.iter_0000020.old         being replaced or removed

A store of objects (`storage.py`) renames nothing. There every attempt to save writes to a folder that nobody has used,

    <root>/iter_0000020.<generation>/

and its manifest, the last object of it, makes it a checkpoint: it names every other object with size and checksum, and
has a checksum itself, so one that is torn is none. What it replaces is removed after that, and a checkpoint is removed
manifest first. So whatever was interrupted, either the old or the new checkpoint is whole, and no folder has objects of
two. Who reads takes the newest generation that is whole; `tidy` removes folders without a manifest and generations
that have a successor. A list that lags hides a new checkpoint for a while, and then an older one is found.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cordee import sealed
from cordee.checkpoint.storage import Place, StoragePath, size_of
from cordee.files import parse_json, read_json, remove_tree, sync_directory, write_durably
from cordee.log import logger

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "cordee.json"
FORMAT = 2  # 1 had no checksum, so that changes in it, and its data, cannot be verified
_FILE = sealed.record({"bytes": sealed.count(), "crc32": sealed.count()}, exact=True)
_MANIFEST = sealed.record(
    {
        "iteration": sealed.count(),
        "files": sealed.table(_FILE, r"(?!\.\.?$)[A-Za-z0-9._-]{1,255}", least=1),
    }
)
_NAME = re.compile(r"iter_([0-9]{7,18})(?:\.([0-9]{1,20}))?")
_UNFINISHED = re.compile(r"\.(iter_[0-9]{7,18}(?:\.[0-9]{1,20})?)\.(new|old)")
_THREADS = 4  # that read a checkpoint's files to check them; zlib lets others run meanwhile


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations(root: Place) -> list[int]:
    """Iterations of all checkpoints under `root`, whole or not, the newest first."""
    return list(folders(root))


def folders(root: Place) -> dict[int, Place]:
    """The folder of every checkpoint under `root`, whole or not, by its iteration, the newest first.

    Of several generations that is the newest whole one, or the newest, if none is; one without a manifest is none yet.
    """
    found = {}
    for iteration, generations in _generations(root).items():
        kept = [place for number, place in generations.items() if not number or (place / MANIFEST).is_file()]
        if kept:
            found[iteration] = kept[0] if len(kept) == 1 else next((p for p in kept if damage(p) is None), kept[0])
    return found


def folder_of(root: Place, iteration: int) -> Place:
    """The folder of the checkpoint of an iteration, which need not be there."""
    return folders(root).get(iteration, root / name_of(iteration))


def _generations(root: Place) -> dict[int, dict[int, Place]]:
    """All folders with names of checkpoints, by iteration and generation, the newest first in both."""
    places = [] if isinstance(root, Path) and not root.is_dir() else root.iterdir()
    named = [(name, place) for place in places if (name := _named(place.name)) is not None]
    found: dict[int, dict[int, Place]] = {}
    for (iteration, number), place in sorted(named, key=lambda pair: pair[0], reverse=True):
        if isinstance(place, StoragePath) or place.is_dir():
            found.setdefault(iteration, {})[number] = place
    return found


def _named(name: str) -> tuple[int, int] | None:
    """Iteration and generation (0 without one) in the name of a folder; None if it is no name of a checkpoint."""
    match = _NAME.fullmatch(name)
    if match is None or name.partition(".")[0] != name_of(int(match[1])):
        return None
    return int(match[1]), int(match[2] or 0)


def is_root(path: Place) -> bool:
    """Whether `path` is a directory that checkpoints were saved to."""
    return (path / TRACKER).is_file() or bool(iterations(path))


def damage(directory: Place, *, contents: Collection[str] = ()) -> str | None:
    """What is wrong with the checkpoint in `directory`, None if nothing is: a manifest that was changed, missing or
    short files, and changed bytes in the files named in `contents`, which are read for that.
    """
    try:
        return _damage(directory, read_manifest(directory), contents)
    except (OSError, ValueError) as error:
        return str(error)


def _damage(directory: Place, manifest: dict[str, Any], contents: Collection[str]) -> str | None:
    named = _named(directory.name)
    if named is not None and manifest["iteration"] != named[0]:
        return f"it is the checkpoint of iteration {manifest['iteration']}, which its name is not"
    sizes = (_misfit(directory / name, expected) for name, expected in manifest["files"].items())
    return next((why for why in sizes if why), None) or changed(directory, manifest, contents)


def _misfit(path: Place, expected: dict[str, int]) -> str | None:
    if (size := size_of(path)) is None:
        return f"{path.name} is missing"
    return None if size == expected["bytes"] else f"{path.name} has {size} bytes instead of {expected['bytes']}"


def changed(directory: Place, manifest: dict[str, Any], names: Iterable[str]) -> str | None:
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


def read_manifest(directory: Place, form: sealed.Form | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint, what is in it besides files of `form`; ValueError if it is not to be believed."""
    try:
        manifest = sealed.opened(_json(directory / MANIFEST), _MANIFEST, FORMAT)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if form is not None and (why := form(manifest)) is not None:
        raise ValueError(f"{MANIFEST} is of another form: {why}")
    return manifest


def _json(place: Place) -> Any:
    return read_json(place) if isinstance(place, Path) else parse_json(place.read_bytes())


def file_entry(path: Path) -> dict[str, int]:
    """What the manifest keeps of a data file."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def checksum(path: Place) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def tracked(root: Place) -> int | None:
    """The iteration that the tracker file names, None without that file; ValueError if it names none."""
    if not (root / TRACKER).exists():
        return None
    try:
        if not (root / TRACKER).is_file():
            raise OSError("it is no file")  # opening a named pipe would wait for its writer
        with (root / TRACKER).open("rb") as file:
            text = file.read(64)
    except OSError as error:
        raise ValueError(f"{root / TRACKER} cannot be read: {error}") from error
    whole = text if isinstance(root, Path) or text.endswith(b"\n") else b""  # in a store its end may be missing
    if not re.fullmatch(rb"[0-9]{1,18}", whole.strip()):
        raise ValueError(f"{root / TRACKER} names no iteration")
    return int(text)


def latest(root: Place, avoid: Mapping[int, str] | None = None) -> tuple[int | None, list[str]]:
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
    present = folders(root)
    order = list(present)
    if named is not None:
        order = [named, *(i for i in present if i < named), *(i for i in present if i > named)]
    for iteration in order:
        folder = present.get(iteration, root / name_of(iteration))
        if (why := (avoid or {}).get(iteration) or damage(folder)) is None:
            return iteration, skipped
        skipped.append(f"skipping corrupt checkpoint {folder}: {why}")
    return None, skipped


# ---- saving and removing ---------------------------------------------------------------------------------------------


def temporary(root: Place, iteration: int) -> Place:
    """Where checkpoint `iteration` is written until it is whole. In a store that is another folder at each call."""
    if isinstance(root, Path):
        return root / f".{name_of(iteration)}.new"
    newest = max(_generations(root).get(iteration, {}), default=0)
    return root / f"{name_of(iteration)}.{max(newest + 1, time.time_ns())}"


def publish(new: Place, manifest: dict[str, Any]) -> None:
    """Make the folder `new`, which has all data, the only checkpoint of its iteration; then the tracker names it."""
    iteration, text, root = manifest["iteration"], sealed.seal(manifest), new.parent
    others = _generations(root).get(iteration, {})
    if isinstance(new, Path) and isinstance(root, Path):
        final = root / name_of(iteration)
        write_durably(new / MANIFEST, text)
        sync_directory(new)
        replaced = [place for number, place in others.items() if number]
        replaced += [_set_aside(final)] if final.exists() else []
        new.rename(final)
        sync_directory(root)
        write_durably(root / TRACKER, str(iteration))
    elif isinstance(new, StoragePath) and isinstance(root, StoragePath):
        _write(new / MANIFEST, text)
        if (why := damage(new)) is not None:  # another process may have removed what it took for left over
            raise OSError(f"{new} is not complete: {why}")
        _write(root / TRACKER, f"{iteration}\n")
        # What is not committed another process may be writing; `tidy` removes it, once no run holds the folder.
        own = (_named(new.name) or (0, 0))[1]
        replaced = [place for number, place in others.items() if number < own and _is_committed(place)]
    else:
        raise AssertionError(f"{new} is in no place that checkpoints are kept in")
    for place in replaced:
        discard(place)


def _write(place: StoragePath, text: str) -> None:
    with place.write() as file:
        file.write(text.encode())


def retain(root: Place, newest: int, keep: int) -> list[int]:
    """Remove the oldest whole checkpoints up to iteration `newest` until `keep` of them are left; those removed.

    Later iterations belong to a run that was rewound. They and damaged checkpoints are left to the user.
    """
    assert keep > 0
    whole = {i: folder for i, folder in folders(root).items() if i <= newest and damage(folder) is None}
    removed = list(whole)[keep:]
    for iteration in removed:
        folder = whole[iteration]
        discard(_set_aside(folder) if isinstance(folder, Path) else folder)
    return removed


def _set_aside(directory: Path) -> Path:
    """Rename a checkpoint so that nobody reads it any more: removing it takes time, and a kill may come between."""
    old = directory.with_name(f".{directory.name}.old")
    discard(old)
    return directory.rename(old)


def tidy(root: Place) -> list[str]:
    """Finish what a killed process left behind; names of what was removed."""
    if isinstance(root, StoragePath):
        left = [place for generations in _generations(root).values() for place in _left_over(generations)]
    else:
        left = [path for path in sorted(root.iterdir()) if _is_left(path)] if root.is_dir() else []
    for place in left:
        discard(place)
    return [place.name for place in left]


def _is_left(path: Path) -> bool:
    """Whether a killed process left a directory that is none of a checkpoint; what is one gets its name back."""
    match = _UNFINISHED.fullmatch(path.name)
    if match is not None and match[2] == "old" and not (path.with_name(match[1])).exists() and damage(path) is None:
        path.rename(path.with_name(match[1]))  # killed between the two renames of `publish`
        return False
    return match is not None


def _left_over(generations: dict[int, Place]) -> Iterator[Place]:
    """Of the folders of one iteration, the newest first, those that did not become a checkpoint or have a successor."""
    succeeded = False
    for number, place in generations.items():
        if succeeded or (number and not _is_committed(place)):
            yield place
        succeeded = succeeded or damage(place) is None


def _is_committed(folder: Place) -> bool:
    """Whether its manifest was written to the end."""
    try:
        _json(folder / MANIFEST)
    except (FileNotFoundError, ValueError):
        return False
    return True


def discard(place: Place) -> None:
    """Remove a directory if it is there. What cannot be removed is in nobody's way, but takes room: a warning."""
    try:
        if isinstance(place, Path):
            remove_tree(place)
        else:
            (place / MANIFEST).delete()  # without it the rest is no checkpoint
            place.delete()
    except OSError as error:
        logger.warning("%s could not be removed: %s", place, error)
