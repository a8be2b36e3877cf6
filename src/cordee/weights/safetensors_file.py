"""Files of safetensors in the making, tensor by tensor.

Owns the layout of such a file: the length of its header in 8 bytes, the header in JSON, padded with blanks, and the
bytes of its tensors without gaps. Who writes those is not its affair: the header gets its room first, its content last.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from cordee.weights.regions import Region, contiguous

NAMES_OF_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_METADATA = {"format": "pt"}
_ENTRY = 160  # bytes that an entry of the header has at most beside its name: type, shape and two positions


def room_for(names: Iterable[str]) -> int:
    """Bytes that the header of a file with tensors of these `names` needs at most, a multiple of 8."""
    size = 64 + sum(len(json.dumps(name)) + _ENTRY for name in names)
    return -(-size // 8) * 8


def starts(path: Path) -> dict[str, int]:
    """Where the bytes of every tensor of a file begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class SafetensorsWriter:
    """A file in which tensors are laid out one after the other; `room` bytes are kept for its header.

    OSError if it cannot be made."""

    def __init__(self, path: Path, room: int):
        self.path = path
        self.nbytes = 0  # of the tensors
        self.names: list[str] = []
        self._room = room
        self._header: dict[str, object] = {"__metadata__": _METADATA}
        path.touch()

    def fits(self, itemsize: int) -> bool:
        """Whether a tensor can begin where the last one ends: readers take only aligned tensors."""
        return self.nbytes % itemsize == 0

    def add(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Region:
        """Where the bytes of a tensor have to be written."""
        assert self.fits(dtype.itemsize), f"{name} would not be aligned"
        region = contiguous(8 + self._room + self.nbytes, tuple(shape), dtype)
        start, self.nbytes = self.nbytes, self.nbytes + region.nbytes
        self._header[name] = {"dtype": NAMES_OF_TYPES[dtype], "shape": [*shape], "data_offsets": [start, self.nbytes]}
        self.names.append(name)
        return region

    def close(self) -> None:
        """Write the header, when all tensors are written. OSError if that fails."""
        header = json.dumps(self._header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(header) <= self._room, f"{len(header)} > {self._room}"
        assert self.path.stat().st_size == 8 + self._room + self.nbytes, f"{self.path}: bytes were not written"
        with self.path.open("r+b") as file:
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
