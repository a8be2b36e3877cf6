"""What modules say of themselves in their first lines is so, as far as their source can tell."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch.distributed as dist

import cordee

SOURCES = Path(cordee.__file__).parent
FILES = {path.relative_to(SOURCES).as_posix(): path for path in sorted(SOURCES.rglob("*.py"))}
ABOUT = {"get_rank", "get_world_size", "get_backend", "is_initialized"}  # ask, and move nothing
GROUPS = {"init_process_group", "new_group", "destroy_process_group", "init_device_mesh"}
TORCH_FREE = re.compile(
    r"(knows (no|neither)|never imports|must not import|without|free of|needs? no)\b[^.:]*\btorch\b", re.IGNORECASE
)
WRITES = re.compile(r"writ|file|output|saved", re.IGNORECASE)
DEVICE = re.compile(r"(cuda|npu)(:\d*)?")
MODES = re.compile(r"[rwxab+t]*[wxa+][rwxab+t]*")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(encoding="utf-8"))


def header(file: str) -> str:
    return " ".join((ast.get_docstring(tree(file)) or "").split())


def used(file: str) -> set[str]:
    """The dotted names of what a file takes from the modules that it imports, wherever in it."""
    known: dict[str, str] = {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            known |= {each.asname or each.name.partition(".")[0]: _bound(each) for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    found = {_dotted(node, known) for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute | ast.Name)}
    return {name for name in found if name is not None}


def _bound(name: ast.alias) -> str:
    return name.name if name.asname else name.name.partition(".")[0]


def _dotted(node: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (of := _dotted(node.value, known)) is not None:
        return f"{of}.{node.attr}"
    return None


def communicates(file: str) -> set[str]:
    """What of torch.distributed a file calls, or hands on to be called."""
    names = {name.rpartition(".")[2] for name in used(file) if name.startswith("torch.distributed.")}
    functions = {name for name in names if callable(what := getattr(dist, name, None)) and not isinstance(what, type)}
    return functions - ABOUT


def calls(file: str) -> Iterator[tuple[str, list[object]]]:
    """Every call in a file: the last part of what is called, and the arguments that are constants."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            yield name, [each.value for each in arguments if isinstance(each, ast.Constant)]


def writes(file: str) -> bool:
    """Whether a file opens files for writing."""
    opened = any(
        name in ("open", "fdopen") and any(isinstance(each, str) and MODES.fullmatch(each) for each in constants)
        for name, constants in calls(file)
    )
    return opened or any(name in ("write_text", "write_bytes", "tofile") for name, _ in calls(file))


def test_every_module_says_what_it_is():
    def says(file: str) -> bool:
        docstring = ast.get_docstring(tree(file)) or ""
        small = len(FILES[file].read_text(encoding="utf-8").splitlines()) <= 100
        definition = file.startswith(("families/", "ops/", "bench/"))  # of mathematics or a measurement: its first line
        return docstring.partition("\n\n")[0].endswith((".", ":")) and (small or definition or "Owns" in docstring)

    assert not [file for file in FILES if not says(file)]


def test_collectives_are_called_where_their_owner_says():
    owner = "parallel/collectives.py"
    named = {f"parallel/{name}" for name in re.findall(r"`(\w+\.py)`", header(owner))}
    found = {file for file in FILES if communicates(file) - GROUPS and not file.startswith("bench/")}
    assert found == {owner, *named}


def test_groups_are_made_where_their_owner_says():
    makers = {file for file in FILES if communicates(file) & GROUPS}
    assert {file for file in makers if not file.startswith("bench/")} == {"parallel/layout.py"}
    assert all("group" in header(file) for file in makers)


def test_who_writes_files_says_so():
    found = {file for file in FILES if writes(file)}
    assert len(found) > 10
    assert not {file for file in found if not WRITES.search(header(file))}


def test_only_one_file_names_a_device():
    def names(file: str) -> bool:
        texts = (node.value for node in ast.walk(tree(file)) if isinstance(node, ast.Constant))
        literal = any(isinstance(text, str) and DEVICE.fullmatch(text) for text in texts)
        return literal or any(name.startswith(("torch.cuda.", "torch.npu.")) for name in used(file))

    assert {file for file in FILES if names(file)} == {"device.py"}


def test_no_pickle_is_run():
    unsafe = re.compile(r"(torch|pickle|_pickle|dill|joblib)\.(load|loads|Unpickler)")
    assert not {file for file in FILES if any(unsafe.fullmatch(name) for name in used(file))}


def test_who_is_to_do_without_torch_does():
    claim = sorted(file for file in FILES if TORCH_FREE.search(header(file)))
    assert len(claim) > 20
    modules = [f"cordee.{file.removesuffix('.py').replace('/', '.')}" for file in claim]
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    script += "    assert 'torch' not in sys.modules, name\n"
    names = [name.removesuffix(".__init__") for name in modules]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
