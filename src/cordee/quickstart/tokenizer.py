"""A small byte-level BPE tokenizer learned from text, saved as a Hugging Face tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

from cordee.tokenizer.hf import END_OF_TEXT


def train(texts: Iterator[str], folder: Path, vocab_size: int) -> int:
    """Learn at most `vocab_size` tokens; the number learned."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=[END_OF_TEXT])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 10**9}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return tokenizer.get_vocab_size()


def texts_of(corpus: Path, max_characters: int) -> Iterator[str]:
    """The texts of a JSON-lines file until there are so many characters."""
    with open(corpus, encoding="utf-8") as file:
        seen = 0
        for line in file:
            text = json.loads(line)["text"]
            yield text
            seen += len(text)
            if seen >= max_characters:
                return
