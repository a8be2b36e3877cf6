from __future__ import annotations

import subprocess
import sys

import pytest

from cordee.config.schema import TrainConfig
from cordee.data import gpt_check as data_check
from cordee.data.build import build_datasets, plan_parts
from cordee.data.indexed import IndexedDataset
from cordee.data.manifest import Manifest, TokenizerNote, merged, read_manifest
from cordee.data.tokenizer.null import NullTokenizer
from cordee.errors import ProblemError
from tests.data import peer


def config(**values) -> TrainConfig:
    return TrainConfig(**{"seq_length": 8, "lr": 1e-3, "train_iters": 1} | values)


def whys(options: TrainConfig, **asked) -> list[str]:
    asked = {"train_samples": 10, "valid_samples": 5, "test_samples": 0} | asked
    return [f"{problem.option}: {problem.why}" for problem in data_check.check(options, **asked)]


@pytest.fixture
def prefix(tmp_path) -> str:
    return str(peer.write_pair(tmp_path / "x", [20] * 40))


def note(prefix: str, tokenizer=None, **values) -> None:
    dataset = IndexedDataset(prefix)
    made_with = tokenizer and TokenizerNote(
        type=tokenizer.type,
        fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )
    facts = {"documents": dataset.num_documents, "tokens": dataset.num_tokens, "max_token": 99} | values
    Manifest(tokenizer=made_with, **facts).write(prefix)


def test_nothing_wrong(prefix):
    assert whys(config(data_path=(prefix,))) == []
    assert whys(config(train_data_path=("1", prefix, "2", prefix), valid_data_path=(prefix,))) == []


def test_nothing_given():
    assert whys(config()) == ["--data-path: there is nothing to train on"]


def test_both_ways_at_once(prefix):
    assert "--data-path" in whys(config(data_path=(prefix,), train_data_path=(prefix,)))[0]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (("0.3", "a", "b"), "do not come in pairs"),
        (("a", "b"), "'a' stands where a weight belongs"),
        (("0.3", "a", "0.7", "b", "c", "d"), "'c' stands where a weight belongs"),
        (("0", "a", "1", "b"), "not a positive number"),
        (("nan", "a", "1", "b"), "not a positive number"),
    ],
)
def test_a_blend_that_is_none(values, why):
    [problem] = whys(config(data_path=values))
    assert why in problem


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "90,-10", "90;10", "1,,1"])
def test_a_split_that_is_none(prefix, split):
    assert whys(config(data_path=(prefix,), split=split)) == ["--split: it is not a list of shares"]


def test_all_problems_of_all_files_at_once(tmp_path, prefix):
    (tmp_path / "broken.bin").write_bytes(b"")
    (tmp_path / "broken.idx").write_bytes(b"nonsense")
    (tmp_path / "lonely.bin").write_bytes(b"")
    peer.write_pair(tmp_path / "empty", [])
    names = ("broken", "lonely", "absent", "empty")
    paths = [text for name in names for text in ("1", str(tmp_path / name))]
    problems = "\n".join(whys(config(train_data_path=(*paths, "1", prefix))))
    for part in ("8 bytes, fewer than", "partner lonely.idx is missing", "neither absent.bin", "the dataset is empty"):
        assert part in problems
    assert len(problems.splitlines()) == 4


def test_damage_inside_an_index(tmp_path, prefix):
    path = tmp_path / "x.idx"
    content = bytearray(path.read_bytes())
    content[34:38] = (7).to_bytes(4, "little")
    path.write_bytes(content)
    assert "sequence 1 does not begin where" in whys(config(data_path=(prefix,)))[0]


def test_a_split_that_leaves_nothing(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [20] * 10))
    [problem] = whys(config(data_path=(prefix,), split="99,1"))
    assert "its share of 10 sequences leaves none for valid" in problem
    assert whys(config(data_path=(prefix,), split="99,1"), valid_samples=0) == []
    with pytest.raises(ProblemError, match="leaves none for valid"):
        build_datasets(config(data_path=(prefix,), split="99,1"), 10, 5, 0)


def test_a_part_without_a_share_is_no_part(prefix):
    options = config(data_path=(prefix,), split="1,0,1")
    assert list(plan_parts(options)) == ["train", "test"]
    assert whys(options) == []
    assert build_datasets(options, 10, 5, 5).valid is None


def test_too_few_tokens(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [0, 1, 0]))
    assert "fewer than two tokens" in whys(config(data_path=(prefix,), split="1"))[0]


def test_tokens_that_the_model_does_not_have(prefix):
    note(prefix)
    assert whys(config(data_path=(prefix,)), vocab_size=100) == []
    assert "holds token 99, but the model has only 99 tokens" in whys(config(data_path=(prefix,)), vocab_size=99)[0]


def test_another_tokenizer(prefix):
    note(prefix, NullTokenizer(200))
    options = config(data_path=(prefix,))
    assert whys(options, tokenizer=NullTokenizer(200)) == []
    [problem] = whys(options, tokenizer=NullTokenizer(300))
    assert "made with another tokenizer: NullTokenizer of 200 tokens; this one has 300" in problem


def test_a_note_about_other_data(prefix):
    note(prefix, tokens=1)
    assert (
        "it tells of 40 documents and 1 tokens, but the dataset has 40 and 800" in whys(config(data_path=(prefix,)))[0]
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 2, "tokenizer": null, "colour": 1}'])
def test_a_note_that_cannot_be_read(tmp_path, prefix, text):
    (tmp_path / "x.json").write_text(text)
    assert "it cannot be read" in whys(config(data_path=(prefix,)))[0]


def test_a_note_of_an_older_version_is_ignored(tmp_path, prefix, caplog):
    """The dataset is as good without it."""
    (tmp_path / "x.json").write_text('{"format": 1, "tokens": 3}')
    assert read_manifest(IndexedDataset(prefix)) is None and str(tmp_path / "x.json") in caplog.text
    assert not whys(config(data_path=(prefix,)))


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
    assert "no tokenizer is given" in whys(options)[0]
    assert whys(options, tokenizer=NullTokenizer(200)) == []


def test_checking_does_not_load_torch(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [20] * 40))
    program = f"""
import sys
from cordee.config.schema import TrainConfig, TokenizerOptions
from cordee.data import gpt_check, preprocess, tokenizer
assert gpt_check.check(TrainConfig(seq_length=8, lr=1.0, data_path=({prefix!r},)), train_samples=3) == []
tokenizer.load_tokenizer(TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=9))
print([name for name in ("torch", "transformers", "tokenizers", "pyarrow", "datasets", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_permutation_of_blocks_is_refused(prefix):
    options = config(data_path=(prefix,), split="1", dataloader_type="cyclic")
    assert whys(options, valid_samples=0) == []
    assert [why.split(":")[0] for why in whys(options, train_samples=10**12)] == ["--dataloader-type"]
