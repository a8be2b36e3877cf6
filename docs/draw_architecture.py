"""Draws docs/architecture.svg from the imports of the source: `python docs/draw_architecture.py`.

Owns the picture. A package stands one row above the highest package that it imports; a line is an import that no other
path of lines implies, dashed where the command loads a job by name. What everything may import is the bar at the
bottom. A test redraws the picture and compares.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "src" / "cordee", ROOT / "docs" / "architecture.svg"
GROUND = ("errors", "log", "files", "lock", "sealed")  # which nearly everything imports
HIDDEN = ("cordee", "__main__")
CALLED = r"cordee(\.\w+)+:\w+"
WIDTH, BOX, HEIGHT, GAP, ROW = 860, 216, 62, 20, 92
LETTERS = 34  # of a line in a box
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
    return text.split("\n")[0].removesuffix(".").replace("`", "")


def placed(lines: dict[str, set[str]], level: dict[str, int]) -> dict[str, tuple[float, float]]:
    """The upper middle of each package's box: every row in the order of the middles of what its packages import."""
    rows = [sorted(name for name in lines if level[name] == row) for row in range(max(level.values()) + 1)]
    x: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda name: sum(x[other] for other in lines[name]) / max(len(lines[name]), 1))
        left = (WIDTH - len(row) * (BOX + GAP) + GAP + BOX) / 2
        x |= {name: left + index * (BOX + GAP) for index, name in enumerate(row)}
    return {name: (x[name], ROW * (len(rows) - 1 - level[name]) + 16) for name in lines}


def draw() -> str:
    """The picture as SVG."""
    hidden = {*GROUND, *HIDDEN}
    imports, calls = graph(), graph(called)
    edges = {name: (imports[name] | calls[name]) - hidden for name in imports if name not in hidden}
    level, lines = levels(edges), needed(edges)
    places = placed(lines, level)
    height = (max(level.values()) + 2) * ROW
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">', f"<style>{STYLE}</style>"]
    for name in sorted(lines):
        for other in sorted(lines[name]):
            kind = "" if other in imports[name] else ' class="called"'
            parts.append(f'<path{kind} d="{_curve(places[name], places[other])}"/>')
    for name, (x, y) in sorted(places.items()):
        parts += _box(name, title(name), x, y, BOX)
    parts += _box(", ".join(GROUND), "what everything may import", WIDTH / 2, height - ROW + 16, WIDTH - 32)
    return "\n".join([*parts, "</svg>", ""])


def _curve(upper: tuple[float, float], lower: tuple[float, float]) -> str:
    (x, top), (end, bottom) = upper, lower
    top += HEIGHT
    middle = (top + bottom) / 2
    return f"M{x:.0f} {top:.0f} C{x:.0f} {middle:.0f} {end:.0f} {middle:.0f} {end:.0f} {bottom:.0f}"


def _box(name: str, about: str, x: float, y: float, width: float) -> Iterator[str]:
    yield f'<rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}"/>'
    yield f'<text class="name" x="{x:.0f}" y="{y + 19:.0f}">{escape(name)}</text>'
    for number, line in enumerate(textwrap.wrap(about, LETTERS)[:2]):
        yield f'<text x="{x:.0f}" y="{y + 36 + 15 * number:.0f}">{escape(line)}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
