"""`cordee inspect`: what a model will see of data for tuning, and what is wrong with it.

Owns how samples are shown, and the findings of the doctor. Samples come as training has them: `records.py` tokenizes,
`TuningDataset` reads, `TuningCollate` makes labels, segments and positions."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cordee.config import laws
from cordee.data.indexed import IndexedDataset
from cordee.data.messages import IGNORED
from cordee.data.options import InspectConfig
from cordee.data.order import Order
from cordee.data.records import Records, tokenizing
from cordee.data.tuning import SIDES
from cordee.data.tuning_dataset import TuningDataset, form_of, sibling_problems
from cordee.errors import Findings, Problem, ProblemError, raise_all
from cordee.files import write_durably
from cordee.log import console, counted
from cordee.tokenizer import Tokenizer, load_tokenizer, names_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

    from cordee.data.batch import Batch

_SPOILS = (
    "without a trained token",
    "whose end is not trained",
    "with a trained role marker",
    "with BOS twice in a row",
    "with tokens unknown to the tokenizer",
)
_RARE = 0.01  # of the samples: less is a note


@dataclass
class Doctor:
    """What is found in samples one after another; token ids of special tokens are None where no tokenizer is given."""

    tokenizer: Tokenizer | None
    ends: frozenset[int]
    seq_length: int
    tokens: int = 0
    trained: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    _seen: set[int] = field(default_factory=set)
    _markers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            special = {text for text, is_special in self.tokenizer.added_tokens().items() if is_special}
            ids = {i for i, text in self.tokenizer.vocabulary().items() if text in special}
            self._markers = frozenset(ids - self.ends - {self.tokenizer.roles.unk})

    def see(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """One sample, as it stands in the files."""
        trained = labels[labels != IGNORED]
        self.tokens, self.trained = self.tokens + len(ids), self.trained + len(trained)
        bos, unk = (self.tokenizer.bos, self.tokenizer.roles.unk) if self.tokenizer else (None, None)
        key = hash(ids.tobytes())
        found = {
            "samples": True,
            "without a trained token": not len(trained),
            "whose end is not trained": len(trained) and self.ends and int(trained[-1]) not in self.ends,
            "with a trained role marker": bool(self._markers.intersection(trained.tolist())),
            "with BOS twice in a row": bos is not None and bool(((ids[1:] == bos) & (ids[:-1] == bos)).any()),
            "with tokens unknown to the tokenizer": unk is not None and unk not in self.ends and unk in ids,
            "longer than --seq-length": len(ids) > self.seq_length,
            "at --seq-length, perhaps cut": len(ids) == self.seq_length,
            "twice": key in self._seen,
        }
        self._seen.add(key)
        self.counts.update(name for name, is_so in found.items() if is_so)

    def findings(self) -> Iterator[tuple[str, str]]:
        """Each finding after "bad", which spoils training, "note" or "ok"."""
        total = self.counts["samples"]
        if self.tokenizer is None:
            yield "note", "ends, role markers and BOS are not looked for: no tokenizer is given"
        for name in (*_SPOILS, "longer than --seq-length", "at --seq-length, perhaps cut", "twice"):
            count = self.counts[name]
            verdict = "ok" if not count else "bad" if name in _SPOILS and count > _RARE * total else "note"
            yield verdict, f"{count:,} of {counted(total, 'sample')} {name}"
        share = self.trained / max(self.tokens, 1)
        yield "ok" if self.trained else "bad", f"{share:.1%} of {counted(self.tokens, 'token')} are trained"


def run(config: InspectConfig) -> int:
    """Show samples and findings; 1 if one of them spoils training. Raises `ProblemError` for data that is broken."""
    from cordee.data.tuning_collate import TuningCollate

    dataset, tokenizer, ends = _opened(config)
    output = console(record=config.html is not None)
    collate = TuningCollate(
        seq_length=config.seq_length,
        multiple=1,
        vocab_size=None,
        eod=tokenizer.eod if tokenizer else None,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
    )
    marked = config.html is None and not output.is_terminal
    sides = SIDES if form_of(dataset.indexed.prefix) == "pairs" else ("",)
    for index in range(config.start, min(config.start + config.num, len(dataset))):
        batch = collate([dataset[index]])
        for row, side in enumerate(sides):
            output.print(_row(f"sample {index}{side and ', '}{side.rstrip('_')}", row, batch, tokenizer, marked))
    doctor = Doctor(tokenizer, ends, config.seq_length)
    for fields, side in ((each, side) for each in dataset.whole() for side in sides):
        mask = fields[f"{side}attention_mask"]
        for own in (mask == number for number in range(1, mask.max(initial=0) + 1)):
            doctor.see(fields[f"{side}input_ids"][own], fields[f"{side}labels"][own])
    findings = list(doctor.findings())
    for verdict, text in findings:
        style = {"bad": "bold red", "note": "yellow"}.get(verdict, "")
        output.print(f"{verdict:<5}{text}", style=style, highlight=False)
    if config.html is not None:
        write_durably(Path(config.html), output.export_html())
    return int(any(verdict == "bad" for verdict, _ in findings))


def check_run(config: InspectConfig) -> list[Problem]:
    """What is wrong with the options and the tokenizer; the data is read when it is shown."""
    found = Findings()
    _tokenizer(config, found)
    return found.problems


def _tokenizer(config: InspectConfig, found: Findings) -> Tokenizer | None:
    """That of the options, if they name one; what is wrong with them is added to `found`."""
    found.problems += laws.problems(config)
    return found.attempt(lambda: load_tokenizer(config)) if names_tokenizer(config) else None


def _opened(config: InspectConfig) -> tuple[TuningDataset, Tokenizer | None, frozenset[int]]:
    """The samples in the order of the files, the tokenizer, and what ends an answer."""
    found = Findings()
    tokenizer = _tokenizer(config, found)
    raise_all(found.problems)
    loaded = (tokenizer, config.tokenizer_name_or_path) if tokenizer else None
    records = Records(tokenizing(config, config.seq_length), config.data_cache_path, lambda: loaded)
    indexed = IndexedDataset(records.prefix("data", config.data))
    raise_all([*indexed.problems(), *sibling_problems(indexed)])
    if not len(indexed):
        raise ProblemError.of("dataset", config.data, "it holds no sample", "give other data", "empty")
    order = Order.of_sequences(len(indexed), None)
    own = (tokenizer.eos, tokenizer.eod) if tokenizer else ()
    ends = records.ends or frozenset(end for end in own if end is not None)
    return TuningDataset(indexed, 0, len(indexed), order, config.seq_length, None), tokenizer, ends


def _row(name: str, row: int, batch: "Batch", tokenizer: Tokenizer | None, marked: bool) -> "Text":
    """One row: a line for each sample of it with its positions, what is trained highlighted, or in brackets."""
    from rich.text import Text

    ids, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
    trained = [False, *(label != IGNORED for label in labels[:-1])]  # a label is that of the next token
    segments = batch.segments[row].tolist() if batch.segments is not None else [0] * len(ids)
    text = Text(f"{name}: {counted(len(ids), 'token')}, {sum(trained)} trained\n", style="bold")
    for segment, tokens in groupby(range(len(ids)), key=segments.__getitem__):
        places = list(tokens)
        first = batch.position_ids[row, places[0]].item() if batch.position_ids is not None else places[0]
        name = "padding" if segment == -1 else f"positions {first} to {first + len(places) - 1}"
        text.append(f"[{name}] ", style="cyan")
        for is_trained, run in groupby(places, key=trained.__getitem__):
            own = [ids[place] for place in run]
            shown = tokenizer.decode(own) if tokenizer else " ".join(map(str, own)) + " "
            shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in shown)
            shown = f"\u27e6{shown}\u27e7" if marked and is_trained else shown
            text.append(shown, style="bold green" if is_trained else "dim")
        text.append("\n")
    return text
