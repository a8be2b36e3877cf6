"""Which device a machine is taken to have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cordee import device


@pytest.mark.parametrize(("accelerator", "kind"), [(None, "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_an_accelerator_without_support_leaves_the_cpu(monkeypatch, accelerator: str | None, kind: str):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator or "cpu"))
    assert device.kind().name == kind


# ---- memory that is left ---------------------------------------------------------------------------------------------

MIB = 1 << 20


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system of a machine with 1000 MiB left, whose process is in `groups`."""
    whole = {"proc/meminfo": f"MemAvailable: {1000 * 1024} kB\n", "proc/self/cgroup": groups, **files}
    for name, text in whole.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder: str, limit: int | str, used: int, cache: int) -> dict[str, str]:
    """Files of a group, in MiB."""
    return {
        f"sys/fs/cgroup/{folder}/memory.max": f"{limit if limit == 'max' else int(limit) * MIB}\n",
        f"sys/fs/cgroup/{folder}/memory.current": f"{used * MIB}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"anon {MIB}\ninactive_file {cache * MIB}\nactive_file {9 * MIB}\n",
    }


def v1(folder: str, limit: int, used: int, cache: int) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/memory/{folder}/memory.limit_in_bytes": f"{limit * MIB}\n",
        f"sys/fs/cgroup/memory/{folder}/memory.usage_in_bytes": f"{used * MIB}\n",
        f"sys/fs/cgroup/memory/{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cache * MIB}\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {}, 1000),  # the root of all groups has no limit
        ("0::/\n", v2(".", 500, 300, 40), 240),  # a container's own group is the root that it sees
        ("0::/slurm/job\n", v2("slurm/job", "max", 300, 0) | v2("slurm", 400, 350, 10), 60),
        ("0::/slurm/job\n", v2("slurm/job", 100, 90, 0) | v2("slurm", 400, 350, 10), 10),
        ("0::/slurm/job\n", v2("slurm/job", 2000, 90, 0), 1000),  # the machine has less than the group may take
        ("0::/job\n", v2("job", 100, 130, 10), 0),
        ("0::/job\n", v2("unified/job", 100, 30, 10), 80),
        ("3:cpu:/job\n2:cpuset,memory:/job/step\n0::/\n", v1("job/step", 2**43, 90, 0) | v1("job", 300, 200, 50), 150),
        ("2:memory:/docker/1234\n", v1(".", 300, 200, 50), 150),  # named by the host, mounted as the container's root
        ("2:memory:/job\n", v2("memory/job", 1, 1, 0), 1000),  # files of another version
    ],
)
def test_memory_that_is_left(tmp_path: Path, groups: str, files: dict[str, str], left: int):
    assert device.available_memory(system(tmp_path, groups, files)) == left * MIB


def test_memory_that_is_left_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < device.available_memory() <= total
