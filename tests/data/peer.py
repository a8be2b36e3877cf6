"""Megatron's own dataset classes, the truth for byte format and sample order; tests skip without them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cordee.data.indexed import IndexedDatasetBuilder


def megatron() -> SimpleNamespace:
    """The parts of megatron.core.datasets that are compared with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(
            "megatron.core.datasets.helpers_cpp", reason="needs megatron-core with its compiled helpers"
        )
        from megatron.core.datasets import gpt_dataset, helpers, indexed_dataset
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    return SimpleNamespace(
        gpt=gpt_dataset, helpers=helpers, indexed=indexed_dataset, builder=BlendedMegatronDatasetBuilder
    )


class Tokenizer:
    """What Megatron's datasets ask of a tokenizer."""

    vocab_size = 1000
    eod = 0
    unique_identifiers: dict[str, Any] = {"class": "Tokenizer"}  # noqa: RUF012 - an attribute of Megatron's protocol


def datasets(sizes: Sequence[int | None], *, seq_length: int, seed: int, **data: Any) -> list[Any]:
    """Megatron's train, valid and test dataset for `blend` and `split`, or `blend_per_split`."""
    m = megatron()
    config = m.gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=Tokenizer(),
        reset_position_ids=data.pop("reset_position_ids", False),
        reset_attention_mask=data.pop("reset_attention_mask", False),
        eod_mask_loss=data.pop("eod_mask_loss", False),
        create_attention_mask=data.pop("create_attention_mask", False),
        **data,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return m.builder(m.gpt.GPTDataset, list(sizes), lambda: True, config).build()


def write_pair(prefix: Path, lengths: Sequence[int], *, seed: int = 0, dtype: Any = np.int32) -> Path:
    """A pair of random documents of these lengths, tokens from 1 to 99 with a 0 at the end of each."""
    random = np.random.default_rng(seed)
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for length in lengths:
            tokens = random.integers(1, 100, length)
            tokens[-1:] = 0
            builder.add_sequence(tokens.tolist())
            builder.end_document()
    return prefix
