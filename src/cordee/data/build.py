"""From the data options of a run to its datasets for training, validation and test.

Owns how `--data-path` and `--split` are read and which part of which file a dataset takes. Knows nothing of ranks: in
a run of several processes one calls `build_datasets` first, so that the others find the sample orders in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cordee.config.schema import DataOptions, TrainConfig
from cordee.data.gpt_dataset import BlendedDataset, Dataset, GPTDataset, blend_sizes, normalise
from cordee.data.indexed import IndexedDataset
from cordee.errors import Problem, raise_all
from cordee.log import logger

SPLITS = ("train", "valid", "test")


class Datasets(NamedTuple):
    """None where the options give a part no data or the run asks for no samples of it."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


@dataclass(frozen=True)
class Blend:
    """Prefixes and their weights; one prefix without a weight is not a blend."""

    option: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Part:
    """What one of train, valid and test reads: the datasets of `blend`, each between two fractions of its length."""

    name: str
    blend: Blend
    begin: float
    end: float

    def sequences(self, indexed: IndexedDataset) -> tuple[int, int]:
        """First sequence and the one behind the last, rounded as Megatron rounds."""
        return round(self.begin * float(len(indexed))), round(self.end * float(len(indexed)))


def build_datasets(config: TrainConfig, train_samples: int, valid_samples: int, test_samples: int) -> Datasets:
    """Datasets of at least so many samples each.

    Raises `ProblemError` for options or files that do not fit; `cordee.data.check` finds them all beforehand.
    """
    parts = plan_parts(config)
    asked: dict[str, int] = dict(zip(SPLITS, (train_samples, valid_samples, test_samples), strict=True))
    files = {
        prefix: IndexedDataset(prefix)
        for prefix in dict.fromkeys(p for name, part in parts.items() if asked[name] for p in part.blend.prefixes)
    }
    return Datasets(*(_build_part(parts.get(name), files, config, asked[name]) for name in SPLITS))


def plan_parts(options: DataOptions) -> dict[str, Part]:
    """Where train, valid and test come from; a part without data is left out. Raises `ProblemError`."""
    problems: list[Problem] = []
    own = {
        "train": ("--train-data-path", options.train_data_path),
        "valid": ("--valid-data-path", options.valid_data_path),
        "test": ("--test-data-path", options.test_data_path),
    }
    given = {name: (option, value) for name, (option, value) in own.items() if value}
    if options.data_path and given:
        others = ", ".join(option for option, _ in given.values())
        why = f"it is split into training, validation and test, which {others} give too"
        problems.append(Problem("--data-path", " ".join(options.data_path), why, f"drop it, or drop {others}"))
    if not options.data_path and "train" not in given:
        why = "there is nothing to train on"
        problems.append(Problem("--data-path", None, why, "give the prefix of a .bin/.idx pair, or --train-data-path"))
    raise_all(problems)
    if given:
        blends = {name: _parse_blend(option, value, problems) for name, (option, value) in given.items()}
        raise_all(problems)
        return {name: Part(name, blend, 0.0, 1.0) for name, blend in blends.items()}
    blend = _parse_blend("--data-path", options.data_path, problems)
    ends = _parse_split(options.split, problems)
    raise_all(problems)
    bounds = zip(SPLITS, (0.0, *ends), ends, strict=False)
    return {name: Part(name, blend, begin, end) for name, begin, end in bounds if end > begin}


def _parse_blend(option: str, values: Sequence[str], problems: list[Problem]) -> Blend:
    if len(values) == 1:
        return Blend(option, (values[0].strip(),), None)
    weights, prefixes = [_number(text) for text in values[::2]], values[1::2]
    why = None
    if len(values) % 2:
        why = "weights and prefixes do not come in pairs"
    elif None in weights:
        why = f"{values[2 * weights.index(None)]!r} stands where a weight belongs"
    elif not all(0 < weight < float("inf") for weight in weights if weight is not None):
        why = "a weight is not a positive number"
    if why:
        form = "write WEIGHT PREFIX WEIGHT PREFIX ..., for example 0.3 first 0.7 second"
        problems.append(Problem(option, " ".join(values), why, form))
    known = tuple(weight for weight in weights if weight is not None)
    return Blend(option, tuple(prefix.strip() for prefix in prefixes), known)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parse_split(split: str, problems: list[Problem]) -> tuple[float, ...]:
    """Where each part ends, as a fraction: "969, 30, 1" is (0.969, 0.999, 1.0)."""
    texts = [text.strip() for text in split.split(",")]
    plain = all(re.fullmatch(r"\d+\.?\d*|\.\d+", text) for text in texts)
    numbers = [float(text) for text in texts] if plain else []
    if not plain or len(numbers) > len(SPLITS) or sum(numbers) <= 0:
        fix = "write up to three numbers for training, validation and test, for example 969,30,1"
        problems.append(Problem("--split", split, "it is not a list of shares", fix))
        return ()
    fractions = normalise(numbers + [0.0] * (len(SPLITS) - len(numbers))).tolist()
    ends = [0.0]
    for fraction in fractions:
        ends.append(ends[-1] + fraction)
    return tuple(ends[1:])


def _build_part(
    part: Part | None, files: dict[str, IndexedDataset], config: TrainConfig, samples: int
) -> Dataset | None:
    if part is None or not samples:
        return None
    if part.blend.weights is None:
        return _build_one(part, files[part.blend.prefixes[0]], config, samples)
    sizes, size = blend_sizes(part.blend.weights, samples)
    datasets = [
        _build_one(part, files[prefix], config, count) for prefix, count in zip(part.blend.prefixes, sizes, strict=True)
    ]
    return BlendedDataset(datasets, part.blend.weights, size, _cache_dir(config, part.blend.prefixes[0]))


def _build_one(part: Part, indexed: IndexedDataset, config: TrainConfig, samples: int) -> GPTDataset:
    raise_all(part_problems(part, indexed))
    first, last = part.sequences(indexed)
    cache_dir = _cache_dir(config, indexed.prefix)
    dataset = GPTDataset(indexed, first, last, samples, config.seq_length, config.seed, cache_dir)
    logger.info(
        "%s data %s: %d sequences, %d samples in %d epochs",
        part.name,
        indexed.prefix,
        last - first,
        len(dataset),
        dataset.epochs.epochs,
    )
    return dataset


def part_problems(part: Part, indexed: IndexedDataset) -> list[Problem]:
    """Why a part cannot be made of this dataset: it gets no sequences, or not two tokens."""
    first, last = part.sequences(indexed)
    if len(indexed) == 0:
        why, fix = "the dataset is empty", "preprocess text that is not"
    elif last == first:
        why = f"its share of {len(indexed)} sequences leaves none for {part.name}"
        fix = f"give {part.name} a larger share in --split, give more documents, or ask for no {part.name} samples"
    elif int(indexed.sequence_lengths[first:last].sum()) < 2:
        why, fix = f"{part.name} has fewer than two tokens, so nothing can be predicted", "give more text"
    else:
        return []
    return [Problem(part.blend.option, indexed.prefix, why, fix)]


def _cache_dir(options: DataOptions, prefix: str) -> Path:
    if options.data_cache_path is not None:
        return Path(options.data_cache_path)
    return Path(prefix).parent / "cordee-cache"
