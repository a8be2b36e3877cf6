"""The tokenizer of texts that are numbers already: "17 4 99" is [17, 4, 99]."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from cordee.errors import ProblemError
from cordee.tokenizer.base import Roles, Tokenizer, outside


class NullTokenizer(Tokenizer):
    """`vocab_size` tokens, of which the last ends a document (Megatron up to release 0.16 counts it on top)."""

    type = "NullTokenizer"
    probes = ("0",)

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.roles = Roles(eos=vocab_size - 1)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        try:
            batch = [[int(word) for word in text.split()] for text in texts]
        except ValueError as error:
            fix = "give text that is numbers with spaces between them, or another tokenizer"
            raise ProblemError.of("--tokenizer-type", self.type, f"the text is not: {error}", fix) from error
        wrong = outside(chain.from_iterable(batch), self.vocab_size)
        if wrong is not None:
            why = f"the text holds {wrong}, which is not among 0 to {self.vocab_size - 1}"
            raise ProblemError.of("--vocab-size", self.vocab_size, why, "give a larger one", "range", limit=wrong)
        return batch

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == self.eos))

    def vocabulary(self) -> dict[int, str]:
        return {i: str(i) for i in range(self.vocab_size)}

    def save(self, directory: str | Path) -> None:
        """There is nothing to write: no Hugging Face tokenizer reads numbers."""
