"""The next token: cross entropy of every trained token of texts in `.bin/.idx` files.

Owns what these files and their options mean for a run: how many samples it reads of each part, which comes when, and
what has to be the same for a run to resume among them. Batches and the order of samples are `cordee.data`'s."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from cordee import sealed
from cordee.config.option import to_flag
from cordee.data import build, gpt_check
from cordee.data.indexed import IndexedDataset, bin_path, fingerprint, idx_path
from cordee.data.order import normalise
from cordee.data.tuning_dataset import TuningDataset, ids_of
from cordee.errors import Findings, Problem, ProblemError, Problems, raise_all, requires
from cordee.train.batch_schedule import BatchSchedule
from cordee.train.objectives import LIKELIHOOD, DataSize, Objective, Run
from cordee.train.options import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.batch import Batch
    from cordee.data.gpt_dataset import Dataset
    from cordee.data.loader import Collate
    from cordee.model.head import Head
    from cordee.parallel.execution import LossParts, Reduce

READ_OF_DATA = 1 << 30  # bytes, over all .bin and over all .idx, that tell whether the data changed: some seconds
CONTENTS = ("bin", "idx")  # fingerprints of the files of a dataset
PARTS = ("train", "validation", "test")  # as `SPLITS`, in the words of a run
_OF_VALIDATION = ("eval_on_start", "save_best", "early_stopping_patience", "multiple_validation_sets")
Fingerprints = tuple[dict[str, int], ...]  # of the .bin and .idx of every dataset to train on

_SET = {**dict.fromkeys(("tokens", "first", "last", *CONTENTS), sealed.count()), "weight": sealed.number()}
IDENTITY = sealed.record(
    {
        "seq_length": sealed.count(1),
        "seed": sealed.count(),
        "order": sealed.text(),
        "sets": sealed.listed(sealed.record(_SET)),
        "blocks": sealed.maybe(sealed.listed(sealed.row(sealed.count(1), sealed.flag))),
        "period": sealed.maybe(sealed.count(1)),
        "samples": sealed.maybe(sealed.count()),
    },
    {"reference": sealed.text()},
)


@dataclass(frozen=True, kw_only=True)
class GPTData:
    """The texts of a run. `samples` is how many it needs for "train", "valid" and "test".

    sequences: what reads samples that are whole sequences of the files; None: samples are of --seq-length tokens."""

    config: TrainConfig
    vocab_size: int | None
    eod: int | None
    samples: dict[str, int]
    identity: dict[str, Any]
    sequences: ClassVar[type[TuningDataset] | None] = None

    def resumed(self, then: Mapping[str, Any], found: Findings) -> GPTData:
        """Consumed samples are a place in the data only if the order of the data is the same. Megatron's depends on the
        length of a run: another length would bring other samples, some a second time before others come at all. So the
        order is kept as it was."""
        problems = list(_data_problems(self, then))
        found.problems += problems
        if problems or not then["blocks"] or not self.identity["blocks"]:
            return self
        kept, samples = {"blocks": then["blocks"]}, self.samples
        if self.config.dataloader_type == "cyclic":  # what is added is further passes over the same samples
            kept["samples"] = then["samples"]
            samples = {**samples, "train": then["samples"]}
        if self.identity["blocks"] != then["blocks"]:
            found.notes.append("the run has another length than before: its data keeps the order that it began with")
        return replace(self, identity={**self.identity, **kept}, samples=samples)

    def open(self, *, verified: bool) -> dict[str, Dataset]:
        """Sample orders that are kept in the cache are built if they are missing."""
        counts = [self.samples[name] for name in build.SPLITS]
        built = build.build_datasets(
            self.config, *counts, train_blocks=self.identity["blocks"], verified=verified, sequences=self.sequences
        )
        found = {name: dataset for name, dataset in zip(PARTS, built, strict=True) if dataset is not None}
        if self.config.multiple_validation_sets:
            sets = build.build_validation_sets(self.config, self.samples["valid"], verified, self.sequences)
            found |= {f"validation-{name}": dataset for name, dataset in sets.items()}
        return found

    def collate(self) -> Collate:
        from cordee.data.gpt_collate import GPTCollate

        return GPTCollate(
            vocab_size=self.vocab_size,
            eod=self.eod,
            eod_mask_loss=self.config.eod_mask_loss,
            reset_position_ids=self.config.reset_position_ids,
            reset_attention_mask=self.config.reset_attention_mask,
        )


class NextToken(Objective["Batch"]):
    stage = "pretrain"
    loss_name = LIKELIHOOD
    plan: ClassVar[type[GPTData]] = GPTData

    def fingerprint(self, config: TrainConfig) -> Fingerprints:
        return fingerprint_data(config)

    def identity_form(self) -> sealed.Form:
        return IDENTITY

    def data(self, run: Run, found: Findings) -> GPTData | None:
        config, tokenizer = run.config, run.tokenizer
        found.problems += _too_many(config, run.batches, run.iterations)
        samples = _samples(config, run.batches, run.iterations, found.notes)
        found.problems += _not_validated(config, samples, found.notes)
        asked = {f"{name}_samples": count for name, count in samples.items()}
        found.problems += gpt_check.check(
            config, **asked, vocab_size=run.vocab_size, tokenizer=tokenizer, sequences=bool(self.plan.sequences)
        )
        identity = found.attempt(lambda: _identity(config, samples, run.fingerprint, bool(self.plan.sequences)))
        if identity is None:
            return None
        eod = tokenizer.eod if tokenizer else None
        return self.plan(config=config, vocab_size=run.vocab_size, eod=eod, samples=samples, identity=identity)

    def evaluated(self, config: TrainConfig) -> str:
        """The first dataset for tests, else for validation, else for training."""
        parts = build.plan_parts(config)
        return next(parts[name] for name in reversed(build.SPLITS) if name in parts).blend.prefixes[0]

    def size(self, config: TrainConfig) -> DataSize:
        blend = (part := build.training_part(config)).blend
        opened = {prefix: ids_of(prefix) for prefix in blend.prefixes}
        raise_all(problem for of in opened.values() for each in of for problem in build.part_problems(part, each))
        tokens = {prefix: sum(x.tokens_between(*part.sequences(x)) for x in of) for prefix, of in opened.items()}
        shares = dict.fromkeys(tokens, 0.0)
        weights = part.weights([opened[prefix][0] for prefix in blend.prefixes], bool(self.plan.sequences))
        each = list(zip(blend.prefixes, normalise(weights or (1.0,)).tolist(), strict=True))
        for prefix, share in each:
            shares[prefix] += share  # a prefix may be there twice
        samples = {prefix: count / config.seq_length for prefix, count in tokens.items()}
        if self.plan.sequences:
            ranges = {prefix: part.sequences(of[0]) for prefix, of in opened.items()}
            samples = {prefix: last - first for prefix, (first, last) in ranges.items()}
        exhausted = [samples[prefix] / share for prefix, share in each]  # samples of the blend until each dataset is
        mixed = {
            "concat": sum(samples[prefix] for prefix, _ in each),
            "interleave_under": min(exhausted),
            "interleave_over": max(exhausted),
        }
        epoch = mixed.get(config.mix_strategy or "", sum(samples.values()))
        return DataSize(tokens=tokens, samples=samples, shares=shares, epoch=epoch)

    def weight(self, batch: Batch) -> int:
        """Number of trained tokens."""
        return batch.num_trained

    def loss(self, head: Head, hidden: Tensor, batch: Batch, reduce: Reduce) -> LossParts:
        total, _ = head.loss(hidden, batch.labels)
        return total, {}


def _too_many(config: TrainConfig, batches: BatchSchedule, iterations: int) -> Problems:
    """Why the samples of a run cannot be counted."""
    size = batches.global_batch_size
    train = ("train_samples", config.train_samples) if config.train_samples else ("train_iters", iterations * size)
    for name, count in (train, ("eval_iters", config.eval_iters * size)):
        if (count or 0) * (config.seq_length + 1) >= 2**63:
            why, involved = "it makes more tokens than 64 bits count", ("seq_length", "global_batch_size")
            yield Problem(to_flag(name), getattr(config, name), why, "give less", "at most", involved)


def _samples(config: TrainConfig, batches: BatchSchedule, iterations: int, notes: list[str]) -> dict[str, int]:
    """Samples that the run reads of each part. The final test is left out where --split leaves it no sequence."""
    held_out = config.eval_iters * batches.global_batch_size
    train = config.train_samples or iterations * batches.global_batch_size
    samples = {"train": 0 if config.skip_train else train, "valid": held_out, "test": held_out}
    parts, _ = build.read_parts(config)  # what keeps them from being read is found by the check of the data
    for name in ("valid", "test"):
        if name not in parts:
            samples[name] = 0
    if samples["test"] and not config.test_data_path and not _has_sequences(parts["test"]):
        notes.append(f"no test at the end: --split {config.split} leaves it no sequence")
        samples["test"] = 0
    return samples


def _not_validated(config: TrainConfig, samples: dict[str, int], notes: list[str]) -> Problems:
    """Options of the validation, of a run that has no data for one."""
    parts, unread = build.read_parts(config)
    if config.mix_strategy and not unread and all(len(part.blend.prefixes) == 1 for part in parts.values()):
        probabilities = " --interleave-probs" * bool(config.interleave_probs)
        notes.append(f"ignored: --mix-strategy{probabilities} (the data is one dataset)")
    if unread or not config.eval_iters:
        return
    for name in _OF_VALIDATION if not samples["valid"] else ():
        why, involved = "there is no data to validate on", ("split", "data_path", "valid_data_path")
        yield from requires(to_flag(name), getattr(config, name), "--valid-data-path", why, *involved)
    if config.multiple_validation_sets and samples["valid"] and not build.validation_sets(parts):
        notes.append("ignored: --multiple-validation-sets (the validation data is one dataset)")


def _has_sequences(part: build.Part) -> bool:
    """Whether --split leaves a part any sequence; files that cannot be read are found by the check of the data."""
    try:
        ranges = [part.sequences(IndexedDataset(prefix)) for prefix in part.blend.prefixes]
    except ProblemError:
        return True
    return all(first < last for first, last in ranges)


def fingerprint_data(config: TrainConfig, pairs: Callable[[str], Sequence[str]] = lambda ids: (ids,)) -> Fingerprints:
    """What tells changed bytes of the data to train on, all `pairs` of files of a dataset; ProblemError if it cannot be
    read.

    The more datasets, the less is read of each, so that no blend takes longer to start than another."""
    prefixes = build.training_part(config).blend.prefixes
    bound = READ_OF_DATA // len(set(prefixes))

    def read(prefix: str) -> dict[str, int]:
        files = {kind: [path(each) for each in pairs(prefix)] for kind, path in (("bin", bin_path), ("idx", idx_path))}
        try:
            return {kind: _together([fingerprint(file, bound) for file in own]) for kind, own in files.items()}
        except OSError as error:
            why, fix = f"it cannot be read: {error}", "give a prefix whose files can be read"
            missing = tuple(file.name for own in files.values() for file in own if not file.exists())
            raise ProblemError.of("dataset", prefix, why, fix, "unreadable", limit=missing or prefix) from error

    found = {prefix: read(prefix) for prefix in dict.fromkeys(prefixes)}
    return tuple(found[prefix] for prefix in prefixes)


def _together(found: list[int]) -> int:
    return found[0] if len(found) == 1 else zlib.crc32(repr(found).encode())


def _identity(
    config: TrainConfig, samples: dict[str, int], fingerprints: Fingerprints | None, sequences: bool
) -> dict[str, Any]:
    """Nothing about the order for a run that trains on no samples."""
    part, count = build.training_part(config), samples.get("train")
    opened = [IndexedDataset(prefix) for prefix in part.blend.prefixes]
    weights = part.weights(opened, sequences) or (1.0,)
    sets = []
    for indexed, weight, content in zip(opened, weights, fingerprints or ({},) * len(opened), strict=True):
        first, last = part.sequences(indexed)
        sets.append({"tokens": indexed.num_tokens, "first": first, "last": last, "weight": weight, **content})
    order, length = {"blocks": None, "period": None}, None if sequences else config.seq_length
    if count:
        order = build.plan_order(part, opened, length, count).describe()
    whole = {"seq_length": config.seq_length, "seed": config.seed, "order": config.dataloader_type, "sets": sets}
    return whole | order | {"samples": count}


def _data_problems(data: GPTData, then: Mapping[str, Any]) -> Iterator[Problem]:
    config, now = data.config, data.identity
    if then["seed"] != now["seed"] and config.load_rng:
        why = f"the run had seed {then['seed']}, which decides the order of its data"
        fix = f"give --seed {then['seed']}, or --no-load-rng to resume with another order"
        yield Problem("--seed", now["seed"], why, fix)
    for key, option in (("seq_length", "--seq-length"), ("order", "--dataloader-type")):
        if then[key] != now[key]:
            why = f"the run had {then[key]}, so its place in the data would mean other samples"
            yield Problem(option, now[key], why, f"give {then[key]}, or start anew from the weights: --finetune")
    option = "--data-path" if config.data_path else "--train-data-path"
    if [_selection(part) for part in then["sets"]] != [_selection(part) for part in now["sets"]]:
        why = "the run was on other data, or on other parts of it, so its place in the data would mean other samples"
        fix = "give the same data, weights (--mix-strategy, --interleave-probs) and --split, or start anew: --finetune"
        yield Problem(option, " ".join(config.data_path or config.train_data_path), why, fix)
        return
    if then.get("reference", now.get("reference")) != now.get("reference", then.get("reference")):
        why, fix = "the run had other weights as its reference", "give that model, or start anew: --finetune"
        yield Problem("--ref-model", config.ref_model, why, fix, "differs")
    prefixes = build.plan_parts(config)["train"].blend.prefixes
    changed = {
        f"{prefix}.{kind}"
        for prefix, before, after in zip(prefixes, then["sets"], now["sets"], strict=True)
        for kind in CONTENTS
        if kind in after and before[kind] != after[kind]  # a plan that is not trained may not have read it
    }
    for file in sorted(changed):
        why = "its bytes changed since the checkpoint was saved, so its place in the data would mean other samples"
        yield Problem(option, file, why, "give the data as it was, or start anew from the weights: --finetune")
    if then["blocks"] and now["blocks"] and then["period"] != now["period"]:
        after = [each["period"] or "no" for each in (then, now)]
        why = f"the blend of the run repeats its choice of datasets after {after[0]} samples, this one after {after[1]}"
        option = "--train-samples" if config.train_samples else "--train-iters"
        value = config.train_samples or config.train_iters
        yield Problem(option, value, why, "keep the length, or start anew from the weights: --finetune")


def _selection(part: dict[str, Any]) -> dict[str, Any]:
    """What is taken of a dataset, whatever its tokens are."""
    return {key: value for key, value in part.items() if key not in CONTENTS}


OBJECTIVE = NextToken()
