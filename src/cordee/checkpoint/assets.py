"""What lies beside the checkpoints of a run, so that they can be talked to and exported: a tokenizer and the like.

Owns putting these there and, from a store, bringing them to a local directory, which is what libraries read. Knows of
tokenizers only which file names make one.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cordee.checkpoint.directory import TRACKER, discard
from cordee.checkpoint.storage import Place, StoragePath, size_of
from cordee.data.tokenizer import VOCABULARIES, holds_tokenizer, is_vocabulary
from cordee.files import LARGEST


def beside(checkpoint: Place) -> Path | None:
    """A local directory with the assets of a checkpoint; None if there is no tokenizer. OSError if they cannot be read.

    One that they were brought to is there until the process ends.
    """
    root = checkpoint.parent
    if not are_in(root):
        return None
    return root if isinstance(root, Path) else _fetched(root)


def are_in(root: Place) -> bool:
    """Whether a tokenizer lies beside the checkpoints in `root`."""
    return (
        holds_tokenizer(root) if isinstance(root, Path) else any(is_vocabulary(place.name) for place in root.iterdir())
    )


def _fetched(root: StoragePath) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="cordee-assets-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for place in root.iterdir():
        size = None if place.name.startswith(".") or place.name == TRACKER else size_of(place)
        if size is not None and size <= LARGEST:
            (directory / place.name).write_bytes(place.read_bytes())
    return directory


@contextmanager
def put_into(root: Place) -> Iterator[Path]:
    """A directory to make assets in; what is there at the end is put into `root`.

    What makes them a tokenizer comes last: a process that is killed in between does it again the next time.
    """
    if isinstance(root, Path):
        scratch = root / ".tokenizer.new"
        discard(scratch)
        scratch.mkdir(parents=True)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="cordee-assets-"))
    try:
        yield scratch
        for file in sorted(scratch.iterdir(), key=lambda file: (file.name in VOCABULARIES, file.name)):
            if isinstance(root, Path):
                file.rename(root / file.name)
            else:
                with (root / file.name).write() as target:
                    target.write(file.read_bytes())
    finally:
        discard(scratch)
