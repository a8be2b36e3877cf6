from __future__ import annotations

import subprocess
import sys

import pytest

from cordee.config.option import to_flag
from cordee.data import gpt_check as data_check
from cordee.data.build import build_datasets, plan_parts
from cordee.data.indexed import IndexedDataset
from cordee.data.manifest import Manifest, TokenizerNote, manifest_path, merged, read_manifest
from cordee.errors import ProblemError
from cordee.tokenizer.null import NullTokenizer
from cordee.train.options import TrainConfig
from tests.data import peer
from tests.problems import limits


def config(**values) -> TrainConfig:
    return TrainConfig(**{"seq_length": 8, "lr": 1e-3, "train_iters": 1} | values)


def found(options: TrainConfig, **asked) -> list[tuple[str, object, object]]:
    """Option, value and limit of each problem."""
    asked = {"train_samples": 10, "valid_samples": 5, "test_samples": 0} | asked
    return [(problem.option, problem.value, problem.limit) for problem in data_check.check(options, **asked)]


@pytest.fixture
def prefix(tmp_path) -> str:
    return str(peer.write_pair(tmp_path / "x", [20] * 40))


def note(prefix: str, tokenizer=None, **values) -> None:
    dataset = IndexedDataset(prefix)
    made_with = tokenizer and TokenizerNote(
        type=tokenizer.type, fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
    )
    facts = {"documents": dataset.num_documents, "tokens": dataset.num_tokens, "max_token": 99} | values
    Manifest(tokenizer=made_with, **facts).write(prefix)


def test_nothing_wrong(prefix):
    assert found(config(data_path=(prefix,))) == []
    assert found(config(train_data_path=("1", prefix, "2", prefix), valid_data_path=(prefix,))) == []


def test_nothing_given():
    assert found(config()) == [("--data-path", None, None)]


def test_both_ways_at_once(prefix):
    assert found(config(data_path=(prefix,), train_data_path=(prefix,))) == [("--data-path", prefix, None)]


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (("0.3", "a", "b"), "pairs"),
        (("a", "b"), "a"),
        (("0.3", "a", "0.7", "b", "c", "d"), "c"),
        (("0", "a", "1", "b"), "positive"),
        (("nan", "a", "1", "b"), "positive"),
    ],
)
def test_a_blend_that_is_none(values, limit):
    assert found(config(data_path=values)) == [("--data-path", " ".join(values), limit)]


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "90,-10", "90;10", "1,,1"])
def test_a_split_that_is_none(prefix, split):
    assert found(config(data_path=(prefix,), split=split)) == [("--split", split, None)]


def test_all_problems_of_all_files_at_once(tmp_path, prefix):
    (tmp_path / "broken.bin").write_bytes(b"")
    (tmp_path / "broken.idx").write_bytes(b"nonsense")
    (tmp_path / "lonely.bin").write_bytes(b"")
    peer.write_pair(tmp_path / "empty", [])
    names = ("broken", "lonely", "absent", "empty")
    paths = [text for name in names for text in ("1", str(tmp_path / name))]
    assert found(config(train_data_path=(*paths, "1", prefix))) == [
        ("dataset", tmp_path / "broken.idx", 34),
        ("dataset", str(tmp_path / "lonely"), ("lonely.idx",)),
        ("dataset", str(tmp_path / "absent"), ("absent.bin", "absent.idx")),
        ("--train-data-path", str(tmp_path / "empty"), "sequences"),
    ]


def test_damage_inside_an_index(tmp_path, prefix):
    path = tmp_path / "x.idx"
    content = bytearray(path.read_bytes())
    content[34:38] = (7).to_bytes(4, "little")
    path.write_bytes(content)
    assert found(config(data_path=(prefix,))) == [("dataset", path, (1, 28))]


def test_a_split_that_leaves_nothing(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [20] * 10))
    assert found(config(data_path=(prefix,), split="99,1")) == [("--data-path", prefix, "valid")]
    assert found(config(data_path=(prefix,), split="99,1"), valid_samples=0) == []
    with pytest.raises(ProblemError) as caught:
        build_datasets(config(data_path=(prefix,), split="99,1"), 10, 5, 0)
    assert limits(caught) == ["valid"]


def test_a_part_without_a_share_is_no_part(prefix):
    options = config(data_path=(prefix,), split="1,0,1")
    assert list(plan_parts(options)) == ["train", "test"]
    assert found(options) == []
    assert build_datasets(options, 10, 5, 5).valid is None


def test_too_few_tokens(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [0, 1, 0]))
    assert found(config(data_path=(prefix,), split="1"))[0] == ("--data-path", prefix, "tokens")


def test_tokens_that_the_model_does_not_have(prefix):
    note(prefix)
    assert found(config(data_path=(prefix,)), vocab_size=100) == []
    assert found(config(data_path=(prefix,)), vocab_size=99) == [("dataset", prefix, 99)]


def test_another_tokenizer(prefix):
    note(prefix, NullTokenizer(200))
    options = config(data_path=(prefix,))
    assert found(options, tokenizer=NullTokenizer(200)) == []
    [(option, value, made_with)] = found(options, tokenizer=NullTokenizer(300))
    assert (option, value, made_with.type, made_with.vocab_size) == ("dataset", prefix, "NullTokenizer", 200)


def test_a_note_about_other_data(prefix):
    note(prefix, tokens=1)
    assert found(config(data_path=(prefix,))) == [("dataset", manifest_path(prefix), (40, 800))]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 2, "tokenizer": null, "colour": 1}'])
def test_a_note_that_cannot_be_read(tmp_path, prefix, text):
    (tmp_path / "x.json").write_text(text)
    assert found(config(data_path=(prefix,))) == [("dataset", tmp_path / "x.json", None)]


def test_a_note_of_an_older_version_is_ignored(tmp_path, prefix, caplog):
    """The dataset is as good without it."""
    (tmp_path / "x.json").write_text('{"format": 1, "tokens": 3}')
    assert read_manifest(IndexedDataset(prefix)) is None and str(tmp_path / "x.json") in caplog.text
    assert not found(config(data_path=(prefix,)))


def test_a_note_is_read_as_written(prefix):
    note(prefix, NullTokenizer(200), append_eod=True, sources={"a": 3, "b": None}, left_out={"empty text": 2})
    manifest = read_manifest(IndexedDataset(prefix))
    assert manifest.tokenizer.vocab_size == 200 and manifest.append_eod
    assert manifest.sources == {"a": 3, "b": None} and manifest.left_out == {"empty text": 2}
    twice = merged([manifest, manifest])
    assert twice.documents == 80 and twice.left_out == {"empty text": 4} and twice.tokenizer == manifest.tokenizer


@pytest.mark.parametrize("name", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_resets_need_the_token_that_ends_a_document(prefix, name):
    options = config(data_path=(prefix,), **{name: True})
    assert found(options) == [(to_flag(name), True, None)]
    assert found(options, tokenizer=NullTokenizer(200)) == []


def test_checking_does_not_load_torch(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [20] * 40))
    program = f"""
import sys
from cordee.tokenizer.options import TokenizerOptions
from cordee.train.options import TrainConfig
from cordee import tokenizer
from cordee.data import gpt_check, preprocess
assert gpt_check.check(TrainConfig(seq_length=8, lr=1.0, data_path=({prefix!r},)), train_samples=3) == []
tokenizer.load_tokenizer(TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=9))
print([name for name in ("torch", "transformers", "tokenizers", "pyarrow", "datasets", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_permutation_of_blocks_is_refused(prefix):
    options = config(data_path=(prefix,), split="1", dataloader_type="cyclic")
    assert found(options, valid_samples=0) == []
    assert found(options, train_samples=10**12) == [("--dataloader-type", "cyclic", None)]
