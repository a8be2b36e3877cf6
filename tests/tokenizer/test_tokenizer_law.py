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

from cordee.errors import ProblemError
from cordee.tokenizer import Tokenizer, load_tokenizer, tik
from cordee.tokenizer.options import TokenizerOptions

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
NEW = ["<pad>", "<tool>", "<x>", "Zqxj", "<x><x>"]
ADDED = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "dog", *NEW]


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
        split_digits=True,
        hard_vocab_limit=False,
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
    "single word": decoder(flagged("<x>", single_word=True), flagged("Zqxj", True, single_word=True)),
    "one in another": decoder(flagged("<x>"), flagged("<x><x>"), flagged("dog<x>", True)),
    "no effect": config(spaces_between_special_tokens=True, use_default_system_prompt=True, model_max_length=7),
    "added_tokens.json": lambda size: {
        "added_tokens.json": {"<|im_start|>": size, "<|im_end|>": size + 1, "Zqxj": size + 2},
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
    if "added_tokens_decoder" in own:
        if laid.get("added_tokens_decoder"):
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


def at_random(seed: int) -> Setting:
    """Several settings at once, among them tokens that take each other's places."""
    choose = random.Random(seed)

    def token(special: bool | None = None) -> dict[str, Any]:
        flags = {key: choose.random() < 0.3 for key in ("lstrip", "rstrip", "single_word")}
        return flagged(choose.choice(NEW), choose.random() < 0.5 if special is None else special, **flags)

    def role() -> Any:
        content = choose.choice(ADDED)
        full = {"__type": "AddedToken", **token(special=True), "content": content}
        return choose.choice([content, content, full])

    values: dict[str, Any] = {key: role() for key in ("bos_token", "eos_token", "pad_token") if choose.random() < 0.4}
    for key in ("add_bos_token", "add_eos_token", "legacy", "split_special_tokens", "clean_up_tokenization_spaces"):
        if choose.random() < 0.4:
            values[key] = choose.random() < 0.5
    if choose.random() < 0.4:
        key = choose.choice(["extra_special_tokens", "additional_special_tokens"])
        values[key] = choose.sample(ADDED, choose.randint(0, 3))
    tokens = list({token["content"]: token for token in (token() for _ in range(choose.randint(0, 3)))}.values())
    return decoder(*tokens, **values) if tokens else config(**values)


def assert_law(name: str, tokenizer: Made, setting: Setting, texts: list[str], folder: Path) -> None:
    files = setting(tokenizer.size)
    directory = write(tokenizer, files, folder / "directory")
    newer = with_newer_name(directory, folder / "newer")
    ours, theirs = load(directory), transformers_tokenizer(newer, tokenizer.kind)
    legacy = json.loads((directory / "tokenizer_config.json").read_text()).get("legacy", True)
    has_prefix = tokenizer.kind == "model" and "no prefix" not in name
    try:
        assert_agree(ours, theirs, texts, lambda text: with_first_space(text, legacy, has_prefix))
    except AssertionError as error:
        raise AssertionError(f"{name}, {files}: {error}") from error
    ours.save(folder / "saved")
    again = load(folder / "saved")
    assert again.encode_batch(texts) == ours.encode_batch(texts), (name, files)
    assert (again.vocab_size, again.bos, again.eos, again.pad) == (ours.vocab_size, ours.bos, ours.eos, ours.pad)


@pytest.fixture
def known_ranks(made, monkeypatch) -> None:
    """The small file of ranks is one of those whose pattern is known."""
    monkeypatch.setitem(tik._KINDS, made["tiktoken"].size - 2, tik.LLAMA3)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(made, name, tmp_path, known_ranks):
    for number, setting in enumerate(SETTINGS.values()):
        assert_law(name, made[name], setting, texts_of(ADDED, seed=number), tmp_path / str(number))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers_with_settings_at_random(made, name, tmp_path, known_ranks):
    for seed in range(12):
        assert_law(name, made[name], at_random(seed), texts_of(ADDED, seed=seed), tmp_path / str(seed))


@pytest.mark.parametrize("name", ["byte level", "byte level, bos", "sentencepiece", "tiktoken", "merges"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"eos_token": "<x>", "pad_token": "<pad>", "unk_token": "<unk>"},
        {"eos_token": "<x>", "add_bos_token": True, "add_eos_token": True},
    ],
)
def test_arguments_are_those_of_transformers(made, name, arguments, tmp_path, known_ranks):
    tokenizer = made[name]
    files = {"special_tokens_map.json": {"eos_token": "<tool>"}}
    directory = write(tokenizer, files, tmp_path / "directory")
    if tokenizer.kind == "model":
        arguments = {"add_bos_token": True, **arguments}
    texts = texts_of(ADDED)
    ours = load(directory, **arguments)
    assert_agree(ours, transformers_tokenizer(directory, tokenizer.kind, **arguments), texts)
    ours.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    assert (again.vocab_size, again.bos, again.eos, again.pad) == (ours.vocab_size, ours.bos, ours.eos, ours.pad)


def test_without_a_space_before_the_text(made, tmp_path):
    """`add_prefix_space: false`, which transformers' generic class ignores and LlamaTokenizer obeys: as a model that
    has no such space by itself."""
    model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(made["sentencepiece"].files["tokenizer.model"])
    model.normalizer_spec.add_dummy_prefix = False
    tokenizer = made["sentencepiece"]
    bare = Made("model", {"tokenizer.model": model.SerializeToString()}, tokenizer.config, tokenizer.size)
    ours = load(write(tokenizer, config(add_prefix_space=False)(tokenizer.size), tmp_path / "ours"))
    theirs = transformers_tokenizer(write(bare, {}, tmp_path / "theirs"), "model")
    assert_agree(ours, theirs, texts_of(ADDED))


# ---- why there are exceptions ----------------------------------------------------------------------------------------


def sentencepiece_ids(made: Made, text: str) -> list[int]:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=made.files["tokenizer.model"]).encode(text)


def test_exception_first_space(made, tmp_path):
    """Exception 1: with `legacy: false` SentencePiece and we put a space before the first one, transformers 5 not."""
    tokenizer = made["sentencepiece"]
    directory = write(tokenizer, config(legacy=False)(0), tmp_path)
    ours, theirs = load(directory), transformers_tokenizer(directory, "model")
    for text in ("  indented", " ", "\u2581x"):
        assert ours.encode(text, add_special_tokens=False) == sentencepiece_ids(tokenizer, text)
        assert theirs(text, add_special_tokens=False).input_ids != sentencepiece_ids(tokenizer, text)


def test_exception_skipped_roles(made, tmp_path):
    """Exception 2: a role that the file does not mark as special is no text either."""
    raw = json.loads(made["byte level"].files["tokenizer.json"])
    for token in raw["added_tokens"]:
        token["special"] = False
    plain = Made("json", {"tokenizer.json": json.dumps(raw).encode()}, made["byte level"].config, 320)
    directory = write(plain, decoder(flagged("<x>"))(320), tmp_path)
    ids = load(directory).encode("x</s>")
    assert load(directory).decode(ids, skip_special_tokens=True) == "x"
    assert transformers_tokenizer(directory, "json").decode(ids, skip_special_tokens=True) == "x</s>"


def test_exception_further_tokens_of_the_older_file(made, tmp_path):
    """Exception 3: further special tokens that transformers 4 read and transformers 5 loses."""
    tokenizer = made["sentencepiece"]
    directory = write(tokenizer, {"special_tokens_map.json": {"additional_special_tokens": ["<x>"]}}, tmp_path)
    assert load(directory).encode("<x>") == [1, tokenizer.size]
    assert transformers_tokenizer(directory, "model").convert_tokens_to_ids("<x>") == 0


def test_exception_bos_by_itself(made, tmp_path):
    """Exception 4: LlamaTokenizer documents that `add_bos_token` is true if it is not said, and transformers 4 kept to
    it; in transformers 5 it is so only with a tokenizer.json."""
    tokenizer = made["sentencepiece"]
    own = {key: value for key, value in tokenizer.config.items() if key != "add_bos_token"}
    directory = write(Made("model", tokenizer.files, own, tokenizer.size), {}, tmp_path)
    assert load(directory).encode("dog") == [1, *transformers_tokenizer(directory, "model")("dog").input_ids]


def test_exception_llama_class(made, tmp_path):
    """Exception 5: LlamaTokenizer of transformers 5 makes a tokenizer of its own out of the vocabulary, which does
    neither what tokenizer.json says nor what SentencePiece does."""
    from transformers import AutoTokenizer

    for name, texts in (("metaspace", ["  indented", " x"]), ("sentencepiece", ["  indented", "a  b"])):
        tokenizer = made[name]
        directory = write(tokenizer, config(tokenizer_class="LlamaTokenizer", unk_token="<unk>")(0), tmp_path / name)
        ours, theirs = load(directory), AutoTokenizer.from_pretrained(str(directory))
        assert type(theirs).__name__ == "LlamaTokenizer"
        faithful = transformers_tokenizer(directory, tokenizer.kind)
        for text in texts:
            assert ours.encode(text) == faithful(text).input_ids
        assert any(ours.encode(text) != theirs(text).input_ids for text in texts), name
        assert ours.encode("The dog sleeps") == faithful("The dog sleeps").input_ids


def test_exception_arguments_of_one_end(made, tmp_path):
    """Exception 6: one of `add_bos_token` and `add_eos_token` given for a tokenizer.json leaves the other end as it is;
    transformers 5 takes the bos of the file away when asked for an eos."""
    directory = write(made["byte level, bos"], {}, tmp_path)
    assert load(directory, add_eos_token=True).encode("x") == [0, *load(directory).encode("x")[1:], 1]
    assert transformers_tokenizer(directory, "json", add_eos_token=True)("x").input_ids[0] != 0


def test_exception_control_tokens_out_of_text(tmp_path):
    """Exception 7: SentencePiece never cuts a control token out of text; where text is not to match special tokens,
    transformers 5 does so with unigram models."""
    unigram = _sentencepiece(model_type="unigram", vocab_size=350)
    directory = write(unigram, config(split_special_tokens=True, add_bos_token=False)(0), tmp_path)
    assert load(directory).encode("x</s>") == sentencepiece_ids(unigram, "x</s>")
    assert 2 in transformers_tokenizer(directory, "model")("x</s>").input_ids


def test_exception_gaps(made, tmp_path):
    """Exception 8: an added token of a SentencePiece directory has the id that its file states, as the model was
    trained; transformers 5 gives it the next one."""
    tokenizer = made["sentencepiece"]
    directory = write(tokenizer, {"added_tokens.json": {"<tool>": tokenizer.size + 5}}, tmp_path)
    ours = load(directory)
    assert ours.encode("<tool>") == [1, tokenizer.size + 5] and ours.vocab_size == tokenizer.size + 6
    assert transformers_tokenizer(directory, "model").convert_tokens_to_ids("<tool>") == tokenizer.size


# ---- what is said, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("byte level", config(add_prefix_space=True), "add_prefix_space is ignored"),
        ("byte level", config(do_lower_case=True), "do_lower_case is ignored"),
        ("metaspace", config(tokenizer_class="LlamaTokenizerFast"), "as written"),
        ("metaspace", config(tokenizer_class="LlamaTokenizer", legacy=False), "`legacy: false` is ignored"),
        ("sentencepiece", config(do_lower_case=True), "do_lower_case is ignored"),
        ("sentencepiece", config(add_bos_token=None), "bos is put before"),
        ("sentencepiece", config(sp_model_kwargs={"enable_sampling": True}), "sp_model_kwargs is ignored"),
        ("tiktoken", config(add_prefix_space=True), "add_prefix_space is ignored"),
        ("tiktoken", config(added_tokens_decoder=None), "the known ones are taken"),
        ("sentencepiece", lambda size: {"added_tokens.json": {"<x>": size + 1}}, "ids of added tokens are"),
        ("word piece", config(add_prefix_space=False, do_lower_case=True, legacy=True), None),
        ("byte level", config(add_prefix_space=False, spaces_between_special_tokens=True), None),
        ("sentencepiece", config(legacy=True), None),
    ],
)
def test_what_differs_or_has_no_effect_is_said_once(made, name, setting, said, tmp_path, known_ranks, caplog):
    caplog.set_level("INFO", logger="cordee")
    directory = write(made[name], setting(made[name].size), tmp_path)
    caplog.clear()
    load(directory).encode_batch(["x", "y"])
    messages = [record.getMessage() for record in caplog.records if record.name == "cordee"]
    assert len(messages) == (said is not None)
    assert said is None or said in messages[0]


@pytest.mark.parametrize("name", ["byte level", "sentencepiece", "tiktoken", "merges"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<x>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": "<x>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": 5}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<x>", "lstrip": "no"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<x>"}, "901": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
        ("tokenizer_config.json", {"eos_token": {"lstrip": True}}),
        ("tokenizer_config.json", {"add_bos_token": "yes"}),
        ("tokenizer_config.json", {"legacy": 3}),
        ("tokenizer_config.json", {"additional_special_tokens": "<x>"}),
        ("tokenizer_config.json", {"extra_special_tokens": [7]}),
        ("added_tokens.json", ["<x>"]),
        ("added_tokens.json", {"<x>": "900"}),
        ("added_tokens.json", {"<x>": -1}),
        ("added_tokens.json", {"<x>": True}),
        ("added_tokens.json", {"<x>": 900, "<y>": 900}),
        ("added_tokens.json", {"<x>": 0, "</s>": 1}),
        ("special_tokens_map.json", ["<x>"]),
        ("special_tokens_map.json", {"eos_token": 5}),
        ("config.json", {"eos_token_id": "2"}),
        ("generation_config.json", {"eos_token_id": [1, None]}),
    ],
)
def test_what_the_files_cannot_say_is_a_problem(made, name, file, content, tmp_path, known_ranks):
    made_here = made[name]
    own = {key: value for key, value in made_here.config.items() if key != "added_tokens_decoder"}
    directory = write(Made(made_here.kind, made_here.files, own, made_here.size), {}, tmp_path)
    laid = own | content if file == "tokenizer_config.json" and isinstance(content, dict) else content
    (directory / file).write_text(json.dumps(laid))
    with pytest.raises(ProblemError):
        load(directory)


# ---- real tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "files", "laid", "text", "size", "ids"),
    [
        (
            "llama",
            {"added_tokens.json": {"<|im_start|>": 32000, "<|im_end|>": 32001}},
            {"eos_token": "<|im_end|>", "legacy": False},
            "<|im_start|>user\nhi",
            32002,
            [1, 32000, 1792, 13, 2918],
        ),
        ("llama", {}, {"legacy": False}, "<s>x </s>b", 32000, [1, 1, 29916, 29871, 2, 29890]),
        ("llama", {}, {"legacy": True}, "<s>x </s>b", 32000, [1, 1, 921, 29871, 2, 289]),
        (
            "llama3",
            {},
            {"add_bos_token": True, "add_eos_token": True},
            "Good day.",
            128256,
            [128000, 15571, 1938, 13, 128001],
        ),
    ],
)
def test_published_ids(shared, tmp_path, source, files, laid, text, size, ids):
    directory = shared / "data" / "tokenizers" / source
    shutil.copyfile(directory / "tokenizer.model", tmp_path / "tokenizer.model")
    own = json.loads((directory / "tokenizer_config.json").read_text()) | laid
    for name, content in {**files, "tokenizer_config.json": own}.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours = load(tmp_path)
    assert (ours.encode(text), ours.vocab_size) == (ids, size)
    if files:
        assert ours.eod == ours.eos == 32001


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind", "names"),
    [
        ("llama", "model", ["tokenizer.model"]),
        ("llama", "json", ["tokenizer.json"]),
        ("mistral", "json", ["tokenizer.json"]),
        ("llama3", "tiktoken", ["tokenizer.model"]),
        ("gpt2", "merges", ["vocab.json", "merges.txt"]),
        ("qwen2", "merges", ["vocab.json", "merges.txt"]),
    ],
)
def test_real_ids_are_those_of_transformers(shared, source, kind, names, tmp_path):
    directory = shared / "data" / "tokenizers" / source
    files = {name: (directory / name).read_bytes() for name in names}
    own = json.loads((directory / "tokenizer_config.json").read_text())
    size = load(write(Made(kind, files, own, 0), {}, tmp_path / "own")).vocab_size
    for seed in (3, 5):
        assert_law(source, Made(kind, files, own, size), at_random(seed), texts_of(ADDED, seed), tmp_path / str(seed))
