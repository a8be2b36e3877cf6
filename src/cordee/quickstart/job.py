"""The whole way in one command: text, tokenizer, data, training on several processes, export, text, score, report.

Owns the sequence of jobs and the small model's shape. Every phase is the job a user would run; the files they would
have written are left in the output folder, so that each can be repeated by hand."""

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cordee import lock, supervisor
from cordee.checkpoint import formats
from cordee.config.load import config_from_dict
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data import preprocess
from cordee.data.options import PreprocessConfig
from cordee.errors import Problem, ProblemError, Problems, raise_all
from cordee.evaluate.options import EvaluateConfig
from cordee.evaluate.task import Subject
from cordee.families.count import count_parameters
from cordee.families.registry import spec_from_options
from cordee.files import unwritable
from cordee.generate import job as generate
from cordee.generate.options import GenerateConfig
from cordee.log import console, counted
from cordee.quickstart import corpus, report, tokenizer
from cordee.quickstart.options import QuickstartConfig
from cordee.train.options import TrainConfig

# In two minutes a small model that sees much text in small batches learns most; so it is with few tokens.
VOCAB_SIZE = 2048
TOKENIZER_CHARACTERS = 8_000_000  # enough text for this many tokens; more only takes time
HELD_OUT_DOCUMENTS = 12
TEMPERATURE = 0.7
MARKER = ".cordee-quickstart"
BATCH_SIZE = 2  # samples of one process and step
TRIAL_STEPS = 12  # which tell how many fit in the time
MIN_STEPS = 50
LONGER = 5000
NUM_PHASES = 8  # one less where the number of steps is given
PROMPTS = ("def ", "import os\n", "class Node:\n    def __init__(self", '    """Return ')
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
RECIPE = {
    "seq_length": 256,
    "micro_batch_size": BATCH_SIZE,
    "zero_stage": 0,  # there is little to shard, and one all-reduce is faster than an all-gather of every layer
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.05,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "clip_grad": 1.0,
}


@dataclass
class Run:
    """Folder of a quickstart run and how long its phases took."""

    config: QuickstartConfig
    folder: Path
    phases: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        number = f"[bold]{len(self.phases) + 1}/{NUM_PHASES - bool(self.config.train_iters)}[/bold]"
        console().print(f"{number} {name}", markup=True)
        start = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - start))

    def say(self, text: str) -> None:
        console().print(f"    {text}", style="dim", highlight=False)


def run(config: QuickstartConfig) -> int:
    """Run every phase; 0 if the report was written."""
    raise_all(check_run(config))
    with _own_folder(config) as folder:
        return _phases(Run(config, folder), Path(config.input) if config.input else None)


def _phases(job: Run, source: Path | None) -> int:
    text = _collect(job, source)
    size = _learn_tokenizer(job, text)
    _preprocess(job, text)
    values = _train_values(job, size)
    if code := _fit(job, values) or _train(job, values):
        return code
    with job.phase("export as a Hugging Face model"):
        convert.run(ConvertConfig(load_dir=str(job.folder / "checkpoints"), save_dir=str(job.folder / "model")))
    samples = _generate(job)
    untrained, trained = scores = _evaluate(job, values)
    page = _report(job, values, text, samples, scores)
    seconds = sum(seconds for _, seconds in job.phases)
    console().print(
        f"perplexity on held-out files: [bold]{trained:.1f}[/bold], before training {untrained:.0f}\n"
        f"report: [bold]{page}[/bold] ({seconds:.0f} s)",
        markup=True,
    )
    return 0


def check_run(config: QuickstartConfig) -> list[Problem]:
    """What is wrong with a quickstart, as far as it can be known before its first phase."""
    found = list(_folder_problems(config))
    source = config.input
    if source is not None and not (os.path.isfile(source) or os.path.isdir(source)):
        found.append(Problem("--input", source, "there is no such file or folder", "give one that exists"))
    return found


def _folder_problems(config: QuickstartConfig) -> Problems:
    folder = Path(config.output)
    yield from unwritable("--output", config.output, folder)
    if folder.is_dir() and any(folder.iterdir()):
        ours = (folder / MARKER).exists()
        if not (config.overwrite and ours):
            why = "the folder holds an earlier quickstart" if ours else "the folder holds other files"
            fix = "add --overwrite, or give another folder" if ours else "give another folder"
            yield Problem("--output", folder, why, fix)


@contextmanager
def _own_folder(config: QuickstartConfig) -> Iterator[Path]:
    """The folder, made anew, for as long as no other quickstart may replace it. The lock is beside it."""
    folder = Path(config.output).absolute()
    with ExitStack() as held:
        try:
            held.enter_context(lock.acquire(folder.with_name(f".{folder.name}.lock")))
            fresh = _fresh_folder(config)
        except lock.HeldError as who:
            why = f"another quickstart writes to it: {who}"
            raise ProblemError.of("--output", folder, why, "wait for that one, or give another folder") from None
        except OSError as error:
            fix = "give a folder in a place that can be written to"
            raise ProblemError.of("--output", folder, f"it cannot be made: {error}", fix) from error
        yield fresh


def _fresh_folder(config: QuickstartConfig) -> Path:
    folder = Path(config.output)
    raise_all(_folder_problems(config))  # again: another quickstart may just have ended
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("made by `cordee quickstart`, which may replace this folder\n", encoding="utf-8")
    return folder


def _collect(job: Run, source: Path | None) -> corpus.Corpus:
    with job.phase("collect text"):
        text = corpus.collect(source, job.folder)
    characters = f"{text.num_characters / 1e6:.1f} M characters"
    job.say(f"{counted(text.num_documents, 'document')} to train on, {text.num_held_out} held out, {characters}")
    if text.num_skipped:
        job.say(f"left out, as not readable as UTF-8 text: {counted(text.num_skipped, 'file')}")
    return text


def _learn_tokenizer(job: Run, text: corpus.Corpus) -> int:
    with job.phase("learn a tokenizer"):
        texts = tokenizer.texts_of(text.train, TOKENIZER_CHARACTERS)
        size = tokenizer.train(texts, job.folder / "tokenizer", VOCAB_SIZE)
    job.say(counted(size, "token"))
    return size


def _preprocess(job: Run, text: corpus.Corpus) -> None:
    with job.phase("tokenize into .bin/.idx"):
        for part, path in (("train", text.train), ("held_out", text.held_out)):
            preprocess.run(
                PreprocessConfig(
                    input=str(path),
                    output_prefix=str(job.folder / part),
                    tokenizer_type="PretrainedFromHF",
                    tokenizer_name_or_path=str(job.folder / "tokenizer"),
                    append_eod=True,
                    workers=job.config.nproc_per_node,
                )
            )


def _train_values(job: Run, vocab_size: int) -> dict[str, Any]:
    """The recipe of this run, but for its length; written as train.yaml, so that it can be changed and run again."""
    config, folder = job.config, job.folder
    return {
        **MODEL,
        **RECIPE,
        "vocab_size": vocab_size,
        "global_batch_size": BATCH_SIZE * config.nproc_per_node,
        "train_data_path": [str(folder / "train_text_document")],
        "valid_data_path": [str(folder / "held_out_text_document")],
        "tokenizer_type": "PretrainedFromHF",
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "seed": config.seed,
        "save": str(folder / "checkpoints"),
        "keep_last": 2,
        "tensorboard_dir": str(folder / "tensorboard"),
        "metrics_file": str(folder / "metrics.jsonl"),
    }


def _fit(job: Run, values: dict[str, Any]) -> int:
    """Set how many steps are taken, and what depends on it; the exit code of the trial that tells."""
    if not (steps := job.config.train_iters):
        with job.phase("measure how fast this machine trains"):
            code, step_seconds = _trial(job, values)
        if code:
            return code
        steps = max(MIN_STEPS, int(job.config.train_seconds / step_seconds))
        job.say(f"{step_seconds * 1000:.0f} ms a step: {steps} steps in {job.config.train_seconds:.0f} s")
    values |= {
        "train_iters": steps,
        "save_interval": max(1, steps // 3),
        "eval_interval": max(1, steps // 5),
        "eval_iters": 4,
        "log_interval": max(1, steps // 100),
    }
    return 0


def _trial(job: Run, values: dict[str, Any]) -> tuple[int, float]:
    """Take a few steps as the run will; the exit code, and how long the median step took."""
    file = job.folder / "trial.jsonl"
    left_out = ("save", "keep_last", "tensorboard_dir", "valid_data_path")
    trial = {name: value for name, value in values.items() if name not in left_out}
    trial |= {"train_iters": TRIAL_STEPS, "eval_iters": 0, "log_interval": 1, "metrics_file": str(file)}
    if code := _launch(job, "trial.yaml", trial):
        return code, 0.0
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return 0, statistics.median(line["step_seconds"] for line in lines[TRIAL_STEPS // 3 :])


def _launch(job: Run, name: str, values: dict[str, Any]) -> int:
    path = job.folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return supervisor.spawn_local(["train", "--config", str(path)], job.config.nproc_per_node)


def _train(job: Run, values: dict[str, Any]) -> int:
    where = counted(job.config.nproc_per_node, "process", "processes")
    with job.phase(f"pretrain on {where}, {counted(values['train_iters'], 'step')}"):
        return _launch(job, "train.yaml", values)


def _generate(job: Run) -> list[report.Sample]:
    output = job.folder / "samples.jsonl"
    with job.phase("generate text"):
        generate.run(
            GenerateConfig(
                load=str(job.folder / "model"),
                prompt=PROMPTS,
                max_new_tokens=64,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=0.95,
                seed=job.config.seed,
                output=str(output),
            )
        )
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]  # of bytes: a text may hold U+2028
    return [report.Sample(line["prompt"], line["text"]) for line in lines]


def _evaluate(job: Run, values: dict[str, Any]) -> tuple[float, float]:
    """Perplexity on held-out files of the model as it was drawn and as it is now."""
    from cordee.evaluate.runner import run_tasks, tasks_of
    from cordee.generate.loading import load_model
    from cordee.model.gpt import GPTModel
    from cordee.model.init import initialise
    from cordee.tokenizer import load_tokenizer

    with job.phase("score held-out files"):
        options = EvaluateConfig(
            load=str(job.folder / "model"),
            task_data_path=(str(job.folder / "held_out.jsonl"),),
            max_eval_samples=HELD_OUT_DOCUMENTS,
        )
        source = formats.read(options.load)
        trained, untrained = load_model(source), GPTModel(source.spec.config).eval()
        initialise(untrained, values["seed"])
        tokens = load_tokenizer(options, options.load)
        tasks = tasks_of(options, source.spec.config)
        (before,), (after,) = (run_tasks(tasks, Subject(model, tokens), options) for model in (untrained, trained))
    return before.metrics["perplexity"], after.metrics["perplexity"]


def _report(job: Run, values: dict[str, Any], text: corpus.Corpus, samples: list[report.Sample], scores) -> Path:
    page = job.folder / "report.html"
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    processes = job.config.nproc_per_node
    steps = [
        report.Step(line["iteration"], line["loss"], line["tokens_per_second"] * processes, line["memory"])
        for line in lines
        if line["kind"] == "train"
    ]
    last = next(line for line in reversed(lines) if line["kind"] == "train")
    report.write(
        report.Report(
            title="A small language model, trained here",
            summary=f"{counted(values['train_iters'], 'step')} on {counted(processes, 'process', 'processes')}, "
            f"{last['consumed_tokens']:,} tokens seen.",
            steps=steps,
            validation=[(line["iteration"], line["loss"]) for line in lines if line["kind"] == "validation"],
            untrained_perplexity=scores[0],
            perplexity=scores[1],
            samples=samples,
            facts=_facts(job, values, text, last),
            phases=job.phases,
            commands=_commands(job, values["train_iters"]),
        ),
        page,
    )
    return page


def _facts(job: Run, values: dict[str, Any], text: corpus.Corpus, last: dict[str, Any]) -> list[tuple[str, str]]:
    model = spec_from_options(config_from_dict(TrainConfig, values)).config
    return [
        ("text", job.config.input or "the sources of Python's standard library"),
        ("documents", f"{text.num_documents} to train on, {text.num_held_out} held out"),
        ("model", f"Llama, {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}"),
        ("parameters", f"{count_parameters(model):,}"),
        ("global batch", f"{values['global_batch_size']} samples of {values['seq_length']} tokens"),
        ("speed at the end", f"{last['tokens_per_second'] * job.config.nproc_per_node:,.0f} tokens/s"),
        ("share of the matrix-product rate (MFU)", f"{100 * last['mfu']:.0f} %"),
        ("largest memory of a process", f"{last['peak_memory'] / 2**20:,.0f} MiB"),
    ]


def _commands(job: Run, steps: int) -> list[str]:
    """What to do next. The learning rate of the resumed run follows the new length, not that of the old one."""
    folder = job.folder
    longer = f"--train-iters {max(LONGER, 2 * steps)} --override-opt-param-scheduler"
    return [
        f'cordee generate --load {folder}/model --prompt "import " --do-sample --temperature 0.8',
        f"cordee evaluate --load {folder}/model --task-data-path {folder}/held_out.jsonl",
        f"cordee train --config {folder}/train.yaml --load {folder}/checkpoints {longer}",
        f"tensorboard --logdir {folder}/tensorboard",
    ]
