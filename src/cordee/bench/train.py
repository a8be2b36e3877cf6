"""`cordee bench train`: the same Llama on the same tokens, trained by Cordée and by transformers in two ways.

Every contender is driven as its users drive it: Cordée by the trainer of `cordee train`, transformers by a plain loop
and by its `Trainer`, both with their defaults. In the rounds, the rate of matrix products is measured too."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cordee.bench import corpus, gemm
from cordee.bench.contest import Baton, Contender, Results, Shift, Turn, hold
from cordee.bench.llama import FFN, HEADS, HIDDEN, LAYERS, VOCAB_SIZE, llama, options
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.config.load import config_from_dict
from cordee.data import preprocess
from cordee.data.options import PreprocessConfig
from cordee.families.count import FLOPS_FORMULA, training_flops_per_token
from cordee.families.registry import spec_from_options
from cordee.train.options import TrainConfig

PEERS = ("accelerate",)
STEPS = 4
BATCH, SEQ_LENGTH = 8, 256
LEARNING_RATE = 1e-3
TOKENIZER_CHARACTERS, TEXT_CHARACTERS = 8_000_000, 4_000_000
TARGETS = {"speed": 1.6, "mfu": 0.75, "memory": 0.6}  # x both peers; of the GEMM rate; x Trainer's peak

CORDEE, PLAIN, TRAINER, GEMM = "cordee", "transformers, loop", "transformers, Trainer", "matrix products"


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Let the contenders take turns of `config.steps` training steps."""
    steps = config.steps or STEPS
    total = steps * (config.rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        job = _train_config(_prepare(Path(folder)), total + 1, config.compile)  # it is stopped, not done
        shapes = [(1024, 1024, 1024), *_gemm_shapes()]
        contenders = [
            Contender(CORDEE, play_cordee, (job, steps)),
            Contender(PLAIN, play_loop, (job, steps)),
            Contender(TRAINER, play_trainer, (job, steps, total, folder)),
            Contender(GEMM, gemm.play, (shapes,)),
        ]
        results = hold(contenders, config.rounds, config.threads or 1, on_turn)
    return _report(config, job, results)


# ---- what is trained -------------------------------------------------------------------------------------------------


def _prepare(folder: Path) -> Path:
    """Tokenize text into a `.bin/.idx` pair; its prefix."""
    corpus.write_tokenizer(folder / "tokenizer", VOCAB_SIZE, TOKENIZER_CHARACTERS)
    corpus.write_jsonl(folder / "text.jsonl", TEXT_CHARACTERS)
    options = PreprocessConfig(
        input=str(folder / "text.jsonl"),
        output_prefix=str(folder / "data"),
        tokenizer_type="PretrainedFromHF",
        tokenizer_name_or_path=str(folder / "tokenizer"),
        append_eod=True,
    )
    preprocess.run(options)
    return folder / "data_text_document"


def _train_config(prefix: Path, steps: int, compile: str) -> TrainConfig:
    given: dict[str, Any] = {
        **options(SEQ_LENGTH),
        "micro_batch_size": BATCH,
        "train_iters": steps,
        "train_data_path": (str(prefix),),
        "eval_iters": 0,
        "lr": LEARNING_RATE,
        "lr_decay_style": "constant",
        "log_interval": 10**6,
        "compile": compile,
    }
    return config_from_dict(TrainConfig, given)


def _gemm_shapes() -> list[gemm.Shape]:
    """Products of the model's forward as (tokens, in, out): qkv, gate and up, down, and a part of the head's."""
    tokens = BATCH * SEQ_LENGTH
    return [(tokens, HIDDEN, 3 * HIDDEN), (tokens, HIDDEN, 2 * FFN), (tokens, FFN, HIDDEN), (256, HIDDEN, VOCAB_SIZE)]


# ---- contenders ------------------------------------------------------------------------------------------------------


def play_cordee(baton: Baton, config: TrainConfig, steps: int) -> None:
    """The trainer of `cordee train`; turns change where it asks whether to go on."""
    import time

    from cordee import device
    from cordee.parallel.degrees import degrees
    from cordee.parallel.layout import Layout
    from cordee.train import job
    from cordee.train.exits import Exit, ExitRule, Signals

    class UntilOver(ExitRule):
        def after(self, iteration: int) -> Exit | None:
            shift.piece_done()
            return Exit("the measurement is over") if shift.over else super().after(iteration)

    device.keep_freed_memory()
    on = device.local_device(0)
    shift = Shift(baton, steps)
    job.train(config, Layout(degrees(config, 1), on.type), on, UntilOver(config, Signals(), time.monotonic()))


def play_loop(baton: Baton, config: TrainConfig, steps: int) -> None:
    """transformers' model in the loop that its documentation shows."""
    import torch

    model = llama(SEQ_LENGTH)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    samples = _samples(config)
    shift = Shift(baton, steps)
    while not shift.over:
        input_ids = torch.stack([next(samples) for _ in range(BATCH)])
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shift.piece_done(loss=loss.item())


def play_trainer(baton: Baton, config: TrainConfig, steps: int, total: int, folder: str) -> None:
    """transformers' Trainer with its defaults, but nothing saved and nobody told."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**trainer_arguments(total, folder), per_device_train_batch_size=BATCH)
    samples = _samples(config)
    data: Any = [{"input_ids": sample, "labels": sample} for sample in (next(samples) for _ in range(total * BATCH))]
    trainer = Trainer(llama(SEQ_LENGTH), arguments, train_dataset=data)
    take_turns(trainer, Shift(baton, steps))
    trainer.train()


def trainer_arguments(total: int, folder: str) -> dict[str, Any]:
    """Of transformers' Trainer and its kin, but for the batch: their defaults, nothing saved and nobody told."""
    return {
        "output_dir": folder,
        "max_steps": total,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def take_turns(trainer: Any, shift: Shift) -> None:
    """Have a Trainer work in the turns of `shift`, until they are over."""
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_step_end(self, args, state, control, **parts) -> None:
            shift.piece_done()
            control.should_training_stop = shift.over

    trainer.add_callback(TakeTurns())


def _samples(config: TrainConfig) -> Iterator[Any]:
    """The inputs that Cordée's trainer sees, int64 `[seq]`, in its order."""
    import torch

    from cordee.data.build import build_datasets

    count = (config.train_iters or 0) * BATCH
    dataset = build_datasets(config, count, 0, 0).train
    assert dataset is not None
    for index in range(count):
        yield torch.from_numpy(dataset[index]["tokens"][:SEQ_LENGTH])


# ---- figures ---------------------------------------------------------------------------------------------------------


def _report(config: BenchConfig, job: TrainConfig, results: Results) -> Report:
    tokens = BATCH * SEQ_LENGTH
    # Causal attention meets half of all pairs of positions, so it costs what full attention over half the length does.
    flops = tokens * training_flops_per_token(spec_from_options(job, None).config, SEQ_LENGTH // 2)
    peak = {name: results.figure(GEMM, name) for name in ("torch_flops", "cordee_flops")}
    rows, figures = [], {}
    for name in (CORDEE, PLAIN, TRAINER):
        seconds, memory = results.median(name), results.peak_bytes(name)
        mfu = [flops / seconds / rate for rate in peak.values()]
        speed = [results.ratio(name, other) for other in (PLAIN, TRAINER)]
        less = memory / results.peak_bytes(TRAINER)
        rows.append(
            [
                name,
                f"{tokens / seconds:,.0f}",
                *(f"{ratio:.2f}" for ratio in speed),
                f"{memory / 2**20:,.0f} MiB",
                f"{less:.2f}",
                *(f"{share:.0%}" for share in mfu),
            ]
        )
        figures |= {
            f"{name}: tokens/s": tokens / seconds,
            f"{name}: speed by loop": speed[0],
            f"{name}: speed by Trainer": speed[1],
            f"{name}: peak bytes": memory,
            f"{name}: memory by Trainer": less,
            f"{name}: MFU by torch": mfu[0],
            f"{name}: MFU by cordee": mfu[1],
        }
    columns = ["", "tokens/s", "x loop", "x Trainer", "peak memory", "x Trainer", "MFU (torch.mm)", "MFU (best)"]
    return Report(
        title="Training", columns=columns, rows=rows, figures=figures | peak, notes=_notes(config, flops, peak)
    )


def _notes(config: BenchConfig, flops: float, peak: dict[str, float]) -> list[str]:
    return [
        f"Llama of {LAYERS} layers, hidden {HIDDEN}, {HEADS} heads, ffn {FFN}, vocabulary {VOCAB_SIZE}, {BATCH} "
        f"samples of {SEQ_LENGTH} tokens a step, float32, AdamW, {config.threads} threads, compile {config.compile}",
        f"{config.rounds} rounds of {config.steps or STEPS} steps in turns, after a round that is not counted; "
        "tokens/s from the median step, ratios are medians of the rounds' ratios",
        f"MFU: {flops / 1e9:,.0f} GFLOP a step, {FLOPS_FORMULA}, causal pairs only, embedding and optimizer not "
        "counted",
        f"rate of matrix products in the same rounds: torch.mm {peak['torch_flops'] / 1e9:,.0f} GFLOP/s, "
        f"what Cordée uses {peak['cordee_flops'] / 1e9:,.0f} GFLOP/s",
    ]
