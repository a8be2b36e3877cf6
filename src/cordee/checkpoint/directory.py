"""What a directory of checkpoints looks like, and which of its checkpoints are whole.

Owns names, the manifest and the order in which files appear and vanish, so that a process may be killed between any
two of them. Knows neither torch nor what a checkpoint holds.

    <root>/iter_0000010/             a whole checkpoint: its data files and cordee.json, the manifest
    <root>/latest_checkpointed_iteration.txt
    <root>/.iter_0000020.new         being written; never read
    <root>/.iter_0000020.old         being replaced or removed
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cordee.files import remove_tree, sync_directory, write_durably
from cordee.log import logger

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "cordee.json"
FORMAT = 1
_NAME = re.compile(r"iter_(\d{7,})")
_UNFINISHED = re.compile(r"\.(iter_\d{7,})\.(new|old)")


def name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations of all checkpoints under `root`, whole or not, the newest first."""
    if not root.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def is_root(path: Path) -> bool:
    """Whether `path` is a directory that checkpoints were saved to."""
    return (path / TRACKER).is_file() or bool(iterations(path))


def damage(directory: Path, *, contents: Collection[str] = ()) -> str | None:
    """What is wrong with the checkpoint in `directory`, None if nothing is: missing or short files, and changed bytes
    in the files named in `contents`, which are read for that.
    """
    try:
        manifest = read_manifest(directory)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if name in contents and checksum(path) != expected["crc32"]:
            return f"{name} was changed: its checksum is not the one it was saved with"
    return None


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError for one that this version cannot read."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    if not isinstance(manifest["files"], dict) or not manifest["files"]:
        raise ValueError("it names no files")
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
    """The iteration that the tracker file names; None if there is none or it is not a number."""
    try:
        return int((root / TRACKER).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def latest(root: Path, avoid: Collection[int] = ()) -> tuple[int | None, list[str]]:
    """The newest whole checkpoint but those to `avoid`, and which damaged ones had to be passed over to find it.

    The tracker file has the first word, so that it can be edited to go back; if what it names is damaged, older
    checkpoints come before newer ones.
    """
    named = tracked(root)
    present = iterations(root)
    if named is None:
        order = present
    else:
        order = [named, *(i for i in present if i < named), *(i for i in present if i > named)]
    passed_over = []
    for iteration in order:
        if iteration in avoid:
            continue
        if (why := damage(root / name_of(iteration))) is None:
            return iteration, passed_over
        passed_over.append(f"{root / name_of(iteration)}: {why}")
    return None, passed_over


def temporary(root: Path, iteration: int) -> Path:
    """Where checkpoint `iteration` is written until it is whole."""
    return root / f".{name_of(iteration)}.new"


def publish(root: Path, iteration: int, manifest: dict[str, Any]) -> None:
    """Complete the checkpoint in its temporary directory and give it its name; then the tracker names it."""
    new, final = temporary(root, iteration), root / name_of(iteration)
    write_durably(new / MANIFEST, json.dumps(manifest, indent=1))
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
