"""Signals, clocks and intervals end a run, on all ranks at the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cordee.train.exits import Exit, ExitRule, Signals, watch
from cordee.train.options import TrainConfig


def rule(signals: Signals | None = None, started: float | None = None, **options) -> ExitRule:
    config = TrainConfig(seq_length=8, lr=1.0, **options)
    return ExitRule(config, signals or Signals(), time.monotonic() if started is None else started)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_noted_and_agreed_on(number: int, code: int):
    before = signal.getsignal(number)
    with watch() as signals:
        os.kill(os.getpid(), number)
        here, elsewhere = rule(signals).votes(), rule().votes()
    assert signal.getsignal(number) is before
    assert elsewhere == [0, 0, 0]
    votes = [a + b for a, b in zip(here, elsewhere, strict=True)]
    assert rule().decide(votes) == Exit(f"signal {signal.Signals(number).name}", code)
    assert rule().decide(elsewhere) is None


def test_second_signal_ends_at_once():
    script = (
        "import os, signal, sys\nfrom cordee.train.exits import watch\n"
        "with watch() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('noted', signals.received, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, "noted 15\n")


def test_handlers_are_left_alone_if_asked():
    before = signal.getsignal(signal.SIGTERM)
    with watch(enabled=False) as signals:
        assert signal.getsignal(signal.SIGTERM) is before
    assert signals.received == 0


def test_duration():
    late = rule(started=time.monotonic() - 61, exit_duration_in_mins=1)
    assert late.decide(late.votes()) == Exit("1 minutes are over")
    early = rule(exit_duration_in_mins=1)
    assert early.decide(early.votes()) is None


def test_interval():
    assert rule(exit_interval=4).after(8) == Exit("--exit-interval 4")
    assert rule(exit_interval=4).after(7) is None
    assert rule().after(8) is None


HANGS = """
import sys, time
from cordee.train.options import ExitOptions
from cordee.errors import Problem, RankLostError
from cordee.train import exits
from cordee.train.exits import Signals
exits.LOST_SECONDS = 0.5
rule = exits.ExitRule(ExitOptions(), Signals(), 0.0)
try:
    with rule.bounded_after_loss():
        raise RankLostError([Problem("rank 3", None, "it lost the others", "look")])
except RankLostError:
    {then}
"""


@pytest.mark.parametrize(
    ("then", "code", "told"), [("time.sleep(30)", 75, True), ("rule.settle(); time.sleep(1); sys.exit(4)", 4, False)]
)
def test_no_hang_after_ranks_were_lost(then: str, code: int, told: bool):
    done = subprocess.run([sys.executable, "-c", HANGS.format(then=then)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert ("it lost the others" in done.stderr) == told
