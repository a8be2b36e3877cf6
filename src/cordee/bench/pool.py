"""Warm worker processes that run functions over several ranks, for parity runs and tests.

Importing torch costs seconds, so the workers are forked once from a server that has imported it (forkserver) and are
kept. Each call makes a fresh gloo group over as many of them as it asks for. Must not import torch itself."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LIFETIME = 20  # calls after which workers are replaced: threads of groups that something still holds would add up
TIMEOUT = 300.0  # seconds for one call: far above what any needs, so that a hang fails instead of blocking


def _worker(connection: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: else a collection would take as long as a short job
    while (job := connection.recv()) is not None:
        function, rank, world_size, store_path, timeout, args = job
        try:
            store = dist.FileStore(store_path, world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout / 2)
            )
            dist.barrier()  # a function that ends its group at once would break the contact that others still make
            result = (True, function(rank, world_size, *args))
            if dist.is_initialized():
                dist.barrier()  # as would the end of groups that the function has made
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _clear_sharding_prop_cache()  # it knows meshes by their ranks, and would bring back those of dead groups
            gc.collect()  # models that lie in cycles keep their groups, and those their threads
        connection.send(result)


class WorkerError(AssertionError):
    """A rank raised; the message is its traceback."""


class Pool:
    def __init__(self, timeout: float = TIMEOUT) -> None:
        """`timeout` is in seconds, for one call."""
        self._timeout = timeout
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.fsdp", "cordee.api"])
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0

    def run(self, function: Callable, world_size: int, *args: Any) -> list[Any]:
        """Results of `function(rank, world_size, *args)` on every rank, in order; raises what a rank raised."""
        if self._calls % LIFETIME == 0:
            self._stop()
        while len(self._workers) < world_size:
            self._start()
        self._calls += 1
        store = str(Path(self._folder.name) / f"store{self._calls}")
        workers = self._workers[:world_size]
        for rank, (_, connection) in enumerate(workers):
            connection.send((function, rank, world_size, store, self._timeout, args))
        return self._collect([connection for _, connection in workers])

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def _collect(self, connections: list[Connection]) -> list[Any]:
        results: dict[int, Any] = {}
        errors: list[str] = []
        while len(results) < len(connections) and not errors:
            ready = wait([c for i, c in enumerate(connections) if i not in results], timeout=self._timeout)
            if not ready:
                errors.append(f"no answer from ranks {sorted(set(range(len(connections))) - results.keys())}")
            for rank, connection in enumerate(connections):
                if connection not in ready:
                    continue
                try:
                    ok, results[rank] = connection.recv()
                except EOFError:
                    ok, results[rank] = False, "the process died"
                if not ok:
                    errors.append(f"rank {rank}:\n{results[rank]}")
        if errors:
            self._stop()  # the other ranks may hang in a collective: the next call starts fresh ones
            raise WorkerError("\n".join(errors))
        return [results[rank] for rank in range(len(connections))]

    def _stop(self) -> None:
        for process, connection in self._workers:
            process.kill()
            connection.close()
            process.join()
        self._workers.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()
        self._folder.cleanup()
