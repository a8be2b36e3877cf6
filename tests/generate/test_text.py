"""Prompts and continuations with real tokenizers made on the fly."""

from __future__ import annotations

import pytest

from cordee.generate.text import continuation, encode_prompts
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from tests.generate.folders import TEXT, write_tokenizer


def tokenizer(directory, bos=True):
    write_tokenizer(directory, bos=bos)
    return load_tokenizer(TokenizerOptions(), str(directory))


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_begins_as_documents_do(tmp_path, bos):
    first, empty = encode_prompts(tokenizer(tmp_path, bos), ["Once", ""])
    assert first[0] == 0 if bos else first[0] > 1
    assert empty == ([0] if bos else [1])


@pytest.mark.parametrize("bos", [True, False])
def test_any_cut_of_a_text_continues_it(tmp_path, bos):
    """Also one inside a character of several bytes."""
    made = tokenizer(tmp_path, bos)
    ids = made.encode(TEXT)
    for cut in range(1, len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        before = made.decode(prompt, skip_special_tokens=True)
        text = continuation(made, prompt, rest)
        assert text and TEXT.endswith(text)
        assert before.rstrip("\ufffd") + text == TEXT


def test_stop_tokens_are_no_text(tmp_path):
    made = tokenizer(tmp_path)
    ids = made.encode("a ball")
    assert continuation(made, ids, [*made.encode(" red", add_special_tokens=False), 1], {1}) == " red"
    assert continuation(made, ids, [1], {1}) == ""
    word = made.encode(" red", add_special_tokens=False)
    assert continuation(made, ids, word * 2, {word[-1]}) == made.decode(word * 2)[: -len(made.decode(word[-1:]))]


def test_sentencepiece_keeps_the_space_between(shared):
    made = load_tokenizer(TokenizerOptions(), str(shared / "data" / "tokenizers" / "llama"))
    whole = "Once upon a time"
    prompt = made.encode("Once")
    rest = made.encode(whole)[len(prompt) :]
    assert continuation(made, prompt, rest) == " upon a time"
