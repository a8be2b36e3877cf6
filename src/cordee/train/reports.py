"""Reports at their intervals.

Owns which sinks a run has and how often each gets a record. Records are `metrics.py`'s, their form `sinks.py`'s."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee import device
from cordee.log import SILENCE, logger
from cordee.train import outputs
from cordee.train.metrics import Meter, StepResult
from cordee.train.options import TrainConfig
from cordee.train.run_plan import TrainState
from cordee.train.sinks import ConsoleSink, JsonSink, Sink, TensorBoardSink, TerminalSink, WandbSink


@dataclass
class Report:
    """Sinks by name that get a record every `interval` steps, and after `patience` seconds, of the steps since the last
    one."""

    interval: int
    meter: Meter
    sinks: dict[str, Sink]
    patience: float = math.inf

    def write(self, state: TrainState) -> None:
        record = self.meter.read(state)
        self.each(lambda sink: sink.step(record))

    def each(self, call: Callable[[Sink], None]) -> None:
        """Call every sink. One that fails, such as a file on a full disk, is left out: the run continues."""
        for name, sink in list(self.sinks.items()):
            try:
                call(sink)
            except OSError as error:
                del self.sinks[name]
                _left_out(name, error)


class Reports:
    """All reports of a run; none on ranks other than 0."""

    def __init__(self, reports: Sequence[Report]):
        self._reports = reports

    def step(self, result: StepResult, state: TrainState) -> None:
        """Count a step, and write the reports that are due."""
        for report in self._reports:
            report.meter.add(result)
            if state.iteration % report.interval == 0 or report.meter.seconds >= report.patience:
                report.write(state)

    def validation(self, state: TrainState, losses: Mapping[str, float], seconds: float) -> None:
        """Report mean losses by what they are over; their time is no training time."""
        self.pause(seconds)
        for split, loss in losses.items():
            for report in self._reports:
                report.each(lambda sink, split=split, loss=loss: sink.validation(state.iteration, split, loss))

    def pause(self, seconds: float) -> None:
        """Take time that was not training out of the rates."""
        for report in self._reports:
            report.meter.pause(seconds)

    def finish(self, state: TrainState) -> None:
        """Write the steps that no report has covered, at the end of a run."""
        for report in self._reports:
            if report.meter.pending:
                report.write(state)

    def close(self) -> None:
        for report in self._reports:
            report.each(lambda sink: sink.close())


def build_reports(config: TrainConfig, make_meter: Callable[[], Meter], loss_name: str, state: TrainState) -> Reports:
    """The reports of rank 0."""
    reports, lines = [], dict[str, Sink]()
    if sys.stdout.isatty():
        meter = make_meter()
        terminal = TerminalSink(meter.num_devices, loss_name, throughput=config.log_throughput)
        reports.append(Report(config.log_interval, meter, {"the terminal": terminal}, SILENCE))
    else:
        unit = "device" if device.kind().name == "cpu" else "GPU"  # Megatron's word, for any accelerator
        lines["standard output"] = ConsoleSink(loss_name, throughput=config.log_throughput, unit=unit)
    if (path := outputs.metrics_path(config)) is not None:
        lines |= _opened(str(path), lambda: JsonSink(path, loss_name))
    reports.append(Report(config.log_interval, make_meter(), lines))
    scalars: dict[str, Sink] = {}
    if (folder := config.tensorboard_dir) is not None:
        scalars |= _opened(folder, lambda: TensorBoardSink(Path(folder), loss_name))
    if config.wandb_project:
        place = outputs.place(config, config.wandb_save_dir)
        scalars |= _opened(f"W&B project {config.wandb_project}", lambda: WandbSink(config, place, loss_name, state))
    if scalars:
        reports.append(Report(config.tensorboard_log_interval, make_meter(), scalars))
    return Reports(reports)


def _opened(name: str, open_sink: Callable[[], Sink]) -> dict[str, Sink]:
    """The sink by its name; none if it cannot be written to from the start, which a run need not end for either."""
    try:
        return {name: open_sink()}
    except OSError as error:
        _left_out(name, error)
        return {}


def _left_out(name: str, error: OSError) -> None:
    logger.warning("%s gets no more metrics of this run: %s", name, error)
