"""`cordee preprocess`: text, instructions or preferences to `.bin/.idx`, or several such pairs to one.

Owns the job: from input to output names, progress, what is reported, and that a failure leaves nothing behind. The
readers read, `encode` and `tuning` tokenize, `indexed` has the byte format."""

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cordee import lock
from cordee.config import laws
from cordee.data.encode import Column, Encode, Encoded
from cordee.data.handlers import Handler
from cordee.data.indexed import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path
from cordee.data.manifest import Manifest, TokenizerNote, manifest_path, merged, read_manifest
from cordee.data.options import PreprocessConfig
from cordee.data.process_map import process_map
from cordee.data.readers import hub, input_files, read_file, reading
from cordee.data.readers.chunk import Chunk, Invalid, other_keys
from cordee.data.tuning import EncodeDialogues, Packer, field_names, inputs_of, output_names, renderer_of, template_of
from cordee.errors import Findings, Problem, ProblemError, raise_all
from cordee.files import is_within, unwritable
from cordee.log import counted, logger, progress_bar
from cordee.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

_SHOWN = 10  # invalid records named one by one
_SECONDS = 1.0  # at least between two log lines


@dataclass(frozen=True)
class Source:
    """Where text comes from. `size` in bytes is known for files."""

    name: str
    size: int | None
    read: Callable[[], Iterator[Chunk]]


def run(config: PreprocessConfig) -> int:
    """Do the job of `config` and return 0. Raises `ProblemError` for what the user can fix."""
    raise_all(laws.problems(config))
    try:
        with _terminable():
            (_merge if config.merge_group_keys else tokenize)(config)
    except OSError as error:
        why = f"the output cannot be written: {error}"
        fix = "make room or give another place; nothing incomplete is left under the final names"
        raise ProblemError.of("--output-prefix", config.output_prefix, why, fix, "unwritable") from error
    return 0


def check_run(config: PreprocessConfig) -> list[Problem]:
    """Everything that would stop the job, as far as it can be known before a text is read."""
    found = Findings([*laws.problems(config)])
    if not found.problems and not config.merge_group_keys:
        found.attempt(lambda: _prepare(config))
    return found.problems


def _prepare(
    config: PreprocessConfig, tokenizer: Tokenizer | None = None, directory: str | None = None
) -> tuple[dict[str, str], list[tuple[Handler | None, list[Source]]]]:
    """The prefix of every output's pair, and what is read: where records of one kind come from, with the handler of
    these, None for text. ProblemError with all that is wrong."""
    keys = tuple(dict.fromkeys(config.json_keys))
    handled = Findings()
    handlers = handled.attempt(lambda: inputs_of(config, config.input)) or [(config.input, None)]
    outputs = keys if (first := handlers[0][1]) is None else output_names(first, config.kto)
    prefixes = {key: f"{config.output_prefix}_{key}_document" for key in outputs}
    tokenizing = () if tokenizer else check_tokenizer(config)
    found = Findings([*_output_problems(config, prefixes.values()), *tokenizing, *handled.problems])
    for _, handler in handlers:
        found.attempt(partial(template_of, config, handler, directory or config.tokenizer_name_or_path))
        if handler and output_names(handler, config.kto) != outputs:
            why, fix = "some of its datasets are of pairs, others not", "preprocess them one by one"
            found.problems.append(Problem("--input", config.input, why, fix, "differs"))
    packs = config.pack or config.neat_pack
    if (packs and outputs != field_names(False)) or (config.kto and outputs == ("text",)):
        flag = "--neat-pack" if config.neat_pack else "--pack" if packs else "--kto"
        why, fix = "it is only of samples of dialogues", "leave it out, or give a --handler-name of dialogues"
        found.problems.append(Problem(flag, True, why, fix, "requires", ("handler_name",)))
    if config.input and Path(config.input).is_dir() and is_within(Path(config.output_prefix).parent, config.input):
        why, fix = "it is in the directory that is read, where a later run would find it", "give another place"
        found.problems.append(Problem("--output-prefix", config.output_prefix, why, fix, "excludes", ("input",)))
    read = [found.attempt(partial(_sources, replace(config, input=path), keys, handler)) for path, handler in handlers]
    raise_all(found.problems)
    return prefixes, [(handler, sources or []) for (_, handler), sources in zip(handlers, read, strict=True)]


def tokenize(config: PreprocessConfig, tokenizer: Tokenizer | None = None, directory: str | None = None) -> None:
    """Text, or dialogues, to pairs of files; `tokenizer`, of `directory`: instead of the one of the options."""
    prefixes, parts = _prepare(config, tokenizer, directory)
    tokenizer = tokenizer or load_tokenizer(config)
    tally = _Tally(tuple(prefixes), config.skip_invalid)
    packer = None
    if config.pack or config.neat_pack:
        assert config.seq_length is not None, "its law says so"
        packer = Packer(config.seq_length, tokenizer.pad or 0, numbered=config.neat_pack)
    with ExitStack() as outer:
        maps = []
        for handler, _ in parts:
            encode = _encode(config, handler, tuple(prefixes), tokenizer, directory)
            maps.append(outer.enter_context(process_map(encode, config.workers * config.n_subs)))
        outer.enter_context(_own(config, prefixes.values()))
        with ExitStack() as stack, _progress(tally, config.log_interval) as show:
            builders = {key: stack.enter_context(IndexedDatasetBuilder(prefix)) for key, prefix in prefixes.items()}

            def write(columns: Mapping[str, Column]) -> None:
                for key, column in columns.items():
                    builders[key].add_documents(column.tokens, column.lengths)

            for (_, own), encoded in zip(parts, maps, strict=True):
                for result in encoded(_chunks(own)):
                    tally.add(result)
                    write(packer.add(result.columns) if packer else result.columns)
                    show()
            write(packer.flush() if packer else {})
            tally.require_documents(builders)
            for prefix in prefixes.values():
                manifest_path(prefix).unlink(missing_ok=True)  # of the pair that is replaced now
        sources = [source for _, own in parts for source in own]
        for key, prefix in prefixes.items():
            manifest = tally.manifest(key, builders[key], tokenizer, config.append_eod, sources)
            manifest.write(prefix)
            found = counted(manifest.documents, "document"), counted(manifest.tokens, "token")
            logger.info("%s: %s, %s", prefix, *found)
    if packer and packer.rows:
        share, rows = packer.tokens / (packer.rows * packer.seq_length), counted(packer.rows, "row")
        logger.info("packed into %s, %.1f %% of them samples, the rest padding", rows, 100 * share)
    tally.report()


def _encode(
    config: PreprocessConfig, handler: Handler | None, outputs: tuple[str, ...], tokenizer: Tokenizer, path: str | None
) -> Encode | EncodeDialogues:
    if config.append_eod and tokenizer.eod is None:
        why = "the tokenizer has no token that ends a document"
        fix = "name one: --tokenizer-kwargs eos_token TOKEN"
        raise ProblemError.of("--append-eod", True, why, fix, "requires", limit="eod")
    eod, length = tokenizer.eod if config.append_eod else None, config.seq_length
    if handler is None or handler.is_text:
        return Encode(tokenizer=tokenizer, keys=outputs, handler=handler, eod=eod, seq_length=length)
    renderer = renderer_of(config, handler, tokenizer, path or config.tokenizer_name_or_path, config.kto)
    given = {"eod": eod, "seq_length": length, "cut": config.cut_long, "kto": config.kto}
    return EncodeDialogues(handler=handler, renderer=renderer, **given)


@contextmanager
def _own(config: PreprocessConfig, prefixes: Iterable[str]) -> Iterator[None]:
    """Have the outputs alone. ProblemError if another process has one, or has completed it meanwhile."""
    with ExitStack() as stack:
        for prefix in prefixes:
            try:
                stack.enter_context(lock.acquire(Path(f"{prefix}.lock")))
            except lock.HeldError as who:
                why, fix = f"another process writes {prefix}: {who}", "wait for that one, or give another prefix"
                problem = Problem("--output-prefix", config.output_prefix, why, fix, "held", limit=who.holder)
                raise ProblemError([problem]) from None
            except OSError as error:
                why, fix = f"{prefix} cannot be written: {error}", "make room or allow it, or give another prefix"
                raise ProblemError.of("--output-prefix", config.output_prefix, why, fix) from error
        raise_all(_output_problems(config, prefixes))
        yield


def _output_problems(config: PreprocessConfig, prefixes: Iterable[str]) -> Iterator[Problem]:
    yield from unwritable("--output-prefix", config.output_prefix, Path(f"{config.output_prefix}_").parent)
    if not config.overwrite:
        for prefix in prefixes:
            if there := [path.name for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]:
                why = f"there is already {' and '.join(there)}"
                fix = "give another prefix, or --overwrite"
                yield Problem("--output-prefix", config.output_prefix, why, fix, "exists", limit=there)


def _sources(config: PreprocessConfig, keys: Sequence[str], handler: Handler | None) -> list[Source]:
    keys = () if handler else keys
    if config.hf_datasets_params:
        if config.input:
            logger.warning("--input %s is not read: --hf-datasets-params says what is.", config.input)
        params = hub.read_params(Path(config.hf_datasets_params))
        if config.streaming:
            params["streaming"] = True
        return [Source(str(params.get("path", "dataset")), None, lambda: hub.read(params, keys))]
    if not config.input:
        why = "there is nothing to read"
        raise ProblemError.of("--input", None, why, "give a file or a directory, or --hf-datasets-params")
    with reading("--input", config.input):
        instead = "give a dataset of a hub by --hf-datasets-params"
        files = input_files(Path(config.input), instead, whole=config.whole_files)
        sizes = [path.stat().st_size for path in files]

    def read(path: Path) -> Iterator[Chunk]:
        return read_file(path, keys, whole=config.whole_files)

    return [Source(str(path), size, partial(read, path)) for path, size in zip(files, sizes, strict=True)]


def _chunks(sources: Sequence[Source]) -> Iterator[Chunk]:
    """The chunks of all sources; `done` is the share of everything, 0 where that is not known."""
    total = sum(source.size or 0 for source in sources)
    before = 0
    for source in sources:
        size = source.size or 0
        with reading("--input", source.name):
            for chunk in source.read():
                yield replace(chunk, done=(before + chunk.done * size) / total if total else 0.0)
        before += size


class _Tally:
    """What has come out so far."""

    def __init__(self, keys: Sequence[str], skip_invalid: bool):
        self.records = 0
        self.text_bytes = 0
        self.done = 0.0
        self.left_out: Counter[str] = Counter()
        self._max_token = dict.fromkeys(keys, -1)
        self._invalid: list[Invalid] = []
        self._in_part: Counter[tuple[str, str]] = Counter()
        self._skip_invalid = skip_invalid
        self._start = time.perf_counter()

    def add(self, result: Encoded) -> None:
        """Raises `ProblemError` for invalid records, unless they are to be skipped."""
        self.records += result.records
        self.text_bytes += result.text_bytes
        self.done = result.done
        self.left_out.update(result.left_out)
        self._in_part.update(result.in_part)
        self._invalid += result.invalid[: _SHOWN - len(self._invalid)]
        for key, column in result.columns.items():
            self._max_token[key] = max(self._max_token[key], column.max_token)
        if result.invalid and not self._skip_invalid:
            count = len(result.invalid)
            if count == self.records:
                raise_all(other_keys(tuple(self._max_token), result.invalid))
            why = f"{count} of the first {counted(self.records, 'record')} cannot be used:{self._places(count)}"
            fix = "fix them, or skip all such records: --skip-invalid"
            raise ProblemError.of("--input", None, why, fix, "records", limit=self.records)

    def require_documents(self, builders: dict[str, IndexedDatasetBuilder]) -> None:
        """Raises `ProblemError` if there are none: an empty dataset is of no use to anyone."""
        counts = f" ({found})" if (found := self._counts()) else ""
        records = f"the input has {counted(self.records, 'record')}{counts}"
        if not self.records:
            raise ProblemError.of("--input", None, records, "give a file with some", "empty", limit=0)
        fix = "give text, or other --json-keys"
        raise_all(
            Problem("--input", None, f"{records} and no text in {key!r}", fix, "empty", limit=self.records)
            for key, builder in builders.items()
            if not builder.sequences
        )

    def line(self) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate, megabytes = self.records / seconds, self.text_bytes / seconds / 1024 / 1024
        return f"Processed {counted(self.records, 'document')} ({rate:.1f} docs/s, {megabytes:.2f} MB/s)."

    def manifest(
        self, key: str, builder: IndexedDatasetBuilder, tokenizer: Tokenizer, eod: bool, sources: Sequence[Source]
    ) -> Manifest:
        note = TokenizerNote(
            type=tokenizer.type, fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
        )
        return Manifest(
            documents=builder.sequences,
            tokens=builder.tokens,
            max_token=self._max_token[key],
            tokenizer=note,
            append_eod=eod,
            sources={source.name: source.size for source in sources},
            left_out=dict(self.left_out),
        )

    def report(self) -> None:
        """Log what was left out."""
        if counts := self._counts():
            logger.warning("Left out of %s: %s", counted(self.records, "record"), counts)
        for (what, how), count in self._in_part.items():
            if count:
                logger.warning("Of %s: %s %s", counted(self.records, "record"), counted(count, what), how)
        if self._invalid:
            logger.warning("Invalid records:%s", self._places(self.left_out["invalid"]))

    def _counts(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)

    def _places(self, count: int) -> str:
        shown = "".join(f"\n    {invalid.place}: {invalid.why}" for invalid in self._invalid)
        return shown + (f"\n    and {count - len(self._invalid)} more" if count > len(self._invalid) else "")


@contextmanager
def _progress(tally: _Tally, log_interval: int) -> Iterator[Callable[[], None]]:
    """A function to call after every step: a bar on a terminal, else a line every `log_interval`, or every second."""
    if sys.stderr.isatty():
        with progress_bar() as show:
            # Without a known size the bar only shows that something happens.
            yield lambda: show(tally.done, total=1.0 if tally.done else None, description=tally.line())
    else:
        due, last = log_interval, time.perf_counter()

        def log_when_due() -> None:
            nonlocal due, last
            if tally.records >= due and time.perf_counter() - last >= _SECONDS:
                logger.info("%s", tally.line())
                due = tally.records - tally.records % log_interval + log_interval
                last = time.perf_counter()

        yield log_when_due
    logger.info("%s", tally.line())


def _merge(config: PreprocessConfig) -> None:
    outputs = {key: f"{config.output_prefix}_{key}" for key in config.merge_group_keys}
    found = Findings(list(_output_problems(config, outputs.values())))
    groups = [found.attempt(partial(_pairs, Path(config.input or ""), *pair)) for pair in outputs.items()]
    raise_all(dict.fromkeys(found.problems))
    with _own(config, outputs.values()):
        for prefixes, output in zip(groups, outputs.values(), strict=True):
            assert prefixes is not None, "its problems are raised"
            _merge_group(prefixes, output)


def _pairs(directory: Path, key: str, output: str) -> list[str]:
    """The prefixes in `directory` whose names hold `key`, by name; never the output itself."""
    if not directory.is_dir():
        why, fix = "there is no such directory", "give that of the pairs"
        raise ProblemError.of("--input", directory, why, fix, "missing")
    names = {path.stem for path in directory.iterdir() if path.suffix in (".bin", ".idx") and key in path.stem}
    prefixes = [str(directory / name) for name in sorted(names)]
    prefixes = [prefix for prefix in prefixes if Path(prefix).absolute() != Path(output).absolute()]
    if not prefixes:
        raise ProblemError.of("--merge-group-keys", key, f"no pair in {directory} holds it", "give another key")
    found = Findings()
    for prefix in prefixes:
        found.attempt(partial(IndexedDataset, prefix))
    raise_all(found.problems)
    return prefixes


def _merge_group(prefixes: Sequence[str], output: str) -> None:
    notes = {prefix: read_manifest(IndexedDataset(prefix)) for prefix in prefixes}
    unknown = [prefix for prefix, note in notes.items() if note is None]
    whole = merged([note for note in notes.values() if note is not None]) if not unknown else None
    with IndexedDatasetBuilder(output, IndexedDataset(prefixes[0]).dtype) as builder:
        for prefix in prefixes:
            builder.add_index(prefix)
        manifest_path(output).unlink(missing_ok=True)
    if whole is not None:
        whole.write(output)
    else:
        logger.warning("%s gets no manifest, because %s has none: no tokenizer can be checked", output, unknown[0])
    numbers = counted(len(prefixes), "pair"), counted(builder.sequences, "sequence"), counted(builder.tokens, "token")
    logger.info("%s: %s, %s, %s", output, *numbers)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the job as an exception does, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
