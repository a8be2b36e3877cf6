"""From the data options of a run to its datasets for training, validation and test.

Owns how `--data-path` and `--split` are read, which part of which file a dataset takes and how it is ordered. Knows
nothing of ranks: in a run of several processes one calls `build_datasets` first, so that the others find those sample
orders in the cache that are kept there."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from cordee.data.gpt_dataset import BlendedDataset, Dataset, GPTDataset
from cordee.data.indexed import IndexedDataset
from cordee.data.options import DataOptions, SampleOptions
from cordee.data.order import Order, blend_period, blend_sizes, normalise, periodic_sizes
from cordee.data.tuning_dataset import TuningDataset
from cordee.errors import Problem, Problems, raise_all
from cordee.log import counted, logger

SPLITS = ("train", "valid", "test")
Blocks = Sequence[tuple[int, bool]]  # of each dataset, as `plan_order` takes them
Indexed = Sequence[IndexedDataset]
SequenceKind: TypeAlias = type[TuningDataset] | None  # what reads samples that are whole sequences


class Datasets(NamedTuple):
    """None where the options give a part no data or the run asks for no samples of it."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


@dataclass(frozen=True)
class Blend:
    """Prefixes and their weights; without, one prefix is no blend, and several weigh as many samples as they have."""

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

    def weights(self, indexed: Indexed, whole: bool) -> tuple[float, ...] | None:
        """Those of its datasets, of which samples are `whole` sequences; None if it is no blend."""
        if self.blend.weights is not None or len(self.blend.prefixes) == 1:
            return self.blend.weights
        ranges = [self.sequences(each) for each in indexed]
        counts = [data.tokens_between(*own) for data, own in zip(indexed, ranges, strict=True)]
        return tuple(float(end - start) for start, end in ranges) if whole else tuple(map(float, counts))


@dataclass(frozen=True)
class PartOrder:
    """How the samples of a part are ordered: of each of its datasets, and of the blend of them by `weights`, which has
    `size` samples and repeats its choice of datasets after `period`."""

    datasets: tuple[Order, ...]
    weights: tuple[float, ...] | None
    size: int
    period: int

    def describe(self) -> dict[str, Any]:
        """What decides which sample comes when besides the data, as JSON holds it; the same for runs of two lengths
        that begin with the same samples."""
        blocks = [[order.block.epochs, order.block.last_apart] for order in self.datasets]
        return {"blocks": blocks, "period": self.period if self.period < self.size else None}


def build_datasets(
    config: SampleOptions,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    train_blocks: Blocks | None = None,
    verified: bool = False,
    sequences: SequenceKind = None,
) -> Datasets:
    """Datasets of at least so many samples each; `sequences`: what reads samples that are whole sequences.
    `train_blocks`: as `plan_order` takes them. `verified`: another process of this machine has just verified or built
    the sample orders in the cache, so they are not read whole.

    Raises `ProblemError` for options or files that do not fit, which `cordee.data.gpt_check` finds all beforehand, and
    for an order that is not in the cache and takes more memory to build than this machine has left."""
    parts = plan_parts(config)
    asked: dict[str, int] = dict(zip(SPLITS, (train_samples, valid_samples, test_samples), strict=True))
    prefixes = dict.fromkeys(prefix for name, part in parts.items() if asked[name] for prefix in part.blend.prefixes)
    files = {prefix: IndexedDataset(prefix) for prefix in prefixes}
    built: list[Dataset | None] = []
    for name in SPLITS:
        part, dataset = parts.get(name), None
        if part is not None and asked[name]:
            indexed = [files[prefix] for prefix in part.blend.prefixes]
            blocks = train_blocks if name == "train" else None
            order = plan_order(part, indexed, None if sequences else config.seq_length, asked[name], blocks)
            dataset = _build_part(part, indexed, config, order, verified, sequences)
        built.append(dataset)
    return Datasets(*built)


def build_validation_sets(
    config: SampleOptions, samples: int, verified: bool = False, sequences: SequenceKind = None
) -> dict[str, Dataset]:
    """The datasets of the validation blend, of so many samples each, by their names; raises as `build_datasets`."""
    built = {}
    for name, part in validation_sets(plan_parts(config)).items():
        indexed = [IndexedDataset(prefix) for prefix in part.blend.prefixes]
        order = plan_order(part, indexed, None if sequences else config.seq_length, samples)
        built[name] = _build_part(part, indexed, config, order, verified, sequences)
    return built


def validation_sets(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Each dataset of the validation blend as a part of its own, by the name of its files, or by its whole prefix where
    several have that name; none without a blend."""
    if (part := parts.get("valid")) is None or len(prefixes := list(dict.fromkeys(part.blend.prefixes))) < 2:
        return {}
    names = [Path(prefix).name for prefix in prefixes]
    return {
        name if names.count(name) == 1 else prefix: replace(part, blend=Blend(part.blend.option, (prefix,), None))
        for name, prefix in zip(names, prefixes, strict=True)
    }


def plan_order(
    part: Part, indexed: Indexed, seq_length: int | None, samples: int, blocks: Blocks | None = None
) -> PartOrder:
    """The order of `samples` samples of `seq_length` tokens, None: of whole sequences, of a part whose datasets are
    `indexed`.

    `blocks`: epochs of a block of each dataset, and whether the last of them is shuffled apart, of the run that this
    one resumes. Its order continues in such blocks, whatever the length of the run is now. Raises `ProblemError`."""
    raise_all(problem for dataset in indexed for problem in part_problems(part, dataset))
    ranges = [part.sequences(dataset) for dataset in indexed]
    both = zip(indexed, ranges, strict=True)
    counts = [(end - start, data.tokens_between(start, end)) for data, (start, end) in both]

    def orders(sizes: Sequence[int]) -> list[Order]:
        if seq_length is None:
            return [Order.of_sequences(count, size) for (count, _), size in zip(counts, sizes, strict=True)]
        return [Order.plan(*count, size, seq_length) for count, size in zip(counts, sizes, strict=True)]

    weights = part.weights(indexed, whole=seq_length is None)
    sizes, size = ([samples], samples) if weights is None else blend_sizes(weights, samples)
    found = orders(sizes)
    period = size if weights is None else blend_period(size, found)
    if weights is not None and period < size:
        found = orders(sizes := periodic_sizes(weights, size, period))
    if blocks is not None and seq_length is not None:
        kept = zip(counts, sizes, blocks, strict=True)
        found = [Order.of_blocks(*count, size, seq_length, *block) for count, size, block in kept]
    return PartOrder(tuple(found), weights, size, period)


def plan_parts(options: DataOptions) -> dict[str, Part]:
    """Where train, valid and test come from; a part without data is left out. Raises `ProblemError`."""
    parts, problems = read_parts(options)
    raise_all(problems)
    return parts


def read_parts(options: DataOptions) -> tuple[dict[str, Part], list[Problem]]:
    """As `plan_parts`, as far as the options can be read, and why they cannot: of data whose --split is none, all of it
    is to train on."""
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
    parts, ends = {}, _parse_split(options.split, problems) or (1.0,)
    if options.data_path and (blend := _parse_blend("--data-path", options.data_path, options, problems)):
        bounds = zip(SPLITS, (0.0, *ends), ends, strict=False)
        parts = {name: Part(name, blend, begin, end) for name, begin, end in bounds if end > begin}
    blends = {
        name: _parse_blend(option, value, options, problems, equal=name == "valid" and options.multiple_validation_sets)
        for name, (option, value) in given.items()
    }
    return parts | {name: Part(name, blend, 0.0, 1.0) for name, blend in blends.items() if blend}, problems


def training_part(options: DataOptions) -> Part:
    """What is trained on. Raises `ProblemError`."""
    parts = plan_parts(options)
    raise_all(share_problems(options))
    return parts["train"]


def share_problems(options: DataOptions) -> Problems:
    """--split must leave training something of --data-path."""
    ends = _parse_split(options.split, []) if options.data_path else ()
    if ends and not ends[0]:
        fix = "give training a share, for example 969,30,1"
        yield Problem("--split", options.split, "its first share, that of training, is zero", fix)


def _parse_blend(
    option: str, values: Sequence[str], options: DataOptions, problems: list[Problem], equal: bool = False
) -> Blend | None:
    """None, and why in `problems`, if it is none. `equal`: it may be prefixes alone, which then weigh the same."""
    if len(values) == 1:
        return Blend(option, (values[0].strip(),), None)
    mix, probs = options.mix_strategy, options.interleave_probs
    if (mix or equal) and all(_number(text) is None for text in values):
        if probs and len(probs) != len(values):
            why, fix = f"{option} has {len(values)} datasets", "give as many, or write weights before the prefixes"
            problems.append(Problem("--interleave-probs", probs, why, fix, limit=len(values)))
        weights = None if mix == "concat" else probs or (1.0,) * len(values)
        return Blend(option, tuple(map(str.strip, values)), weights)
    if mix and any(_number(text) is not None for text in values[::2]):
        why = f"it mixes datasets by a rule, and {option} has weights"
        problems.append(Problem("--mix-strategy", mix, why, "leave it out, or give prefixes alone", "excludes"))
    weights, prefixes = [_number(text) for text in values[::2]], values[1::2]
    why = limit = None
    if len(values) % 2:
        limit, why = "pairs", "weights and prefixes do not come in pairs"
    elif None in weights:
        limit = values[2 * weights.index(None)]
        why = f"{limit!r} stands where a weight belongs"
    elif not all(0 < weight < float("inf") for weight in weights if weight is not None):
        limit, why = "positive", "a weight is not a positive number"
    if why:
        fix = "write WEIGHT PREFIX WEIGHT PREFIX ..., for example 0.3 first 0.7 second, or add --mix-strategy concat"
        problems.append(Problem(option, " ".join(values), why, fix, limit=limit))
        return None
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
    if not plain or len(numbers) > len(SPLITS) or not 0 < sum(numbers) < math.inf:
        fix = "write up to three numbers for training, validation and test, for example 969,30,1"
        problems.append(Problem("--split", split, "it is not a list of parts", fix))
        return ()
    fractions = normalise(numbers + [0.0] * (len(SPLITS) - len(numbers))).tolist()
    return tuple(accumulate(fractions))


def _build_part(
    part: Part, indexed: Indexed, config: SampleOptions, order: PartOrder, verified: bool, sequences: SequenceKind
) -> Dataset:
    build = partial(_build_one, part, config=config, verified=verified, sequences=sequences)
    datasets: list[Dataset] = [build(one, own) for one, own in zip(indexed, order.datasets, strict=True)]
    if order.weights is None:
        return datasets[0]
    cache = cache_dir(config.data_cache_path, part.blend.prefixes[0])
    blend = BlendedDataset(datasets, order.weights, order.size, cache, order.period, verified)
    if order.period < order.size:
        text = "%s data: the blend of %s samples repeats its choice of datasets every %s, which Megatron's does not"
        logger.info(text, part.name, f"{order.size:,}", f"{order.period:,}")
    for prefix, drawn in zip(part.blend.prefixes, blend.drawn, strict=True):
        if not drawn:
            logger.warning("%s data %s: its weight is too small for any of %d samples", part.name, prefix, order.period)
    return blend


def _build_one(
    part: Part, indexed: IndexedDataset, order: Order, config: SampleOptions, verified: bool, sequences: SequenceKind
) -> TuningDataset | GPTDataset:
    first, last = part.sequences(indexed)
    if sequences is not None:
        logger.info("%s data %s: %s", part.name, indexed.prefix, counted(last - first, "sample"))
        return sequences(indexed, first, last, order, config.seq_length, config.seed)
    cache = cache_dir(config.data_cache_path, indexed.prefix)
    dataset = GPTDataset(indexed, first, last, order, config.seq_length, config.seed, cache, verified)
    numbers = (counted(last - first, "sequence"), counted(len(dataset), "sample"), counted(order.epochs, "epoch"))
    logger.info("%s data %s: %s, %s in %s", part.name, indexed.prefix, *numbers)
    if order.blocks > 1:
        text = "%s data %s: every %d epochs are shuffled on their own; Megatron shuffles all together, in %.1f GiB"
        logger.info(text, part.name, indexed.prefix, order.block.epochs, order.bytes_of_one_block / 2**30)
    return dataset


def part_problems(part: Part, indexed: IndexedDataset) -> list[Problem]:
    """Why a part cannot be made of this dataset: it gets no sequences, or not two tokens."""
    first, last = part.sequences(indexed)
    if len(indexed) == 0:
        limit, why, fix = "sequences", "the dataset is empty", "preprocess text that is not"
    elif last == first:
        limit, why = part.name, f"its part of {len(indexed)} sequences leaves none for {part.name}"
        fix = f"give {part.name} a larger part in --split, give more documents, or ask for no {part.name} samples"
    elif indexed.tokens_between(first, last) < 2:
        limit, fix = "tokens", "give more text"
        why = f"{part.name} has fewer than two tokens, so nothing can be predicted"
    else:
        return []
    return [Problem(part.blend.option, indexed.prefix, why, fix, limit=limit)]


def cache_dir(given: str | None, path: str) -> Path:
    """Where what is made of data at `path` is kept: --data-cache-path, else beside it."""
    return Path(path).parent / "cordee-cache" if given is None else Path(given)
