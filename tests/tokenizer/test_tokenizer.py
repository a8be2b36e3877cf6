"""Ids against the libraries and systems that define them: transformers, sentencepiece, tiktoken, Megatron."""

from __future__ import annotations

import base64
import io
import itertools
import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from cordee.errors import ProblemError
from cordee.tokenizer import Tokenizer, check_tokenizer, holds_tokenizer, load_tokenizer, tik
from cordee.tokenizer.matching import Matcher
from cordee.tokenizer.options import TokenizerOptions
from cordee.tokenizer.special import AddedToken
from tests.problems import facts, limits

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind at all, and sleeps on.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2345))\n",
    "Once upon a time there was a little girl named Lily, who loved to play outside in the park.",
] * 8
TEXTS = [
    "The quick brown dog",
    "",
    "a  b   c\n\n d\te",
    "def f(x):\n    return x ** 12345\n",
    "It doesn't (really) matter...",
    "caf\u00e9 \u4f60\u597d\uff0c\u4e16\u754c \U0001f600",
]
# Where a Llama-class tokenizer puts a space of its own before the text, transformers 5 treats spaces there otherwise
# than the tokenizer's own files.
LEADING = ["  indented", "    return x\n      y"]


def load(directory=None, **values) -> Tokenizer:
    options = TokenizerOptions(tokenizer_name_or_path=directory and str(directory), **values)
    return load_tokenizer(options)


def auto(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


# ---- tokenizers made on the spot, one of each kind -------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def hf(made) -> Path:
    """A byte-level BPE that puts <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    directory = made / "hf"
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False},
        "pad_token": "<pad>",
        "added_tokens_decoder": {"320": {"content": "<tool>", "special": False, "lstrip": False, "normalized": False}},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="session")
def gpt2(made) -> Path:
    """A directory with vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    directory = made / "gpt2"
    directory.mkdir()
    tokenizer.save_model(str(directory))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def spm(made) -> Path:
    """A directory with a SentencePiece tokenizer.model like Llama's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    directory = made / "spm"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def ranks(made) -> dict[bytes, int]:
    words = {word for text in CORPUS for word in text.split()}
    merged = sorted({(" " + word)[:n].encode() for word in words for n in range(2, 5)} - {b""})
    tokens = [bytes([i]) for i in range(256)] + [token for token in merged if len(token) > 1]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture
def tiktoken_file(tmp_path, ranks, monkeypatch) -> Path:
    monkeypatch.setitem(tik._KINDS, len(ranks), tik.LLAMA3)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def test_tokenizer_json_is_what_transformers_makes_of_it(hf):
    ours, theirs = load(hf), auto(hf)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos, ours.eos, ours.eod, ours.pad) == (0, 1, 1, theirs.pad_token_id)
    texts = [*TEXTS, *LEADING, "a </s>b<s> <tool>x <pad>"]
    assert ours.encode_batch(texts) == [theirs(text).input_ids for text in texts]
    plain = [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert ours.encode_batch(texts, add_special_tokens=False) == plain
    assert ours.encode(texts[0]) == ours.encode_batch(texts)[0]
    assert ours.encode(texts[0])[0] == ours.bos


def test_decode_is_the_inverse(hf, gpt2, spm):
    for tokenizer in (load(hf), load(gpt2), load(spm)):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode([*tokenizer.encode("The dog", add_special_tokens=False), tokenizer.eos]) != "The dog"
        with_end = [*tokenizer.encode("The dog"), tokenizer.eos]
        assert tokenizer.decode(with_end, skip_special_tokens=True) == "The dog"


def test_arguments_take_the_place_of_the_config(hf):
    tokenizer = load(hf, tokenizer_kwargs={"eos_token": "<tool>", "pad_token": "</s>", "add_eos_token": True})
    assert tokenizer.eos == tokenizer.eod == 320 and tokenizer.pad == 1
    plain = load(hf).encode("The dog")
    assert tokenizer.encode("The dog") == [*plain, 320]
    without = load(hf, tokenizer_kwargs={"add_bos_token": False})
    assert without.encode("The dog") == plain[1:]


@pytest.mark.parametrize("kwargs", [{"colour": "red"}, {"trust_remote_code": True}, {"add_bos_token": "maybe"}])
def test_arguments_without_effect_are_refused(hf, kwargs):
    with pytest.raises(ProblemError) as caught:
        load(hf, tokenizer_kwargs=kwargs)
    assert [option for option, _, _ in facts(caught)] == ["--tokenizer-kwargs"]


def test_special_tokens_from_the_models_files(tmp_path, hf):
    shutil.copy(hf / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [5, 1]}))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 5, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load(tmp_path).eos == 1
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load(tmp_path).eos == 0


def test_no_special_tokens_at_all(tmp_path, hf):
    shutil.copy(hf / "tokenizer.json", tmp_path)
    tokenizer = load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (None, None, None, None)


def test_gpt2_files(gpt2):
    ours = load(
        tokenizer_type="GPT2BPETokenizer", vocab_file=str(gpt2 / "vocab.json"), merge_file=str(gpt2 / "merges.txt")
    )
    theirs = auto(gpt2)
    assert ours.vocab_size == len(theirs) == 320
    assert ours.eod == ours.eos == theirs.eos_token_id
    assert ours.encode_batch(TEXTS + LEADING) == [theirs(text).input_ids for text in TEXTS + LEADING]
    assert load(gpt2).encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    # In Megatron, the token is text if it stands in a text.
    assert len(ours.encode("<|endoftext|>")) > 1 and load(gpt2).encode("<|endoftext|>") == [ours.eod]


def test_llama2_tokenizer(spm):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(spm / "tokenizer.model"))
    ours = load(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(spm / "tokenizer.model"))
    assert (ours.vocab_size, ours.bos, ours.eod, ours.pad) == (model.vocab_size(), 1, 2, 2)
    texts = [*TEXTS, *LEADING, "a </s> b"]
    assert ours.encode_batch(texts) == [[1, *model.encode(text)] for text in texts]
    gpt = load(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(spm / "tokenizer.model"))
    assert gpt.encode_batch(texts) == [model.encode(text) for text in texts]
    assert gpt.eod == 2


def test_sentencepiece_tokenizer_has_megatrons_own_tokens(spm):
    ours = load(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(spm / "tokenizer.model"))
    plain = load(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(spm / "tokenizer.model"))
    size = plain.vocab_size
    assert ours.vocab_size == size + 5  # <CLS> <SEP> <EOD> <MASK> <PAD>
    assert (ours.eod, ours.pad, ours.bos, ours.eos) == (size + 2, size + 4, 1, 2)
    text = "The dog<EOD>The fox</s>"
    pieces = [*plain.encode("The dog"), size + 2, *plain.encode("The fox"), 2]
    assert ours.encode(text) == pieces
    assert ours.decode(pieces) == text and ours.decode(pieces, skip_special_tokens=True) == "The dog The fox"


def test_a_directory_with_only_a_sentencepiece_model(spm):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(spm / "tokenizer.model"))
    ours, theirs = load(spm), auto(spm)
    assert (ours.vocab_size, ours.bos, ours.eos, ours.pad) == (len(theirs), 1, 2, 2)
    assert ours.encode_batch(TEXTS + LEADING) == [[1, *model.encode(text)] for text in TEXTS + LEADING]
    assert ours.encode("The dog") == theirs("The dog").input_ids
    # As in transformers, special tokens stand for themselves inside a text.
    assert ours.encode("The dog</s>The fox") == [1, *model.encode("The dog"), 2, *model.encode("The fox")]
    assert load(spm, tokenizer_kwargs={"add_bos_token": False}).encode("The dog") == model.encode("The dog")
    added = load(spm, tokenizer_kwargs={"pad_token": "<new>"})
    assert added.pad == model.vocab_size() and added.vocab_size == model.vocab_size() + 1
    assert added.encode("x<new>", add_special_tokens=False)[-1] == added.pad


def test_slow_means_sentencepiece_itself(spm, tmp_path, hf):
    shutil.copytree(spm, tmp_path / "both")
    shutil.copy(hf / "tokenizer.json", tmp_path / "both")
    assert load(tmp_path / "both").vocab_size != load(spm).vocab_size
    assert load(tmp_path / "both", tokenizer_use_fast=False).fingerprint() == load(spm).fingerprint()
    with pytest.raises(ProblemError) as caught:
        load(hf, tokenizer_use_fast=False)
    assert facts(caught) == [("--tokenizer-use-fast", False, "requires")]


def test_tiktoken_file(tiktoken_file, ranks):
    import tiktoken

    ours = load(tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_file))
    size = len(ranks)
    special = {name: size + i for i, name in enumerate(tik.LLAMA3.special)}
    theirs = tiktoken.Encoding("x", pat_str=tik.LLAMA3.pattern, mergeable_ranks=ranks, special_tokens=special)
    assert (ours.vocab_size, ours.bos, ours.eod) == (size + 256, size, size + 1)
    assert ours.encode_batch(TEXTS + LEADING) == [theirs.encode(text) for text in TEXTS + LEADING]
    assert ours.encode("a<|eot_id|>") == [*theirs.encode("a"), special["<|eot_id|>"]]
    assert ours.decode(ours.encode("a<|eot_id|>b"), skip_special_tokens=True) == "ab"
    assert all(ours.decode(ours.encode(text)) == text for text in TEXTS)


def test_tiktoken_directory(tiktoken_file):
    config = {"bos_token": None, "eos_token": "<|eot_id|>", "pad_token": "<|extra_pad|>"}
    (tiktoken_file.parent / "tokenizer_config.json").write_text(json.dumps(config))
    file = load(tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_file))
    ours = load(tiktoken_file.parent)
    assert ours.encode_batch(TEXTS) == file.encode_batch(TEXTS)
    assert ours.eos == file.eos + 8 and ours.pad == file.vocab_size and ours.vocab_size == file.vocab_size + 1


def test_megatrons_tiktoken_vocabulary(tmp_path, ranks):
    library = pytest.importorskip("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
    path = tmp_path / "vocab.json"
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for token, rank in ranks.items()
    ]
    path.write_text(json.dumps(entries))
    ours = load(tokenizer_type="TikTokenizer", tokenizer_model=str(path))
    theirs = library.TikTokenTokenizer(str(path), vocab_size=1000 + len(ranks))
    assert (ours.vocab_size, ours.bos, ours.eod, ours.pad) == (
        theirs.vocab_size,
        theirs.bos_id,
        theirs.eod,
        theirs.pad_id,
    )
    texts = [*TEXTS, "a</s>b<SPECIAL_7>"]
    assert ours.encode_batch(texts) == [theirs.text_to_ids(text) for text in texts]


def test_numbers():
    tokenizer = load(tokenizer_type="NullTokenizer", vocab_size=100)
    assert tokenizer.encode_batch(["17 4  99", ""]) == [[17, 4, 99], []]
    assert tokenizer.decode([17, 4, 99]) == "17 4 99"
    assert tokenizer.decode([17, 99], skip_special_tokens=True) == "17"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad, tokenizer.bos) == (100, 99, 99, None)
    wrong = {"1 x": ("--tokenizer-type", None), "100": ("--vocab-size", 100), "-1": ("--vocab-size", -1)}
    for text, law in wrong.items():
        with pytest.raises(ProblemError) as caught:
            tokenizer.encode(text)
        assert [(problem.option, problem.limit) for problem in caught.value.problems] == [law]


# ---- fingerprints, copies, pickles -----------------------------------------------------------------------------------


def test_fingerprints(hf, gpt2, spm, tmp_path):
    prints = [load(path).fingerprint() for path in (hf, gpt2, spm)]
    assert len(set(prints)) == 3
    assert load(hf).fingerprint() == prints[0]
    llama2 = load(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(spm / "tokenizer.model"))
    assert llama2.fingerprint() == prints[2], "the same tokens, however they are read"
    fewer_merges = json.loads((hf / "tokenizer.json").read_text())
    del fewer_merges["model"]["merges"][3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fewer_merges))
    shutil.copy(hf / "tokenizer_config.json", tmp_path)
    assert load(tmp_path).fingerprint() != prints[0], "the same vocabulary, cut otherwise"


def kinds(hf, gpt2, spm, tiktoken_file) -> dict[str, Tokenizer]:
    model, gpt2_files = str(spm / "tokenizer.model"), {"vocab_file": str(gpt2 / "vocab.json")}
    return {
        "hf": load(hf),
        "hf with arguments": load(hf, tokenizer_kwargs={"pad_token": "<tool>", "add_bos_token": False}),
        "gpt2 directory": load(gpt2),
        "gpt2 files": load(tokenizer_type="GPT2BPETokenizer", **gpt2_files, merge_file=str(gpt2 / "merges.txt")),
        "spm directory": load(spm),
        "llama2": load(tokenizer_type="Llama2Tokenizer", tokenizer_model=model),
        "gpt sentencepiece": load(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=model),
        "sentencepiece": load(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model),
        "tiktoken": load(tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_file)),
    }


def test_a_saved_tokenizer_gives_the_same_ids(hf, gpt2, spm, tiktoken_file, tmp_path):
    for name, tokenizer in kinds(hf, gpt2, spm, tiktoken_file).items():
        folder = tmp_path / name
        tokenizer.save(folder)
        again = load(folder, tokenizer_kwargs={"add_bos_token": False} if name == "hf with arguments" else {})
        assert again.fingerprint() == tokenizer.fingerprint(), name
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS), name
        assert (again.bos, again.eos, again.vocab_size) == (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size), name
        if name != "sentencepiece":  # its <EOD> has no role in a Hugging Face tokenizer
            assert again.pad == tokenizer.pad, name
    assert (tmp_path / "hf" / "chat_template.jinja").is_file()
    assert auto(tmp_path / "hf")("The dog").input_ids == load(hf).encode("The dog")
    assert auto(tmp_path / "gpt2 files")("The dog").input_ids == load(gpt2).encode("The dog")


def test_pickled_tokenizers_give_the_same_ids(hf, gpt2, spm, tiktoken_file):
    for name, tokenizer in kinds(hf, gpt2, spm, tiktoken_file).items():
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS), name
        assert (again.bos, again.eos, again.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad), name


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({}, ["--tokenizer-name-or-path"]),
        ({"tokenizer_type": "GPT2BPETokenizer"}, ["--vocab-file", "--merge-file"]),
        (
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "absent", "merge_file": "absent"},
            ["--vocab-file", "--merge-file"],
        ),
        ({"tokenizer_type": "Llama2Tokenizer"}, ["--tokenizer-model"]),
        ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "absent"}, ["--tokenizer-model"]),
        ({"tokenizer_type": "TikTokenizer"}, ["--tokenizer-model"]),
        ({"tokenizer_type": "NullTokenizer"}, ["--vocab-size"]),
        ({"tokenizer_name_or_path": "absent"}, ["--tokenizer-name-or-path"]),
    ],
)
def test_what_is_missing_is_said_at_once(values, flags):
    options = TokenizerOptions(**values)
    assert [problem.option for problem in check_tokenizer(options)] == flags
    with pytest.raises(ProblemError):
        load_tokenizer(options)


def test_a_directory_stands_in_for_the_option(hf, tmp_path):
    assert load_tokenizer(TokenizerOptions(), str(hf)).fingerprint() == load(hf).fingerprint()
    assert holds_tokenizer(hf) and not holds_tokenizer(tmp_path)
    assert [problem.kind for problem in check_tokenizer(TokenizerOptions(), str(tmp_path))] == ["empty"]


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("tokenizer.json", "{}", {}),
        ("tokenizer_config.json", "{", {}),
        ("tokenizer.model", "\x00\x01", {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "tokenizer.model"}),
        (
            "tokenizer.model",
            "IQ== 0\nIg== 5\n",
            {"tokenizer_type": "TikTokenizer", "tokenizer_model": "tokenizer.model"},
        ),
        ("tokenizer.model", "IQ== 0\n", {"tokenizer_type": "TikTokenizer", "tokenizer_model": "tokenizer.model"}),
        ("t.json", "{}", {"tokenizer_type": "TikTokenizer", "tokenizer_model": "t.json"}),
        (
            "vocab.json",
            "{}",
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "vocab.json", "merge_file": "merges.txt"},
        ),
        (
            "merges.txt",
            "a b c",
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "vocab.json", "merge_file": "merges.txt"},
        ),
    ],
)
def test_damaged_files(hf, gpt2, tmp_path, monkeypatch, name, content, values):
    monkeypatch.chdir(tmp_path)
    for path in (*hf.iterdir(), *gpt2.glob("*.json"), *gpt2.glob("*.txt")):
        if path.name != "tokenizer_config.json" or path.parent == hf:
            shutil.copy(path, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ProblemError):
        load(None if values else tmp_path, **values)


# ---- real tokenizers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_texts(shared) -> list[str]:
    data = shared / "data"
    texts = []
    for path in ("tinystories/valid_sample.jsonl", "pretrain/pretrain_en.jsonl", "pretrain/pretrain_zh.jsonl"):
        lines = (data / path).read_text(encoding="utf-8").splitlines()
        texts += [json.loads(line)["text"][:4000] for line in lines[:60]]
    return texts


def unpacked(shared: Path, name: str, folder: Path) -> Path:
    with tarfile.open(shared / "data" / "tokenizers" / "packed" / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "mistral", "qwen2"])
def test_real_tokenizer_is_what_transformers_makes_of_it(shared, real_texts, name):
    directory = shared / "data" / "tokenizers" / name
    ours, theirs = load(directory), auto(directory)
    assert ours.encode_batch(real_texts) == [theirs(text).input_ids for text in real_texts]
    assert ours.vocab_size == len(theirs)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert all(
        ours.decode(ids, skip_special_tokens=True) == text
        for ids, text in zip(ours.encode_batch(real_texts), real_texts, strict=True)
    )


@pytest.mark.parametrize("name", ["chatglm3", "deepseek-v2", pytest.param("bloom", marks=pytest.mark.slow)])
def test_packed_tokenizer_is_what_transformers_makes_of_it(shared, real_texts, name, tmp_path):
    directory = unpacked(shared, name, tmp_path)
    ours, theirs = load(directory), auto(directory)
    assert ours.encode_batch(real_texts) == [theirs(text).input_ids for text in real_texts]
    assert (ours.vocab_size, ours.bos, ours.eos) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)


def test_tiny_model_is_what_transformers_makes_of_it(shared, real_texts):
    directory = shared / "data" / "models" / "stories260K"
    assert load(directory).encode_batch(real_texts) == [auto(directory)(text).input_ids for text in real_texts]


@pytest.mark.parametrize("name", ["baichuan2", "internlm", "minicpm3", "gemma"])
def test_sentencepiece_directory_is_what_sentencepiece_says(shared, real_texts, name, tmp_path):
    import sentencepiece

    directory = unpacked(shared, name, tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    ours = load(directory)
    before = [ours.bos] if config.get("add_bos_token", True) else []
    texts = real_texts + LEADING
    assert ours.encode_batch(texts) == [[*before, *model.encode(text)] for text in texts]


def test_both_files_of_llama_agree(shared, real_texts, tmp_path):
    """Also at the beginning of a text, where transformers 5 does not agree with either. The tokenizer.json is of the
    `legacy` kind, which its config is not."""
    directory = shared / "data" / "tokenizers" / "llama"
    shutil.copyfile(directory / "tokenizer.model", tmp_path / "tokenizer.model")
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    by_json, by_model = load(directory), load(tmp_path)
    texts = [*real_texts, *LEADING, "tail </s> <s>x", " "]
    assert by_json.encode_batch(texts) == by_model.encode_batch(texts)
    assert by_json.fingerprint() == by_model.fingerprint()


@pytest.mark.slow
def test_tiktoken_text_that_it_cannot_cut(tiktoken_file):
    tokenizer = load_tokenizer(TokenizerOptions(tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_file)))
    with pytest.raises(ProblemError) as caught:
        tokenizer.encode(" " * 10**6 + "x")
    assert (facts(caught), limits(caught)) == ([("tokenizer", tiktoken_file, "too long")], [10**6 + 1])


@pytest.mark.parametrize("token_id", ["1073741824", "10000000000", "9" * 5000])
def test_ids_far_behind_the_vocabulary(tiktoken_file, token_id):
    """Every id in between would be a token."""
    decoder = {token_id: {"content": "<|far|>", "special": True}}
    (tiktoken_file.parent / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(ProblemError):
        load(tiktoken_file.parent)


@pytest.mark.parametrize("count", [40, 400])
def test_added_tokens_are_found_however_many_there_are(count):
    """The leftmost, and of those that begin there the longest."""
    words = ["".join(letters) for letters in itertools.product("abc", "def", "ghi", "jkl", "mno")]
    words = [*words[: count // 2], *(word[:3] for word in words[:: len(words) // (count // 2) or 1])][:count]
    tokens = {i: AddedToken(word, normalized=False) for i, word in enumerate(dict.fromkeys(words))}
    text = "xadgjmadg cei" + "".join(words[::7]) + " aadgadgjmx"
    pattern = "|".join(sorted((token.content for token in tokens.values()), key=len, reverse=True))
    ids = {token.content: i for i, token in tokens.items()}
    expected = [ids.get(piece, piece) for piece in re.split(f"({pattern})", text) if piece]
    assert list(Matcher(tokens).pieces(text)) == expected
