"""The meshes and process groups of a run, seen from this rank.

Owns all of them: they are made here, once, and looked up by name. Knows neither models nor data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cordee.launch import RankInfo
from cordee.parallel.degrees import AXES, DATA_AXES, Degrees
from cordee.parallel.rendezvous import rendezvous

STORAGE_AXES = ("pp", "replicate", "shard", "tp")
CONTEXT_AXES = ("pp", "replicate", "shard", "ring", "ulysses", "tp")
EXPERT_AXES = ("pp", "replicate", "shard", "ep", "tp")


class Layout:
    """The meshes of a run, seen from this rank.

    `mesh` has all axes of `Degrees`, those of size 1 too, and says which rank computes what. `storage` and `experts`
    say which rank keeps which parameters and gradients: over [pp, replicate, shard, tp], where shard covers
    context-parallel ranks too, and for experts over [pp, replicate, shard, ep, tp]. `context` splits the axis cp into
    ring and ulysses. All are None without a process group, that is, alone in one process.
    `control` and `background` are gloo groups of all ranks, for values on the host: one for the training thread, one
    for a thread beside it, since collectives of two threads must never share a group. `timeout` is that of their
    collectives, torch's own if None. `blocking`: a collective blocks its thread, as no accelerator's does."""

    def __init__(self, degrees: Degrees, device_type: str = "cpu", timeout: timedelta | None = None):
        self.degrees = degrees
        self.rank = 0
        self.mesh: DeviceMesh | None = None
        self.storage: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        self.context: DeviceMesh | None = None
        self.control: ProcessGroup | None = None
        self.background: ProcessGroup | None = None
        self.blocking = False
        if not dist.is_initialized():
            assert degrees.world_size == 1, f"{degrees} need a process group"
            return
        assert degrees.world_size == dist.get_world_size(), f"{degrees} do not fill {dist.get_world_size()} ranks"
        self.rank = dist.get_rank()
        d = degrees
        self.mesh = init_device_mesh(device_type, d.sizes, mesh_dim_names=AXES)
        self.storage = init_device_mesh(device_type, (d.pp, *d.storage, d.tp), mesh_dim_names=STORAGE_AXES)
        if d.cp > 1:
            sizes = (d.pp, d.replicate, d.shard, d.ring, d.ulysses, d.tp)
            self.context = init_device_mesh(device_type, sizes, mesh_dim_names=CONTEXT_AXES)
        if d.ep > 1:
            sizes = (d.pp, *d.expert_storage, d.ep, d.tp)
            self.experts = init_device_mesh(device_type, sizes, mesh_dim_names=EXPERT_AXES)
        self.blocking = dist.get_backend() == dist.Backend.GLOO
        self.control = dist.group.WORLD if self.blocking else _gloo_group("control", timeout)
        self.background = _gloo_group("background", timeout)

    @property
    def world_size(self) -> int:
        return self.degrees.world_size

    def axis_rank(self, axis: str) -> int:
        """Index of this rank along `axis`, also "ep", "ring" and "ulysses"."""
        mesh = self._mesh_of(axis)
        return 0 if mesh is None else mesh.get_local_rank(axis)

    @property
    def data_rank(self) -> int:
        """Index of this rank among the ranks that see different samples."""
        return self.axis_rank("replicate") * self.degrees.shard + self.axis_rank("shard")

    @property
    def speaks_for_samples(self) -> bool:
        """Whether this rank counts its samples: of the ranks that share samples exactly one does."""
        return all(self.axis_rank(axis) == 0 for axis in AXES if axis not in DATA_AXES)

    @property
    def data_size(self) -> int:
        return self.degrees.data

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """The mesh of FSDP2: `[shard]`, or `[replicate, shard]` where parameters are replicated."""
        return None if self.storage is None else _spread(self.storage, self.degrees.storage)

    @property
    def expert_data_mesh(self) -> DeviceMesh | None:
        """As `data_mesh`, of this rank's experts; None without expert parallelism."""
        return None if self.experts is None else _spread(self.experts, self.degrees.expert_storage)

    def group(self, axis: str) -> ProcessGroup | None:
        """The group of this rank along `axis`, "ep", "ring" and "ulysses" too; None where that has one rank."""
        if getattr(self.degrees, axis) == 1:
            return None
        mesh = self._mesh_of(axis)
        assert mesh is not None
        return mesh.get_group(axis)

    def _mesh_of(self, axis: str) -> DeviceMesh | None:
        return {"ep": self.experts, "ring": self.context, "ulysses": self.context}.get(axis, self.mesh)

    def groups(self, axes: tuple[str, ...]) -> list[ProcessGroup]:
        """Groups of this rank along those `axes` that have more than one rank."""
        return [group for axis in axes if (group := self.group(axis)) is not None]


def _spread(mesh: DeviceMesh, storage: tuple[int, int]) -> DeviceMesh:
    """The part of a storage mesh that FSDP works over; two dims only where parameters are repeated."""
    return mesh["shard"] if storage[0] == 1 else mesh["replicate", "shard"]


def _gloo_group(purpose: str, timeout: timedelta | None) -> ProcessGroup:
    group = dist.new_group(backend=dist.Backend.GLOO, group_desc=purpose, timeout=timeout)
    assert isinstance(group, ProcessGroup), "every rank is in it"
    return group


# Timeout of the rendezvous, at least: ranks start one after the other, and slower the more there are, while the
# timeout of a collective may be seconds.
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(ranks: RankInfo, backend: str, timeout: timedelta) -> Iterator[None]:
    """The default process group of a run, destroyed at the end; its store is this run's alone (`rendezvous.py`)."""
    store, size = _store(ranks, timeout), ranks.world_size
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store(ranks: RankInfo, timeout: timedelta) -> dist.Store:
    if ranks.world_size == 1:
        return dist.HashStore()
    listens = ranks.rank == 0 and not ranks.agent_store
    joining = max(timeout, RENDEZVOUS_TIMEOUT)
    store = dist.TCPStore(
        ranks.master_addr,
        ranks.master_port,
        ranks.world_size,
        is_master=listens,
        timeout=joining,
        # A store closes what it is given, and the next run of these processes meets at the same socket.
        master_listen_fd=os.dup(ranks.listen_fd) if listens and ranks.listen_fd is not None else None,
    )
    name = rendezvous(store, ranks.rank, ranks.world_size, joining)
    store.set_timeout(timeout)
    return dist.PrefixStore(name, store)
