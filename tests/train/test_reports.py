"""What a run says: log lines that Megatron's parsers read, figures that add up, and each sink's form."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cordee.checkpoint.store import CheckpointStore
from cordee.families.count import training_flops_per_token
from cordee.families.registry import spec_from_options
from cordee.log import SILENCE, shortened
from cordee.train import job
from cordee.train.metrics import Meter, StepResult, measure_peak_flops
from cordee.train.options import TrainConfig
from cordee.train.reports import build_reports
from cordee.train.run_plan import TrainState
from cordee.train.sinks import JsonSink, TerminalSink, log_line, memory_line, perplexity, rate, validation_lines
from tests.train import tiny

LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration {8}7/ {5}100 \| consumed samples: {11}56 \| "
    r"elapsed time per iteration \(ms\): [0-9.]+ \| throughput per GPU \(TFLOP/s/GPU\): [0-9.]+ \| "
    r"learning rate: 1\.000000E-03 \| global batch size:     8 \| lm loss: 2\.500000E\+00 \| "
    r"loss scale: 1\.0 \| grad norm: 0\.500 \| number of skipped iterations:   1 \| number of nan iterations:   0 \|"
)
# The expressions by which the reference systems' own tests read their logs.
THROUGHPUT = r"throughput per GPU \(TFLOP/s/GPU\):\s+([0-9.]+)\s+\|.*?lm loss:\s+([0-9.]+E[+-][0-9]+)"
MEMORY = r"\[Rank (\d+)\] \(after \d+ iterations\) memory \(MB\) \| allocated: ([0-9.]+) \| max allocated: ([0-9.]+)"


def result(loss: float, **changes) -> StepResult:
    values = {"grad_norm": 0.5, "learning_rate": 1e-3, "loss_scale": 1.0, "samples": 8, "tokens": 128}
    return StepResult(loss=loss, **{**values, **changes})


def meter(**changes) -> Meter:
    values = {"train_iterations": 100, "flops_per_token": 1e6, "num_devices": 2, "peak_flops": 1e9}
    return Meter(**{**values, **changes})


def record(*steps: StepResult, **changes):
    made = meter(**changes)
    for step in steps:
        made.add(step)
    return made.read(TrainState(iteration=7, consumed_samples=56, consumed_tokens=896))


def test_log_line():
    line = log_line(record(result(2.0), result(3.0), result(float("inf"), skipped=True)), "lm loss")
    assert LINE.fullmatch(line), line
    assert re.search(THROUGHPUT, line).group(2) == "2.500000E+00"
    assert "throughput" not in log_line(record(result(2.0)), "lm loss", throughput=False)
    assert "GPU" not in log_line(record(result(2.0)), "lm loss", unit="device")


@pytest.mark.parametrize(
    ("tflops", "shown"),
    [(412.34, "412.3"), (10.0, "10.0"), (5.678, "5.68"), (0.0456, "0.0456"), (0.00001, "0.000010"), (0.0, "0.000000")],
)
def test_throughput_has_digits_for_small_models(tflops: float, shown: str):
    assert rate(tflops) == shown
    line = log_line(replace(record(result(2.0)), tflops=tflops), "lm loss")
    assert float(re.search(THROUGHPUT, line).group(1)) == pytest.approx(tflops, abs=1e-6, rel=1e-2)


def test_more_figures_in_the_log_line():
    line = log_line(record(result(2.0, zeros_in_grad=5, params_norm=1.25, metrics={"accuracy": 0.5})), "lm loss")
    assert "| accuracy: 5.000000E-01 |" in line
    assert "| num zeros: 5 | params norm: 1.250 |" in line


def test_memory_and_validation_lines():
    found = re.fullmatch(MEMORY + r" \| reserved: [0-9.]+ \| max reserved: [0-9.]+", memory_line(record(result(2.0))))
    assert found and float(found[3]) >= float(found[2]) > 10
    frame, line, _ = validation_lines(10, "validation", "lm loss", 2.0).splitlines()
    assert line == " validation loss at iteration 10 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert frame == "-" * len(line)
    assert perplexity("lm loss", 1e9) == [pytest.approx(torch.tensor(20.0).exp().item(), rel=1e-5)]
    assert "PPL" not in validation_lines(10, "validation", "policy loss", -0.5)  # a mean reward


def test_figures_add_up():
    made = meter()
    time.sleep(0.02)
    made.add(result(1.0))
    made.add(result(float("nan"), skipped=True))
    made.pause(0.01)
    read = made.read(TrainState(iteration=2, consumed_samples=16, consumed_tokens=256))
    seconds = 2 * read.step_seconds
    assert seconds > 0.01
    assert read.tokens_per_second == pytest.approx(256 / seconds / 2)
    assert read.tflops == pytest.approx(read.tokens_per_second * 1e6 / 1e12)
    assert read.mfu == pytest.approx(read.tflops * 1e12 / 1e9)
    assert read.seconds_left == pytest.approx(98 * read.step_seconds)
    assert (read.loss, read.skipped_iterations, read.nan_iterations) == (1.0, 1, 1)
    assert read.peak_memory >= read.memory > 0
    assert not made.pending
    assert record(result(1.0), peak_flops=None).mfu is None


def test_saving_is_no_training_time(tmp_path: Path, monkeypatch):
    """By a clock that jumps while it is saved, by more than any machine is slow."""
    saved, clock = [], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1e6 * len(saved))
    monkeypatch.setattr(CheckpointStore, "save", lambda self, *args, **options: saved.append(args))
    given = tiny.config(tmp_path, save_interval=1, train_iters=4)
    job.run(given)
    assert len(saved) == 4
    assert all(read["step_seconds"] < 1e5 for read in tiny.records(given).values())


def test_all_steps_skipped():
    read = record(result(float("inf"), skipped=True), result(float("inf"), skipped=True))
    assert (read.loss, read.grad_norm, read.skipped_iterations) == (0.0, 0.0, 2)
    json.dumps(read.loss, allow_nan=False)


def test_throughput_is_megatrons_formula():
    given = TrainConfig(**{**tiny.MODEL, "seq_length": 16, "lr": 1.0})
    config = spec_from_options(given).config
    layers, hidden, ffn, heads, groups, sequence, vocab = 2, 32, 48, 4, 2, 16, tiny.VOCAB
    per_iteration = (
        12
        * sequence
        * layers
        * hidden**2
        * (1 + ffn / hidden * 1.5 + groups / heads + sequence / hidden + vocab / (2 * layers * hidden))
    )
    assert training_flops_per_token(config, sequence) * sequence == pytest.approx(per_iteration)


def test_reports_at_their_intervals(tmp_path: Path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = TrainConfig(
        seq_length=16,
        lr=1.0,
        save=str(tmp_path),
        log_interval=3,
        tensorboard_dir=str(tmp_path / "board"),
        tensorboard_log_interval=2,
    )
    reports = build_reports(given, meter, "lm loss", TrainState())
    state = TrainState()
    for step in range(1, 6):
        state.advance(8, 128, skipped=False)
        reports.step(result(float(step)), state)
    reports.validation(state, {"validation": 1.5, "validation-b": float("nan")}, 0.01)
    reports.finish(state)
    reports.close()
    said = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in said]
    assert [(line["kind"], line["iteration"], line["loss"]) for line in lines] == [
        ("train", 3, 2.0),
        ("validation", 5, 1.5),
        ("validation-b", 5, None),
        ("train", 5, 4.5),
    ]
    out = capsys.readouterr().out
    assert "GPU" not in out or torch.accelerator.is_available()
    assert out.count("| lm loss: ") == 2 and out.count("memory (MB)") == 1 and out.count("validation loss") == 1
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("lm loss")] == [(2, 1.5), (4, 3.5), (5, 5.0)]
    assert [event.step for event in board.Scalars("lm loss validation")] == [5]
    assert {"learning-rate", "grad-norm", "tokens-per-second", "mfu"} <= set(board.Tags()["scalars"])


@pytest.mark.parametrize("length", [100, 10**6])
def test_short_lines_fit_a_terminal_of_80_columns(capsys, length: int):
    read = record(result(12.0), train_iterations=length)
    days, left = (123, "123 days") if length > 100 else (0, "1:01:01")
    sink = TerminalSink(2, "lm loss")
    for _ in range(2):
        sink.step(replace(read, iteration=length // 2, seconds_left=days * 86400.0 + 3661.0))
    sink.validation(7, "validation", 2.0)
    *lines, validation = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if f"{length // 2}/{length}" in line]
    assert len(steps) == 2 and len(lines) == 3, "figures of the device are shown once"
    assert max(map(len, lines)) <= 80
    assert all(figure in steps[0] for figure in ("loss 12.0000", "lr 1.00e-03", left))
    both = float(re.search(r"([0-9.]+)([KMB]?) tokens/s", steps[0])[1])
    assert both == pytest.approx(float(shortened(2 * read.tokens_per_second).rstrip("KMB")))
    assert "loss 2.0000" in validation and "7.3891" in validation


def test_a_terminal_is_never_silent_for_long(monkeypatch, capsys):
    """Steps that take long are shown one by one, by a clock that jumps with each."""
    steps, clock = [], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 2 * SILENCE * len(steps))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    state = TrainState()
    reports = build_reports(TrainConfig(seq_length=16, lr=1.0, log_interval=100), meter, "lm loss", state)
    for _ in range(3):
        steps.append(state.advance(8, 128, skipped=False))
        reports.step(result(1.0), state)
    shown = capsys.readouterr().out
    assert [f"{step}/100" in shown for step in (1, 2, 3)] == [True] * 3 and "elapsed time" not in shown


def test_rate_of_matrix_products():
    assert 1e8 < measure_peak_flops(torch.float32, torch.device("cpu")) < 1e14


def test_half_a_line_of_a_killed_run_swallows_no_record(tmp_path: Path, caplog):
    """A metrics.jsonl cut at every byte: what a resumed run appends stands on lines of its own, behind all that were
    finished."""
    path = tmp_path / "metrics.jsonl"
    first = [{"kind": "train", "iteration": i, "loss": 2.5} for i in range(2)]
    content = "".join(json.dumps(line) + "\n" for line in first).encode()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        caplog.clear()
        sink = JsonSink(path, "lm loss")
        sink.validation(7, "validation", 1.5)
        sink.close()
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        whole = [line for line in first if len(content[:length].split(json.dumps(line).encode())) == 2]
        assert lines[:-1] == whole and lines[-1]["iteration"] == 7
        cut = bool(content[:length].rpartition(b"\n")[2]) and content[: length + 1][-1:] != b"\n"
        assert len(caplog.records) == cut


def test_a_last_line_that_is_longer_than_a_block_is_ended(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    long = json.dumps({"iteration": 1, "name": "x" * 200_000}).encode()
    for content, kept in ((long, long + b"\n"), (b"{}\n" + long[:-1], b"{}\n"), (b"{}\n", b"{}\n"), (b"", b"")):
        path.write_bytes(content)
        JsonSink(path, "lm loss").close()
        assert path.read_bytes() == kept
