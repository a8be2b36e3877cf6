"""Who communicates."""

from __future__ import annotations

import ast
from pathlib import Path

import torch.distributed as dist

import cordee

SOURCES = Path(cordee.__file__).parent
ABOUT = {"get_rank", "get_world_size", "get_backend", "is_initialized"}  # ask, and move nothing
GROUPS = {"init_process_group", "new_group", "destroy_process_group"}


def calls(path: Path) -> set[str]:
    """What of torch.distributed a file calls, or hands on to be called."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
            what = getattr(dist, node.attr)
            if callable(what) and not isinstance(what, type):
                found.add(node.attr)
    return found - ABOUT


def test_collectives_are_called_where_they_are_owned():
    files = {path.relative_to(SOURCES).as_posix(): calls(path) for path in SOURCES.rglob("*.py")}
    shipped = {name: found for name, found in files.items() if found and not name.startswith("bench/")}
    owners = {f"parallel/{name}.py" for name in ("collectives", "differentiable", "overlap")}
    assert {name for name, found in shipped.items() if found - GROUPS} == owners
    assert {name for name, found in shipped.items() if found & GROUPS} == {"parallel/layout.py"}
