"""The text of the quickstart, written as often as it takes, and a tokenizer learned from it."""

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from cordee.quickstart import corpus, tokenizer


def documents(characters: int) -> Iterator[str]:
    """Source files in a fixed order, from the first one again after the last, until `characters` are reached."""
    for _, text in cycle(corpus.texts(None)):
        if text is None:
            continue  # no UTF-8
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def write_jsonl(path: Path, characters: int) -> None:
    """Write JSON lines with the key "text"."""
    with open(path, "w", encoding="utf-8") as file:
        for text in documents(characters):
            file.write(json.dumps({"text": text}) + "\n")


def write_tokenizer(folder: Path, vocab_size: int, characters: int) -> None:
    """Learn a byte-level BPE tokenizer of at most `vocab_size` tokens and write it in Hugging Face's format."""
    tokenizer.train(documents(characters), folder, vocab_size)
