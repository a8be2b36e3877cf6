"""Writing a checkpoint's data.

Owns torch's distributed checkpoint as objects of a folder that is not a checkpoint yet, in the form that torch's own
writer gives its files, and what the manifest keeps of them, which is found while they are written: reading them back
would be a second transfer. What makes the folder a checkpoint is `directory.py`'s."""

import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from cordee.checkpoint.files import METADATA
from cordee.checkpoint.storage import Location


class ObjectWriter(StorageWriter):
    """torch's writer of one rank: an object of tensors, and of the first rank one of metadata, in `folder`.

    entries: bytes and CRC-32 of the objects that are written, by name."""

    def __init__(self, folder: Location):
        self.folder = folder
        self.entries: dict[str, dict[str, int]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        assert checkpoint_id is None, "the folder is given at the beginning"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: there are no folders to be made."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with self._create(plan.storage_data) as file:
            for item in plan.items:
                start, tensor = file.tell(), planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), f"{item.index.fqn} is no tensor"
                torch.save(_alone(tensor.detach().cpu()), file)
                place = _StorageInfo(plan.storage_data, start, file.tell() - start)
                results.append(WriteResult(item.index, place.length, place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = StorageMeta()
        with self._create(METADATA) as file:
            pickle.dump(metadata, file)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Location)

    @contextmanager
    def _create(self, name: str) -> Iterator[Any]:
        with (self.folder / name).write() as stream:
            file = _Counted(stream)
            yield file
        self.entries[name] = {"bytes": file.bytes, "crc32": file.crc32}


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without what it is a view of, which `torch.save` would write too."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Counted:
    """A stream that knows how many bytes went through it, and their CRC-32."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self.bytes += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        return len(view)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """What is written is sent when the stream is left."""
