"""The pages on the house, followed to the letter: what one adds as they say is found and works.

The page on extending it is a script: a block of Python is the file that its first line names, a diff is a touch of the
file in its first line, and commands are run in order, on a copy of the sources to which all of that is added.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cordee.data.indexed import IndexedDataset

ROOT = Path(__file__).resolve().parents[1]
EXTENDING, ARCHITECTURE = ROOT / "docs" / "extending.md", ROOT / "docs" / "architecture.md"
FAMILY = ROOT / "docs" / "adding-a-family.md"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """Of the page: files by their path, touches as (path, before, after), commands."""

    title: str
    text: str

    @property
    def files(self) -> dict[str, str]:
        found = (block.partition("\n") for block in blocks(self.text, "python"))
        return {first.removeprefix("# src/cordee/"): rest for first, _, rest in found}

    @property
    def touches(self) -> list[tuple[str, str, str]]:
        found = []
        for block in blocks(self.text, "diff"):
            path, *lines = block.splitlines()
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in kept) for kept in (" -", " +"))
            found.append((path.removeprefix("+++ src/cordee/"), before, after))
        return found

    @property
    def commands(self) -> list[str]:
        return blocks(self.text, "bash")


def sections() -> dict[str, Section]:
    _, *parts = re.split(r"^## ", EXTENDING.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: Section(title, text) for title, _, text in (part.partition("\n") for part in parts)}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The sources with everything that the pages add: a folder to import from."""
    folder = tmp_path_factory.mktemp("house")
    package = shutil.copytree(ROOT / "src" / "cordee", folder / "cordee", ignore=shutil.ignore_patterns("__pycache__"))
    for section in sections().values():
        for path, text in section.files.items():
            assert (package / path).parent.is_dir() and not (package / path).exists()
            (package / path).write_text(text, encoding="utf-8")
        for path, before, after in section.touches:
            source = (package / path).read_text(encoding="utf-8")
            assert source.count(before) == 1, f"{section.title}: {path} has not once\n{before}"
            (package / path).write_text(source.replace(before, after), encoding="utf-8")
    guide = FAMILY.read_text(encoding="utf-8")
    (package / "families" / "example.py").write_text("\n".join(blocks(guide, "python")), encoding="utf-8")
    with (package / "families" / "presets.yaml").open("a", encoding="utf-8") as presets:
        presets.write("".join(blocks(guide, "yaml")))
    return folder


def run(house: Path, folder: Path, command: str) -> str:
    """What a command of the page prints, with the sources of `house`."""
    python = f'cordee() {{ "{sys.executable}" -m cordee "$@"; }}\nset -e\n'
    environment = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", python + command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def followed(house, tmp_path_factory) -> Path:
    """Where the commands of the page were run."""
    folder = tmp_path_factory.mktemp("followed")
    for section in sections().values():
        for command in section.commands:
            run(house, folder, command)
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Of the steps that the run of the page has logged."""
    lines = (folder / "counted" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["iteration"]: record["loss"] for record in records if "loss" in record}
