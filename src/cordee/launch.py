"""Which process of how many this is, by the environment variables of its launcher.

Owns the launchers' variables. Must not import torch: it runs before any job does."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cordee.errors import Problem, ProblemError, Problems, raise_all

CORDEE = "cordee"  # the launcher of `supervisor.spawn_local`
_LAUNCHER = "CORDEE_LAUNCHER"  # variable with its name
_SOCKET = "CORDEE_LAUNCHER_SOCKET"  # variable with the file descriptor of the socket at which rank 0 listens
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Place of this process in the run. `launcher` is who started it; empty for a process on its own.

    `agent_store`: its agent, not rank 0, listens at `master_port` for processes that want to find each other.
    `listen_fd`: a socket's file descriptor, bound to that port, at which rank 0 listens."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int = 29500
    launcher: str = ""
    agent_store: bool = False
    listen_fd: int | None = None

    def environ(self) -> dict[str, str]:
        """The variables under which torch.distributed and `rank_info` look for this."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            _LAUNCHER: self.launcher,
            _SOCKET: "" if self.listen_fd is None else str(self.listen_fd),
        }


def rank_info(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Place of this process by the variables of torchrun, Slurm, Open MPI or PMI, in this order; else on its own.

    Raises `ProblemError` if a launcher's variables are incomplete or contradict each other."""
    environ = os.environ if environ is None else environ
    for read in (_from_torchrun, _from_slurm, _from_open_mpi, _from_pmi):
        if (info := read(environ)) is not None:
            return _checked(info)
    return RankInfo()


def world_size(nproc_per_node: int | None) -> int:
    """Processes of the run: those the launcher started, else those that are asked for."""
    here = rank_info()
    return here.world_size if here.launcher else nproc_per_node or 1


def problems(nproc_per_node: int | None) -> Problems:
    """Why a launcher's processes are not those that are asked for."""
    here = rank_info()
    if here.launcher and nproc_per_node and nproc_per_node != here.local_world_size:
        why = f"{here.launcher} has started {here.local_world_size} processes on this node"
        fix = "leave the option out, or launch that many"
        yield Problem("--nproc-per-node", nproc_per_node, why, fix, "launched", limit=here.local_world_size)


def rank_0_speaks() -> bool:
    """Whether rank 0 can report for all ranks: our launcher lets it finish, others may kill it first."""
    return rank_info().launcher == CORDEE and rank_info().rank != 0


def _checked(info: RankInfo) -> RankInfo:
    places = (("rank", info.rank, info.world_size), ("local rank", info.local_rank, info.local_world_size))
    raise_all(
        Problem(f"{name} of {info.launcher}", place, f"it must be below {size}, their number", "check the job")
        for name, place, size in places
        if not 0 <= place < size
    )
    return info


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        why = "the launcher should have set a whole number"
        raise ProblemError.of(name, text, why, "check how the job is started") from None


def _from_torchrun(environ: Mapping[str, str]) -> RankInfo | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank, size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK", rank)
    return RankInfo(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", size),
        master_addr=environ.get("MASTER_ADDR", LOOPBACK),
        master_port=_integer(environ, "MASTER_PORT", 29500),
        launcher=environ.get(_LAUNCHER, "torchrun"),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        listen_fd=_integer(environ, _SOCKET) if environ.get(_SOCKET) else None,
    )


def _from_slurm(environ: Mapping[str, str]) -> RankInfo | None:
    """A task of `srun`; a step of one task is a process on its own."""
    if "SLURM_PROCID" not in environ or _integer(environ, "SLURM_NTASKS", 1) < 2:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    job = _integer(environ, "SLURM_JOB_ID", _integer(environ, "SLURM_JOBID", 0))
    step = _integer(environ, "SLURM_STEP_ID", 0)
    return RankInfo(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_NTASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID", 0),
        local_world_size=_slurm_tasks_here(environ),
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes or LOOPBACK),
        # The same on every node and different for jobs that share one; below the ports that systems hand out.
        master_port=_integer(environ, "MASTER_PORT", 12000 + (job + 101 * step) % 20000),
        launcher="slurm",
    )


def _slurm_tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node, from `4(x2),3`: 4 on each of the first two nodes, 3 on the next."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if not text:
        return _integer(environ, "SLURM_NTASKS")
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts[min(_integer(environ, "SLURM_NODEID", 0), len(counts) - 1)]


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[003-005,9],login` -> `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodelist)


def _from_open_mpi(environ: Mapping[str, str]) -> RankInfo | None:
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return _from_mpi(environ, "Open MPI", *names)


def _from_pmi(environ: Mapping[str, str]) -> RankInfo | None:
    """MPICH, Intel MPI and other launchers that speak PMI."""
    return _from_mpi(environ, "MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _from_mpi(environ: Mapping[str, str], launcher: str, *names: str) -> RankInfo | None:
    rank, size, local_rank, local_size = names
    if rank not in environ or _integer(environ, size, 1) < 2:
        return None
    world_size = _integer(environ, size)
    local_world_size = _integer(environ, local_size, world_size)
    if local_world_size < world_size and "MASTER_ADDR" not in environ:
        why = f"{launcher} has started processes on several nodes, without the address of rank 0"
        raise ProblemError.of("MASTER_ADDR", None, why, "export MASTER_ADDR=<host of rank 0> to all processes")
    return RankInfo(
        rank=_integer(environ, rank),
        world_size=world_size,
        local_rank=_integer(environ, local_rank, _integer(environ, rank) % local_world_size),
        local_world_size=local_world_size,
        master_addr=environ.get("MASTER_ADDR", LOOPBACK),
        master_port=_integer(environ, "MASTER_PORT", 29500),
        launcher=launcher,
    )
