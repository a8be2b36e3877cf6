"""What a directory of checkpoints looks like, and which of its checkpoints are good: complete and not corrupt.

Owns names, the manifest and the order in which files appear and vanish, so that a process may be killed between any
two of them. Knows neither torch nor what a checkpoint holds.

    <root>/iter_0000010/             a whole checkpoint: its data files and cordee.json, the manifest
    <root>/latest_checkpointed_iteration.txt
    <root>/best_checkpointed_iteration.txt

Where the storage renames (`storage.py`), as a file system does, a checkpoint gets its name, and loses it, by renaming
its directory, which is atomic:

    <root>/.iter_0000020.new         being written; never read
    <root>/.iter_0000020.old         being replaced or removed

A store of objects renames nothing. There every attempt to save writes to a folder that nobody has used,

    <root>/iter_0000020.<generation>/

and its manifest, the last object of it, makes it a checkpoint: it names every other object with size and checksum, and
has a checksum itself, so one that is torn is none. What it replaces is removed after that, and a checkpoint is removed
manifest first. So whatever was interrupted, either the old or the new checkpoint is whole, and no folder has objects of
two. Who reads takes the newest generation that is whole; `tidy` removes folders without a manifest and generations
that have a successor. A list that lags hides a new checkpoint for a while, and then an older one is found."""

import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cordee import sealed
from cordee.checkpoint.storage import Location
from cordee.files import load_json
from cordee.log import logger

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
MANIFEST = "cordee.json"
FORMAT = 2  # 1 had no checksum, so that changes in it, and its data, cannot be verified
_FILE = sealed.record({"bytes": sealed.count(), "crc32": sealed.count()}, exact=True)
_FILES = sealed.table(_FILE, r"(?!\.\.?$)[A-Za-z0-9._-]{1,255}", least=1)
_MANIFEST = sealed.record({"iteration": sealed.count(), "files": _FILES})
# What a manifest says of the weights that its checkpoint lacks, for it has only what was trained beside them.
BASE = sealed.record({"path": sealed.text(), "fingerprint": sealed.text()})
_NAME = re.compile(r"iter_([0-9]{7,18})(?:\.([0-9]{1,20}))?")
_UNFINISHED = re.compile(r"\.(iter_[0-9]{7,18}(?:\.[0-9]{1,20})?)\.(new|old)")
_THREADS = 4  # that read a checkpoint's files to check them; zlib lets others run meanwhile


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations(root: Location) -> list[int]:
    """Iterations of all checkpoints under `root`, whole or not, the newest first."""
    return list(folders(root))


def folders(root: Location) -> dict[int, Location]:
    """The folder of every checkpoint under `root`, whole or not, by its iteration, the newest first.

    Of several generations that is the newest whole one, or the newest, if none is; one without a manifest is none yet.
    """
    found = {}
    for iteration, generations in _generations(root).items():
        kept = [folder for number, folder in generations.items() if not number or (folder / MANIFEST).is_file()]
        if kept:
            found[iteration] = kept[0] if len(kept) == 1 else next((p for p in kept if damage(p) is None), kept[0])
    return found


def folder_of(root: Location, iteration: int) -> Location:
    """The folder of the checkpoint of an iteration, which need not be there."""
    return folders(root).get(iteration, root / name_of(iteration))


def _generations(root: Location) -> dict[int, dict[int, Location]]:
    """All folders with names of checkpoints, by iteration and generation, the newest first in both."""
    named = [(name, folder) for folder in root.iterdir() if (name := _named(folder.name)) is not None]
    if root.storage.renames:  # a store has objects with such names inside of folders only
        named = [(name, folder) for name, folder in named if not folder.is_file()]
    found: dict[int, dict[int, Location]] = {}
    for (iteration, number), folder in sorted(named, key=lambda pair: pair[0], reverse=True):
        found.setdefault(iteration, {})[number] = folder
    return found


def _named(name: str) -> tuple[int, int] | None:
    """Iteration and generation (0 without one) in the name of a folder; None if it is no name of a checkpoint."""
    match = _NAME.fullmatch(name)
    if match is None or name.partition(".")[0] != name_of(int(match[1])):
        return None
    return int(match[1]), int(match[2] or 0)


def is_root(path: Location) -> bool:
    """Whether `path` is a directory that checkpoints were saved to."""
    return (path / TRACKER).is_file() or bool(iterations(path))


def damage(directory: Location, *, contents: Collection[str] = ()) -> str | None:
    """What is wrong with the checkpoint in `directory`, None if nothing is: a manifest that was changed, missing or
    short files, and changed bytes in the files named in `contents`, which are read for that."""
    try:
        manifest, named = read_manifest(directory), _named(directory.name)
        if named is not None and manifest["iteration"] != named[0]:
            return f"it is the checkpoint of iteration {manifest['iteration']}, which its name is not"
        sizes = (_misfit(directory / name, expected) for name, expected in manifest["files"].items())
        return next((why for why in sizes if why), None) or changed(directory, manifest, contents)
    except (OSError, ValueError) as error:
        return str(error)


def _misfit(path: Location, expected: dict[str, int]) -> str | None:
    if (size := path.size()) is None:
        return f"{path.name} is missing"
    return None if size == expected["bytes"] else f"{path.name} has {size} bytes instead of {expected['bytes']}"


def changed(directory: Location, manifest: dict[str, Any], names: Iterable[str]) -> str | None:
    """Which of the files `names` of a checkpoint has other bytes than were saved, in words; None if none has.

    They are read, several at a time, in blocks. A file that the manifest does not know counts as changed."""

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


def read_manifest(directory: Location, form: sealed.Form | None = None) -> dict[str, Any]:
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


def _json(file: Location) -> Any:
    with file.open() as opened:
        return load_json(opened)


def checksum(path: Location) -> int:
    value = 0
    with path.open() as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def tracked(root: Location, tracker: str = TRACKER) -> int | None:
    """The iteration that a tracker file names, None without that file; ValueError if it names none."""
    try:
        with (root / tracker).open() as file:
            text = file.read(64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{root / tracker} cannot be read: {error}") from error
    is_whole = root.storage.renames or text.endswith(b"\n")
    if not is_whole or not re.fullmatch(rb"[0-9]{1,18}", text.strip()):
        raise ValueError(f"{root / tracker} names no iteration")
    return int(text)


def _track(root: Location, tracker: str, iteration: int) -> None:
    (root / tracker).write_text(str(iteration) if root.storage.renames else f"{iteration}\n")  # torn without its end


def latest(root: Location, avoid: Mapping[int, str] | None = None) -> tuple[int | None, list[str]]:
    """The newest whole checkpoint, and what had to be skipped to find it, in words.

    `avoid` are iterations that are known to be damaged, and how.

    The tracker file has the first word, so that it can be edited to go back; if what it names is damaged, older
    checkpoints come before newer ones."""
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


def temporary(root: Location, iteration: int) -> Location:
    """Where checkpoint `iteration` is written until it is whole. In a store that is another folder at each call."""
    if root.storage.renames:
        return root / f".{name_of(iteration)}.new"
    newest = max(_generations(root).get(iteration, {}), default=0)
    return root / f"{name_of(iteration)}.{max(newest + 1, time.time_ns())}"


def publish(new: Location, manifest: dict[str, Any]) -> None:
    """Make the folder `new`, which has all data, the only checkpoint of its iteration; then the tracker names it."""
    iteration, root = manifest["iteration"], new.parent
    others = _generations(root).get(iteration, {})
    (new / MANIFEST).write_text(sealed.seal(manifest))
    if root.storage.renames:
        replaced = [_set_aside(folder) if number == 0 else folder for number, folder in others.items()]
        new.rename(root / name_of(iteration))
    else:
        if (why := damage(new)) is not None:  # another process may have removed what it took for left over
            raise OSError(f"{new} is not complete: {why}")
        # What is not committed another process may be writing; `tidy` removes it, once no run holds the folder.
        own = (_named(new.name) or (0, 0))[1]
        replaced = [folder for number, folder in others.items() if number < own and _is_committed(folder)]
    _track(root, TRACKER, iteration)
    for folder in replaced:
        discard(folder)


def point_to_best(root: Location, iteration: int) -> None:
    """Name the best checkpoint in its tracker file, if it is there and whole."""
    if damage(folder_of(root, iteration)) is None:
        _track(root, BEST, iteration)


def retain(root: Location, newest: int, keep: int) -> list[int]:
    """Remove the oldest whole checkpoints up to iteration `newest` until `keep` of them are left, and the best, as its
    tracker file names it; those removed.

    Later iterations belong to a run that was rewound. They and damaged checkpoints are left to the user."""
    assert keep > 0
    try:
        best = tracked(root, BEST)
    except ValueError as error:
        logger.warning("no checkpoint is removed: %s", error)
        return []
    whole = {i: folder for i, folder in folders(root).items() if i <= newest and damage(folder) is None}
    removed = [iteration for iteration in list(whole)[keep:] if iteration != best]
    for iteration in removed:
        folder = whole[iteration]
        discard(_set_aside(folder) if root.storage.renames else folder)
    return removed


def _set_aside(folder: Location) -> Location:
    """Rename a checkpoint so that nobody reads it any more: removing it takes time, and a kill may come between."""
    old = folder.parent / f".{folder.name}.old"
    discard(old)
    folder.rename(old)
    return old


def tidy(root: Location) -> list[str]:
    """Finish what a killed process left behind; names of what was removed."""
    if root.storage.renames:
        left = [folder for folder in root.iterdir() if _is_left(folder)]
    else:
        left = [folder for generations in _generations(root).values() for folder in _left_over(generations)]
    for folder in left:
        discard(folder)
    return [folder.name for folder in left]


def _is_left(folder: Location) -> bool:
    """Whether a killed process left a folder that is none of a checkpoint; what is one gets its name back."""
    if (match := _UNFINISHED.fullmatch(folder.name)) is None:
        return False
    final = folder.parent / match[1]
    if match[2] == "old" and not final.is_dir() and damage(folder) is None:
        folder.rename(final)  # killed between the two renames of `publish`
        return False
    return True


def _left_over(generations: dict[int, Location]) -> Iterator[Location]:
    """Of the folders of one iteration, the newest first, those that did not become a checkpoint or have a successor."""
    succeeded = False
    for number, folder in generations.items():
        if succeeded or (number and not _is_committed(folder)):
            yield folder
        succeeded = succeeded or damage(folder) is None


def _is_committed(folder: Location) -> bool:
    """Whether its manifest was written to the end."""
    try:
        _json(folder / MANIFEST)
    except (FileNotFoundError, ValueError):
        return False
    return True


def discard(folder: Location) -> None:
    """Remove a folder if it is there. What cannot be removed is in nobody's way, but takes room: a warning."""
    try:
        if not folder.storage.renames:  # else it has been set aside, and may be a link to what stays
            (folder / MANIFEST).delete()  # without it the rest is no checkpoint
        folder.delete()
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)
