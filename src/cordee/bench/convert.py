"""`cordee bench convert`: memory and speed of a conversion to Megatron's ranks and back, beside `cp` of the same bytes.

The checkpoint has the shape of a preset and holds zeros that take no room on disk; what is read from it and written
is as long as with any other values. Each turn is a process of its own, and ends when its files are on disk."""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cordee import device
from cordee.bench.contest import Baton, Contender, Results, Turn, apart, once
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.errors import ProblemError

if TYPE_CHECKING:
    from cordee.families.registry import ModelSpec

PEERS = ()
PRESET = "llama2-13b"
TENSOR, PIPELINE = 8, 2
ALLOWANCE = 300 * 2**20  # bytes that a conversion may take beside its tensors
SHARD = 5 * 10**9  # bytes of a file of the Hugging Face directory
HEADER = 16 * 2**20  # bytes at the beginning of a file of safetensors that are left alone
THERE, BACK = "HF to Megatron", "Megatron to HF"
COPIES = {THERE: "cp of the HF files", BACK: "cp of the Megatron files"}
KEEP_SIZE, PUNCH_HOLE = 1, 2  # flags of Linux's fallocate
HELD = 24 * 10**9  # bytes on disk before they are given back
INTERVAL, PAUSE = 0.02, 1.0  # seconds between looks at the memory, and at the disk


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Each way once a round, after `cp` of what it reads."""
    preset, workers = config.model or PRESET, config.threads or 1
    turns: dict[str, list[Turn]] = {name: [] for name in (THERE, BACK, *COPIES.values())}
    with tempfile.TemporaryDirectory(dir=config.scratch) as folder:
        hf, megatron, out = (Path(folder) / name for name in ("hf", "megatron", "out"))
        apart(write_preset, hf, preset)
        total, largest = _bytes(hf)
        _check_room(folder, total, config.discard)
        back = ("--workers", str(workers))
        there = ("--save-model-type", "mg", "--use-mcore-models", *_degrees(), *back)
        for number in range(1, config.rounds + 1):
            for name, source, target, flags in ((THERE, hf, megatron, there), (BACK, megatron, out, back)):
                for contender in (
                    Contender(COPIES[name], play_copy, (source, out, config.discard)),
                    Contender(name, play_convert, (source, target, flags)),
                ):
                    with _swept(Path(folder), config.discard and contender.name == name):
                        turn = once(contender, 1)
                    turns[contender.name].append(turn)
                    on_turn(number, contender.name, turn)
                    shutil.rmtree(out, ignore_errors=True)
                if name == THERE:
                    apart(discard, megatron)  # from here on it is a source that takes no room
            shutil.rmtree(megatron)
    return _report(config, preset, workers, total, largest, Results(turns))


def _degrees() -> tuple[str, ...]:
    return "--target-tensor-parallel-size", str(TENSOR), "--target-pipeline-parallel-size", str(PIPELINE)


def _check_room(folder: str, total: int, discarding: bool) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.1 * total and not discarding:
        why = f"{total:,} bytes are written, and {free:,} are free in {folder}"
        raise ProblemError.of("--scratch", folder, why, "make room, take a smaller --model, or add --discard")


# ---- files -----------------------------------------------------------------------------------------------------------


def write_preset(path: Path, preset: str) -> None:
    """A checkpoint of zeros with the shape of a preset."""
    from cordee.families.registry import spec_from_preset

    write_sparse(path, spec_from_preset(preset))


def write_sparse(path: Path, spec: ModelSpec) -> None:
    """A Hugging Face directory of bfloat16 zeros that take no room on disk."""
    shapes, shards = spec.shapes(), [{}]
    for name, rule in spec.rules().items():
        for foreign, shape in zip(rule.foreign, rule.foreign_shapes(shapes[name]), strict=True):
            if sum(map(_nbytes, shards[-1].values())) > SHARD - _nbytes(shape):
                shards.append({})
            shards[-1][foreign] = shape
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**spec.hf_config, "torch_dtype": "bfloat16"}))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(path / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def _bytes(path: Path) -> tuple[int, int]:
    """Bytes of all tensors and of the largest, by the headers of the files."""
    sizes = []
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        sizes += [_nbytes(entry["shape"]) for entry in header.values()]
    return sum(sizes), max(sizes)


def discard(path: Path) -> None:
    """Give the disk back what tensors under `path` take, which are zeros with or without room of their own.

    What a file holds is on disk before it is given back: whoever writes it writes at the pace of the disk."""
    for file in filter(Path.is_file, path.rglob("*")):
        with suppress(FileNotFoundError), file.open("r+b") as opened:  # it may be renamed in between
            if os.fstat(opened.fileno()).st_blocks * 512 > 4 * HEADER:
                os.fsync(opened.fileno())
                for offset, size in _zeros(file):
                    _punch(opened.fileno(), offset, size)


def _zeros(file: Path) -> Iterator[tuple[int, int]]:
    """Where in a file of weights zeros are, in bytes; of a `.pt` file those of large tensors."""
    from cordee.weights.torch_file import UNREADABLE, TorchFile

    if file.suffix == ".safetensors" or file.name.startswith("shard-"):
        yield HEADER, file.stat().st_size - HEADER
    elif file.suffix == ".pt":
        with suppress(*UNREADABLE):  # it is being made
            for region in TorchFile(file).tensors.values():
                if region.nbytes > HEADER:
                    yield region.offset, region.nbytes


def _punch(descriptor: int, offset: int, size: int) -> None:
    if size > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size)):
            raise OSError(ctypes.get_errno(), "this file system makes no holes in files")


@contextmanager
def _swept(folder: Path, wanted: bool) -> Iterator[None]:
    """While it lasts, what is written under `folder` is given back to the disk again and again."""
    if not wanted:
        yield
        return
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    sweeper = context.Process(target=_sweep, args=(folder, over))
    sweeper.start()
    try:
        yield
    finally:
        over.set()
        sweeper.join()
    if sweeper.exitcode:
        raise RuntimeError(f"what had been written was not given back: the sweeper ended with {sweeper.exitcode}")


def _sweep(folder: Path, over: threading.Event) -> None:
    """Discard whenever much has been written: the writer waits meanwhile, as it does for a disk.

    A file of Megatron has all its length and headers from the first moment on, so that its zeros are known."""
    while not over.wait(PAUSE):
        with suppress(FileNotFoundError):  # what is complete is renamed
            if sum(file.stat().st_blocks * 512 for file in folder.rglob("*")) > HELD:
                discard(folder)


# ---- turns -----------------------------------------------------------------------------------------------------------


def play_convert(baton: Baton, source: Path, target: Path, flags: tuple[str, ...]) -> None:
    """Run the command as a user would, up to files that are on disk."""
    from cordee.config.load import load_config
    from cordee.convert import job
    from cordee.convert.options import ConvertConfig

    baton.take()
    options = load_config(ConvertConfig, ["--load-dir", str(source), "--save-dir", str(target), *flags]).config
    peak = _Peak()
    start = time.perf_counter()
    job.run(options)
    _to_disk(target)
    baton.give([time.perf_counter() - start], anonymous=peak.stop())


def play_copy(baton: Baton, source: Path, target: Path, discarding: bool = False) -> None:
    """`cp` that writes every byte, holes too; `discarding` removes each copied file as soon as it is on disk."""
    baton.take()
    seconds = 0.0
    for piece in sorted(file for file in source.rglob("*") if file.is_file()) if discarding else [source]:
        start = time.perf_counter()
        subprocess.run(["cp", "-r", "--sparse=never", str(piece), str(target)], check=True)
        _to_disk(target)
        seconds += time.perf_counter() - start
        if discarding:
            target.unlink()
    baton.give([seconds], anonymous=0)


def _to_disk(path: Path) -> None:
    for file in (path, *path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class _Peak:
    """The most memory of this process that is not pages of files, looked at now and then."""

    def __init__(self) -> None:
        self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(INTERVAL):
            self._most = max(self._most, device.anonymous_bytes())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most


# ---- report ----------------------------------------------------------------------------------------------------------


def _report(config: BenchConfig, preset: str, workers: int, total: int, largest: int, results: Results) -> Report:
    rows, figures = [], {}
    for name, copied in COPIES.items():
        bound = largest * (1 + workers) + ALLOWANCE
        peak, ratio = results.figure(name, "anonymous"), results.ratio(name, copied)
        for contender, memory, against in ((name, peak, f"{ratio:.0%}"), (copied, None, "")):
            seconds = results.median(contender)
            shown = "" if memory is None else f"{memory / 2**20:,.0f} MiB"
            limit = "" if memory is None else f"{bound / 2**20:,.0f} MiB"
            rows.append([contender, f"{seconds:.1f} s", f"{total / seconds / 1e9:.2f}", against, shown, limit])
        figures |= {f"{name}: by cp": ratio, f"{name}: peak": peak, f"{name}: bound": bound}
    notes = [
        f"{preset}: {total / 1e9:.1f} GB of bfloat16 in shards of {SHARD / 1e9:g} GB, largest tensor "
        f"{largest / 2**20:,.0f} MiB; {TENSOR} tensor ranks, {PIPELINE} stages, {workers} workers, "
        f"{config.rounds} rounds",
        f"bound: largest tensor x (1 + files written at once) + {ALLOWANCE // 2**20} MiB; peak: memory of a fresh "
        f"process that is not pages of files",
        "the files read are zeros without room on disk, for cp as well, which writes all of them (--sparse=never); "
        "times end when the files are on disk",
    ]
    if config.discard:
        notes.append(
            f"--discard: whenever {HELD / 1e9:g} GB had reached the disk they were given back to it, and "
            "cp copied file by file, each removed when it was on disk"
        )
    columns = ["", "time", "GB/s", "speed by cp", "peak memory", "bound"]
    return Report(title="Converting a checkpoint", columns=columns, rows=rows, figures=figures, notes=notes)
