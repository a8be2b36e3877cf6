"""One self-contained HTML page that shows what a run did.

Owns the page and its pictures (SVG, drawn by matplotlib, nothing fetched). Is handed every figure; measures nothing."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from cordee.files import write_durably

INK, MUTED, BLUE, ORANGE = "#1f2933", "#7b8794", "#2563a8", "#c2571a"


@dataclass(frozen=True)
class Step:
    """What was logged at one training step; memory in bytes, of one process."""

    iteration: int
    loss: float
    tokens_per_second: float
    memory: int


@dataclass(frozen=True)
class Sample:
    prompt: str
    continuation: str


@dataclass(frozen=True)
class Report:
    """All that the page shows. `facts` are (name, value) rows; `phases` are (name, seconds)."""

    title: str
    summary: str
    steps: Sequence[Step]
    validation: Sequence[tuple[int, float]]  # (iteration, loss)
    untrained_perplexity: float
    perplexity: float
    samples: Sequence[Sample]
    facts: Sequence[tuple[str, str]]
    phases: Sequence[tuple[str, float]]
    commands: Sequence[str] = field(default_factory=tuple)


def write(report: Report, path: Path) -> None:
    """Write the page; it appears under its name when it is whole."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cordee.quickstart", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        report=report,
        loss_plot=_loss_plot(report),
        speed_plot=_line_plot(report, "tokens per second, all processes", lambda step: step.tokens_per_second),
        memory_plot=_line_plot(report, "memory of one process, MiB", lambda step: step.memory / 2**20),
        improvement=report.untrained_perplexity / report.perplexity,
    )
    write_durably(path, page)


def _loss_plot(report: Report) -> str:
    figure, axes = _canvas("loss, nats per token", height=3.4)
    axes.plot([s.iteration for s in report.steps], [s.loss for s in report.steps], color=BLUE, lw=1.2, label="training")
    if report.validation:
        iterations, losses = zip(*report.validation, strict=True)
        axes.plot(iterations, losses, color=ORANGE, lw=0, marker="o", ms=5, label="validation")
        last, below = (iterations[-1], losses[-1]), {"textcoords": "offset points", "xytext": (0, 8), "ha": "center"}
        axes.annotate(f"{losses[-1]:.2f}", last, color=ORANGE, **below)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure)


def _line_plot(report: Report, label: str, value) -> str:
    figure, axes = _canvas(label, height=2.2)
    axes.plot([s.iteration for s in report.steps], [value(s) for s in report.steps], color=BLUE, lw=1.2)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def _canvas(label: str, height: float):
    # The object interface, not pyplot: no global figure and no display is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(label, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step", color=MUTED, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.grid(axis="y", color="#e4e7eb", lw=0.8)
    return figure, axes


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
