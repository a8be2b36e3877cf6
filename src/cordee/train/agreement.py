"""Whether all ranks are about to do the same run.

Owns what has to be equal. Nodes may have their own copies of the configuration, the data and the checkpoints: where
those differ, the run would go on silently, and train something that nobody asked for.
"""

from __future__ import annotations

from typing import Any

from cordee.config.option import options_of, to_flag
from cordee.errors import Problem
from cordee.parallel import collectives
from cordee.parallel.layout import Layout
from cordee.train.run_plan import RunPlan

OF_A_NODE = ("nproc_per_node", "num_workers", "peak_tflops", "exit_grace_seconds", "distributed_timeout_minutes")


def require(plan: RunPlan, layout: Layout) -> None:
    """Raise `ProblemError` on all ranks if the `plan` of one is not that of rank 0."""
    mine = _identity(plan)
    first = collectives.from_first(mine, layout)
    fix = "give all nodes the same options, data and checkpoints"
    problems = [
        Problem(name, value, f"rank {layout.rank} has this, rank 0 has {first.get(name)}", fix)
        for name, value in mine.items()
        if first.get(name) != value
    ]
    collectives.raise_together(problems, layout.control)


def _identity(plan: RunPlan) -> dict[str, Any]:
    """What decides the course of a run, by the option that says it. Paths do not: they may differ between nodes."""
    config, checkpoint = plan.config, plan.origin.checkpoint
    options = [option for option in options_of(type(config)) if option.kind is not str or option.choices]
    found: dict[str, Any] = {
        to_flag(option.name): getattr(config, option.name) for option in options if option.name not in OF_A_NODE
    }
    return {
        "--stage": config.stage,
        **found,
        "model": str(plan.spec.to_dict()),
        "pipeline": str(plan.division),
        "micro-batches": plan.batches.sizes,
        "data": str(plan.data.identity),
        "length of the run": plan.iterations,
        "checkpoint": None if checkpoint is None else (checkpoint.manifest["iteration"], checkpoint.resume),
        "weights of a model": plan.origin.weights is not None,
    }
