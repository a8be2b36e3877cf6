"""What `cordee data show` says of a pair, against figures that the standard library computes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from cordee.cli import main
from cordee.data import show
from cordee.data.indexed import IndexedDatasetBuilder
from cordee.data.manifest import Manifest, TokenizerNote
from cordee.data.options import ShowDataConfig
from cordee.errors import Problem

NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size")


@pytest.fixture
def documents() -> list[list[list[int]]]:
    """Documents of sequences, one of which is empty."""
    random = np.random.default_rng(0)
    lengths = [[3], [1, 7], [0], [200, 2], *([[int(length)] for length in random.integers(1, 30, 20)])]
    return [[random.integers(0, 50, length).tolist() for length in each] for each in lengths]


@pytest.fixture
def prefix(tmp_path: Path, documents) -> str:
    with IndexedDatasetBuilder(tmp_path / "pair", np.uint16) as builder:
        for document in documents:
            for sequence in document:
                builder.add_sequence(sequence)
            builder.end_document()
    return str(tmp_path / "pair")


def found(prefix: str, **options) -> list[Problem]:
    return show.check_run(ShowDataConfig(prefix=prefix, **options))


def test_figures(prefix: str, documents, capsys):
    assert main(["data", "show", prefix]) == 0
    shown = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines()[:4])
    lengths = [len(sequence) for document in documents for sequence in document]
    assert rows == {
        "sequences": str(len(lengths)),
        "documents": str(len(documents)),
        "tokens": str(sum(lengths)),
        "dtype": "uint16",
    }
    spread = dict(show.describe(show.IndexedDataset(prefix)))["sequence length"]
    assert f"min 0, median {statistics.median_low(lengths)}, " in spread
    assert f"max 200, mean {statistics.fmean(lengths):.1f}" in spread
    assert shown.count("\nsequence ") == 4 and "\nsequence 3" not in shown  # of the lengths, and the first three


@pytest.mark.parametrize(("start", "num"), [(0, 2), (2, 3), (4, 1), (22, 5), (0, 0)])
def test_sequences_decoded(prefix: str, documents, capsys, start: int, num: int):
    assert main(["data", "show", prefix, "--start", str(start), "--num", str(num), *NULL, "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sequences = [sequence for document in documents for sequence in document][start : start + num]
    texts = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  text ")]
    assert len(texts) == len(sequences)
    for text, sequence in zip(texts, sequences, strict=True):
        assert text.endswith(" ...") == (len(sequence) > 64)
        assert json.loads(text.removesuffix(" ...")) == " ".join(map(str, sequence[:64]))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("kind", ["bin", "idx"])
@pytest.mark.parametrize("spoil", [cut, Path.unlink])
def test_a_broken_pair(prefix: str, kind: str, spoil):
    spoil(Path(f"{prefix}.{kind}"))
    assert [problem.option for problem in found(prefix)] == ["dataset"]
    assert main(["data", "show", prefix]) == 2


def test_a_broken_index_and_no_tokenizer_are_told_together(prefix: str, tmp_path: Path):
    file = Path(f"{prefix}.idx")
    content = bytearray(file.read_bytes())
    content[34:38] = (-3).to_bytes(4, "little", signed=True)  # the length of the first sequence
    file.write_bytes(content)
    problems = found(prefix, tokenizer_name_or_path=str(tmp_path / "absent"))
    assert {problem.option for problem in problems} == {"dataset", "--tokenizer-name-or-path"}


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({"start": 1000}, ("--start", 1000, "at most")),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 10}, ("dataset", None, "tokenizer")),
    ],
)
def test_what_cannot_be_shown(prefix: str, options: dict, law: tuple):
    (problem,) = found(prefix, **options)
    assert (problem.option, problem.value, problem.kind) == (law[0], law[1] or prefix, law[2])


def test_another_tokenizer(prefix: str):
    dataset = show.IndexedDataset(prefix)
    note = TokenizerNote(type="NullTokenizer", fingerprint="other", vocab_size=60, eod=59)
    counts = {"documents": dataset.num_documents, "tokens": dataset.num_tokens, "max_token": 49}
    Manifest(**counts, tokenizer=note).write(prefix)
    assert "60" in dict(show.describe(dataset, show.read_manifest(dataset)))["tokenizer"]
    (problem,) = found(prefix, tokenizer_type="NullTokenizer", vocab_size=50)
    assert (problem.option, problem.limit) == ("dataset", note)


def test_an_empty_pair(tmp_path: Path, capsys):
    with IndexedDatasetBuilder(tmp_path / "pair", np.int32):
        pass
    assert main(["data", "show", str(tmp_path / "pair")]) == 0
    assert "sequence" not in capsys.readouterr().out.replace("sequences", "", 1)
