"""What a run reports about itself.

Owns the figures: averages since the last line, speed, share of the peak, time left. How they are shown is `sinks.py`'s.
"""

import time
from dataclasses import dataclass, field

import torch

from cordee import device
from cordee.ops.gemm import matmul
from cordee.train.run_plan import TrainState


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step, over all ranks. `loss` is the mean over what was trained; NaN or inf only in a skipped step."""

    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    samples: int
    tokens: int
    skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    zeros_in_grad: int | None = None
    params_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a log. `loss` and `metrics` are means over the steps since the last line that were not skipped.

    Rates are over all of them and per device: tokens are positions the model computed, `mfu` is a fraction of the peak
    and None where none is known. Memory is bytes on rank 0, reserved that which the allocator holds."""

    iteration: int
    train_iterations: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    metrics: dict[str, float]
    learning_rate: float
    global_batch_size: int
    loss_scale: float
    grad_norm: float
    zeros_in_grad: int | None
    params_norm: float | None
    skipped_iterations: int
    nan_iterations: int
    step_seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    memory: int
    peak_memory: int
    reserved_memory: int
    peak_reserved_memory: int
    seconds_left: float
    time: float


@dataclass(kw_only=True)
class Meter:
    """Collects steps and sums them up.

    `train_iterations` is the length of the run; `flops_per_token` counts forward and backward; `num_devices` share the
    work; `peak_flops` is that of one device, in the type the run computes in."""

    train_iterations: int
    flops_per_token: float
    num_devices: int
    peak_flops: float | None
    _steps: list[StepResult] = field(default_factory=list, init=False)
    _paused: float = field(default=0.0, init=False)
    _since: float = field(default_factory=time.perf_counter, init=False)

    def add(self, step: StepResult) -> None:
        self._steps.append(step)

    def pause(self, seconds: float) -> None:
        """Take time that was not training (validation, copying and waiting for a checkpoint) out of the rates."""
        self._paused += seconds

    @property
    def seconds(self) -> float:
        """Since the last record."""
        return time.perf_counter() - self._since

    @property
    def pending(self) -> bool:
        """Whether there are steps that no record covers."""
        return bool(self._steps)

    def read(self, state: TrainState) -> Record:
        """The record of all steps since the last call, with where the run is now."""
        steps = self._steps
        assert steps, "a record needs a step"
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused, 1e-9)
        self._steps, self._paused, self._since = [], 0.0, now
        good = [step for step in steps if not step.skipped]
        tokens_per_second = sum(step.tokens for step in steps) / seconds / self.num_devices
        flops = tokens_per_second * self.flops_per_token
        memory = device.memory()
        last = steps[-1]
        return Record(
            iteration=state.iteration,
            train_iterations=self.train_iterations,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            loss=_mean([step.loss for step in good]),
            metrics={name: _mean([step.metrics[name] for step in good]) for name in (good[0].metrics if good else ())},
            learning_rate=last.learning_rate,
            global_batch_size=last.samples,
            loss_scale=last.loss_scale,
            grad_norm=good[-1].grad_norm if good else 0.0,
            zeros_in_grad=last.zeros_in_grad,
            params_norm=last.params_norm,
            skipped_iterations=len(steps) - len(good),
            nan_iterations=sum(step.loss != step.loss for step in steps),
            step_seconds=seconds / len(steps),
            tokens_per_second=tokens_per_second,
            tflops=flops / 1e12,
            mfu=flops / self.peak_flops if self.peak_flops else None,
            memory=memory.allocated,
            peak_memory=max(memory.peak, memory.allocated),
            reserved_memory=memory.reserved,
            peak_reserved_memory=max(memory.peak_reserved, memory.reserved),
            seconds_left=max(self.train_iterations - state.iteration, 0) * seconds / len(steps),
            time=time.time(),
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


PROBE_SIZE = 768
PROBE_SECONDS = 0.2


def measure_peak_flops(dtype: torch.dtype, on: torch.device) -> float:
    """FLOP/s of square matrix products in `dtype`, the best of as many as fit in a fifth of a second.

    For devices without a data sheet: a processor's rate depends on how many threads and processes share it, so it is
    measured where the run takes place."""
    a = torch.randn(PROBE_SIZE, PROBE_SIZE, device=on).to(dtype)
    best = float("inf")
    end = time.perf_counter() + PROBE_SECONDS
    while True:
        start = time.perf_counter()
        matmul(a, a)
        device.synchronize()
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop > end:
            return 2 * PROBE_SIZE**3 / best
