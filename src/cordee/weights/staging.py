"""A directory of output that appears under its name when it is complete.

Owns the directory in which output is made, beside its final place, and what may be replaced by it. Knows no format."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from cordee import lock
from cordee.errors import ProblemError, raise_all
from cordee.files import copy_files, create_new, left_out, remove_tree, unwritable
from cordee.tokenizer.special import FILES as TOKENIZER_FILES

logger = logging.getLogger("cordee")

CONFIG = "config.json"
MARKS = (CONFIG, "*.gguf", "adapter_config.json")  # every output has one of these; what holds something else has none
UNFINISHED = ".unfinished"  # a file in what is being made, the lock of the process that makes it
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
TOKENIZER = ("tokenizer*", "spiece.model", "chat_template*", *TOKENIZER_FILES)
# Files beside the weights that belong to the model: tokenizer, generation settings, code, terms of use.
ASSETS = ("generation_config.json", "*.py", *TOKENIZER, *TERMS)


class Staging:
    """Output for `path` in the making, in the directory `scratch`.

    overwrite: replace a model directory at `path`.
    ProblemError if something is at `path` that must not be replaced."""

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        self.path = Path(path).absolute()
        self._old = self.path.with_name(f".{self.path.name}.old")
        check_output(self.path, overwrite=overwrite)
        check_output(self._old, overwrite=True)  # left by a process that was killed
        self.scratch = self.path.with_name(f".{self.path.name}.new")
        mark = self.scratch / UNFINISHED
        if os.path.lexists(self.scratch) and not _is_ours(self.scratch):
            why = f"output is made in {self.scratch} until it is complete, and something else is there"
            raise ProblemError.of("output directory", self.path, why, "move that away, or give another", "foreign")
        try:
            with self.writing():
                self._lock = lock.acquire(mark)
                self._remove_what_was_left()
        except lock.HeldError as who:
            why, fix = f"another process is writing it: {who}", "wait for that one, or give another"
            raise ProblemError.of("output directory", self.path, why, fix, "in use") from None
        try:
            check_output(self.path, overwrite=overwrite)  # another process may have completed it meanwhile
        except ProblemError:
            self.discard()
            raise

    def _remove_what_was_left(self) -> None:
        """By a process that was killed, or by this one."""
        for left in self.scratch.iterdir():
            if left.is_dir():
                remove_tree(left)
            elif left.name != UNFINISHED:
                left.unlink()

    def write_json(self, name: str, content: object) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        with create_new(self.scratch / name) as file:
            file.write(text.encode())

    def write_config(self, hf_config: Mapping[str, object], dtypes: Iterable[torch.dtype]) -> None:
        """Write `config.json`, its type key (transformers 4 or 5 spelling) set to the weights' one type."""
        config, kinds = dict(hf_config), set(dtypes)
        if len(kinds) == 1:
            config["dtype" if "dtype" in config else "torch_dtype"] = str(*kinds).removeprefix("torch.")
        self.write_json(CONFIG, config)

    def copy_assets(self, source: Path | None, patterns: Iterable[str] = ASSETS) -> None:
        """Copy the files that belong to a model, or those of `patterns`, from a directory of it."""
        if source is None:
            return
        found = {file for pattern in patterns for file in source.glob(pattern) if not file.is_dir()}
        tokenizer = found & {file for pattern in TOKENIZER for file in source.glob(pattern)}
        if any(left_out(file) for file in tokenizer):
            logger.warning("the tokenizer in %s is left out: without the file that is not copied it is another", source)
            found -= {file for file in tokenizer if left_out(file) is None}
        if copied := copy_files(sorted(found), self.scratch):
            # `source` may be where a reader has put them for a while, of which nobody has heard.
            logger.info("copied beside the weights: %s", ", ".join(file.name for file in copied))

    def publish(self) -> None:
        """Give the output its name."""
        if self.path.exists():
            remove_tree(self._old)
            self.path.rename(self._old)
        self.scratch.rename(self.path)
        self._lock.path = self.path / UNFINISHED  # released last: what has no such file would not be taken for ours
        self._lock.release()
        remove_tree(self._old)

    def discard(self) -> None:
        """Remove what was made, unless it is published."""
        if self._lock.path.parent == self.scratch and self.scratch.exists():
            self._remove_what_was_left()
        self._lock.release()
        with suppress(OSError):  # it is gone, or the next process has it by now
            self.scratch.rmdir()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """ProblemError for files that cannot be written."""
        try:
            yield
        except OSError as error:
            why, fix = f"it cannot be written: {error}", "make room or allow it, or give another"
            raise ProblemError.of("output directory", self.path, why, fix, "unwritable") from error


def _is_ours(scratch: Path) -> bool:
    """Whether output was made in what is there: a directory of this user with our mark, or one that did not get it yet.

    Into a directory of somebody else they could put links meanwhile."""
    mark = scratch / UNFINISHED
    marked = mark.is_file() and not mark.is_symlink()
    own = scratch.is_dir() and not scratch.is_symlink() and scratch.stat().st_uid == os.geteuid()
    return own and (marked or not any(scratch.iterdir()))


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """ProblemError if output must not go to `path`."""
    if os.path.lexists(path) and not path.is_dir():
        why, fix = "there is a file of this name", "give another directory"
        raise ProblemError.of("output directory", path, why, fix, "file")
    raise_all(unwritable("output directory", path, path.parent))
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            fix = "give another directory, or --overwrite"
            raise ProblemError.of("output directory", path, "it is not empty", fix, "not empty", ("overwrite",))
        if not any(any(path.glob(mark)) for mark in MARKS):
            why = "it holds something else than a model, which --overwrite does not replace"
            raise ProblemError.of("output directory", path, why, "give another directory", "foreign")
