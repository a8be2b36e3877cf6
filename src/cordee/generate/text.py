"""Text to prompts and new tokens to text.

Owns how a text begins and how a continuation reads. Knows nothing of models."""

from collections.abc import Collection, Sequence

from cordee.tokenizer.base import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes that are no character are decoded to


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, with what the tokenizer puts around a text by itself.

    A text that gives no ids begins as documents do: with bos, else with the token that ends the one before."""
    start = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
    beginning = [] if start is None else [start]
    return [ids or beginning for ids in tokenizer.encode_batch(texts)]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Collection[int] = ()) -> str:
    """The text that `tokens` add to a prompt, without a stop token at their end.

    Decoded together with the prompt: alone, a tokenizer would drop a space at their beginning."""
    if tokens and tokens[-1] in stop:
        tokens = tokens[:-1]
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    if not whole.startswith(before):  # the prompt ended inside a character, which is complete now
        before = before.rstrip(REPLACEMENT)
    return whole[len(before) :]
