"""Context parallelism: whole models train as in one process, and what does not fit is reported."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from cordee.config.laws import ignored_options
from cordee.data.batch import IGNORED, Batch
from cordee.errors import Problem, ProblemError
from cordee.model.balance import Balance
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.optim.clip import global_norm, gradients
from cordee.parallel import apply, collectives, context, data, laws
from cordee.parallel.degrees import Degrees, degrees, model_ranks, problems
from cordee.parallel.layout import Layout
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import plan_run
from tests.matrix import sampled
from tests.parallel.context_cases import (
    BATCH,
    CPU,
    HYBRID,
    LAYOUTS,
    LENGTH,
    MODELS,
    RING,
    ULYSSES,
    VOCAB,
    documents,
    options,
    positions,
    shape,
)
from tests.problems import facts, limits
from tests.train import tiny

STEPS, SAMPLES = 2, 4


def samples(packed: bool) -> Batch:
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    labels = tokens[:, 1:].clone()
    labels[:, 5:9] = IGNORED
    if not packed:
        return Batch(tokens[:, :-1], labels)
    return Batch(tokens[:, :-1], labels, positions().repeat(2, 1), documents().repeat(2, 1))


def rows(batch: Batch, keep: slice) -> Batch:
    return Batch(*(None if x is None else x[keep] for x in vars(batch).values()))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(name: str, ranks: int, packed: bool, given: dict) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Loss, auxiliary values and gradient norm of each step, and the gradients of the first; micro-batches of two
    samples.
    """
    config = options(**given)
    layout = Layout(degrees(config, ranks))
    model = apply.apply(GPTModel(MODELS[name], device="meta"), layout, config, CPU)
    initialise(model, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    whole = samples(packed)
    count = SAMPLES // BATCH // layout.data_size
    found, grads = [], {}
    for step in range(STEPS):
        sums: dict[str, torch.Tensor] = {}
        for index in range(count):
            data.begin_micro_batch(model, config.zero_stage, last=index == count - 1)
            start = BATCH * (index * layout.data_size + layout.data_rank)
            batch = rows(whole, slice(start, start + BATCH))
            balance = Balance(batch.num_trained / whole.num_trained)
            batch = context.shard(batch, layout, config)
            loss, weight = model(
                batch.input_ids,
                position_ids=batch.position_ids,
                segments=batch.segments,
                balance=balance,
                output=lambda head, hidden, batch=batch: head.loss(hidden, batch.labels),
            )
            assert int(weight) == batch.num_trained
            (loss / whole.num_trained).backward()
            reported = {name: value * batch.num_trained for name, value in balance.metrics().items()}
            for key, value in {"loss": loss.detach(), **reported}.items():
                sums[key] = sums.get(key, torch.zeros(())) + value
        total = collectives.sum_over(torch.stack([sums[key] for key in sorted(sums)]), layout) / whole.num_trained
        norm = global_norm(gradients(list(model.parameters()))).item()
        found.append([*total.tolist(), norm])
        if step == 0:
            grads = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return found, grads


def train_on_ranks(rank: int, ranks: int, runs: list[tuple[str, bool, dict]]) -> list:
    return [train(name, ranks, packed, given) for name, packed, given in runs]


@functools.cache
def train_alone(name: str, packed: bool) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    return train(name, 1, packed, {})


def assert_as_alone(pool, ranks: int, runs: list[tuple[str, bool, dict]]) -> None:
    results = pool.run(train_on_ranks, ranks, runs)
    for number, (name, packed, given) in enumerate(runs):
        values, grads = train_alone(name, packed)
        for found in results:
            got, found_grads = found[number]
            close = torch.allclose(torch.tensor(got), torch.tensor(values), rtol=1e-5, atol=1e-6)
            assert close, (name, packed, given, got, values)
            assert found_grads.keys() == grads.keys()
            for parameter, grad in grads.items():
                assert torch.allclose(found_grads[parameter], grad, rtol=1e-4, atol=1e-6), (name, given, parameter)


def context_of(layout: str, **given) -> dict:
    ranks, chosen = LAYOUTS[layout]
    return {"context_parallel_size": ranks, **chosen, **given}


TENSOR_MODELS = ["grouped", "alibi", "windows and sinks", "latent"]
MODEL_LAYOUTS = ["ulysses2", "ring2", "ulysses4", "double ring4 overlapped", "hybrid4"]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(MODEL_LAYOUTS, MODELS, whole=["ring2"], per_row=2))
def test_models_train_as_in_one_process(pool, layout: str, name: str):
    assert_as_alone(pool, LAYOUTS[layout][0], [(name, packed, context_of(layout)) for packed in (False, True)])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(["ulysses2", "ring2"], TENSOR_MODELS, per_row=2))
def test_with_tensor_parallelism(pool, layout: str, name: str):
    whole, sharded = ({"tensor_model_parallel_size": 2, "sequence_parallel": sequence} for sequence in (False, True))
    runs = [(name, True, context_of(layout, **whole))]
    assert_as_alone(pool, 4, [*runs, ("mixture", True, context_of(layout, **sharded))])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "stage"), sampled(["ulysses2", "ring2"], range(4), per_row=2))
def test_with_data_parallelism(pool, layout: str, stage: int):
    assert_as_alone(pool, 4, [("mixture", True, context_of(layout, zero_stage=stage))])


NEEDS = {"hybrid": "--context-parallel-algo hybrid_cp_algo", "ring": "--context-parallel-algo megatron_cp_algo"}


@pytest.mark.parametrize(
    ("given", "option", "kind", "limit"),
    [
        ({"context_parallel_algo": "hybrid_cp_algo"}, "ulysses_degree_in_cp", "missing", None),
        ({**HYBRID, "ulysses_degree_in_cp": 4}, "ulysses_degree_in_cp", "at most", 2),
        ({**HYBRID, "ulysses_degree_in_cp": 3}, "ulysses_degree_in_cp", "divides", 4),
        ({**RING, "ulysses_degree_in_cp": 2}, "ulysses_degree_in_cp", "requires", NEEDS["hybrid"]),
        ({**RING, "cp_window_size": 3}, "cp_window_size", "divides", 4),
        ({**RING, "cp_window_size": 4}, "cp_window_size", "at most", 3),
        ({**HYBRID, "cp_window_size": 2}, "cp_window_size", "at most", 1),
        ({**ULYSSES, "cp_window_size": 2}, "cp_window_size", "requires", NEEDS["ring"]),
        ({**RING, "seq_length": 28}, "seq_length", "divisible", 8),
        ({**RING, "seq_length": 30, "cp_attention_mask_type": "full"}, "seq_length", "divisible", 4),
        ({**ULYSSES, "seq_length": 30}, "seq_length", "divisible", 4),
        ({**ULYSSES, "tensor_model_parallel_size": 4}, "context_parallel_size", "divides", 8),
        ({**HYBRID, "tensor_model_parallel_size": 8}, "ulysses_degree_in_cp", "divides", 8),
    ],
)
def test_what_does_not_fit_is_reported(given: dict, option: str, kind: str, limit: object):
    config = options(4, **given)
    (problem,) = broken(config)
    found = problem.subject, problem.value, problem.kind, problem.limit
    assert found == (option, getattr(config, option), kind, limit)


def broken(config: TrainConfig) -> list[Problem]:
    placed = laws.PlacedRun(model=shape(), degrees=Degrees(), options=config)
    return [*problems(config, model_ranks(config)), *laws.context(placed)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_fits_is_not_complained_of(layout: str):
    ranks, given = LAYOUTS[layout]
    assert not broken(options(ranks, **given))
    assert not broken(options(1, seq_length=31))


# ---- a whole run -----------------------------------------------------------------------------------------------------

RUN = {"train_iters": 3, "eval_iters": 1, "eval_interval": 3, "global_batch_size": 4}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_trains_and_validates_as_in_one_process(tmp_path: Path, pool):
    one = tiny.config(tmp_path, **RUN)
    job.run(one)
    for number, (ranks, given) in enumerate([(2, ULYSSES), (4, RING)]):
        many = tiny.config(
            tmp_path,
            **RUN,
            **given,
            save=str(tmp_path / f"many{number}"),
            nproc_per_node=ranks,
            context_parallel_size=2,
        )
        pool.run(tiny.train_rank, ranks, many)
        for kind in ("train", "validation"):
            ours, theirs = tiny.records(many, kind), tiny.records(one, kind)
            assert ours.keys() == theirs.keys()
            assert all(ours[i]["loss"] == pytest.approx(theirs[i]["loss"], rel=1e-5) for i in ours)
        norms = [[record["grad_norm"] for record in tiny.records(run).values()] for run in (one, many)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_a_run_that_does_not_fit_is_found_before_it_starts(tmp_path: Path):
    given = tiny.config(tmp_path, nproc_per_node=2, context_parallel_size=2, seq_length=15)
    with pytest.raises(ProblemError) as caught:
        plan_run(given, 2)
    assert (facts(caught), limits(caught)) == ([("--seq-length", 15, "divisible")], [2])


def test_ignored_options_are_reported(tmp_path: Path):
    alone = ignored_options(tiny.config(tmp_path, cp_window_size=2, use_cp_send_recv_overlap=True))
    assert {"cp_window_size", "use_cp_send_recv_overlap"} <= {name for ignored in alone for name in ignored.names}
    ulysses = ignored_options(tiny.config(tmp_path, context_parallel_size=2, use_cp_send_recv_overlap=True))
    assert "use_cp_send_recv_overlap" in {name for ignored in ulysses for name in ignored.names}
