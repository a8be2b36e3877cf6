"""Models that the tests of generation, evaluation and the Python interface load."""

from __future__ import annotations

import pytest

from tests.generate.folders import model_directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A random Llama with a tokenizer whose texts begin with bos."""
    return model_directory("Llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A random GPT-2 with a tokenizer that has no bos."""
    return model_directory("GPT2", tmp_path_factory.mktemp("gpt2"), bos=False)
