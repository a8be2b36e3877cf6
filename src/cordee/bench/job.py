"""`cordee bench`: how fast Cordée is and what memory it takes, beside its peers, measured in one run.

Owns the choice of the suite and what becomes of its report. Each suite is a module with `PEERS`, the packages that only
measuring needs, and `run(config, on_turn) -> Report`. Those for the development of Cordée are outside of this package.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from cordee.bench.contest import Turn
from cordee.bench.options import BenchConfig, BenchOptions
from cordee.errors import Problem, raise_all
from cordee.files import unwritable

EXTRA = "bench"  # what brings the peers


def run(config: BenchConfig) -> int:
    """Measure, print and write the report, and return 0. ProblemError for what the user can fix."""
    return measure(f"cordee.bench.{config.suite}", config)


def check_run(config: BenchConfig) -> list[Problem]:
    """What is wrong with a measurement, as far as it can be known before."""
    return _problems(config, import_module(f"cordee.bench.{config.suite}").PEERS)


def measure(module: str, config: BenchOptions) -> int:
    """As `run`, with the suite that is `module`."""
    suite = import_module(module)
    raise_all(_problems(config, suite.PEERS))
    config = replace(config, threads=config.threads or os.cpu_count() or 1)
    report = suite.run(config, _show)
    print(report.to_markdown())
    if config.output:
        report.write(Path(config.output))
    return 0


def _problems(config: BenchOptions, peers: Sequence[str]) -> list[Problem]:
    problems = []
    for package in peers:
        if find_spec(package) is None:
            fix = f"pip install 'cordee[{EXTRA}]'"
            problems.append(Problem(package, None, "the peers of this measurement need it", fix))
    if config.output:
        problems += unwritable("--output", config.output, Path(config.output).parent)
    return problems


def _show(number: int, name: str, turn: Turn) -> None:
    """One line a turn, so that a person sees it go on."""
    when = f"round {number}" if number else "warm-up"
    figures = "".join(f"  {key} {value:.4g}" for key, value in turn.figures.items())
    print(f"{when:<9} {name:<22} {turn.median:8.3f} s  {turn.peak_bytes / 2**20:7.0f} MiB{figures}", flush=True)
