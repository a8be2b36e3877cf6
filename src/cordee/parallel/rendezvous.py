"""Rendezvous: how the processes of one attempt find each other in a store that outlives attempts.

Owns the name of the attempt. A launcher's agent keeps its store when it restarts its workers, and when these train once
more: its keys may be from processes that are gone. The launcher's own number of the attempt is no help, for on several
nodes each agent has its own: it counts the ends of its workers, not those of others."""

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store

_POLL_SECONDS = 0.01


def rendezvous(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this attempt get, and those of no other.

    Every process draws a ticket. Rank 0 answers the newest ticket of each rank with a name, until all have acknowledged
    it; a process that is gone never does, and its successor has a newer ticket. DistStoreError if ranks are missing
    after `timeout`."""
    ticket = str(store.add("tickets", 1))
    store.set(f"ticket_of_{rank}", ticket)
    if rank == 0:
        return _invite(store, f"attempt_{ticket}", world_size, timeout)
    name = store.get(f"invitation_of_{ticket}").decode()
    store.set(f"{name}/rank_{rank}", "here")
    return name


def _invite(store: Store, name: str, world_size: int, timeout: timedelta) -> str:
    deadline = time.monotonic() + timeout.total_seconds()
    missing, invited = list(range(1, world_size)), set()
    while missing:
        for rank in missing:
            if store.check([f"ticket_of_{rank}"]) and (ticket := store.get(f"ticket_of_{rank}")) not in invited:
                store.set(f"invitation_of_{ticket.decode()}", name)
                invited.add(ticket)
        missing = [rank for rank in missing if not store.check([f"{name}/rank_{rank}"])]
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"no word from ranks {', '.join(map(str, missing))} after {timeout}")
        time.sleep(_POLL_SECONDS if missing else 0)
    return name
