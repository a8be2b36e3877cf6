"""`python -m benchmarks SUITE`: as `cordee bench`, for the suites of this package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from cordee.bench import job
from cordee.bench.options import BenchOptions
from cordee.config.argv import Teaching
from cordee.config.load import load_config
from cordee.config.option import required
from cordee.errors import ProblemError

TEACHING = Teaching(
    "python -m benchmarks", "Measure what a part of Cordée costs.", "python -m benchmarks seams --rounds 7"
)


@dataclass(frozen=True, kw_only=True)
class Config(BenchOptions):
    suite: Literal["context", "gguf", "load", "moe", "pipeline", "seams"] = required("what to measure", positional=True)


def main() -> int:
    try:
        config = load_config(Config, sys.argv[1:], teaching=TEACHING).config
        return job.measure(f"benchmarks.{config.suite}", config)
    except ProblemError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
