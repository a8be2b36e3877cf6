"""For every directory and setting our ids are those of transformers, save for the exceptions named here.

The oracle is transformers' own `PreTrainedTokenizerFast`, which reads a directory as its files say, or the class that a
directory of vocab.json and merges.txt names. The exceptions are where transformers 5 contradicts SentencePiece, the
tokenizer's own files or its own documentation; each has a test that shows the contradiction, so that an exception
which is no longer needed fails.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cordee.config.schema import TokenizerOptions
from cordee.data.tokenizer import Tokenizer, load_tokenizer, tik
from cordee.errors import ProblemError

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind at all, and sleeps on.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2345))\n",
    "Once upon a time there was a little girl named Lily, who loved to play outside in the park.",
] * 8
PLAIN = [
    "",
    " ",
    "   ",
    "\n",
    "The quick brown dog",
    "  leading, trailing  ",
    "a  b   c\n\n d\te\r\n",
    "def f(x):\n    return x ** 12345\n",
    "caf\u00e9 cafe\u0301 \ufb01 \uff21 \u4f60\u597d\uff0c\u4e16\u754c \U0001f600\u200d\U0001f680 \u00a0 \u2014",
    "\ue000 outside \U000e0001",
    "the dog " * 300 + "\u4f60" * 300,
]
# What added tokens are tried in: before, between and behind spaces, words and each other.
ATOMS = ["", " ", "  ", "\n", "x", "dog", "The", "\u4f60", "\u00e9", ".", "_"]
ADDED = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<pad>", "<tool>", "<x>", "dog", "Ab"]


def texts_of(added: list[str], seed: int = 0) -> list[str]:
    """The plain texts, and random ones around added tokens."""
    choose = random.Random(seed)
    mixed = ["".join(choose.choice([*ATOMS, *added, *added]) for _ in range(choose.randint(1, 9))) for _ in range(60)]
    return [*PLAIN, *(f"x {token} x{token}{token}" for token in added), *mixed]


# ---- tokenizers made on the spot -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Files of a vocabulary, and the config that makes a tokenizer of them."""

    kind: str  # "json", "model", "tiktoken" or "merges"
    files: dict[str, bytes]
    config: dict[str, Any]
    size: int


def _byte_level(bos: bool) -> Made:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return _of_json(tokenizer)


def _metaspace() -> Made:
    """As `tokenizer.json` of LLaMA is written."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *alphabet], max_token_length=6, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    return _of_json(Tokenizer.from_str(json.dumps(raw)))


def _word_piece() -> Made:
    """Lower case, words with spaces between them, and the one kind whose decoded text is cleaned up."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _of_json(tokenizer)


def _of_json(tokenizer: Any) -> Made:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return Made("json", {"tokenizer.json": tokenizer.to_str().encode()}, config, tokenizer.get_vocab_size())


def _sentencepiece(**values: Any) -> Made:
    import sentencepiece

    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 420}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_digits=True,
        minloglevel=2,
        **options | values,
    )
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return Made("model", {"tokenizer.model": model.getvalue()}, config, size)


def _tiktoken() -> Made:
    words = {word for text in CORPUS for word in text.split()}
    grown = sorted({(" " + word)[:n].encode() for word in words for n in range(2, 5)})
    tokens = [bytes([i]) for i in range(256)] + [token for token in grown if len(token) > 1]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    decoder = {str(len(tokens) + i): {"content": token, "special": True} for i, token in enumerate(("<s>", "</s>"))}
    return Made("tiktoken", {"tokenizer.model": lines}, named | {"added_tokens_decoder": decoder}, len(tokens) + 2)


def _merges(folder: Path) -> Made:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.save_model(str(folder))
    files = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}
    return Made("merges", files, named, tokenizer.get_vocab_size())


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Made]:
    return {
        "byte level": _byte_level(bos=False),
        "byte level, bos": _byte_level(bos=True),
        "metaspace": _metaspace(),
        "word piece": _word_piece(),
        "sentencepiece": _sentencepiece(),
        "sentencepiece, no prefix": _sentencepiece(add_dummy_prefix=False),
        "sentencepiece, no bytes": _sentencepiece(byte_fallback=False, vocab_size=120),
        "tiktoken": _tiktoken(),
        "merges": _merges(tmp_path_factory.mktemp("merges")),
    }


NAMES = [
    "byte level",
    "byte level, bos",
    "metaspace",
    "word piece",
    "sentencepiece",
    "sentencepiece, no prefix",
    "sentencepiece, no bytes",
    "tiktoken",
    "merges",
]


# ---- settings --------------------------------------------------------------------------------------------------------


Files = dict[str, dict[str, Any]]  # JSON objects by file name; tokenizer_config.json is laid over the tokenizer's own
Setting = Callable[[int], Files]  # of the size of the vocabulary


def config(**values: Any) -> Setting:
    return lambda size: {"tokenizer_config.json": values}


def decoder(*tokens: dict[str, Any], **values: Any) -> Setting:
    """Tokens behind the vocabulary, and how they are matched."""
    return lambda size: {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(size + i): token for i, token in enumerate(tokens)},
            **values,
        }
    }


def flagged(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": special, "normalized": False, **flags}


SETTINGS: dict[str, Setting] = {
    "nothing": config(),
    "eos added": config(add_eos_token=True),
    "bos and eos added": config(add_bos_token=True, add_eos_token=True),
    "neither added": config(add_bos_token=False, add_eos_token=False),
    "legacy": config(legacy=True),
    "not legacy": config(legacy=False),
    "roles exchanged": config(bos_token="</s>", eos_token="<s>", add_bos_token=True, add_eos_token=True),
    "new roles": config(pad_token="<pad>", unk_token="<unk>", sep_token="<x>", mask_token="<tool>"),
    "new eos": config(eos_token="<|im_end|>", add_eos_token=True),
    "eos with flags": config(eos_token={"__type": "AddedToken", "content": "<x>", "lstrip": True, "normalized": False}),
    "role of its own": config(image_token="<tool>"),
    "additional": config(additional_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="<pad>"),
    "extra": config(extra_special_tokens=["<x>", "<tool>", "dog"]),
    "extra by role": config(extra_special_tokens={"image_token": "<x>"}),
    "split": config(split_special_tokens=True, additional_special_tokens=["<x>"]),
    "split, plain ones": decoder(flagged("<x>"), flagged("<tool>", True), split_special_tokens=True),
    "no further ones": config(eos_token="<x>", additional_special_tokens=[]),
    "no bos": config(bos_token=None, add_bos_token=True),
    "cleaned up": config(clean_up_tokenization_spaces=True),
    "lstrip": decoder(flagged("<tool>", lstrip=True), flagged("<x>", True, lstrip=True)),
    "rstrip": decoder(flagged("<tool>", rstrip=True), flagged("<x>", True, rstrip=True)),
    "both strip": decoder(flagged("<tool>", lstrip=True, rstrip=True), flagged("<x>", True), pad_token="<x>"),
    "single word": decoder(flagged("<x>", single_word=True), flagged("Ab", True, single_word=True)),
    "one in another": decoder(flagged("<x>"), flagged("<x><x>"), flagged("dog<x>", True)),
    "no effect": config(spaces_between_special_tokens=True, use_default_system_prompt=True, model_max_length=7),
    "added_tokens.json": lambda size: {
        "added_tokens.json": {"<|im_start|>": size, "<|im_end|>": size + 1, "Ab": size + 2},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "legacy": False},
    },
    "special_tokens_map.json": lambda size: {
        "special_tokens_map.json": {
            "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": True},
            "pad_token": "<pad>",
            "additional_special_tokens": ["<x>"],
        },
        "tokenizer_config.json": {"eos_token": "<s>"},
    },
    "all the older files": lambda size: {
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<x>"]},
        "added_tokens.json": {"<x>": size + 1, "<tool>": size},
        "tokenizer_config.json": {"pad_token": "<pad>", "add_eos_token": True},
    },
    "older files beside a newer one": lambda size: {
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "added_tokens.json": {"<tool>": size + 7},
        **decoder(flagged("<x>", True))(size),
    },
}


def write(made: Made, files: Files, folder: Path) -> Path:
    """The directory of a tokenizer with settings laid over it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    own = dict(made.config)
    laid = files.get("tokenizer_config.json", {})
    if made.kind == "tiktoken":
        if "added_tokens_decoder" in laid:
            laid = laid | {"added_tokens_decoder": own["added_tokens_decoder"] | laid["added_tokens_decoder"]}
        elif set(files) - {"tokenizer_config.json"}:  # the older files are read only without the newer one
            tokens = own.pop("added_tokens_decoder")
            ids = {token["content"]: int(i) for i, token in tokens.items()}
            files = files | {"added_tokens.json": ids | files.get("added_tokens.json", {})}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(own | laid), encoding="utf-8")
    return folder


def load(directory: Path, **arguments: Any) -> Tokenizer:
    options = TokenizerOptions(tokenizer_name_or_path=str(directory), tokenizer_kwargs=arguments)
    return load_tokenizer(options)


def transformers_tokenizer(directory: Path, kind: str, **arguments: Any) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reader = AutoTokenizer if kind == "merges" else PreTrainedTokenizerFast
    return reader.from_pretrained(str(directory), **arguments)


# ---- the exceptions --------------------------------------------------------------------------------------------------


def with_first_space(text: str, legacy: bool, has_prefix: bool) -> str:
    """Exception 1, `tokenizer.model` with `legacy: false`. SentencePiece puts its space before a text whatever that
    begins with, and so does every published tokenizer.json; transformers 5 leaves it out before a space."""
    return " " + text if has_prefix and not legacy and text.startswith((" ", "\u2581")) else text


def skipped_roles(ours: Tokenizer, ids: list[int]) -> list[int]:
    """Exception 2, decoding without special tokens: bos, eos and pad never are part of the text, also where a
    vocabulary file forgets to mark them as special."""
    return [i for i in ids if i not in (ours.bos, ours.eos, ours.pad)]


def with_newer_name(directory: Path, folder: Path) -> Path:
    """Exception 3, `additional_special_tokens` in special_tokens_map.json: transformers 5 does not look there when it
    reads added_tokens.json, and has forgotten them when it has read a SentencePiece model. Under the name that it
    gives them itself it does."""
    path = directory / "special_tokens_map.json"
    if not path.is_file() or (directory / "merges.txt").is_file():  # those are read by transformers itself
        return directory
    shutil.copytree(directory, folder)
    content = path.read_text().replace("additional_special_tokens", "extra_special_tokens")
    (folder / path.name).write_text(content)
    return folder


def assert_agree(ours: Tokenizer, theirs: Any, texts: list[str], adapt: Callable[[str], str] = str) -> None:
    expected = [theirs(adapt(text)).input_ids for text in texts]
    got = ours.encode_batch(texts)
    for text, mine, other in zip(texts, got, expected, strict=True):
        assert mine == other, f"{text!r}: {theirs.convert_ids_to_tokens(mine)} {theirs.convert_ids_to_tokens(other)}"
    plain = [theirs(adapt(text), add_special_tokens=False).input_ids for text in texts]
    assert ours.encode_batch(texts, add_special_tokens=False) == plain
    assert (ours.vocab_size, ours.bos, ours.eos) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad == (ours.eos if theirs.pad_token_id is None else theirs.pad_token_id)
    for ids in got:
        assert ours.decode(ids) == theirs.decode(ids)
        skipped = theirs.decode(skipped_roles(ours, ids), skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=True) == skipped


# ---- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(made, name, tmp_path, monkeypatch):
    tokenizer = made[name]
    if tokenizer.kind == "tiktoken":
        monkeypatch.setitem(tik._KINDS, tokenizer.size - 2, tik._LLAMA3)
    for number, (setting, files) in enumerate(SETTINGS.items()):
        directory = write(tokenizer, files(tokenizer.size), tmp_path / str(number))
        newer = with_newer_name(directory, tmp_path / f"{number} newer")
        ours, theirs = load(directory), transformers_tokenizer(newer, tokenizer.kind)
        legacy = files(tokenizer.size).get("tokenizer_config.json", {}).get("legacy", True)
        has_prefix = tokenizer.kind == "model" and "no prefix" not in name

        def adapt(text: str, legacy=legacy, has_prefix=has_prefix) -> str:
            return with_first_space(text, legacy, has_prefix)

        texts = texts_of(ADDED, seed=number)
        try:
            assert_agree(ours, theirs, texts, adapt)
        except AssertionError as error:
            raise AssertionError(f"{name}, {setting}: {error}") from error
        ours.save(tmp_path / f"{number} saved")
        again = load(tmp_path / f"{number} saved")
        assert again.encode_batch(texts) == ours.encode_batch(texts), setting
        assert (again.vocab_size, again.bos, again.eos, again.pad) == (ours.vocab_size, ours.bos, ours.eos, ours.pad)
