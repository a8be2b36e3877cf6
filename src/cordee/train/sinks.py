"""Where records of a run go: lines on a terminal or in a log, files (TensorBoard, metrics.jsonl), and W&B.

Owns the form of each; the figures are `metrics.py`'s. Only rank 0 has sinks: it knows every figure, for losses and
norms are of all ranks. (Megatron prints on the last rank, the only one that knows its loss.)"""

import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cordee.files import end_last_line
from cordee.log import counted, shortened
from cordee.train.metrics import Record
from cordee.train.objectives import LIKELIHOOD
from cordee.train.options import TrainConfig
from cordee.train.run_plan import TrainState

MB, GIB = 1 << 20, 1 << 30


class Sink(ABC):
    """Takes the records of a run; `close` is called once, at its end."""

    @abstractmethod
    def step(self, record: Record) -> None:
        """A record of the steps since the last one."""

    def validation(self, iteration: int, split: str, loss: float) -> None:  # noqa: B027 - not all sinks show it
        """The mean loss over `split`: "validation", "validation-NAME" for a dataset of its blend, or "test"."""

    def close(self) -> None:  # noqa: B027 - not all sinks have something to close
        """Release what the sink writes to."""


def log_line(record: Record, loss_name: str, throughput: bool = True, unit: str = "GPU") -> str:
    """Megatron's log line; parsers of its logs read it. The learning rate is the one the last step was taken with.
    `unit` is what a device is called."""
    parts = [
        f" [{datetime.fromtimestamp(record.time):%Y-%m-%d %H:%M:%S}] "
        f"iteration {record.iteration:8d}/{record.train_iterations:8d}",
        f"consumed samples: {record.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {record.step_seconds * 1000:.1f}",
    ]
    if throughput:
        parts.append(f"throughput per {unit} (TFLOP/s/{unit}): {rate(record.tflops)}")
    parts += [
        f"learning rate: {record.learning_rate:.6E}",
        f"global batch size: {record.global_batch_size:5d}",
        f"{loss_name}: {record.loss:.6E}",
        *(f"{name}: {value:.6E}" for name, value in record.metrics.items()),
        f"loss scale: {record.loss_scale:.1f}",
        f"grad norm: {record.grad_norm:.3f}",
    ]
    if record.zeros_in_grad is not None:
        parts.append(f"num zeros: {record.zeros_in_grad}")
    if record.params_norm is not None:
        parts.append(f"params norm: {record.params_norm:.3f}")
    parts.append(f"number of skipped iterations: {record.skipped_iterations:3d}")
    parts.append(f"number of nan iterations: {record.nan_iterations:3d}")
    return " | ".join(parts) + " |"


def memory_line(record: Record) -> str:
    """Megatron's memory report of rank 0, in MiB."""
    return (
        f"[Rank 0] (after {record.iteration} iterations) memory (MB) | allocated: {record.memory / MB:.1f} | "
        f"max allocated: {record.peak_memory / MB:.1f} | reserved: {record.reserved_memory / MB:.1f} | "
        f"max reserved: {record.peak_reserved_memory / MB:.1f}"
    )


def validation_lines(iteration: int, split: str, loss_name: str, loss: float) -> str:
    """Megatron's validation report."""
    value = f" {split} loss at iteration {iteration} | {loss_name} value: {loss:.6E} | "
    line = value + "".join(f"{loss_name} PPL: {ppl:.6E} | " for ppl in perplexity(loss_name, loss))
    return "\n".join(("-" * len(line), line, "-" * len(line)))


def perplexity(loss_name: str, loss: float) -> list[float]:
    """exp of a mean loss, if that is a likelihood's; a hopeless one is capped as Megatron does, so that it can be
    printed."""
    return [math.exp(min(20.0, loss))] if loss_name == LIKELIHOOD else []


def short_line(record: Record, num_devices: int) -> str:
    """The figures that a person follows a run by, in at most 80 columns."""
    days, seconds = divmod(round(record.seconds_left), 24 * 60 * 60)
    left = timedelta(seconds=seconds)
    parts = [
        f"iter {record.iteration:{len(str(record.train_iterations))}}/{record.train_iterations}",
        f"loss {record.loss:.4f}",
        f"lr {record.learning_rate:.2e}",
        f"{shortened(record.tokens_per_second * num_devices)} tokens/s",
        f"{counted(days, 'day')} left" if days else f"{left} left",
    ]
    return "  ".join([*parts, f"{record.skipped_iterations} skipped"] if record.skipped_iterations else parts)


def usage_line(record: Record, throughput: bool = True) -> str:
    """What a run makes of its devices."""
    share = "" if record.mfu is None else f" (MFU {record.mfu:.0%})"
    speed = f"{rate(record.tflops)} TFLOP/s per device{share}, " if throughput else ""
    return f"  {speed}{record.memory / GIB:.2f} GiB on rank 0, peak {record.peak_memory / GIB:.2f} GiB"


def rate(tflops: float) -> str:
    """With one decimal as Megatron writes it, or so many that a small model on a CPU shows three digits."""
    digits = next((digits for digits in range(1, 6) if abs(tflops) >= 10 ** (2 - digits)), 6)
    return f"{tflops:.{digits}f}"


class ConsoleSink(Sink):
    """Megatron's log lines, on standard output."""

    def __init__(self, loss_name: str, *, throughput: bool = True, unit: str = "GPU"):
        self._loss_name = loss_name
        self._throughput = throughput
        self._unit = unit
        self._memory_shown = False

    def step(self, record: Record) -> None:
        print(log_line(record, self._loss_name, self._throughput, self._unit), flush=True)
        if not self._memory_shown:
            print(memory_line(record), flush=True)
            self._memory_shown = True

    def validation(self, iteration: int, split: str, loss: float) -> None:
        print(validation_lines(iteration, split, self._loss_name, loss), flush=True)


class TerminalSink(Sink):
    """Short lines, for a terminal of 80 columns."""

    def __init__(self, num_devices: int, loss_name: str, *, throughput: bool = True):
        self._num_devices = num_devices
        self._loss_name = loss_name
        self._throughput = throughput
        self._usage_shown = False

    def step(self, record: Record) -> None:
        print(short_line(record, self._num_devices), flush=True)
        if not self._usage_shown:
            print(usage_line(record, self._throughput), flush=True)
            self._usage_shown = True

    def validation(self, iteration: int, split: str, loss: float) -> None:
        more = "".join(f", perplexity {ppl:.5g}" for ppl in perplexity(self._loss_name, loss))
        print(f"{split} after iteration {iteration}: loss {loss:.4f}{more}", flush=True)


class JsonSink(Sink):
    """One JSON object a line. A resumed run appends: of lines with the same iteration the last one counts. What a
    killed run has left of a line is cut off first. Numbers that are not finite, which JSON has none for, are null."""

    def __init__(self, path: Path, loss_name: str):
        self._loss_name = loss_name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no regular file")  # opening a pipe would wait for its reader
        end_last_line(path)
        self._file = path.open("a", encoding="utf-8")

    def step(self, record: Record) -> None:
        self._write({"kind": "train", "loss_name": self._loss_name, **asdict(record)})

    def validation(self, iteration: int, split: str, loss: float) -> None:
        self._write({"kind": split, "loss_name": self._loss_name, "iteration": iteration, "loss": loss})

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict) -> None:
        self._file.write(json.dumps(_finite(values)) + "\n")
        self._file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ScalarSink(Sink):
    """Scalars by iteration, named as Megatron names them."""

    def __init__(self, loss_name: str):
        self._loss_name = loss_name

    @abstractmethod
    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """Write scalars by their names; iterations never go back."""

    def step(self, record: Record) -> None:
        values = {
            self._loss_name: record.loss,
            **record.metrics,
            "learning-rate": record.learning_rate,
            "batch-size": record.global_batch_size,
            "loss-scale": record.loss_scale,
            "grad-norm": record.grad_norm,
            "iteration-time": record.step_seconds,
            "throughput": record.tflops,
            "tokens-per-second": record.tokens_per_second,
            "mfu": record.mfu,
            "memory": record.memory,
            "num-zeros": record.zeros_in_grad,
            "params-norm": record.params_norm,
        }
        self.write({name: value for name, value in values.items() if value is not None}, record.iteration)

    def validation(self, iteration: int, split: str, loss: float) -> None:
        name = f"{self._loss_name} {split}"
        self.write({name: loss} | {f"{name} ppl": ppl for ppl in perplexity(self._loss_name, loss)}, iteration)


class TensorBoardSink(ScalarSink):
    """Event files in a directory."""

    def __init__(self, path: Path, loss_name: str):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(loss_name)
        self._writer = SummaryWriter(str(path))

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


class WandbSink(ScalarSink):
    """A run of Weights & Biases, which has the options of this one. `state` keeps its id: a run that resumes continues
    it, unless WANDB_RUN_ID names another. Where and as whom it logs in, and whether at all (WANDB_MODE=offline), is
    W&B's own configuration. What it cannot do is an OSError, which never says the API key."""

    def __init__(self, config: TrainConfig, folder: Path | None, loss_name: str, state: TrainState):
        super().__init__(loss_name)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)  # W&B takes a temporary one otherwise
        with _wandb() as wandb:
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_exp_name or None,
                dir=None if folder is None else str(folder),
                config=asdict(config),
                id=os.environ.get("WANDB_RUN_ID") or state.wandb_run,
                resume="allow",
            )
        state.wandb_run = self._run.id

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        if iteration < self._run.starting_step:  # W&B has it from before the run resumed, and takes no step twice
            return
        with _wandb():
            self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        with _wandb():
            self._run.finish()


@contextmanager
def _wandb() -> Iterator[Any]:
    """The library, whose errors are OSErrors within."""
    wandb, errors = map(importlib.import_module, ("wandb", "wandb.errors"))
    try:
        yield wandb
    except errors.Error as error:
        key = os.environ.get("WANDB_API_KEY") or None
        raise OSError(str(error) if key is None else str(error).replace(key, "***")) from None
