"""`cordee bench preprocess`: text to `.bin/.idx`, against `encode_batch` of the same tokenizer on the same text.

The peer is handed the texts in memory, in batches, and keeps nothing: no reading, no writing. Cordée reads JSON lines
and writes both files. A second Cordée has a quarter of the text, so that its memory tells whether input size matters.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cordee.bench import corpus
from cordee.bench.contest import Baton, Contender, Results, Turn, hold
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.data.options import PreprocessConfig

PEERS = ()
CHARACTERS = 24_000_000
VOCAB_SIZE, TOKENIZER_CHARACTERS = 32000, 8_000_000
CORDEE, QUARTER, PEER = "cordee", "cordee, a quarter", "encode_batch"
TARGET = 0.85
BATCH = 256  # documents: with all of them in one call the peer takes gigabytes and is slower


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Let each go once over the text in a turn."""
    threads = config.threads or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus.write_tokenizer(folder / "tokenizer", VOCAB_SIZE, TOKENIZER_CHARACTERS)
        whole, quarter = folder / "whole.jsonl", folder / "quarter.jsonl"
        corpus.write_jsonl(whole, CHARACTERS)
        corpus.write_jsonl(quarter, CHARACTERS // 4)
        contenders = [
            Contender(CORDEE, play_cordee, (name, str(whole), threads)),
            Contender(QUARTER, play_cordee, (name, str(quarter), threads)),
            Contender(PEER, play_encode_batch, (name, str(whole))),
        ]
        results = hold(contenders, config.rounds, threads, on_turn)
        size = sum(len(json.loads(line)["text"].encode()) for line in whole.read_text(encoding="utf-8").splitlines())
    return _report(config, size, results)


def play_cordee(baton: Baton, folder: str, text: str, workers: int) -> None:
    from cordee.data import preprocess
    from cordee.data.indexed import IndexedDataset

    prefix = f"{folder}/{Path(text).stem}-out"
    options = PreprocessConfig(
        input=text,
        output_prefix=prefix,
        tokenizer_type="PretrainedFromHF",
        tokenizer_name_or_path=f"{folder}/tokenizer",
        workers=workers,
        overwrite=True,
    )
    while baton.take():
        start = time.perf_counter()
        preprocess.run(options)
        seconds = time.perf_counter() - start
        baton.give([seconds], tokens=IndexedDataset(f"{prefix}_text_document").num_tokens)


def play_encode_batch(baton: Baton, folder: str, text: str) -> None:
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
    with open(text, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    while baton.take():
        start = time.perf_counter()
        tokens = 0
        for first in range(0, len(texts), BATCH):
            tokens += sum(map(len, tokenizer.encode_batch(texts[first : first + BATCH])))
        baton.give([time.perf_counter() - start], tokens=tokens)


def _report(config: BenchConfig, size: int, results: Results) -> Report:
    ratio = results.ratio(CORDEE, PEER)
    same = results.figure(CORDEE, "tokens") == results.figure(PEER, "tokens")
    rows = []
    for name, part in ((CORDEE, 1.0), (QUARTER, 0.25), (PEER, 1.0)):
        rate, tokens = size * part / results.median(name), results.figure(name, "tokens") / results.median(name)
        rows.append([name, f"{rate / 1e6:.2f}", f"{tokens:,.0f}", f"{results.peak_bytes(name) / 2**20:,.0f} MiB"])
    notes = [
        f"{size / 1e6:.1f} MB of text, {config.threads} threads (workers of Cordée), {config.rounds} rounds",
        f"throughput by encode_batch, writing included: {ratio:.2f} (target {TARGET:g})",
        "peak memory is that of the main process; memory must not grow with the input: compare the first two rows",
        f"the numbers of tokens of both are {'the same' if same else 'NOT the same'}",
    ]
    figures = {"ratio": ratio, "same tokens": float(same)} | {
        f"{name}: peak bytes": results.peak_bytes(name) for name in (CORDEE, QUARTER, PEER)
    }
    columns = ["", "MB/s", "tokens/s", "peak memory"]
    return Report(title="Preprocessing", columns=columns, rows=rows, figures=figures, notes=notes)
