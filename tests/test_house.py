"""The pages on the house, followed to the letter: what one adds as they say is found and works.

The page on extending it is a script: a block of Python is the file that its first line names, a diff is a touch of the
file in its first line, and commands are run in order, on a copy of the sources to which all of that is added.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cordee.checkpoint import directory, formats
from cordee.checkpoint.storage import location_of
from cordee.data.indexed import IndexedDataset

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "cordee"
CODE = re.compile(r"`([\w/-]+/[\w.-]+\.(?:py|yaml))`")
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
    package = shutil.copytree(SOURCES, folder / "cordee", ignore=shutil.ignore_patterns("__pycache__"))
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


# ---- what was added works --------------------------------------------------------------------------------------------


def logged(folder: Path) -> dict[int, dict[str, Any]]:
    """What the runs of the page have logged, by step."""
    lines = (folder / "counted" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["iteration"]: record for record in map(json.loads, lines)}


@pytest.mark.slow
def test_the_objective_trains(followed):
    records = logged(followed)
    assert records[10]["loss"] > 1 > 0.1 > records[60]["loss"]
    assert records[60]["loss_name"] == "counting loss"


@pytest.mark.slow
def test_the_task_scores_what_was_learned(followed):
    (result,) = json.loads((followed / "score.json").read_text(encoding="utf-8"))["results"]
    assert (result["task"], result["metrics"]) == ("last_word", {"accuracy": 0.75, "lines": 4})  # one line is wrong


@pytest.mark.slow
@pytest.mark.parametrize(("text", "wrong"), [("1 2\n\n", "document 2 of last_word"), ("", "--task-data-path")])
def test_the_task_says_what_its_data_lacks(house, followed, text, wrong):
    (followed / "few.txt").write_text(text)
    command = "cordee evaluate --load counted --task last_word --task-data-path few.txt"
    said = run(house, followed, f"{command} --tokenizer-type NullTokenizer --vocab-size 16 2>&1 || [ $? = 2 ]")
    assert "1 problem:" in said and wrong in said


@pytest.mark.slow
def test_the_reader_reads(followed):
    indexed = IndexedDataset(str(followed / "numbers_text_document"))
    assert [indexed[number].tolist() for number in range(len(indexed))] == [[1, 2, 3, 4], [5, 6]]


@pytest.mark.slow
def test_the_optimizer_goes_on_with_its_own_state(followed):
    read_manifest = directory.read_manifest
    of_page = {step: read_manifest(location_of(followed / "counted" / f"iter_00000{step}")) for step in (60, 64, 68)}
    assert [manifest["optimizer"] for manifest in of_page.values()] == ["adam", "nadam", "nadam"]
    assert logged(followed)[64]["loss"] < 0.1


@pytest.mark.slow
def test_the_codec_writes_and_reads(followed):
    named = load_file(followed / "named" / "named.safetensors")
    source = formats.read(followed / "back")  # in the format of Hugging Face, made of the other
    assert set(named) == set(source.names())
    assert all(torch.equal(named[name], source.tensor(name)) for name in named)


MEASURE = """
import json, torch
from tests.parallel import models

kept, found = 0, []
def keep(tensor):
    global kept
    kept += tensor.numel()
    return tensor

for recompute in (False, True):
    built = models.build(models.MODELS["llama"], 1, recompute_mlp=recompute)
    kept = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built[0](torch.arange(16)[None])
    found.append((kept, models.train(*built)["norms"]))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_technique_keeps_less_for_the_same_gradients(house, tmp_path):
    (kept, norms), (fewer, same) = json.loads(
        run(house, tmp_path, f"PYTHONPATH+=:{ROOT} {sys.executable} -c '{MEASURE}'")
    )
    assert fewer < kept and same == norms


def test_the_family_is_listed(house, tmp_path):
    assert "7,241,732,096" in run(house, tmp_path, "cordee models show example-7b")


# ---- what the pages say is there -------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading of the page on the architecture."""
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", ARCHITECTURE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_what_is_written_and_touched_is_what_the_table_says():
    by_title = sections()
    found = {}
    for what, written, touched in rows("You add, you write, you touch"):
        title = re.fullmatch(r"\[(.*)\]\(extending\.md#(.*)\)", what)
        assert title is not None and title[2] == title[1].replace(" ", "-")
        found[title[1].capitalize()] = set(re.findall(r"`(\S+)/<name>\.py`", written)), set(CODE.findall(touched))
    assert list(found) == list(by_title)
    for title, (folders, touched) in found.items():
        section = by_title[title]
        if section.commands:  # others have a page or tests of their own
            assert {str(Path(path).parent) for path in section.files} == folders, title
            assert {path for path, *_ in section.touches} == touched, title


def test_the_seams_are_where_the_table_says():
    for seam, where, *_ in rows("The seams"):
        defined: set[str] = set()
        for path in re.findall(r"`(\S+\.py)`", where):
            for node in ast.walk(ast.parse((SOURCES / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    defined.add(node.name)
                elif isinstance(node, ast.AnnAssign | ast.Assign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        names = set(re.findall(r"`(\w+)`", where))
        assert names and names <= defined, seam


def test_the_files_that_pages_name_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        missing = [path for path in CODE.findall(text) if not any((of / path).exists() for of in (SOURCES, ROOT))]
        assert not missing, page.name
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert all((page.parent / link).exists() for link in links), page.name


def test_the_picture_is_drawn_from_the_sources():
    draw = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))["draw"]
    assert draw() == (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
