"""Everything about a run's data that can be known before the run.

Owns the checks of `.bin/.idx` files against the run's options, its tokenizer and the memory that its sample orders
take: all problems at once, without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cordee import device
from cordee.config.option import to_flag
from cordee.config.schema import DataOptions, TrainConfig
from cordee.data.build import SPLITS, Part, part_problems, plan_order, plan_parts
from cordee.data.indexed import IndexedDataset
from cordee.data.manifest import Manifest, read_manifest
from cordee.errors import Problem, ProblemError

if TYPE_CHECKING:
    from cordee.data.tokenizer import Tokenizer

_BLEND_ENTRY = 10  # bytes of a sample in the index of a blend
_PERMUTATION_ENTRY = 8  # bytes of a sample in the permutation of a cyclic order
_NEED_EOD = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


def check(
    options: TrainConfig,
    *,
    train_samples: int = 0,
    valid_samples: int = 0,
    test_samples: int = 0,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Problem]:
    """All problems of the data a run asks for.

    The numbers of samples say which parts are needed at all. `vocab_size` (of the model) and `tokenizer` are compared
    with what is known of each dataset. Reads every index once, and no tokens.
    """
    problems = list(_eod_problems(options, tokenizer))
    try:
        parts = plan_parts(options)
    except ProblemError as error:
        return problems + error.problems
    asked: dict[str, int] = dict(zip(SPLITS, (train_samples, valid_samples, test_samples), strict=True))
    needed = {name: part for name, part in parts.items() if asked[name]}
    for prefix in dict.fromkeys(prefix for part in needed.values() for prefix in part.blend.prefixes):
        using = [part for part in needed.values() if prefix in part.blend.prefixes]
        problems += _dataset_problems(prefix, using, vocab_size, tokenizer)
    for name, part in needed.items():
        try:
            problems += _order_problems(options, part, asked[name])
        except ProblemError:  # of a dataset, found above
            continue
    return problems


def _order_problems(options: TrainConfig, part: Part, samples: int) -> Iterator[Problem]:
    """What keeps the order of a part from being worked out. Its memory hangs on the samples it holds, where Megatron's
    order is kept."""
    indexed = [IndexedDataset(prefix) for prefix in part.blend.prefixes]
    order = plan_order(part, indexed, options.seq_length, samples)
    available = device.available_memory()
    for prefix, own in zip(part.blend.prefixes, order.datasets, strict=True):
        if own.bytes_to_build > available:
            what = f"the order of {own.samples:,} samples in {own.epochs:,} epochs of {own.documents:,} sequences"
            yield _too_large(part, prefix, what, own.bytes_to_build, available)
    if part.blend.weights is not None and order.period * _BLEND_ENTRY > available:
        what = f"the blend of {order.size:,} samples"
        yield _too_large(part, None, what, order.period * _BLEND_ENTRY, available)
    if part.name == "train" and options.dataloader_type == "cyclic" and any(own.blocks > 1 for own in order.datasets):
        samples = order.size if part.blend.weights is not None else order.datasets[0].samples
        why = f"it permutes all {samples:,} samples at once, in {_gib(samples * _PERMUTATION_ENTRY)} on every rank"
        fix = "take --dataloader-type single, whose order is shuffled too, or a shorter run"
        yield Problem("--dataloader-type", "cyclic", why, fix)


def _too_large(part: Part, prefix: str | None, what: str, needed: int, available: int) -> Problem:
    why = f"{part.name}: {what} takes {_gib(needed)} of memory to build, and this machine has {_gib(available)} left"
    fix = "ask for fewer samples, take a larger --seq-length, or a machine with more memory"
    return Problem(part.blend.option, prefix, why, fix)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _eod_problems(options: DataOptions, tokenizer: Tokenizer | None) -> Iterator[Problem]:
    for name in _NEED_EOD:
        if getattr(options, name) and (tokenizer is None or tokenizer.eod is None):
            what = "no tokenizer is given" if tokenizer is None else "the tokenizer has none"
            why = f"it acts at the token that ends a document, and {what}"
            yield Problem(to_flag(name), True, why, "give a tokenizer that has an end-of-sequence token")


def _dataset_problems(
    prefix: str, parts: list[Part], vocab_size: int | None, tokenizer: Tokenizer | None
) -> list[Problem]:
    try:
        dataset = IndexedDataset(prefix)
        if problems := dataset.problems():
            return problems
        manifest = read_manifest(dataset)
    except ProblemError as error:
        return error.problems
    problems = [problem for part in parts for problem in part_problems(part, dataset)]
    if manifest is not None:
        problems += token_problems(prefix, manifest, vocab_size, tokenizer)
    return problems


def token_problems(
    prefix: str, manifest: Manifest, vocab_size: int | None, tokenizer: Tokenizer | None
) -> Iterator[Problem]:
    """What a dataset's note says against the model's vocabulary or the tokenizer; None of them is not compared."""
    if vocab_size is not None and manifest.max_token >= vocab_size:
        why = f"it holds token {manifest.max_token}, but the model has only {vocab_size} tokens"
        yield Problem("dataset", prefix, why, "take the model's own tokenizer, or a model with the data's vocabulary")
    made_with: Any = manifest.tokenizer
    if tokenizer is None or made_with is None or tokenizer.fingerprint() == made_with.fingerprint:
        return
    why = (
        f"it was made with another tokenizer: {made_with.type} of {made_with.vocab_size} tokens; "
        f"this one has {tokenizer.vocab_size}"
    )
    yield Problem("dataset", prefix, why, "give the tokenizer it was made with, or preprocess again")
