"""`cordee bench sft`: the same Llama tuned on the same dialogues, in trained tokens a second.

Cordée trains rows of samples that do not see each other (--neat-pack), transformers' `Trainer` batches padded to their
longest sample, and TRL's `SFTTrainer`, where it is installed, packs by itself. Each learns the same labels: the answers
and their ends. Writes the dialogues and what Cordée makes of them into a temporary directory."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cordee.bench import corpus
from cordee.bench.contest import Baton, Contender, Results, Shift, Turn, hold
from cordee.bench.llama import FFN, HEADS, HIDDEN, LAYERS, VOCAB_SIZE, llama, options
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.bench.train import LEARNING_RATE, TOKENIZER_CHARACTERS, play_cordee, take_turns, trainer_arguments
from cordee.config.load import config_from_dict
from cordee.data import preprocess
from cordee.data.indexed import IndexedDataset
from cordee.data.messages import IGNORED
from cordee.data.options import PreprocessConfig
from cordee.data.tuning_dataset import document
from cordee.train.options import TrainConfig

PEERS = ("accelerate",)
STEPS, SEQ_LENGTH, BATCH, SAMPLES = 3, 2048, 8, 2000
CORDEE, TRAINER, TRL = "cordee, packed", "transformers, Trainer", "TRL, packed"
TARGETS = {TRAINER: 2.5, TRL: 1.3}
COLUMNS = ["", "trained tokens/s", "Cordée is x as fast", "peak memory", "Cordée's is x"]


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Let the contenders take turns of `config.steps` training steps."""
    steps = config.steps or STEPS
    total = steps * (config.rounds + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus.write_tokenizer(folder / "tokenizer", VOCAB_SIZE, TOKENIZER_CHARACTERS)
        write_dialogues(folder, config.load, folder / "tokenizer", SEQ_LENGTH)
        job = train_config(folder, total + 1, **options(SEQ_LENGTH))
        contenders = [
            Contender(CORDEE, play_cordee, (job, steps)),
            Contender(TRAINER, play_trainer, (steps, total, name, partial(llama, SEQ_LENGTH), BATCH)),
        ]
        if find_spec("trl") is not None:
            contenders.append(Contender(TRL, play_trl, (steps, total, name)))
        trained = {CORDEE: trained_per_row(folder / "packed"), TRAINER: BATCH * trained_per_row(folder / "plain")}
        trained[TRL] = trained[CORDEE]
        results = hold(contenders, config.rounds, config.threads or 1, on_turn)
    return _report(config, results, trained, [contender.name for contender in contenders])


# ---- what is trained -------------------------------------------------------------------------------------------------


def write_dialogues(folder: Path, given: str | None, tokenizer: Path, length: int) -> None:
    """The dialogues of the file `given`, or of source text cut in questions and answers, tokenized in both ways: of at
    most `length` tokens each, and packed into rows of so many."""
    source = given or str(folder / "dialogues.jsonl")
    if given is None:
        text, random = "".join(corpus.documents(4_000_000)), np.random.default_rng(0)
        with open(source, "w", encoding="utf-8") as file:
            for _ in range(SAMPLES):  # lengths as those of Alpaca: short questions, answers of many lengths
                asked, said = (int(size) for size in np.exp(random.normal((4.0, 5.3), (0.5, 1.0))).clip(8, 4000))
                begin = int(random.integers(len(text) - asked - said))
                record = {"instruction": text[begin : begin + asked], "output": text[begin + asked :][:said]}
                file.write(json.dumps(record) + "\n")
    for prefix, packed in (("plain", False), ("packed", True)):
        preprocess.run(
            PreprocessConfig(
                input=source,
                output_prefix=str(folder / prefix),
                tokenizer_name_or_path=str(tokenizer),
                handler_name="AlpacaStyleInstructionHandler",
                prompt_type="alpaca",
                seq_length=length,
                neat_pack=packed,
                skip_invalid=True,
            )
        )


def trained_per_row(prefix: Path) -> float:
    labels = IndexedDataset(document(str(prefix), "labels"))
    return sum(int((row != IGNORED).sum()) for row in labels[:]) / len(labels)


def train_config(folder: Path, steps: int, **model: Any) -> TrainConfig:
    """Packed rows, one a step, for a `model` by options."""
    given: dict[str, Any] = {
        "stage": "sft",
        **model,
        "micro_batch_size": 1,
        "train_iters": steps,
        "train_data_path": (document(str(folder / "packed")),),
        "eval_iters": 0,
        "lr": LEARNING_RATE,
        "lr_decay_style": "constant",
        "log_interval": 10**6,
    }
    return config_from_dict(TrainConfig, given)


# ---- contenders ------------------------------------------------------------------------------------------------------


def _plain_samples(folder: str) -> Any:
    """`input_ids` and `labels` of the samples, a list."""
    ids, labels = (IndexedDataset(document(f"{folder}/plain", field)) for field in ("input_ids", "labels"))
    order = np.random.default_rng(0).permutation(len(ids))
    return [{"input_ids": ids[int(i)].tolist(), "labels": labels[int(i)].tolist()} for i in order]


def play_trainer(baton: Baton, steps: int, total: int, folder: str, model: Callable[[], Any], batch: int) -> None:
    """transformers' Trainer with batches of so many samples, padded to their longest."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = TrainingArguments(**trainer_arguments(total, folder), per_device_train_batch_size=batch)
    trainer = Trainer(
        model(), arguments, train_dataset=_plain_samples(folder), data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    take_turns(trainer, Shift(baton, steps))
    trainer.train()


def play_trl(baton: Baton, steps: int, total: int, folder: str) -> None:
    """TRL's SFTTrainer with its own packing; one row a step, as Cordée. Its rows have what it reports."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]  # no package of ours needs it

    samples = _plain_samples(folder)
    for sample in samples:
        sample["completion_mask"] = [int(label != IGNORED) for label in sample.pop("labels")]
    arguments = SFTConfig(
        **trainer_arguments(total, folder),
        per_device_train_batch_size=1,
        packing=True,
        max_length=SEQ_LENGTH,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        llama(SEQ_LENGTH),
        args=arguments,
        train_dataset=Dataset.from_list(samples),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
    )
    take_turns(trainer, Shift(baton, steps))
    trainer.train()


# ---- figures ---------------------------------------------------------------------------------------------------------


def compared(results: Results, trained: dict[str, float], names: list[str]) -> tuple[list[list[str]], dict[str, float]]:
    """Rows and figures of contenders, Cordée first; `trained` tokens each in a step."""
    rows, figures = [], {}
    for name in names:
        rate, peak = trained[name] / results.median(name), results.peak_bytes(name)
        figures |= {f"{name}: trained tokens/s": rate, f"{name}: peak bytes": peak}
        faster = figures[f"{CORDEE}: trained tokens/s"] / rate
        smaller = figures[f"{CORDEE}: peak bytes"] / peak
        rows.append([name, f"{rate:,.0f}", f"{faster:.2f}", f"{peak / 2**20:,.0f} MiB", f"{smaller:.2f}"])
    return rows, figures


def _report(config: BenchConfig, results: Results, trained: dict[str, float], names: list[str]) -> Report:
    rows, figures = compared(results, trained, names)
    notes = [
        f"Llama of {LAYERS} layers, hidden {HIDDEN}, {HEADS} heads, ffn {FFN}, vocabulary {VOCAB_SIZE}, float32, "
        f"AdamW, {config.threads} threads; rows of {SEQ_LENGTH} tokens, or {BATCH} samples padded to the longest",
        f"{config.rounds} rounds of {config.steps or STEPS} steps in turns, after a round that is not counted; trained "
        "tokens of a mean step by its median time; rows of TRL are taken to have as many as Cordée's",
    ]
    return Report(title="Tuning", columns=COLUMNS, rows=rows, figures=figures, notes=notes)
