"""Everything about a run's data that can be known before the run.

Owns the checks of `.bin/.idx` files against the run's options, its tokenizer and how it orders samples: all problems at
once, without torch."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cordee.config.option import to_flag
from cordee.data.build import SPLITS, Part, part_problems, plan_order, read_parts, share_problems
from cordee.data.indexed import IndexedDataset
from cordee.data.manifest import Manifest, read_manifest
from cordee.data.options import DataOptions, SampleOptions
from cordee.data.tuning_dataset import sibling_problems
from cordee.errors import Problem, ProblemError, Problems

if TYPE_CHECKING:
    from cordee.tokenizer import Tokenizer

_PERMUTATION_ENTRY = 8  # bytes of a sample in the permutation of a cyclic order
_NEED_EOD = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


def check(
    options: SampleOptions,
    *,
    train_samples: int = 0,
    valid_samples: int = 0,
    test_samples: int = 0,
    vocab_size: int | None = None,
    tokenizer: "Tokenizer | None" = None,
    sequences: bool = False,
) -> list[Problem]:
    """All problems of the data a run asks for, of which with `sequences` each is a sample with labels of its own.

    The numbers of samples say which parts are needed at all. `vocab_size` (of the model) and `tokenizer` are compared
    with what is known of each dataset. Reads every index once, and no tokens. The memory that building an order takes
    is not checked: this machine may be another than the one that builds it, if it has to be built at all."""
    parts, problems = read_parts(options)
    problems += (*share_problems(options), *_eod_problems(options, tokenizer))
    asked: dict[str, int] = dict(zip(SPLITS, (train_samples, valid_samples, test_samples), strict=True))
    needed = {name: part for name, part in parts.items() if asked[name]}
    for prefix in dict.fromkeys(prefix for part in needed.values() for prefix in part.blend.prefixes):
        using = [part for part in needed.values() if prefix in part.blend.prefixes]
        asked_by = {"skip_train" if part.name == "train" else "eval_iters" for part in using}
        found = _dataset_problems(prefix, using, vocab_size, tokenizer, sequences)
        problems += [problem.involving(*asked_by) if len(asked_by) == 1 else problem for problem in found]
    if "train" in needed and options.dataloader_type == "cyclic":
        with suppress(ProblemError):  # of a dataset, found above
            problems += _permutation_problems(needed["train"], None if sequences else options.seq_length, train_samples)
    return problems


def _permutation_problems(part: Part, seq_length: int | None, samples: int) -> Problems:
    """Why the samples of a part cannot be permuted: their order is in blocks, since all at once they are too many."""
    order = plan_order(part, [IndexedDataset(prefix) for prefix in part.blend.prefixes], seq_length, samples)
    if seq_length is not None and any(own.blocks > 1 for own in order.datasets):
        samples = order.size if order.weights is not None else order.datasets[0].samples
        size = samples * _PERMUTATION_ENTRY / 2**30
        why = f"it permutes all {samples:,} samples at once, in {size:,.1f} GiB on every rank"
        fix = "take --dataloader-type single, whose order is shuffled too, or a shorter run"
        yield Problem("--dataloader-type", "cyclic", why, fix)


def _eod_problems(options: DataOptions, tokenizer: "Tokenizer | None") -> Problems:
    for name in _NEED_EOD:
        if getattr(options, name) and (tokenizer is None or tokenizer.eod is None):
            what = "no tokenizer is given" if tokenizer is None else "the tokenizer has none"
            why = f"it acts at the token that ends a document, and {what}"
            yield Problem(to_flag(name), True, why, "give a tokenizer that has an end-of-sequence token")


def _dataset_problems(
    prefix: str, parts: list[Part], vocab_size: int | None, tokenizer: "Tokenizer | None", sequences: bool
) -> list[Problem]:
    try:
        dataset = IndexedDataset(prefix)
        if problems := dataset.problems() or list(sibling_problems(dataset) if sequences else ()):
            return problems
        manifest = read_manifest(dataset)
    except ProblemError as error:
        return error.problems
    problems = [problem for part in parts for problem in part_problems(part, dataset)]
    if manifest is not None:
        problems += token_problems(prefix, manifest, vocab_size, tokenizer)
    return problems


def token_problems(prefix: str, manifest: Manifest, vocab_size: int | None, tokenizer: "Tokenizer | None") -> Problems:
    """Conflicts of a dataset's manifest with the model's vocabulary and the tokenizer, where they are given."""
    if vocab_size is not None and manifest.max_token >= vocab_size:
        why = f"it holds token {manifest.max_token}, but the model has only {vocab_size} tokens"
        fix = "take the model's own tokenizer, or a model with the data's vocabulary"
        yield Problem("dataset", prefix, why, fix, limit=vocab_size)
    made_with: Any = manifest.tokenizer
    if tokenizer is None or made_with is None or tokenizer.fingerprint() == made_with.fingerprint:
        return
    why = f"it was made with {made_with.type} of {made_with.vocab_size} tokens; this tokenizer: {tokenizer.vocab_size}"
    yield Problem("dataset", prefix, why, "give the tokenizer it was made with, or preprocess again", limit=made_with)
