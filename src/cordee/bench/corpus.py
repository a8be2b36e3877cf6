"""Files of text that is on every machine, the sources of Python's standard library, and a tokenizer learned from it."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def documents(characters: int) -> Iterator[str]:
    """Source files in a fixed order, from the first one again after the last, until `characters` are reached."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    for path in cycle(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few test files are written in other encodings on purpose
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(characters), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
