"""Supervised fine-tuning: the next token wherever a sample has a label, in whole samples of dialogues.

Owns what data of dialogues means for a run: files that `cordee preprocess` has written, or records, which are tokenized
into such files once, before the run. The order of samples, the loss and resuming are as those of the next token."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cordee.config.laws import changed_options
from cordee.config.option import to_flag
from cordee.data.build import plan_parts
from cordee.data.indexed import idx_path
from cordee.data.options import DialogueOptions
from cordee.data.records import Records, tokenizing
from cordee.data.tuning_dataset import Form, TuningDataset, fields_of, ids_of, sibling
from cordee.errors import Findings, raise_all
from cordee.log import counted, logger
from cordee.tokenizer import Tokenizer
from cordee.train.initial_weights import choose, opened, tokenizer_of
from cordee.train.objectives import Run
from cordee.train.objectives.next_token import Fingerprints, GPTData, NextToken, fingerprint_data
from cordee.train.options import TrainConfig

if TYPE_CHECKING:
    from cordee.data.loader import Collate
    from cordee.data.tuning_collate import TuningCollate

_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


@dataclass(frozen=True, kw_only=True)
class TuningData(GPTData):
    """The samples of a run: whole sequences with labels of their own."""

    sequences: ClassVar[type[TuningDataset] | None] = TuningDataset

    def collate(self) -> "Collate":
        config = self.config
        parts = 2 * config.context_parallel_size * config.tensor_model_parallel_size  # of a sequence, on ranks
        return self.rows(math.lcm(config.pad_to_multiple_of, parts) if config.variable_seq_lengths else None)

    def rows(self, multiple: int | None) -> "TuningCollate":
        """What makes a batch of samples, as long as `TuningCollate` has it."""
        from cordee.data.tuning_collate import TuningCollate

        config = self.config
        return TuningCollate(
            seq_length=config.seq_length,
            multiple=multiple,
            vocab_size=self.vocab_size,
            eod=self.eod,
            reset_position_ids=config.reset_position_ids,
            reset_attention_mask=config.reset_attention_mask,
        )


class SFT(NextToken):
    stage = "sft"
    plan = TuningData
    form: ClassVar[Form] = "dialogues"  # of its samples
    cuts: ClassVar[bool] = True  # whether samples of more than --seq-length tokens are cut to it

    def ready(self, config: TrainConfig) -> TrainConfig:
        """Paths become the prefixes of pairs of ids; records are tokenized into the cache if they are not there."""
        options = tokenizing(config, config.seq_length if self.cuts else None, kto=self.form == "kto")
        records = Records(options, config.data_cache_path, partial(_tokenizer, config), self.form)
        found = Findings()
        changed = {}
        for name in _PATHS:
            values = getattr(config, name)
            made = [found.attempt(partial(records.prefix, name, value)) for value in values]
            changed[name] = tuple(new or old for new, old in zip(made, values, strict=True))
        raise_all(found.problems)
        own = changed_options(config) & {each.name for each in fields(DialogueOptions)}
        if own and not records.met and any(idx_path(each).exists() for each in chain(*changed.values())):
            named = ", ".join(map(to_flag, sorted(own)))
            logger.warning("ignored: %s (no records are tokenized: the data is already)", named)
        return replace(config, **changed)

    def fingerprint(self, config: TrainConfig) -> Fingerprints:
        return fingerprint_data(config, lambda ids: [sibling(ids, field) for field in fields_of(ids)])

    def evaluated(self, config: TrainConfig) -> None:
        """Nothing: perplexity is of texts, and these are dialogues with what asks for answers, in rows perhaps."""

    def data(self, run: Run, found: Findings) -> GPTData | None:
        plan = super().data(run, found)
        if plan is not None:
            found.notes += self.notes(run.config)
        return plan

    def notes(self, config: TrainConfig) -> Iterator[str]:
        """Samples that are cut, and pairs that teach nothing, of what is trained on."""
        for prefix in dict.fromkeys(plan_parts(config)["train"].blend.prefixes):
            sides = ids_of(prefix)
            lengths = np.stack([each.sequence_lengths for each in sides])
            samples = f"of the {counted(len(sides[0]), 'sample')} of {prefix}"
            if long := int((lengths.max(0) > config.seq_length).sum()):
                yield f"cut to --seq-length {config.seq_length}: {long:,} {samples}"
            alike = np.flatnonzero((lengths[0] == lengths[-1]) & (len(sides) > 1)).tolist()
            if same := sum(np.array_equal(sides[0].get(pair), sides[-1].get(pair)) for pair in alike):
                yield f"chosen and rejected are the same: {same:,} {samples}"


def _tokenizer(config: TrainConfig) -> tuple[Tokenizer, str | None] | None:
    """That of the options, else that beside the weights, and its directory."""
    initial = opened(config, choose(config, None, []), found := Findings())
    raise_all(found.problems)
    if initial is None or (tokenizer := tokenizer_of(config, initial)) is None:
        return None
    return tokenizer, config.tokenizer_name_or_path or (str(initial.assets) if initial.assets else None)


OBJECTIVE = SFT()
