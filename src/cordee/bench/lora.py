"""`cordee bench lora`: adapters of one model on the same dialogues, trained by Cordée and by peft under `Trainer`.

Cordée trains packed rows, `Trainer` batches padded to their longest sample, both in float32 with the labels of the
answers. Writes the dialogues, what Cordée makes of them, and a model where none is given into a temporary directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cordee.bench import corpus, llama
from cordee.bench.contest import Contender, Turn, hold
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.bench.sft import COLUMNS, CORDEE, compared, play_trainer, train_config, trained_per_row, write_dialogues
from cordee.bench.train import TOKENIZER_CHARACTERS, play_cordee

PEERS = ("accelerate", "peft")
STEPS, SEQ_LENGTH, BATCH = 2, 1024, 8
RANK, ALPHA = 16, 32
PEFT = "peft, Trainer"
TARGETS = {"speed": 1.5, "memory": 0.6}


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Let the contenders take turns of `config.steps` training steps."""
    steps = config.steps or STEPS
    total = steps * (config.rounds + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder, config.load)
        write_dialogues(folder, None, folder / "tokenizer", SEQ_LENGTH)
        form = {"lora_target_modules": ("all-linear",), "lora_r": RANK, "lora_alpha": float(ALPHA)}
        job = train_config(folder, total + 1, load=model, seq_length=SEQ_LENGTH, **form)
        contenders = [
            Contender(CORDEE, play_cordee, (job, steps)),
            Contender(PEFT, play_trainer, (steps, total, name, partial(_adapted, model), BATCH)),
        ]
        trained = {CORDEE: trained_per_row(folder / "packed"), PEFT: BATCH * trained_per_row(folder / "plain")}
        results = hold(contenders, config.rounds, config.threads or 1, on_turn)
    rows, figures = compared(results, trained, [CORDEE, PEFT])
    notes = [
        f"adapters of rank {RANK} on every projection of {config.load or 'a random Llama'}, float32, AdamW, "
        f"{config.threads} threads; rows of {SEQ_LENGTH} tokens, or {BATCH} samples padded to the longest",
        f"{config.rounds} rounds of {steps} steps in turns, after a round that is not counted; trained tokens of a "
        "mean step by its median time",
    ]
    return Report(title="Adapters", columns=COLUMNS, rows=rows, figures=figures, notes=notes)


def _model(folder: Path, given: str | None) -> str:
    """The directory of a model; its tokenizer is in `folder` too."""
    if given is None:
        corpus.write_tokenizer(folder / "tokenizer", llama.VOCAB_SIZE, TOKENIZER_CHARACTERS)
        llama.save(str(folder / "model"), SEQ_LENGTH, {})
        return str(folder / "model")
    (folder / "tokenizer").mkdir()
    for file in Path(given).glob("*token*"):
        shutil.copy(file, folder / "tokenizer")
    return given


def _adapted(model: str) -> Any:
    """transformers' model with peft's adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    return get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
