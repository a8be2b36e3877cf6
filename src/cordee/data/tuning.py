"""Dialogues to samples: ids and labels, cut to a length and packed to rows.

Owns what a sample of tuning is on disk: three sequences, `input_ids`, `attention_mask` and `labels`, of one length.
`labels[i]` is what token i has to be predicted as, -100 where it is not trained. `attention_mask` is 1, or in rows of
several samples that do not see each other the number of the sample from 1 on, and 0 for padding. A pair has three for
each side, `chosen_` and `rejected_`; a sample of KTO a fourth, `desirable`, of one number: 1, or 0. Knows no template.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cordee.data.encode import INVALID, TOO_LONG, Column, Encoded, column_of, read_records
from cordee.data.handlers import LLAMA_FACTORY, Handler, from_dataset_info, handler_named
from cordee.data.messages import IGNORED, Dialogue
from cordee.data.options import DialogueOptions
from cordee.data.readers.chunk import Chunk, Invalid
from cordee.data.render import Renderer
from cordee.data.templates import Template, chat_template, template_named
from cordee.errors import ProblemError
from cordee.tokenizer import Tokenizer

FIELDS = ("input_ids", "attention_mask", "labels")
SIDES = ("chosen_", "rejected_")  # of a pair
DESIRABLE = "desirable"
NOTHING_TRAINED = "without a trained token"
_CUT = ("sample", "cut to the length")
_UNPROVED = ("answer", "not trained: the template writes it otherwise once others follow")
_WINDOW = 1 << 24  # tokens among which samples to pack are chosen

Tokens = npt.NDArray[np.int32]
_Group: TypeAlias = tuple[list[tuple[Tokens, Tokens]], list[Tokens]]  # ids and labels of samples, and a flag


def field_names(pairwise: bool, kto: bool = False) -> tuple[str, ...]:
    """What the pairs of files of a dataset are called, between its prefix and `_document`."""
    sides = SIDES if pairwise and not kto else ("",)
    return tuple(f"packed_{side}{name}" for side in sides for name in FIELDS) + (f"packed_{DESIRABLE}",) * kto


def inputs_of(options: DialogueOptions, path: str | None) -> list[tuple[str | None, Handler | None]]:
    """What is read for `path`, and what the records are, None for text; datasets of a dataset_info.json are several.
    ProblemError for what is unknown."""
    name = options.handler_name
    if name == LLAMA_FACTORY:
        directory = Path(options.dataset_dir or "data")
        found = [from_dataset_info(directory, each.strip()) for each in (path or "").split(",")]
        return [(str(file), handler) for file, handler in found]
    return [(path, None if name in (None, "GeneralPretrainHandler") else handler_named(name, options.map_keys))]


def output_names(handler: Handler, kto: bool) -> tuple[str, ...]:
    return ("text",) if handler.is_text else field_names(handler.pairwise, kto)


def renderer_of(
    options: DialogueOptions, handler: Handler, tokenizer: Tokenizer, directory: str | None, kto: bool = False
) -> Renderer:
    """What renders the dialogues of `handler`; `directory` is the tokenizer's. ProblemError without a template. A
    preference is of the last answer: what comes before has no labels."""
    template = template_of(options, handler, directory)
    assert template is not None
    last = options.mask_history or handler.pairwise or kto
    return Renderer(template, tokenizer, train_on=options.train_on, mask_history=last)


def template_of(options: DialogueOptions, handler: Handler | None, directory: str | None) -> Template | None:
    """None for text."""
    if handler is None or handler.is_text:
        return None
    flag, value = ("--hf-chat-template", True) if options.hf_chat_template else ("--prompt-type", options.prompt_type)
    if handler.own_template is not None:
        if options.hf_chat_template or options.prompt_type:
            why, fix = f"{handler.name} has a template of its own", "leave it out, or take another --handler-name"
            raise ProblemError.of(flag, value, why, fix, "excludes", ("handler_name",))
        return handler.own_template
    if options.hf_chat_template:
        if directory is None:
            why, fix = "the tokenizer is of no directory", "give --tokenizer-name-or-path, or a --prompt-type"
            raise ProblemError.of(flag, value, why, fix, "requires", ("tokenizer_name_or_path",))
        return chat_template(Path(directory))
    if options.prompt_type is None:
        why = f"the dialogues of {handler.name} need a template"
        fix = "give the one of the model, or the tokenizer's own: --hf-chat-template"
        raise ProblemError.of("--prompt-type", None, why, fix, "missing", ("hf_chat_template",))
    return template_named(options.prompt_type)


def kept_of(labels: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64] | slice:
    """Which `length` tokens remain when the turns of a sample are cut one after another, each source and target (a run
    of tokens without and with labels) in proportion: a short target is kept whole while the source is cut, a short
    source likewise (the rule of LLaMA-Factory and of MindSpeed-LLM)."""
    if len(labels) <= length:
        return slice(None)
    trained = labels != IGNORED
    starts = np.flatnonzero(np.diff(trained, prepend=not trained[0])).tolist()
    spans = [(begin, end) for begin, end in pairwise([*starts, len(labels)])]
    if trained[0]:
        spans.insert(0, (0, 0))
    if len(spans) % 2:
        spans.append((len(labels), len(labels)))
    kept, left = [], length
    for (begin, middle), (_, end) in zip(spans[::2], spans[1::2], strict=True):
        source, target = _shares(middle - begin, end - middle, left)
        kept += [np.arange(begin, begin + source), np.arange(middle, middle + target)]
        if (left := left - source - target) <= 0:
            break
    return np.concatenate(kept)


def kept_of_sides(labels: Sequence[npt.NDArray[Any]], length: int) -> list[npt.NDArray[np.int64] | slice]:
    """As `kept_of`, of the sides of one sample: two have one source, which is cut alike, and each its own target."""
    if len(labels) == 1 or max(map(len, labels)) <= length:
        return [kept_of(each, length) for each in labels]
    sources = [source_length(each) for each in labels]
    targets = [len(each) - source for each, source in zip(labels, sources, strict=True)]
    source, target = _shares(max(sources), max(targets), length)
    source, target = min(source, length - 1), max(target, 1)  # a little of a short answer remains
    sides = zip(sources, targets, strict=True)
    return [np.r_[: min(source, own), own : own + min(target, rest)] for own, rest in sides]


def source_length(labels: npt.NDArray[Any]) -> int:
    """How many tokens come before the first that has a label."""
    trained = labels != IGNORED
    return int(trained.argmax()) if trained.any() else len(labels)


def prompt_length(labels: npt.NDArray[Any]) -> int:
    """How many tokens come before the last run of labels, all without any."""
    places = np.flatnonzero(labels != IGNORED)
    if not len(places):
        return len(labels)
    runs = np.flatnonzero(np.diff(places) > 1)
    return int(places[runs[-1] + 1] if len(runs) else places[0])


def _shares(source: int, target: int, limit: int) -> tuple[int, int]:
    """How many of the first tokens of a source and a target are kept within `limit`."""
    if target * 2 < limit:
        most = limit
    elif source * 2 < limit:
        most = limit - source
    else:
        most = int(limit * target / (source + target))
    new_target = min(most, target)
    return min(max(limit - new_target, 0), source), new_target


@dataclass(frozen=True, kw_only=True)
class EncodeDialogues:
    """How chunks of records become samples.

    A sample of more than `seq_length` tokens is cut if `cut`, else left out. With `eod` each ends with it, trained.
    Records of pairs have two samples, left out together; for `kto` each is alone, with a flag, as those of others have.
    """

    handler: Handler
    renderer: Renderer
    eod: int | None = None
    seq_length: int | None = None
    cut: bool = False
    kto: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        return output_names(self.handler, self.kto)

    def __call__(self, chunk: Chunk) -> Encoded:
        samples: list[tuple[Tokens, ...]] = []
        invalid: list[Invalid] = []
        left_out, in_part = Counter[str](), Counter[tuple[str, str]]()
        records = size = 0
        for found in read_records(chunk, partial(self._samples, in_part), invalid):
            records += 1
            for together, flags in found:
                size += sum(len(ids) for ids, _ in together)
                kept = self._fitting(together)
                if isinstance(kept, str):
                    left_out[kept] += 1
                    continue
                in_part[_CUT] += any(len(cut[0]) < len(ids) for cut, (ids, _) in zip(kept, together, strict=True))
                samples.append((*chain.from_iterable(kept), *flags))
        columns = zip(*samples, strict=True) if samples else ((),) * len(self.outputs)
        return Encoded(
            columns={name: column_of(list(column)) for name, column in zip(self.outputs, columns, strict=True)},
            records=records + len(invalid),
            text_bytes=size,
            done=chunk.done,
            invalid=invalid,
            left_out={INVALID: len(invalid), TOO_LONG: 0, NOTHING_TRAINED: 0, **left_out},
            in_part=in_part,
        )

    def _samples(self, in_part: Counter[tuple[str, str]], record: Mapping[str, Any]) -> list[_Group]:
        """Those of a record, in groups that are left out together, each with its flag for KTO."""
        handler = self.handler
        dialogues = handler.pairs(record) if handler.pairwise else handler.dialogues(record)
        samples = [self._sample(dialogue, in_part) for dialogue in dialogues]
        if not self.kto:
            return [(samples, [])] if handler.pairwise else [([sample], []) for sample in samples]
        flags = (1, 0) if handler.pairwise else [handler.desirable(record)] * len(samples)
        return [([sample], [np.array([flag], np.int32)]) for sample, flag in zip(samples, flags, strict=True)]

    def _sample(self, dialogue: Dialogue, in_part: Counter[tuple[str, str]]) -> tuple[Tokens, Tokens]:
        """Ids and labels; the first token has no label, for nothing comes before it."""
        turns = self.renderer.turns(dialogue)
        in_part[_UNPROVED] += sum(turn.unproved for turn in turns)
        ids = list(chain.from_iterable(chain(turn.source, turn.target) for turn in turns))
        labels = list(chain.from_iterable(chain(turn.source_labels, turn.target_labels) for turn in turns))
        if self.eod is not None:
            ids, labels = [*ids, self.eod], [*labels, self.eod]
        return np.asarray(ids, np.int32), np.asarray([IGNORED, *labels[1:]], np.int32)

    def _fitting(self, sides: list[tuple[Tokens, Tokens]]) -> list[tuple[Tokens, Tokens, Tokens]] | str:
        """The three fields of each side of a sample, or why it is left out."""
        longest = max(len(ids) for ids, _ in sides)
        if self.seq_length is not None and longest > self.seq_length and not self.cut:
            return TOO_LONG
        kept = kept_of_sides([labels for _, labels in sides], self.seq_length or longest)
        cut = [(ids[own], labels[own]) for (ids, labels), own in zip(sides, kept, strict=True)]
        if not all((labels != IGNORED).any() for _, labels in cut):
            return NOTHING_TRAINED
        return [(ids, np.ones_like(ids), labels) for ids, labels in cut]


class Packer:
    """Rows of exactly `seq_length` tokens, of as many samples as the largest that still fits is taken, again and again
    (the greedy knapsack of LLaMA-Factory: a row has at most `seq_length - 1` tokens of samples, unless one alone has
    more). `numbered`: the samples of a row are numbered in its attention mask, else it is 1 throughout."""

    def __init__(self, seq_length: int, pad: int, numbered: bool):
        self.seq_length, self._pad, self._numbered = seq_length, pad, numbered
        self._samples: list[tuple[Tokens, Tokens]] = []
        self._waiting = 0
        self.tokens = self.rows = 0

    def add(self, columns: Mapping[str, Column]) -> dict[str, Column]:
        """The rows that are complete with these samples, perhaps none."""
        ids, labels = (self._split(columns[name]) for name in field_names(False)[::2])
        self._samples += zip(ids, labels, strict=True)
        self._waiting += columns[field_names(False)[0]].tokens.size
        return self.flush() if self._waiting >= _WINDOW else self._columns([])

    def flush(self) -> dict[str, Column]:
        """The rows of all samples that are waiting."""
        rows = [self._row(chosen) for chosen in knapsacks([len(ids) for ids, _ in self._samples], self.seq_length - 1)]
        self.tokens, self.rows = self.tokens + self._waiting, self.rows + len(rows)
        self._samples, self._waiting = [], 0
        return self._columns(rows)

    @staticmethod
    def _split(column: Column) -> list[Tokens]:
        return np.split(column.tokens, np.cumsum(column.lengths)[:-1]) if len(column.lengths) else []

    @staticmethod
    def _columns(rows: list[tuple[Tokens, ...]]) -> dict[str, Column]:
        columns = zip(*rows, strict=True) if rows else ((),) * len(FIELDS)
        return {name: column_of(list(rows)) for name, rows in zip(field_names(False), columns, strict=True)}

    def _row(self, chosen: list[int]) -> tuple[Tokens, Tokens, Tokens]:
        ids = np.full(self.seq_length, self._pad, np.int32)
        mask = np.full(self.seq_length, 0 if self._numbered else 1, np.int32)
        labels = np.full(self.seq_length, IGNORED, np.int32)
        begin = 0
        for number, index in enumerate(chosen, 1):
            end = begin + len(self._samples[index][0])
            ids[begin:end], labels[begin:end] = self._samples[index]
            mask[begin:end] = number if self._numbered else 1
            begin = end
        return ids, mask, labels


def knapsacks(lengths: Iterable[int], capacity: int) -> Iterator[list[int]]:
    """Indices of `lengths`, each once, in groups that have at most `capacity` together, or are one."""
    order = sorted(enumerate(lengths), key=lambda item: item[1])
    waiting, sizes = [index for index, _ in order], [length for _, length in order]
    while waiting:
        group, left = [], capacity
        place = max(bisect_right(sizes, left) - 1, 0)
        while place >= 0:
            left -= sizes.pop(place)
            group.append(waiting.pop(place))
            place = bisect_right(sizes, left) - 1
        yield group
