"""Pickles that run code where Python's own machine reads them, and every reader of ours, in a process that shows it.

Each gadget makes the directory MARKER. `python -m tests.weights.gadgets read FOLDER` hands them to all readers and
prints what Python's audit reported and what the readers said; `... control FOLDER` hands them to Python's own machine.
"""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

EXTENSION = 240  # a number that `copyreg` may know
RUNS = ("pickle.find_class", "exec", "os.mkdir", "os.system", "subprocess.Popen")  # what audit reports if code runs
METADATA = "torch.distributed.checkpoint.metadata"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def mapping(pairs: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def attributes(pairs: dict[str, bytes]) -> bytes:
    """BUILD with a state that is set as attributes, on whatever stands before it."""
    return pickle.NONE + mapping(pairs) + pickle.TUPLE2 + pickle.BUILD


def gadgets(marker: str) -> dict[str, bytes]:
    """Pickles by what they do."""
    make = f"__import__('os').makedirs({marker!r}, exist_ok=True)"
    call = name("os", "mkdir") + text(marker) + b"\x85R"
    no = pickle.NEWFALSE
    # A field whose name is more than a name in the code that `dataclass` makes of it.
    field = name(METADATA, "field") + b")R" + attributes({"init": no, "repr": no})
    injected = f"a={make},*b"
    annotated = attributes({injected: field, "__annotations__": mapping({injected: text("int")})})
    return {
        "call": call + b".",
        "evaluated": name("builtins", "eval") + text(make) + b"\x85R.",
        "name on the stack": text("os") + text("mkdir") + b"\x93" + text(marker) + b"\x85R.",
        "name with a dot": b"\x80\x04" + text("pathlib") + text("os.mkdir") + b"\x93" + text(marker) + b"\x85R.",
        "instance": b"(" + text(marker) + b"ios\nmkdir\n.",
        "object": b"(" + name("os", "mkdir") + text(marker) + b"o.",
        "extension": b"\x82" + bytes([EXTENSION]) + text(marker) + b"\x85R.",
        "generated code": name(METADATA, "dataclass") + name(METADATA, "StorageMeta") + annotated + b"\x85R.",
        "method of a class": name("pathlib", "PosixPath") + attributes({"exists": text("no method")}) + b".",
        "state": name("argparse", "Namespace") + b")\x81" + mapping({"x": call}) + b"b.",
        "value of a dict": name("collections", "OrderedDict") + b")R" + text("w") + call + b"s.",
        "in a parameter": name("torch._utils", "_rebuild_parameter") + call + b"\x88}\x87R.",
        "for a type": name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + name("os", "mkdir")
        + name("torch", "Tensor")
        + text(marker)
        + b"\x85}tR.",
        "elsewhere": call + b"Q.",
    }


def archive(pickled: bytes) -> bytes:
    """As `torch.save` writes it since release 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as entries:
        entries.writestr("x/data.pkl", pickled)
        entries.writestr("x/version", "3\n")
        entries.writestr("x/byteorder", sys.byteorder)
        entries.writestr("x/data/0", bytes(16))
    return file.getvalue()


def stream(pickled: bytes) -> bytes:
    """As `torch.save` wrote it before."""
    start = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(part, 2) for part in start) + pickled + pickle.dumps([], 2)


def _metadata(folder: Path, pickled: bytes) -> None:
    from cordee.checkpoint.files import read_metadata
    from cordee.checkpoint.storage import location_of

    (folder / ".metadata").write_bytes(pickled)
    read_metadata(location_of(folder))


def _resumed(folder: Path, content: bytes, described: str) -> None:
    """A run goes on from a checkpoint whose `model.bias` is `content`, by its metadata a tensor or bytes."""
    import torch
    from torch.distributed.checkpoint import Metadata
    from torch.distributed.checkpoint import metadata as torchs
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    from cordee import sealed
    from cordee.checkpoint import directory
    from cordee.checkpoint.storage import location_of
    from cordee.checkpoint.store import restore

    none, size = torch.Size([0]), torch.Size([4])
    chunks = [torchs.ChunkStorageMetadata(none, size)]
    kept, index = {
        "tensor": (
            torchs.TensorStorageMetadata(torchs.TensorProperties(), size, chunks),
            torchs.MetadataIndex("model.bias", none),
        ),
        "bytes": (torchs.BytesStorageMetadata(), torchs.MetadataIndex("model.bias")),
    }[described]
    (folder / "__0_0.distcp").write_bytes(content)
    places = {index: _StorageInfo("__0_0.distcp", 0, len(content))}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"model.bias": kept}, storage_data=places)))
    written = {name: location_of(folder / name) for name in (".metadata", "__0_0.distcp")}
    files = {name: {"bytes": file.size(), "crc32": directory.checksum(file)} for name, file in written.items()}
    manifest = sealed.seal({"format": directory.FORMAT, "iteration": 1, "files": files})
    (folder / directory.MANIFEST).write_text(manifest)
    model = torch.nn.Module()
    model.bias = torch.nn.Parameter(torch.zeros(4))
    restore(location_of(folder), model)


def _file(form: Callable[[bytes], bytes]) -> Callable[[Path, bytes], None]:
    def read(folder: Path, pickled: bytes) -> None:
        from cordee.weights.torch_file import TorchFile

        (folder / "x.pt").write_bytes(form(pickled))
        assert not TorchFile(folder / "x.pt").tensors

    return read


def _hf(folder: Path, pickled: bytes) -> None:
    from cordee.weights import hf

    _llama(folder)
    (folder / "pytorch_model.bin").write_bytes(archive(pickled))
    hf.read(folder)


def _megatron(folder: Path, pickled: bytes) -> None:
    from cordee.weights.megatron import source

    rank = folder / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    args = b"}" + text("args") + pickled.removesuffix(b".") + b"s."
    (rank / "model_optim_rng.pt").write_bytes(archive(args))
    source.read(folder)


def _adapter(folder: Path, pickled: bytes) -> None:
    from cordee.families.registry import spec_from_preset
    from cordee.weights import peft
    from cordee.weights.adapter import Given

    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (folder / "adapter_model.bin").write_bytes(archive(pickled))
    peft.read(Given(path=folder), spec_from_preset("llama2-7b"))


def _distributed(folder: Path, pickled: bytes) -> None:
    from cordee.checkpoint import dcp

    _llama(folder)
    (folder / ".metadata").write_bytes(pickled)
    dcp.read(folder)


def _llama(folder: Path) -> None:
    from cordee.families.registry import spec_from_preset

    (folder / "config.json").write_text(json.dumps(spec_from_preset("llama2-7b").hf_config))


READERS = {
    "metadata": _metadata,
    "tensor of a resumed run": lambda folder, pickled: _resumed(folder, archive(pickled), "tensor"),
    "bytes of a resumed run": lambda folder, pickled: _resumed(folder, pickled, "bytes"),
    "archive": _file(archive),
    "stream": _file(stream),
    "pytorch_model.bin": _hf,
    "args of Megatron": _megatron,
    "adapter": _adapter,
    "distributed checkpoint": _distributed,
}


def _said(reader: Callable[[Path, bytes], None], folder: Path, pickled: bytes) -> str:
    from cordee.errors import ProblemError
    from cordee.weights.torch_file import UNREADABLE

    folder.mkdir()
    try:
        reader(folder, pickled)
    except (ProblemError, *UNREADABLE) as error:
        return str(error)
    return ""


def control(root: Path) -> dict[str, bool]:
    """Whether Python's own machine runs each gadget."""
    import pathlib

    marker, exists, ran = root / "marker", pathlib.Path.exists, {}
    copyreg.add_extension("os", "mkdir", EXTENSION)
    for what, pickled in gadgets(str(marker)).items():
        with suppress(Exception):  # of what comes after the damage
            pickle.loads(pickled)
        ran[what] = os.path.isdir(marker) or pathlib.PosixPath.exists is not exists
        pathlib.PosixPath.exists = exists
        if os.path.isdir(marker):
            os.rmdir(marker)
    return ran


def read(root: Path) -> list[tuple[str, str, str, list[str], bool]]:
    """Gadget, reader, what it said, what ran meanwhile, and whether the gadget has done its work."""
    marker, exists, seen, events = root / "marker", Path.exists, [], []
    copyreg.add_extension("os", "mkdir", EXTENSION)
    for number, reader in enumerate(READERS.values()):  # which import what they need
        _said(reader, root / f"first{number}", b"N.")
    sys.addaudithook(lambda event, args: events.append(f"{event} {args}") if event in RUNS else None)
    for what, pickled in gadgets(str(marker)).items():
        for name, reader in READERS.items():
            folder = root / f"{len(seen)}"
            events.clear()
            said = _said(reader, folder, pickled)
            ran = [event for event in events if str(folder) not in event]  # the readers' own folders
            seen.append((what, name, said, ran, os.path.isdir(marker) or Path.exists is not exists))
    return seen


if __name__ == "__main__":
    print(json.dumps({"control": control, "read": read}[sys.argv[1]](Path(sys.argv[2]))))
