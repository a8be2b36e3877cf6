"""Rendezvous of the processes of one attempt, whatever earlier ones have left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from cordee.parallel.rendezvous import rendezvous

LONG = timedelta(seconds=30)


def names(store: dist.Store, size: int) -> set[str]:
    """What ranks hear that come in an awkward order: the one that invites is the last."""
    with ThreadPoolExecutor(size) as threads:
        return set(threads.map(lambda rank: rendezvous(store, rank, size, LONG), reversed(range(size))))


def test_every_attempt_has_a_name_of_its_own():
    store = dist.HashStore()
    found = [names(store, 4) for _ in range(3)]
    assert [len(each) for each in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3


def test_who_is_gone_is_not_waited_for():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    for rank in (1, 2):  # they came, heard nothing and died
        with pytest.raises(dist.DistStoreError):
            rendezvous(store, rank, 3, LONG)
    with pytest.raises(dist.DistStoreError, match="1, 2"):  # so did rank 0, which had invited them
        rendezvous(store, 0, 3, timedelta(seconds=0.1))
    store.set_timeout(LONG)
    assert len(names(store, 3)) == 1
