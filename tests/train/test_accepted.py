"""What `cordee check` calls ok, `cordee train` accepts: it trains, or ends with a result, such as a loss of NaN.

Options of all kinds are drawn together, with values that look valid, and neighbours and edges of those.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cordee import cli
from cordee.config.load import load_as_far_as_possible
from cordee.config.option import Option, options_of
from cordee.errors import Problem, ProblemError
from cordee.model.options import ModelOptions
from cordee.optim import algorithms
from cordee.train import job
from cordee.train.options import TrainConfig
from tests.train import tiny
from tests.weights import tiny as weights

# ---- what is drawn ---------------------------------------------------------------------------------------------------

OF_MODEL = options_of(ModelOptions)
MODEL = {option.name for option in OF_MODEL}
LEFT_OUT = {"nproc_per_node", "distributed_backend", "wandb_project", "compile"}  # given, not here, or slow
OPTIONS = [option for option in options_of(TrainConfig) if option.name not in LEFT_OUT | MODEL]
SMALL = {*MODEL, "micro_batch_size", "global_batch_size", "seq_length", "rampup_batch_size", "num_workers"}
SMALL |= {"train_iters", "train_samples", "num_epochs", "eval_iters"}  # which cost memory or time

BASE = {**tiny.MODEL, "seq_length": 16, "global_batch_size": 8, "train_iters": 2, "lr": 1e-2, "split": "80,10,10"}
BASE |= {"eval_iters": 0, "log_interval": 1, "peak_tflops": 1.0}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "untie_embeddings_and_output_weights": True}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8}
LATENT |= {"multi_head_latent_attention": True, "group_query_attention": None, "num_query_groups": None}
GPT2 = {"position_embedding_type": None, "normalization": None, "swiglu": None, "add_bias_linear": None}
GPT2 |= {"group_query_attention": None, "num_query_groups": None, "openai_gelu": True, "hidden_dropout": 0.1}
BASES: dict[str, Mapping[str, object]] = {
    "llama": {},
    "gpt2": GPT2,
    "experts": EXPERTS,
    "latent": {**EXPERTS, **LATENT, "moe_router_load_balancing_type": "softmax_topk"},
    "samples": {"train_iters": None, "train_samples": 16, "bf16": True},
    "epochs": {"train_iters": None, "num_epochs": 0.05},
    "validated": {"eval_iters": 1, "eval_interval": 1},
    "fp16": {"fp16": True},
}
BUNDLES = """
--lr-decay-style WSD --lr-wsd-decay-iters 1
--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.1
--train-samples 24 --rampup-batch-size 4 4 16
--eval-iters 1 --early-stopping-patience 1
--eval-iters 1 --skip-train
--load {run}
--load {run} --finetune
--load {hf}
--model {hf}
--rope-scaling-type yarn --rope-scaling-factor 4 --original-max-position-embeddings 8
--rope-scaling-type llama3 --rope-scaling-factor 8 --low-freq-factor 1 --high-freq-factor 4 --rotary-base 500000
--deepspeed-config {deepspeed}
--optimizer sgd
""".strip().splitlines()
PARALLEL = """
--tensor-model-parallel-size 2
--tensor-model-parallel-size 2 --sequence-parallel
--tensor-model-parallel-size 2 --tp-comm-overlap
--pipeline-model-parallel-size 2
--pipeline-model-parallel-size 2 --pipeline-schedule gpipe
--pipeline-model-parallel-size 2 --pipeline-schedule zbv --num-layers 4
--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --num-layers 4
--pipeline-model-parallel-size 2 --num-layer-list 1,1
--context-parallel-size 2
--context-parallel-size 2 --context-parallel-algo megatron_cp_algo
--expert-model-parallel-size 2
--zero-stage 0
--zero-stage 3
""".strip().splitlines()
WHOLE = [0, 1, 2, 3, 4, 5, 8, 16, 24, 64]
HUGE = [2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1]
REAL = [0, 1e-3, 0.25, 0.5, 0.9, 1, 1.5, 2, 16]
EXTREME = [5e-324, 1e-45, 1e-30, 1e-8, 1e8, 1e30, 3e38, 1e300]


@dataclass(frozen=True)
class Draws:
    """Command lines of small runs; `texts` are values of options by name, `places` of those in bundles."""

    folder: Path
    texts: dict[str, list[str]]
    places: dict[str, str]

    def line(self, draw: random.Random, processes: int) -> list[str]:
        words = self.base(processes, **BASES[draw.choice(list(BASES))])
        words += draw.choice(PARALLEL).split() if processes > 1 else []
        for bundle in draw.sample(BUNDLES, draw.choice([0, 0, 1, 1, 2])):
            words += bundle.format(**self.places).split()
        shapes, others = draw.choice([(0, 1), (0, 2), (0, 4), (0, 8), (1, 0), (1, 1), (2, 1)])
        for option in [*draw.sample(OF_MODEL, shapes), *draw.sample(OPTIONS, others)]:
            words += self._words(option, draw)
        return words

    def base(self, processes: int, **values: object) -> list[str]:
        given = {**BASE, "data_path": self.places["data"], "nproc_per_node": processes, **values}
        file = self.folder / "run.yaml"
        file.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))
        return ["--config", str(file)]

    def _words(self, option: Option, draw: random.Random) -> list[str]:
        if option.is_switch:
            return [draw.choice([option.flag, option.negations[0]])]
        values = self.texts.get(option.name) or list(_near(option))
        return [option.flag, *(str(draw.choice(values)) for _ in range(option.length or 1))]


def _near(option: Option) -> Iterator[object]:
    d = option.declared
    if option.choices or option.kind is str:
        yield from option.choices or ["x"]
        return
    whole, edges = option.kind is int, (d.at_least, d.above, d.at_most, d.below, option.default)
    step = 1 if whole else 1e-3
    near = [edge + add for edge in edges if isinstance(edge, int | float) for add in (-step, 0, step)]
    found = [*near, *(WHOLE if whole else REAL)]
    if option.name not in SMALL:
        found += HUGE if whole else EXTREME
    for value in found:
        inside = (d.at_least is None or value >= d.at_least) and (d.above is None or value > d.above)
        inside &= (d.at_most is None or value <= d.at_most) and (d.below is None or value < d.below)
        if inside and (option.name not in SMALL or value <= 64):
            yield int(value) if whole else value


@pytest.fixture(scope="module")
def draws(tmp_path_factory) -> Draws:
    folder = tmp_path_factory.mktemp("drawn")
    data, further = tiny.make_data(folder), tiny.make_data(folder, seed=1)
    done = tiny.config(folder, train_iters=1, save_interval=1, lr_warmup_iters=0)
    job.run(done)
    hf = folder / "hf"
    weights.save(hf, {**weights.LLAMA, "vocab_size": tiny.VOCAB})
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}))
    places = {"data": data, "run": str(done.save), "hf": str(hf), "deepspeed": str(folder / "ds.json")}
    texts = {
        "data_path": [data, further],
        "train_data_path": [data],
        "valid_data_path": [data, further],
        "test_data_path": [further],
        "split": ["1", "90,10", "98,1,1", "0.5,0.5,0", "1,0,1"],
        "optimizer": sorted(algorithms.registry()),
        "stage": ["pretrain"],
        "model": [str(hf)],
        "load": [str(hf), str(done.save)],
        "save": [str(folder / "saved"), str(done.save)],
        "tensorboard_dir": [str(folder / "tb")],
        "metrics_file": [str(folder / "metrics.jsonl")],
        "data_cache_path": [str(folder / "cache")],
        "pipeline_timeline": [str(folder / "timeline.json")],
        "deepspeed_config": [places["deepspeed"]],
        "num_layer_list": ["1,1", "2,2"],
        "noop_layers": ["0", "3", "0,3"],
        "manual_mbs": ["1,1,2", "4,4", "2,2,2,2"],
        "train_samples": ["8", "16", "17", "24"],
        "num_epochs": ["0.01", "0.1", "1e-9"],
        "train_iters": ["1", "2", "3"],
        "num_layers": ["1", "2", "3", "4"],
        "eval_iters": ["0", "1", "2"],
        "num_workers": ["0", "1", "2"],
        "ckpt_step": ["0", "1", "2"],
        "vocab_size": ["61", "64", "128"],  # data with other tokens is found where it is read
        "exit_duration_in_mins": ["1e-9", "1", "1e300"],
        "rampup_batch_size": ["4", "8", "16"],
        "wandb_exp_name": ["x"],
        "wandb_save_dir": [str(folder)],
    }
    return Draws(folder, texts, places)


# ---- what is right ---------------------------------------------------------------------------------------------------


def accepted(words: list[str]) -> TrainConfig | None:
    """The configuration, if `cordee check` calls it ok."""
    loaded = load_as_far_as_possible(TrainConfig, words)
    if loaded.problems or cli.problems(cli.COMMANDS["check"], loaded):
        return None
    return loaded.config


def refused(run: Callable[[], object]) -> list[Problem]:
    """The problems that a run ends with, but for results."""
    try:
        run()
    except ProblemError as error:
        return [problem for problem in error.problems if problem.kind not in ("loss", "gradient", "norm")]
    return []


def refused_by_rank(rank: int, world_size: int, config: TrainConfig) -> list[Problem]:
    """As `refused`, in a worker of the pool."""
    return refused(lambda: tiny.train_rank(rank, world_size, config))


def differing(
    draws: Draws, count: int, processes: int, run: Callable[[TrainConfig], list[Problem]]
) -> dict[str, object]:
    """Of as many drawn lines as it takes to find `count` that the check calls ok, those that the run refuses."""
    found, draw = {}, random.Random(count)
    while count:
        words = draws.line(draw, processes)
        if (config := accepted(words)) is not None:
            count -= 1
            if problems := run(config):
                found[" ".join(words)] = problems
        shutil.rmtree(draws.folder / "saved", ignore_errors=True)
    return found


def many(sample: int, whole: int) -> pytest.MarkDecorator:
    marks = (pytest.mark.slow, pytest.mark.exhaustive)
    return pytest.mark.parametrize("count", [sample, pytest.param(whole, marks=marks)])


@many(5, 300)
@pytest.mark.filterwarnings("ignore")
def test_one_process_trains_what_is_ok(draws, count):
    assert differing(draws, count, 1, lambda config: refused(lambda: job.run(config))) == {}


@many(2, 100)
def test_two_processes_train_what_is_ok(draws, count, pool):
    assert differing(draws, count, 2, lambda config: pool.run(refused_by_rank, 2, config)[0]) == {}


@pytest.mark.parametrize("flags", ["--optimizer sgd --bf16"])
def test_what_draws_have_found(draws, flags):
    config = accepted([*draws.base(1), *flags.split()])
    assert config is not None and job.run(config) == 0
