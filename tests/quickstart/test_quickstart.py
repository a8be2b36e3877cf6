"""The whole climb on a little text, and what it refuses."""

from __future__ import annotations

import functools
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cordee import lock
from cordee.errors import ProblemError
from cordee.quickstart import corpus, job, report, tokenizer
from cordee.quickstart.options import QuickstartConfig

WORDS = "the quick brown fox jumps over the lazy dog and runs far away from the old stone bridge".split()


def write_texts(folder: Path, num_files: int = 120) -> Path:
    folder.mkdir()
    for n in range(num_files):
        lines = [" ".join(WORDS[(n * k + j) % len(WORDS)] for j in range(9)) for k in range(40)]
        (folder / f"file{n}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_corpus_holds_files_out(tmp_path):
    texts = write_texts(tmp_path / "texts")
    (texts / "binary.txt").write_bytes(b"\xff\xfe\x00broken")
    found = corpus.collect(texts, tmp_path)
    held_out = [json.loads(line)["source"] for line in found.held_out.read_text().splitlines()]
    trained = [json.loads(line)["source"] for line in found.train.read_text().splitlines()]
    assert len(held_out) == found.num_held_out > 0
    assert len(trained) == found.num_documents
    assert not set(held_out) & set(trained)
    assert len(held_out) + len(trained) == 120
    assert found.num_skipped == 1


def test_corpus_cuts_a_single_file_into_passages(tmp_path):
    text = "".join(f"line {n}\n" for n in range(150_000))
    (tmp_path / "book.txt").write_text(text)
    found = corpus.collect(tmp_path / "book.txt", tmp_path)
    assert found.num_characters == len(text)
    parts = [json.loads(line) for path in (found.train, found.held_out) for line in path.read_text().splitlines()]
    parts.sort(key=lambda part: int(part["source"].split(":")[1]))
    assert "".join(part["text"] for part in parts) == text


def test_corpus_too_small(tmp_path):
    (tmp_path / "only.txt").write_text("short")
    with pytest.raises(ProblemError, match="1 documents"):
        corpus.collect(tmp_path / "only.txt", tmp_path)


def test_tokenizer_gives_the_text_back(tmp_path):
    from tokenizers import Tokenizer

    found = corpus.collect(write_texts(tmp_path / "texts"), tmp_path)
    size = tokenizer.train(tokenizer.texts_of(found.train, 10**6), tmp_path / "tokenizer", 400)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert size == loaded.get_vocab_size() <= 400
    for text in ("the lazy dog\n    runs", "unseen: ñ漢\t"):
        assert loaded.decode(loaded.encode(text).ids) == text


def test_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ProblemError, match="holds other files"):
            job.run(QuickstartConfig(output=str(tmp_path), overwrite=overwrite))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_report_is_self_contained(tmp_path):
    page = tmp_path / "report.html"
    report.write(
        report.Report(
            title="t",
            summary="s",
            steps=[report.Step(n, 5.0 / n, 100.0, 2**20) for n in range(1, 5)],
            validation=[(4, 1.5)],
            untrained_perplexity=400.0,
            perplexity=20.0,
            samples=[report.Sample("<b>prompt", " & more")],
            facts=[("fact", "value")],
            phases=[("first", 1.25), ("second", 2.5)],
        ),
        page,
    )
    text = page.read_text()
    assert "&lt;b&gt;prompt" in text and "&amp; more" in text  # text of a model is never markup
    assert text.count("<svg") == 3
    assert "3.8 s" in text and "<b>20</b>" in text
    assert "src=" not in text and "@import" not in text and "<script" not in text


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path):
    texts = write_texts(tmp_path / "texts")
    command = [sys.executable, "-m", "cordee", "quickstart", "--input", str(texts), "--train-iters", "30"]
    done = subprocess.run([*command, "--output", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert (run / "report.html").stat().st_size > 20_000
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "30"
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == list(job.PROMPTS)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in losses if line["kind"] == "train"]
    assert train[-1] < 0.7 * train[0]  # a few words in a fixed order are learned at once
    page = html.unescape((run / "report.html").read_text())
    going_on = re.findall(r"cordee train .*--train-iters 5000.*", page)[0].replace("5000", "33").split("<")[0].split()
    more = subprocess.run([sys.executable, "-m", *going_on], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert more.returncode == 0, more.stderr
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "33"
    again = subprocess.run([*command, "--output", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_a_folder_that_another_quickstart_writes_to(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / job.MARKER).write_text("")
    (folder / "precious").write_text("of a quickstart that is running")
    monkeypatch.setattr(lock, "acquire", functools.partial(lock.acquire, patience=0))
    with lock.acquire(tmp_path / ".out.lock"), pytest.raises(ProblemError, match="another quickstart writes to it"):
        job.run(QuickstartConfig(output=str(folder), overwrite=True))
    assert (folder / "precious").exists()
