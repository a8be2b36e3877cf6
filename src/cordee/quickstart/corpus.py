"""The text the quickstart learns from.

Owns which files are read, which of them are held out, and how they are written as JSON lines. Knows no tokenizer."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cordee.errors import ProblemError

TEXT_ENDINGS = (".py", ".txt", ".md", ".rst", ".html", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".tex")
NOT_OWN = {"site-packages", "__pycache__"}
NOT_PROGRAMS = {"test", "tests", "idle_test", "encodings", "pydoc_data"}  # two thirds of Python's library: calls of
# assertEqual and tables, which are all that a small model would learn to write
HELD_OUT = 33  # one file in so many is kept for the evaluation
PASSAGE = 20_000  # characters: a file that stands alone is cut, so that there is something to hold out
MAX_CHARACTERS = 40_000_000  # more text would not make a run of two minutes better


@dataclass(frozen=True)
class Corpus:
    """What was written: two JSON-lines files with the key "text", and what they hold."""

    train: Path
    held_out: Path
    num_documents: int
    num_held_out: int
    num_characters: int
    num_skipped: int  # files that cannot be read, or not as text


def collect(source: Path | None, folder: Path) -> Corpus:
    """Write train.jsonl and held_out.jsonl into `folder` from `source`, or from Python's own standard library."""
    documents, num_skipped = _read(source)
    held_out = _held_out([name for name, _ in documents])
    if len(documents) < 2:
        why = f"{len(documents)} documents: one to train on and one to hold out are the least"
        fix = f"give a folder with more files ({', '.join(TEXT_ENDINGS[:4])}, ...) or a text file of a megabyte or more"
        raise ProblemError.of("--input", source or "Python's standard library", why, fix)
    paths = {part: folder / f"{part}.jsonl" for part in ("train", "held_out")}
    with open(paths["train"], "w", encoding="utf-8") as train, open(paths["held_out"], "w", encoding="utf-8") as held:
        for name, text in documents:
            file = held if name in held_out else train
            file.write(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
    characters, rest = sum(len(text) for _, text in documents), len(documents) - len(held_out)
    return Corpus(paths["train"], paths["held_out"], rest, len(held_out), characters, num_skipped)


def _read(source: Path | None) -> tuple[list[tuple[str, str]], int]:
    """Name and text of the documents, and how many files are not text."""
    documents, characters, skipped = [], 0, 0
    for name, text in texts(source):
        if text is None:
            skipped += 1
        elif text.strip():
            documents.append((name, text))
            characters += len(text)
        if characters >= MAX_CHARACTERS:
            break
    return documents, skipped


def texts(source: Path | None) -> Iterator[tuple[str, str | None]]:
    """Name and text of every file, or of every passage of a single one; None for what cannot be read as UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"]) if source is None else source
    if root.is_file():
        text = _text(root)
        for start in range(0, len(text or ""), PASSAGE):
            yield f"{root.name}:{start}", text[start : start + PASSAGE] if text else None
        return
    left_out, endings = (NOT_OWN | NOT_PROGRAMS, (".py",)) if source is None else (NOT_OWN, TEXT_ENDINGS)
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(names):
            if (path := Path(folder, name)).suffix in endings and path.is_file():
                yield path.relative_to(root).as_posix(), _text(path)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, PermissionError):
        return None


def _held_out(names: list[str]) -> set[str]:
    """One name in `HELD_OUT`, at least one, picked by what it is and not by where it stands."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[: max(1, len(names) // HELD_OUT)])
