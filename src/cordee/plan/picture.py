"""Timelines as a picture: ranks x time.

Owns how it looks. Computes no figure. Imports matplotlib, so it is imported where a picture is asked for."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colors, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import blended_transform_factory

from cordee.plan.timeline import Span, Timeline

COLOURS = {"F": "#2f6fae", "B": "#d9772b", "I": "#c2475f", "W": "#6f9440", "R": "#7b58a6"}
MEANINGS = {
    "F": "forward",
    "B": "backward",
    "I": "input-gradient (dgrad) backward",
    "W": "weight-gradient (wgrad) backward",
    "R": "gradient reduction",
}
IDLE = "#ececec"
WIDTH, ROW, MARGIN_LEFT, MARGIN_RIGHT = 14.0, 0.34, 0.75, 1.55  # inches
HEAD, BETWEEN, FOOT = 0.42, 0.26, 0.42
LINE = 9.0  # font size of titles, in points


def draw(timelines: Sequence[Timeline], path: Path) -> None:
    """Write one panel per timeline, one below the other, to an .svg or .png file.

    Simulated panels share their scale of time; a measured one, in its own unit, is stretched to the same width."""
    heights = [timeline.num_ranks * ROW for timeline in timelines]
    total = sum(heights) + len(timelines) * (HEAD + BETWEEN) + FOOT
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    top = total
    for timeline, height in zip(timelines, heights, strict=True):
        top -= HEAD + height
        inside = WIDTH - MARGIN_LEFT - MARGIN_RIGHT
        axes = figure.add_axes((MARGIN_LEFT / WIDTH, top / total, inside / WIDTH, height / total))
        _panel(axes, timeline, _scale(timeline, timelines), inside)
        top -= BETWEEN
    kinds = {span.action.kind for timeline in timelines for span in timeline.spans}
    handles = [Patch(color=COLOURS[kind], label=meaning) for kind, meaning in MEANINGS.items() if kind in kinds]
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=LINE)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cordee"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _scale(timeline: Timeline, timelines: Sequence[Timeline]) -> float:
    if timeline.measured:
        return timeline.makespan
    return max(each.makespan for each in timelines if not each.measured)


def _panel(axes: Axes, timeline: Timeline, scale: float, inches: float) -> None:
    chunks = _chunks(timeline)
    axes.set_xlim(0, scale)
    axes.set_ylim(timeline.num_ranks, 0)
    for rank in range(timeline.num_ranks):
        axes.add_patch(Rectangle((0, rank + 0.06), timeline.makespan, 0.88, facecolor=IDLE, linewidth=0))
    for span in timeline.spans:
        _box(axes, span, chunks[span.action.stage], inches / scale)
    axes.set_yticks([rank + 0.5 for rank in range(timeline.num_ranks)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(timeline.num_ranks)])
    axes.tick_params(labelsize=LINE - 1, length=0)
    axes.tick_params(axis="x", length=2, colors="#666666", labelsize=LINE - 2)
    for side in axes.spines.values():
        side.set_visible(False)
    _figures(axes, timeline)


def _chunks(timeline: Timeline) -> dict[int, float]:
    """How light each stage is: its place among the stages of its rank, 0 the first, 1 the last."""
    of_rank: dict[int, set[int]] = {}
    for span in timeline.spans:
        of_rank.setdefault(span.rank, set()).add(span.action.stage)
    return {stage: i / max(1, len(stages) - 1) for stages in of_rank.values() for i, stage in enumerate(sorted(stages))}


def _box(axes: Axes, span: Span, lightness: float, inches_per_unit: float) -> None:
    shade = tuple(channel + 0.5 * lightness * (1 - channel) for channel in colors.to_rgb(COLOURS[span.action.kind]))
    length = span.end - span.start
    below = span.action.kind == "R"  # beside the rank's work: a strip along the row's lower edge
    y, height = (span.rank + 0.84, 0.14) if below else (span.rank + 0.06, 0.88)
    edge = {"edgecolor": "white", "linewidth": 0.5}
    axes.add_patch(Rectangle((span.start, y), length, height, facecolor=shade, zorder=3 if below else 2, **edge))
    text = str(span.action.micro_batch)
    size = min(8.0, 72 * length * inches_per_unit / (0.62 * len(text) + 0.25))
    if not below and size >= 4:
        ink = "white" if lightness < 0.75 else "#1a1a1a"
        place = (span.start + length / 2, span.rank + 0.5)
        axes.text(*place, text, ha="center", va="center", fontsize=size, color=ink, zorder=4)


def _figures(axes: Axes, timeline: Timeline) -> None:
    peaks, bubbles = timeline.peak_activations(), timeline.bubbles()
    hidden = f"   ·   reduction not hidden {timeline.exposed_reduction:.4g}" if timeline.exposed_reduction else ""
    summary = (
        f"bubble {timeline.bubble:.1%}   ·   step {timeline.makespan:.4g}{hidden}   ·   "
        f"peak activations {max(peaks):g} samples × layers"
    )
    above = {"transform": axes.transAxes, "va": "bottom", "fontsize": LINE}
    lift = 1 + 0.06 / (timeline.num_ranks * ROW)
    axes.text(0, lift, timeline.name, ha="left", fontweight="bold", **above)
    axes.text(1, lift, summary, ha="right", **above)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    grey = {"transform": beside, "ha": "right", "va": "center", "fontsize": LINE - 1, "color": "#444444"}
    for x, head in ((1.055, "idle"), (1.115, "peak")):
        axes.text(x, lift, head, **{**grey, "transform": axes.transAxes, "va": "bottom", "color": "#888888"})
    for rank, (bubble, peak) in enumerate(zip(bubbles, peaks, strict=True)):
        axes.text(1.055, rank + 0.5, f"{bubble:.1%}", **grey)
        axes.text(1.115, rank + 0.5, f"{peak:g}", **grey)
