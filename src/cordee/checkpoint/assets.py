"""What lies beside the checkpoints of a run, so that they can be talked to and exported: a tokenizer and the like.

Owns putting these there and, from a store, bringing them to a local directory, which is what libraries read. Knows of
tokenizers only which file names make one."""

import atexit
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from cordee.checkpoint.directory import BEST, TRACKER
from cordee.checkpoint.storage import Location
from cordee.files import LARGEST
from cordee.tokenizer import VOCABULARIES, is_vocabulary


def beside(checkpoint: Location) -> Path | None:
    """A local directory with the assets of a checkpoint; None if there is no tokenizer. OSError if they cannot be read.

    One that they were brought to is there until the process ends."""
    root = checkpoint.parent
    return (root.local or _fetched(root)) if are_in(root) else None


def are_in(root: Location) -> bool:
    """Whether a tokenizer lies beside the checkpoints in `root`."""
    return any(is_vocabulary(file.name) and file.is_file() for file in root.iterdir())


def _fetched(root: Location) -> Path:
    directory = Path(mkdtemp(prefix="cordee-assets-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for file in root.iterdir():
        size = None if file.name.startswith(".") or file.name in (TRACKER, BEST) else file.size()
        if size is not None and size <= LARGEST:
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


@contextmanager
def put_into(root: Location) -> Iterator[Path]:
    """A directory to make assets in; what is there at the end is put into `root`.

    What makes them a tokenizer comes last: a process that is killed in between does it again the next time."""
    with TemporaryDirectory(prefix="cordee-assets-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: (file.name in VOCABULARIES, file.name)):
            mode = file.stat().st_mode & 0o666  # no one else may do what they may not with the original
            with (root / file.name).write(mode) as target:
                target.write(file.read_bytes())
