"""The options of `cordee plan`."""

from dataclasses import dataclass
from typing import get_args

from cordee.config.laws import excludes
from cordee.config.option import option
from cordee.parallel.options import PipelineSchedule


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Pipeline schedules, simulated."""

    schedule: tuple[PipelineSchedule, ...] = option(
        ("1f1b",), f"what to simulate; several are compared: {', '.join(get_args(PipelineSchedule))}", metavar="NAME"
    )
    pipeline_model_parallel_size: int | None = option(None, "pipeline-parallel ranks [4, or as --manual-mbs]", above=0)
    stages_per_rank: int | None = option(None, "virtual stages per rank, for schedules with a free choice [2]", above=0)
    num_layers: int | None = option(None, "transformer layers [one or more per stage, as few as possible]", above=0)
    num_layer_list: str | None = option(None, "layers of each pipeline stage: 7,8,8,9 [equal]", metavar="N,N,...")
    num_micro_batches: int | None = option(None, "gradient accumulation: micro-batches per step [8]", above=0)
    micro_batch_size: int | None = option(None, "samples per micro-batch [1, or as --manual-mbs]", above=0)
    manual_mbs: str | None = option(
        None, "compare 1f1b with such micro-batches: example-config-1, example-config-2, or 1,2,3,...", metavar="LIST"
    )
    forward_time: float = option(1.0, "forward time of one sample through one layer, in any unit of time", above=0)
    backward_time: float | None = option(None, "backward time (dgrad + wgrad) of a sample, layer [2x forward]", above=0)
    backward_input_time: float | None = option(
        None, "input-gradient (dgrad) part of --backward-time; the rest is weight-gradient (wgrad) [half]", above=0
    )
    fixed_time: float = option(0.0, "overhead per forward or backward, independent of its size", at_least=0)
    communication_time: float = option(0.0, "send/recv time of one sample's activations between stages", at_least=0)
    reduction_time: float = option(0.0, "gradient reduce-scatter of one layer over data-parallel ranks", at_least=0)
    timeline: str | None = option(None, "compare with a timeline of cordee train --pipeline-timeline", metavar="FILE")
    output: str | None = option(None, "draw the schedules: .svg or .png", metavar="FILE")

    laws = (excludes("num_layers", "num_layer_list"),)
