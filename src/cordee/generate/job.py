"""`cordee generate`: prompts from the command line or a file, continuations to the terminal and a file.

Owns where prompts come from and where results go."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from cordee import launch, log
from cordee.checkpoint import adapter
from cordee.config import laws
from cordee.config.spelling import unknown
from cordee.data.readers import reading, text_files
from cordee.data.readers.chunk import Invalid
from cordee.errors import Findings, Problem, ProblemError, Problems, raise_all
from cordee.generate.engine import check, stream
from cordee.generate.loading import check_part, join, load_part, stop_ids, tokenizer_of
from cordee.generate.options import GenerateConfig, GenerateOptions
from cordee.generate.results import NewFile, check_new
from cordee.generate.text import continuation, encode_prompts
from cordee.log import counted, logger, progress_bar
from cordee.model.gpt import GPTModel
from cordee.parallel import inference
from cordee.parallel.degrees import DEGREES, model_processes
from cordee.parallel.inference import InferenceStage
from cordee.tokenizer import Tokenizer
from cordee.tune.options import BASE
from cordee.weights.codec import Source

BOLD, PLAIN = "\033[1m", "\033[0m"


@dataclass
class _Sample:
    """A continuation: which of its prompt's by an adapter, and once it has ended its text and why it ended."""

    place: int  # of its prompt among all
    prompt: str
    prompt_tokens: list[int]
    adapter: str
    number: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""

    def end(self, tokenizer: Tokenizer, stop: frozenset[int]) -> None:
        self.text = continuation(tokenizer, self.prompt_tokens, self.tokens, stop)
        self.finish = "stop" if self.tokens[-1] in stop else "length"

    def record(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("prompt", "adapter", "number", "text", "tokens", "finish")}


@dataclass(frozen=True)
class _Prepared:
    """A generation that nothing is known to be wrong with."""

    sources: dict[str, Source]  # by the names of their adapters
    tokenizer: Tokenizer
    prompts: list[tuple[int, str, list[int], str]]  # places, texts, tokens, and which source continues them
    stop: frozenset[int]


def option_problems(config: GenerateConfig) -> Problems:
    """All problems between the options of a generation."""
    yield from laws.problems(config)
    here, processes = launch.rank_info(), model_processes(config)
    if here.launcher and here.world_size != processes:
        why = f"{here.launcher} has started {here.world_size} processes, tensor x pipeline degrees are {processes}"
        fix = f"start {processes}, or change the degrees"
        yield Problem("processes", here.world_size, why, fix, "launched", DEGREES, processes)


def check_run(config: GenerateConfig) -> list[Problem]:
    """Everything that would stop the job, as far as it can be known without loading the weights."""
    found = Findings()
    found.attempt(lambda: _prepare(config))
    return found.problems


def run(config: GenerateConfig) -> int:
    """Continue the prompts of `config` and show them. ProblemError with all that keeps it from starting."""
    prepared = _prepare(config)
    numbers = range(config.num_return_sequences)
    samples = [_Sample(*prompt, number) for prompt in prepared.prompts for number in numbers]
    rank, seconds = launch.rank_info().rank, 0.0
    log.setup(rank)
    with ExitStack() as stack:
        shown = rank == 0 and not sys.stdout.isatty()  # on a terminal the continuations themselves show how far it is
        show = stack.enter_context(progress_bar("generating", len(samples) * config.max_new_tokens, shown=shown))
        layout, number = join(config, inference.degrees(config), stack, "while generating"), 0
        file: NewFile | None = None
        for name, source in prepared.sources.items():
            own, before = [sample for sample in samples if sample.adapter == name], number * config.max_new_tokens
            model, stage = load_part(source, config, layout)
            if file is None and config.output and rank == 0:  # a model is there: the job starts
                file = stack.enter_context(closing(NewFile(config.output)))
            start = time.perf_counter()
            for sample in _written(own, model, stage, prepared, config, lambda done, n=before: show(n + done)):
                number += 1
                if rank == 0:
                    of = f" ({name})" if len(prepared.sources) > 1 else ""
                    _show(sample, f"--- {number} of {len(samples)}{of}" if len(samples) > 1 else None)
                if file is not None:
                    file.write(json.dumps(sample.record(), ensure_ascii=False))
            seconds += time.perf_counter() - start
            del model  # before the next comes
    logger.info(_summary(samples, seconds))
    return 0


def _prepare(config: GenerateConfig) -> _Prepared:
    found = Findings([*option_problems(config)])
    texts = found.attempt(lambda: _prompts(config)) or {}
    found.attempt(lambda: check_new(config.output))
    asked = found.attempt(lambda: _asked(config, len(texts))) or []
    paths, read = config.adapters() if asked else {}, partial(adapter.read, config.load, config)
    made = {name: found.attempt(partial(read, paths.get(name))) for name in dict.fromkeys(chain(*asked)) or ("",)}
    for source in made.values():
        found.problems += check_part(source, config, inference.degrees(config))
    sources = {name: source for name, source in made.items() if source is not None}
    first = next(iter(sources.values()), None)
    tokenizer = found.attempt(lambda: tokenizer_of(config, first))
    prompts, stop = [], None
    if first is not None and tokenizer is not None:
        ids = encode_prompts(tokenizer, list(texts.values()))
        found.problems += (each for of in sources.values() for each in check(of.spec.config, ids, config, texts))
        both = list(zip(zip(range(len(ids)), texts.values(), ids, strict=True), asked, strict=False))
        prompts = [(*prompt, name) for name in sources for prompt, names in both if name in names]
        stop = found.attempt(lambda: stop_ids(first.spec, first.assets, tokenizer))
    raise_all(each for place, each in enumerate(found.problems) if each not in found.problems[:place])
    assert tokenizer is not None and stop is not None
    return _Prepared(sources, tokenizer, prompts, stop)


def _asked(config: GenerateConfig, num_prompts: int) -> list[tuple[str, ...]]:
    """The adapters that continue each prompt, by their names. ProblemError for names of none."""
    names = tuple(config.adapters()) or (BASE if config.adapter else "",)
    for name in config.adapter:
        if name not in (*names, BASE):
            raise_all([unknown("--adapter", name, [*names, BASE], "--lora-load has no such adapter")])
    if len(config.adapter) not in (0, 1, num_prompts):
        why = f"there are {counted(num_prompts, 'prompt')}"
        raise ProblemError.of(
            "--adapter", " ".join(config.adapter), why, "give one, or one a prompt", limit=num_prompts
        )
    if len(config.adapter) == num_prompts:
        return [(name,) for name in config.adapter]
    return [config.adapter or names] * num_prompts


def _prompts(options: GenerateOptions) -> dict[str, str]:
    """The prompts by where each was given."""
    if options.prompts_file is None:
        return {f"prompt {number}": prompt for number, prompt in enumerate(options.prompt, 1)}
    option, file = "--prompts-file", options.prompts_file
    fix = "give a text file in UTF-8 with one prompt per line"
    # The reader of text files says what a line is.
    lines: list[str] = []
    broken: list[Invalid] = []
    with reading(option, file):
        for chunk in text_files.read(Path(file), (text_files.KEY,)):
            rows, invalid = chunk.rows((text_files.KEY,))
            lines += [line for (line,) in rows]
            broken += invalid
    raise_all(Problem(option, record.place, record.why, fix, "records") for record in broken)
    prompts = {f"{file}: line {number}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not prompts:
        raise ProblemError.of(option, file, "it holds no prompt", "write one per line", "empty")
    if len(prompts) < len(lines):
        logger.warning("%s: %s left out", file, counted(len(lines) - len(prompts), "blank line"))
    return prompts


def _written(
    samples: list[_Sample],
    model: GPTModel,
    stage: InferenceStage | None,
    prepared: _Prepared,
    options: GenerateOptions,
    progress: Callable[[int], None],
) -> Iterator[_Sample]:
    """The samples in order, once they and all before have ended; `progress` gets the tokens written or void."""
    prompts, tokenizer, stop = [sample.prompt_tokens for sample in samples], prepared.tokenizer, prepared.stop
    names = [sample.place * options.num_return_sequences + sample.number for sample in samples]
    given, done, size = 0, 0, tokenizer.vocab_size
    for token in stream(model, prompts, options, stop_ids=stop, vocab_size=size, stage=stage, names=names):
        sample = samples[token.sample]
        sample.tokens.append(token.id)
        done += 1 + (options.max_new_tokens - len(sample.tokens) if token.last else 0)
        progress(done)
        if token.last:
            sample.end(tokenizer, stop)
        while given < len(samples) and samples[given].finish:
            yield samples[given]
            given += 1


def _show(sample: _Sample, heading: str | None) -> None:
    """Print prompt (bold on a terminal) and continuation, as they are."""
    if heading is not None:
        print(heading)
    prompt = f"{BOLD}{sample.prompt}{PLAIN}" if sys.stdout.isatty() else sample.prompt
    print(f"{prompt}{sample.text}", flush=True)


def _summary(samples: list[_Sample], seconds: float) -> str:
    count, tokens = len(samples), sum(len(sample.tokens) for sample in samples)
    finish = Counter(sample.finish for sample in samples)
    return (
        f"{counted(count, 'continuation')}, {counted(tokens, 'token')} in {seconds:.2f} s "
        f"({tokens / seconds:.0f} tokens/s): {finish['stop']} ended with a stop token, {finish['length']} full length"
    )
