"""Devices: the only file that names one.

Owns which device a process computes on, which collective backend serves it, what it can do and how much memory it
uses. Everything else asks here, so a new kind of accelerator is a new row."""

import ctypes
import functools
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cordee.errors import Problem, ProblemError
from cordee.log import info_once

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceKind:
    """What differs between kinds of devices.

    `overlaps` tells whether collectives of parameters and gradients run beside its computation; `fused_rms_norm`
    whether torch's RMS norm is one operation there; `grouped_matmul` names the types that torch's grouped product takes
    there; `flash_parts` tells whether its flash attention can be taken in parts that are merged afterwards
    (`cordee.ops.partial_attention`); `peak_flops` maps a part of the device's name to dense 16-bit FLOP/s."""

    name: str
    backend: str
    fused_optimizer: bool
    overlaps: bool = True
    fused_rms_norm: bool = False
    grouped_matmul: tuple[str, ...] = ()
    flash_parts: bool = False
    peak_flops: tuple[tuple[str, float], ...] = ()

    def collective_backend(self, given: str | None) -> str:
        """The backend that is `given`, else the own one. ProblemError if it serves no devices of this kind."""
        if given in (None, self.backend, KINDS["cpu"].backend):
            return given or self.backend
        why, fix = f"it moves no tensors of {self.name}, which computes here", f"give {self.backend}, or leave it out"
        raise ProblemError([Problem("--distributed-backend", given, why, fix, "device", limit=self.backend)], True)


_FLOATS = ("float32", "bfloat16", "float16")
KINDS = {
    "cpu": DeviceKind("cpu", "gloo", fused_optimizer=True, overlaps=False, grouped_matmul=_FLOATS, flash_parts=True),
    "cuda": DeviceKind(
        "cuda",
        "nccl",
        fused_optimizer=True,
        fused_rms_norm=True,
        grouped_matmul=("bfloat16",),
        # Dense bf16 rates from the vendor's data sheets; the most specific name comes first.
        peak_flops=(("H100 PCIe", 756e12), ("H100", 989e12), ("H200", 989e12), ("B200", 2250e12), ("A100", 312e12)),
    ),
    "npu": DeviceKind("npu", "hccl", fused_optimizer=False, peak_flops=(("910B", 376e12), ("910", 320e12))),
}


def kind() -> DeviceKind:
    """The kind of device of this machine: its accelerator if there is one that `KINDS` knows, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return KINDS["cpu"]
    if accelerator.type not in KINDS:
        info_once("There is no support for accelerators of type %s: the CPU computes", accelerator.type)
    return KINDS.get(accelerator.type, KINDS["cpu"])


def local_device(local_rank: int) -> "torch.device":
    """The device of local process `local_rank`, made the current one."""
    import torch

    if kind().name == "cpu":
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank % torch.accelerator.device_count())
    return torch.device(kind().name, torch.accelerator.current_device_index())


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, as allocators of accelerators do.

    glibc gives large buffers back to the system and gets them anew for the next step, page by page and zeroed: 6 % of
    a step. Its own environment variables come first; other C libraries are left alone."""
    settings = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, -1), "MALLOC_TOP_PAD_": (-2, 1 << 24)}
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    for name, (parameter, value) in settings.items():
        if name not in os.environ:
            ctypes.CDLL(None).mallopt(parameter, value)


def prefers_onednn(device: "torch.device") -> bool:
    """Whether oneDNN multiplies float32 matrices on `device` faster than MKL, to which torch gives them."""
    return device.type == "cpu" and _mkl_wastes_avx512()


@functools.cache
def _mkl_wastes_avx512() -> bool:
    """MKL keeps to AVX2 on processors of other makers than Intel, whatever they can do."""
    import torch

    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    maker = _processor_maker()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(maker) and "Intel" not in maker


def _processor_maker() -> str:
    """Such as "GenuineIntel" or "AuthenticAMD"; empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    except FileNotFoundError:
        return platform.processor()


def count() -> int:
    """Accelerators of this machine; 1 on a machine that has only its CPU."""
    import torch

    return 1 if kind().name == "cpu" else torch.accelerator.device_count()


def synchronize() -> None:
    """Wait until the device has done all it was given."""
    import torch

    if kind().name != "cpu":
        torch.accelerator.synchronize()


def peak_flops() -> float | None:
    """Dense 16-bit FLOP/s of this device by its data sheet; None where there is none (a CPU is measured instead)."""
    import torch

    if not (table := kind().peak_flops):
        return None
    name = getattr(torch, kind().name).get_device_name()
    return next((flops for part, flops in table if part in name), None)


@dataclass(frozen=True)
class Memory:
    """Bytes in use now and at most so far, and those that the accelerator's allocator holds for them; on a CPU, where
    nothing is reserved, twice those resident in RAM."""

    allocated: int
    peak: int
    reserved: int
    peak_reserved: int


def memory() -> Memory:
    from torch import accelerator as a

    if kind().name != "cpu":
        return Memory(a.memory_allocated(), a.max_memory_allocated(), a.memory_reserved(), a.max_memory_reserved())
    return Memory(*(resident_bytes(), peak_resident_bytes()) * 2)


def resident_bytes() -> int:
    """Bytes of this process in RAM now (Linux; elsewhere the peak)."""
    try:
        return _field(Path("/proc/self/status"), "VmRSS")
    except FileNotFoundError:
        return peak_resident_bytes()


def anonymous_bytes() -> int:
    """Bytes of this process in RAM that are not pages of files, which the system may drop at any time (Linux)."""
    return _field(Path("/proc/self/status"), "RssAnon")


def peak_resident_bytes() -> int:
    """Bytes of this program in RAM at most so far."""
    try:
        # getrusage begins with the peak of the process that has started this one
        return _field(Path("/proc/self/status"), "VmHWM")
    except (FileNotFoundError, StopIteration):
        # macOS counts ru_maxrss in bytes, others in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that programs can still take before the machine swaps, or one of the control groups that this
    process is in reaches its limit (Linux; elsewhere all of the machine's). `root` is that of the file system."""
    try:
        available = _field(root / "proc/meminfo", "MemAvailable")
    except (FileNotFoundError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *_left_in_groups(root)])


# Where control groups of each version are mounted, and their files: limit, use, and the name of the part of the use
# that is cache of files nobody reads, which the kernel drops before it refuses memory.
_GROUPS_V1 = (("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GROUPS_V2 = ((".", "unified"), "memory.max", "memory.current", "inactive_file")


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes that are left of the limit of each control group above this process that has one."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts, limit, use, cache = _GROUPS_V1 if controllers else _GROUPS_V2
        group = PurePosixPath(path.lstrip("/"))
        # A container may see its own group as the root of all: then the directories below it are not there.
        for folder in (root / "sys/fs/cgroup" / mount / place for mount in mounts for place in (group, *group.parents)):
            try:
                text = (folder / limit).read_text(encoding="ascii").strip()
                if text != "max":
                    used = int((folder / use).read_text(encoding="ascii"))
                    yield max(0, int(text) - used + _field(folder / "memory.stat", cache, unit=1))
            except (OSError, StopIteration):
                continue


def _field(path: Path, field: str, unit: int = 1024) -> int:
    """Bytes that Linux reports in `path` under `field`, in units of so many."""
    with path.open(encoding="utf-8") as file:
        return next(int(words[1]) * unit for words in map(str.split, file) if words[0].rstrip(":") == field)
