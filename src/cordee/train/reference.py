"""Log-probabilities of the whole data by a reference model, computed once.

Owns what they follow from, and that every sequence gets its own. Files are `order_cache.py`'s."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee import launch
from cordee.data.build import cache_dir
from cordee.data.indexed import bin_path, fingerprint
from cordee.data.order_cache import Arrays, cached_arrays, content_key
from cordee.data.tuning_dataset import TuningDataset
from cordee.log import counted, logger
from cordee.parallel import collectives, context
from cordee.parallel.execution import Frozen
from cordee.parallel.layout import Layout
from cordee.train.run_plan import RunPlan
from cordee.weights.adapter import fingerprint as fingerprint_weights

_READ = 1 << 28  # bytes of a file that tell whether it changed
_SETTINGS = "seq_length reset_position_ids reset_attention_mask cp_attention_mask_type bf16 fp16 quantise_base".split()


def attach(make: Callable[[], Frozen], plan: RunPlan, datasets: Mapping[str, Any], layout: Layout) -> None:
    """Give `datasets`, and those they blend, what the model of `make` says of them; it is made only if that is not
    known yet."""
    frozen = None
    for dataset in (part for each in datasets.values() for part in getattr(each, "datasets", [each])):
        key = collectives.from_first(_key(plan, dataset) if layout.rank == 0 else None, layout)
        folder = cache_dir(plan.config.data_cache_path, dataset.indexed.prefix)
        open_or = partial(cached_arrays, folder, key, {"reference": (dataset.count, 2)})
        known: Arrays = {}
        with suppress(LookupError):  # of what is damaged
            known = open_or(dict) if (folder / f"{key}-reference.npy").exists() else {}
        if not all(collectives.gather(bool(known), layout)):
            logger.info("the reference model scores %s", counted(dataset.count, "sample"))
            frozen = frozen or make()
            known = {"reference": _scores(dataset, frozen, plan, layout)}
            if launch.rank_info().local_rank == 0:
                open_or(lambda known=known: known)
        dataset.reference = known["reference"]


def _key(plan: RunPlan, dataset: TuningDataset) -> str:
    config = plan.config
    facts = {name: getattr(config, name) for name in _SETTINGS} | {"range": [dataset.first, dataset.count]}
    facts["data"] = [fingerprint(bin_path(field.prefix), _READ) for field in dataset.fields.values()]
    reference = plan.models["reference"]
    facts["weights"] = config.seed if reference.source is None else fingerprint_weights(reference.source)
    return content_key(**facts, model=reference.spec.to_dict())


def _scores(dataset: TuningDataset, frozen: Frozen, plan: RunPlan, layout: Layout) -> npt.NDArray[np.float32]:
    """The log-probabilities of both rows of each sequence, float32 [sequences, 2], of which each rank scores some."""
    sums = np.zeros((3, dataset.count))  # in the order of the first pass: of both rows, and how often they were scored
    collate, sizes, begin = plan.data.collate(), plan.batches.micro_batches(0), 0
    while begin < dataset.count:
        parts, places = [], []
        for size in sizes:
            own = range(begin + layout.data_rank * size, begin + (layout.data_rank + 1) * size)
            batch = collate([dataset[place % dataset.count] for place in own])  # whole steps: from the first on again
            parts.append(context.shard(batch, layout, plan.config))
            places.append(own)
            begin += size * layout.data_size
        scored = frozen.forward(parts, lambda head, hidden, batch: head.token_logprobs(hidden, batch.labels).sum(1))
        for own, rows in zip(places, scored, strict=True):
            new = [place for place in own if place < dataset.count]
            if rows is not None:
                sums[:2, new] = rows.double().cpu().numpy().reshape(-1, 2)[: len(new)].T / layout.degrees.tp
            sums[2, new] = layout.speaks_for_samples
    sums = np.reshape(collectives.sum_numbers(sums.ravel().tolist(), layout), sums.shape)
    assert (sums[2] == 1).all(), "every sequence is scored once"
    scores = np.empty((dataset.count, 2), np.float32)
    scores[dataset.permutation(0)] = sums[:2].T
    return scores
