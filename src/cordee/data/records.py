"""Records of dialogues or preferences, tokenized into pairs of files once.

Owns where such files lie and when they are made anew: their names follow from the contents of the records, the
tokenizer, the template and the options. Knows no run."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cordee import lock
from cordee.config.option import to_flag
from cordee.data import preprocess, tuning
from cordee.data.build import cache_dir
from cordee.data.indexed import fingerprint, idx_path
from cordee.data.options import DialogueOptions, PreprocessConfig
from cordee.data.order_cache import content_key
from cordee.data.readers import input_files, read_file, reading
from cordee.data.render import Renderer
from cordee.data.tuning import FIELDS
from cordee.data.tuning_dataset import CHOSEN, Form, document, form_of
from cordee.errors import ProblemError
from cordee.log import logger
from cordee.tokenizer import Tokenizer
from cordee.tokenizer.options import TokenizerOptions

_READ_OF_RECORDS = 1 << 30  # bytes of a file that tell whether it changed
_SMALL = 1 << 23  # bytes that are tokenized before further processes have started
# What records are by keys that they have, for a run that does not say so.
_LAYOUTS = {
    ("conversations", "chosen"): "SharegptStylePairwiseHandler",
    ("instruction", "chosen"): "AlpacaStylePairwiseHandler",
    ("messages",): "MessagesHandler",
    ("conversations",): "SharegptStyleInstructionHandler",
    ("instruction",): "AlpacaStyleInstructionHandler",
}
_NAMED = {"dialogues": "dialogues (sft)", "pairs": "pairs (dpo, orpo, simpo, rm)", "kto": "samples with a flag (kto)"}
_Load: TypeAlias = Callable[[], tuple[Tokenizer, str | None] | None]


class Records:
    """Files of records, tokenized as `options` say, whose input and output are none, into the directory `cache`, None:
    beside them. `load` gives, when the first is met, the tokenizer and its directory, or None where there is none.
    `form`: what the samples have to be; None: anything."""

    def __init__(self, options: PreprocessConfig, cache: str | None, load: _Load, form: Form | None = None):
        self._options, self._cache, self._load = options, cache, functools.cache(load)
        self._form = form
        self._rendered: Callable[[], Renderer] | None = None  # by what the records last met are

    @property
    def met(self) -> bool:
        """Whether there were any records."""
        return self._rendered is not None

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer of the records last met; empty without such."""
        return frozenset() if self._rendered is None else frozenset(self._rendered().stop_ids)

    def prefix(self, option: str, value: str) -> str:
        """That of the ids of the dataset that `value`, a word of an option of data, names; else `value`."""
        value = value.strip()
        fields = (CHOSEN, FIELDS[0]) if self._form == "pairs" else (FIELDS[0], CHOSEN)
        found = [ids for field in fields if idx_path(ids := document(value, field)).exists()]
        if found or idx_path(value).exists() or not Path(value).exists():
            prefix = found[0] if found else value  # ids already, a weight, or nothing, found with all else of the data
            self._require(to_flag(option), value, form_of(prefix))
            return prefix
        return self._tokenized(to_flag(option), value)

    def _require(self, flag: str, value: str, form: Form | None) -> None:
        """ProblemError if the samples are of another form."""
        if form and self._form and form != self._form:
            why, fix = f"it holds {_NAMED[form]}", f"give {_NAMED[self._form]}, or another --stage"
            raise ProblemError.of(flag, value, why, fix, "form", ("stage",), form)

    def _tokenized(self, flag: str, path: str) -> str:
        with reading(flag, path):
            files = input_files(Path(path))
            contents = [(str(file), fingerprint(file, _READ_OF_RECORDS)) for file in files]
        if (loaded := self._load()) is None:
            why = "it holds records, and no tokenizer is given"
            fix = "give the tokenizer of the model: --tokenizer-name-or-path DIR"
            raise ProblemError.of(flag, path, why, fix, "tokenizer")
        tokenizer, directory = loaded
        large = sum(file.stat().st_size for file in files) >= _SMALL
        name = self._options.handler_name or _layout(flag, files[0])
        workers = min(8, os.cpu_count() or 1) if large else 1
        config = replace(self._options, input=path, handler_name=name, workers=workers, overwrite=True)
        ((_, handler),) = tuning.inputs_of(config, path)
        if handler is None or handler.is_text:
            why, fix = "it is of text without labels", "give the handler of the records, or --stage pretrain"
            raise ProblemError.of("--handler-name", config.handler_name, why, fix)
        form: Form = "kto" if config.kto else "pairs" if handler.pairwise else "dialogues"
        self._require(flag, path, form)
        self._rendered = partial(tuning.renderer_of, config, handler, tokenizer, directory, config.kto)
        facts: dict[str, Any] = {
            **{each.name: getattr(config, each.name) for each in fields(DialogueOptions)},
            "contents": contents,
            "tokenizer": tokenizer.fingerprint(),
            "template": repr(tuning.template_of(config, handler, directory)),
            "seq_length": config.seq_length,
            "kto": config.kto,
        }
        prefix = cache_dir(self._cache, path) / f"{Path(path).name}-{content_key(**facts)}"
        with reading(flag, path):
            made = _made(replace(config, output_prefix=str(prefix)), tokenizer, directory)
        return document(made, CHOSEN if form == "pairs" else FIELDS[0])


def tokenizing(options: Any, seq_length: int | None, kto: bool = False) -> PreprocessConfig:
    """How records are tokenized for `options`, which have those of dialogues and of the tokenizer among them."""
    names = [each.name for kind in (DialogueOptions, TokenizerOptions) for each in fields(kind)]
    given = {name: getattr(options, name) for name in names}
    return PreprocessConfig(**given, output_prefix="", seq_length=seq_length, cut_long=True, kto=kto)


def _layout(flag: str, file: Path) -> str:
    """The handler of a file, by the keys of its first record."""
    with reading(flag, file):
        chunk = next(iter(read_file(file, ())), None)
    values = next(iter(chunk.records(())), (None, ()))[1] if chunk else ()
    if not values:
        raise ProblemError.of(flag, file, "it has no records", "give a file with some", "empty")
    keys = tuple(values[0]) if isinstance(values, (list, tuple)) and isinstance(values[0], dict) else ()
    name = next((name for known, name in _LAYOUTS.items() if set(known) <= {*keys}), None)
    if name is None:
        why = f"what the records of {file} are cannot be told by their keys: {', '.join(keys) or 'none'}"
        raise ProblemError.of("--handler-name", None, why, "name the handler", "missing", limit=keys)
    logger.info("records of %s: --handler-name %s", file, name)
    return name


def _made(config: PreprocessConfig, tokenizer: Tokenizer, directory: str | None) -> str:
    """The prefix of `config`, whose files are there now; of several processes one makes them."""
    done = Path(f"{config.output_prefix}.complete")
    with lock.acquire(Path(f"{config.output_prefix}.making"), patience=math.inf):
        if not done.exists():
            logger.info("tokenizing %s into %s", config.input, config.output_prefix)
            preprocess.tokenize(config, tokenizer, directory)
            done.touch()
    return config.output_prefix
