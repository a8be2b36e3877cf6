"""The comparison with llama.cpp: asks for its packages, and agrees where they are installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from benchmarks import gguf
from benchmarks.__main__ import Config
from cordee.bench import job
from cordee.errors import ProblemError


def test_without_its_packages_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(ProblemError, match=r"llama_cpp[\s\S]*cordee\[bench\]"):
        job.measure("benchmarks.gguf", Config(suite="gguf"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python, of the extra bench")
def test_llama_cpp_computes_the_same():
    report = gguf.run(Config(suite="gguf", rounds=1, steps=1), lambda number, name, turn: None)
    assert report.figures["difference"] < 1e-4
    assert report.figures["same"] == gguf.NEW_TOKENS
