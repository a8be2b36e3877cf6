"""The result of a measurement, for people and for programs.

Owns how it looks, and the file it is written to. Knows no suite."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("cordee", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Report:
    """`columns` name the values of each of `rows`; `further` reports are of the same run, each with its own table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Mapping[str, float]
    notes: Sequence[str] = ()
    further: Sequence[Report] = ()
    command: str = field(default_factory=lambda: shlex.join(["cordee", *sys.argv[1:]]))
    machine: Mapping[str, str] = field(default_factory=lambda: machine())

    def to_markdown(self) -> str:
        """The report as a section of a document, and one for each further report."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.columns, ["-" * width for width in widths], *self.rows]
        table = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
        where = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        notes = [f"- {note}" for note in self.notes]
        section = [f"## {self.title}", "", f"`{self.command}`", "", *table, "", *notes, f"- {where}", ""]
        return "\n".join([*section, *(report.to_markdown() for report in self.further)])

    def write(self, path: Path) -> None:
        """Write Markdown to a path that ends so, else JSON; its folder is made if need be."""
        text = self.to_markdown() if path.suffix == ".md" else json.dumps(asdict(self), indent=2) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def machine() -> dict[str, str]:
    """What a reader needs to place the figures: processor, cores, system and versions."""
    facts = {"processor": _processor(), "cores": str(os.cpu_count()), "system": platform.system()}
    return facts | {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    except FileNotFoundError:
        return platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
