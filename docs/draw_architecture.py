"""Draws docs/architecture.svg from the imports of the source: `python docs/draw_architecture.py`.

Owns the picture. A package stands one row above the highest package that it imports; a line is an import that no other
path of lines implies, dashed where the command loads a job by name. What everything may import is the bar at the
bottom. A test redraws the picture and compares.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "src" / "cordee", ROOT / "docs" / "architecture.svg"
GROUND = ("errors", "log", "files", "lock", "sealed")  # which nearly everything imports
HIDDEN = ("cordee", "__main__")
CALLED = r"cordee(\.\w+)+:\w+"
BOX, HEIGHT, GAP, ROW, MARGIN = 216, 64, 20, 98, 16  # pixels
SWEEPS, PULL = 30, 0.85  # up and down through the rows, each a little to the middle
LETTERS, TEXT_ROWS = 30, 2  # of a text in a box
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1d2733; text-anchor: middle }
  .name { font-weight: 600; font-size: 14px }
  rect { fill: #eef3f8; stroke: #52708c; rx: 6 }
  path { fill: none; stroke: #8ba3b8; stroke-width: 1.2 }
  .called { stroke-dasharray: 4 3 }
"""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def imported(file: Path) -> Iterator[str]:
    """What a file imports, wherever in it, by dotted names; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(module: str) -> str:
    """The part of the house that a module belongs to: `cordee.train.job` to "train"."""
    return ([*module.split("."), "cordee"])[1]


def called(file: Path) -> Iterator[str]:
    """Modules that a file loads when it needs them, by texts of the form module:function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(CALLED, node.value):
            yield node.value.partition(":")[0]


def graph(of: Callable[[Path], Iterator[str]] = imported) -> dict[str, set[str]]:
    """Which packages each package imports."""
    names = modules()
    edges: dict[str, set[str]] = {package(name): set() for name in names}
    for name, file in names.items():
        targets = {package(target) for target in of(file) if target in names}
        edges[package(name)] |= targets - {package(name)}
    return edges


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """The row of each package, 0 at the bottom. The imports must have no circle."""
    found: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in found:
            found[name] = max((level(other) + 1 for other in edges[name]), default=0)
        return found[name]

    for name in edges:
        level(name)
    return found


def needed(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that no longer path implies."""

    def below(name: str) -> set[str]:
        return set().union(*({other} | below(other) for other in edges[name]))

    return {name: others - set().union(*(below(other) for other in others)) for name, others in edges.items()}


def title(name: str) -> str:
    """The first line of what a package says of itself."""
    file = SOURCE / f"{name}.py"
    file = file if file.is_file() else SOURCE / name / "__init__.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    line = text.split("\n")[0].removesuffix(".").replace("`", "")
    return line if len(textwrap.wrap(line, LETTERS)) <= TEXT_ROWS else line.partition(":")[0]


class Node(NamedTuple):
    """A box, or where a line passes a row."""

    name: str
    row: int
    width: float = BOX


def chains(lines: dict[str, set[str]], level: dict[str, int]) -> list[list[Node]]:
    """Every line as the nodes that it passes: its packages and, in each row between them, a lane of its own."""
    found = []
    for upper in sorted(lines):
        for lower in sorted(lines[upper]):
            lanes = [f"{upper}>{lower}:{row}" for row in range(level[upper] - 1, level[lower], -1)]
            found.append([Node(upper, level[upper]), *(Node(x, int(x.rpartition(":")[2]), 2) for x in lanes)])
            found[-1].append(Node(lower, level[lower]))
    return found


def placed(lines: dict[str, set[str]], level: dict[str, int]) -> dict[str, float]:
    """The middle of every box and lane from the left: near the middles of what it is joined to, none on another."""
    joined: dict[str, list[str]] = defaultdict(list)
    nodes = {name: Node(name, level[name]) for name in sorted(lines)}
    for chain in chains(lines, level):
        nodes |= {node.name: node for node in chain}
        for one, other in pairwise(chain):
            joined[one.name].append(other.name)
            joined[other.name].append(one.name)
    rows = [[node for node in nodes.values() if node.row == row] for row in range(max(level.values()) + 1)]
    x = dict.fromkeys(nodes, 0.0)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else rows[::-1]:
            wanted = {n.name: PULL * fmean([x[other] for other in joined[n.name]] or [0.0]) for n in row}
            row.sort(key=lambda n: wanted[n.name])
            x |= _apart(row, wanted)
    left = min(x[node.name] - node.width / 2 for node in nodes.values()) - MARGIN
    return {name: at - left for name, at in x.items()}


def _apart(row: list[Node], wanted: dict[str, float]) -> dict[str, float]:
    """Places in the order of `row`, as near as can be to those wanted, none on another."""
    found: dict[str, float] = {}
    free = -float("inf")
    for node in row:
        found[node.name] = max(wanted[node.name], free + node.width / 2)
        free = found[node.name] + node.width / 2 + GAP
    shift = fmean(wanted[name] - at for name, at in found.items())
    return {name: at + shift for name, at in found.items()}


def draw() -> str:
    """The picture as SVG."""
    hidden = {*GROUND, *HIDDEN}
    imports, calls = graph(), graph(called)
    edges = {name: (imports[name] | calls[name]) - hidden for name in imports if name not in hidden}
    level = levels(edges)
    lines = needed(edges)
    x = placed(lines, level)
    top = max(level.values())
    width = max(x[name] for name in x) + BOX / 2 + MARGIN
    height = (top + 1) * ROW + HEIGHT + MARGIN

    def y(row: int) -> float:
        return ROW * (top - row) + MARGIN

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}">',
        f"<style>{STYLE}</style>",
    ]
    for chain in chains(lines, level):
        kind = "" if chain[-1].name in imports[chain[0].name] else ' class="called"'
        parts.append(f'<path{kind} d="{_curve([(x[node.name], y(node.row)) for node in chain])}"/>')
    for name in sorted(lines):
        parts += _box(name, title(name), x[name], y(level[name]), BOX)
    parts += _box(", ".join(GROUND), "what everything may import", width / 2, (top + 1) * ROW, width - 2 * MARGIN)
    return "\n".join([*parts, "</svg>", ""])


def _curve(places: list[tuple[float, float]]) -> str:
    """From the lower edge of the first box, straight through the rows between, to the upper edge of the last."""
    (x, start), *between, (end, stop) = places
    path, y = f"M{x:.0f} {start + HEIGHT:.0f}", start + HEIGHT
    for lane, top in [*between, (end, stop)]:
        middle = (y + top) / 2
        path += f" C{x:.0f} {middle:.0f} {lane:.0f} {middle:.0f} {lane:.0f} {top:.0f}"
        x, y = lane, top
        if (lane, top) != (end, stop):
            path, y = f"{path} V{top + HEIGHT:.0f}", top + HEIGHT
    return path


def _box(name: str, about: str, x: float, y: float, width: float) -> Iterator[str]:
    yield f'<rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}"/>'
    yield f'<text class="name" x="{x:.0f}" y="{y + 20:.0f}">{escape(name)}</text>'
    for number, line in enumerate(textwrap.wrap(about, LETTERS)):
        yield f'<text x="{x:.0f}" y="{y + 38 + 15 * number:.0f}">{escape(line)}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
