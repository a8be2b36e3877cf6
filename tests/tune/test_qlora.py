"""QLoRA: the paper's formulas, PEFT over the dequantised base, memory of the codes, and one loss under layouts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cordee.checkpoint import formats
from cordee.families.registry import spec_from_hf
from cordee.model.config import LowRankConfig
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.model.low_rank import quantised
from cordee.model.parameter import parameter_specs, train_only
from cordee.ops.quantise import Quantised
from cordee.parallel import apply, cost
from cordee.parallel.degrees import Degrees, degrees
from cordee.parallel.layout import Layout
from cordee.parallel.live import LiveSource, refill
from cordee.parallel.quantised import QuantisedBase
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from cordee.weights.load import fill_lengths, load_into
from tests.train import test_preference, tiny
from tests.tune import adapters
from tests.tune.test_lora import figures, logits, of_model, stored, train, trained_by_peft
from tests.weights import models
from tests.weights import tiny as saved

peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

# The paper's Appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
WIDE: dict[str, Any] = {  # halves of its projections are whole blocks of 64 columns and whole groups of 256 rows
    **models.MODELS["llama"],
    "hidden_size": 128,
    "head_dim": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
}
MODELS = {
    "wide": WIDE,
    "mixtral": adapters.MODELS["mixtral"],
    "latent": {**models.MODELS["deepseek_v3"], "num_hidden_layers": 3},
}


# ---- plain formulas --------------------------------------------------------------------------------------------------


def plain_nf4(weight: Tensor) -> Tensor:
    """What the paper makes of a weight: blocks of 64 by their absmax to the nearest level; log2 of absmaxes, 256 of a
    column at a time, less their mean in 8 bits, mean and scale in bfloat16."""
    if weight.ndim > 2:
        return torch.stack([plain_nf4(each) for each in weight])
    levels, columns = torch.tensor(NF4), []
    for block in weight.split(64, 1):
        absmax = block.abs().amax(1)
        nearest = (block[..., None] / absmax[:, None, None] - levels).abs().argmin(-1)
        kept = []
        for group in absmax.log2().split(256):
            mean = group.mean().bfloat16().float()
            scale = ((group - mean).abs().max() / 127).bfloat16().float()
            kept.append(((group - mean) / scale).round().clamp(-127, 127) * scale + mean)
        columns.append(levels[nearest] * torch.exp2(torch.cat(kept))[:, None])
    return torch.cat(columns, 1)


def plain_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale).round() * scale


PLAIN = {"nf4": plain_nf4, "int8": plain_int8}


@pytest.mark.parametrize(("kind", "bits", "low", "high"), [("nf4", 4.127, 0.09, 0.1), ("int8", 8.1, 0.006, 0.01)])
@pytest.mark.parametrize("shape", [(3, 200, 100), (1024, 1024)])
def test_codes_are_those_of_the_formula(kind: str, bits: float, low: float, high: float, shape: tuple[int, ...]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes = Quantised(kind)
    codes.fill(weight)
    found = codes.dequantised()
    torch.testing.assert_close(found, PLAIN[kind](weight), rtol=1e-6, atol=1e-6)
    assert low < (found - weight).square().mean().sqrt() < high
    if shape[-1] % 64 == 0:
        assert 8 * size(codes) <= bits * weight.numel()
    codes.fill(torch.zeros(shape))
    assert not codes.dequantised().any()
    weight[..., 0, :] *= 1e3  # an outlier costs the other rows nothing, nor does a row of zeros
    weight[..., 1, :] = 0
    codes.fill(weight)
    error = (codes.dequantised() - weight)[..., 1:, :]
    assert low < error.square().mean().sqrt() < high and not error[..., 0, :].any()


def size(codes: Quantised) -> int:
    """In bytes."""
    return sum(each.numel() * each.element_size() for each in codes.tensors)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model by its name, or of it with dequantised weights."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def made(name: str, kind: str | None = None) -> Path:
        spec = spec_from_hf(MODELS[name])
        tensors = saved.tensors_of(spec)
        scaled = {key: 1 + 0.1 * value if "norm" in key else 0.05 * value for key, value in tensors.items()}
        if kind is not None:
            gemms = {f"{path}.weight" for path in spec.config.gemms()}
            for rule in (rule for name, rule in spec.rules().items() if name in gemms):
                whole = PLAIN[kind](rule.forward([scaled[each] for each in rule.foreign]))
                scaled |= {key: part.clone() for key, part in zip(rule.foreign, rule.inverse(whole), strict=True)}
        saved.save(folder / f"{name}-{kind}", MODELS[name], scaled)
        return folder / f"{name}-{kind}"

    return made


def adapted(load: Path, kind: str | None, dora: bool = False) -> GPTModel:
    """The model at `load` with adapters that are no longer as they begin, its base quantised."""
    source = formats.read(load)
    low_rank = LowRankConfig(targets=tuple(source.spec.config.gemms()), rank=2, scale=1.0, dora=dora)
    model = GPTModel(replace(source.spec.config, low_rank=(low_rank,)), device="meta")
    train_only(model, ("adapter",))
    if kind is not None:
        QuantisedBase(kind=kind).apply(model)
    load_into(model, source, origins={"base"})
    initialise(model, 0, {"adapter"})
    fill_lengths(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(("name", "dora"), [("wide", False), ("wide", True), ("mixtral", False), ("latent", False)])
def test_forward_and_gradients_are_those_of_dequantised_weights(base, name: str, dora: bool, kind: str):
    found, expected = adapted(base(name), kind, dora), adapted(base(name, kind), None, dora)
    ids = torch.arange(24).view(2, 12)
    values = [model(ids) for model in (found, expected)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    for value in values:
        value.square().mean().backward()
    wanted = {key: parameter.grad for key, parameter in expected.named_parameters() if parameter.requires_grad}
    assert len(wanted) > 8 and all(grad is not None and grad.any() for key, grad in wanted.items() if key[-1] != "m")
    for key, grad in wanted.items():
        torch.testing.assert_close(found.get_parameter(key).grad, grad, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.14), ("int8", 0.26)])
def test_memory_is_that_of_the_codes(base, tmp_path: Path, kind: str, share: float):
    """All GEMMs of layers and no more are quantised, nothing of them is kept beside the codes, or for the backward."""
    model = adapted(base("wide"), kind)
    codes, specs = quantised(model), parameter_specs(model)
    assert codes.keys() == {
        name for name in specs if name.startswith("layers.") and len(specs[name].shape) > 1 and name.endswith(".weight")
    }
    held = sum(size(module.quantised) for module in codes.values())
    assert held <= share * sum(4 * module.weight.numel() for module in codes.values())
    assert all(module.weight.is_meta for module in codes.values())
    count = cost.count(model.config, Degrees(), trained=("adapter",))
    foreseen = cost.cost(given(tmp_path, base("wide"), "wide"), Degrees(), count, kind)
    rest = sum(4 * each.numel() for each in model.parameters() if not each.is_meta)
    assert foreseen.weights * foreseen.parameters == pytest.approx(held + rest, rel=0.03)

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.arange(8)[None])
    matrices = {module.weight.numel() for module in codes.values()}
    assert kept and not matrices & {each.numel() for each in kept}


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_five_steps_are_those_of_peft(base, tmp_path: Path, kind: str):
    """Over the dequantised weights; the adapters are then those of the base as it was."""
    torch.manual_seed(1)
    lora = peft.LoraConfig(target_modules=list(adapters.LINEAR), r=4, init_lora_weights=False)
    theirs = adapters.peft_model(base("wide", kind), lora)
    theirs.save_pretrained(tmp_path / "start")
    start = str(tmp_path / "start")
    config = adapters.config(tmp_path, base("wide"), lora_load=(start,), quantise_base=kind, lr=3e-3, train_iters=5)
    job.run(config)
    losses, norms = trained_by_peft(theirs, config)
    assert figures(config) == {"loss": pytest.approx(losses, rel=1e-5), "grad_norm": pytest.approx(norms, rel=1e-5)}
    assert len(set(losses)) == 5
    out = adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    whole = adapters.peft_model(base("wide"), adapter=out).eval()
    torch.testing.assert_close(of_model(config), logits(whole), rtol=1e-4, atol=1e-4)
    assert {key.rpartition(".")[2] for key in stored(config)} == {"a", "b"}


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("wide", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": ("wide", {"pipeline_model_parallel_size": 2}),
    "zero1": ("wide", {"zero_stage": 1}),
    "zero3": ("wide", {"zero_stage": 3}),
    "ep2": ("mixtral", {"expert_model_parallel_size": 2}),
}


def given(folder: Path, load: Path | str, name: str, **options: Any) -> TrainConfig:
    """A prefix and LoRA over NF4, four steps."""
    targets = ("q", "down") if name == "wide" else ("q", "experts.up")
    own = {"lora_target_modules": targets, "lora_r": 2, "num_prefix_tokens": 3, "quantise_base": "nf4", "lr": 1e-3}
    own |= {"micro_batch_size": 1, "train_iters": 4, "save_interval": 2}
    return adapters.config(folder, Path(load), **{**own, **options})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base):
    """Such a run in one process, by the name of its model."""

    @cache
    def trained(name: str) -> TrainConfig:
        config = given(tmp_path_factory.mktemp("alone"), base(name), name)
        train(0, 1, config)
        return config

    return trained


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_loss_under_every_layout(pool, alone, tmp_path: Path, layout: str):
    """Half of the steps on one rank, from the checkpoint of the layout."""
    name, options = LAYOUTS[layout]
    reference = alone(name)
    config = given(tmp_path, str(reference.load), name, **options)
    pool.run(train, 2, replace(config, exit_interval=2))
    own = {"num_prefix_tokens": None, "lora_target_modules": None, "lora_r": None}
    train(0, 1, given(tmp_path, str(config.save), name, **own))
    for figure, values in figures(reference).items():
        assert figures(config)[figure] == pytest.approx(values, rel=1e-5), figure
    for key, value in stored(reference).items():
        torch.testing.assert_close(stored(config)[key], value, rtol=1e-4, atol=2e-4, msg=key)


def copied(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor]:
    """The GEMMs of a copy of the model that a run trains, on one rank."""
    layout, spec = Layout(degrees(config, world_size)), plan_run(config, world_size).spec
    model, whole = GPTModel(spec.config, device="meta"), GPTModel(spec.config)
    train_only(model, ("adapter",))
    apply.apply(model, layout, config, torch.device("cpu"), [QuantisedBase(kind="nf4")])
    load_into(model, formats.read(str(config.load)), origins={"base"})
    initialise(model, 0, {"adapter"})
    refill(whole, LiveSource(model, spec, layout))
    return {name: whole.get_parameter(name).detach() for name in quantised(model)}


@pytest.mark.parametrize("layout", ["tp2", "zero3"])
def test_shards_have_the_codes_of_the_whole(pool, base, tmp_path: Path, layout: str):
    """Also for the model that writes the rollouts of a run, a copy of the one that is trained."""
    config = given(tmp_path, base("wide"), "wide", **LAYOUTS[layout][1], save=None, save_interval=None)
    expected = formats.read(base("wide", "nf4"))
    for found in pool.run(copied, 2, config):
        assert found.keys() >= {"layers.0.attention.qkv.weight", "layers.1.mlp.down.weight"}
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected.tensor(name), rtol=1e-6, atol=1e-7)


def test_the_reference_is_quantised_as_what_is_compared_with_it(base, tmp_path: Path):
    """So that before the first update nothing is gained."""
    test_preference.make_data(tmp_path)
    data = {"stage": "dpo", "data_path": (str(tmp_path / "pairs"),), "variable_seq_lengths": True}
    config = given(tmp_path, base("wide"), "wide", **data, num_prefix_tokens=None, train_iters=1, save_interval=1)
    train(0, 1, config)
    metrics = tiny.records(config)[1]["metrics"]
    assert metrics["rewards/chosen"] == pytest.approx(0, abs=1e-6)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"lora_target_modules": None, "lora_r": None}, ("--quantise-base", "requires")),
        ({"tensor_model_parallel_size": 2, "tp_comm_overlap": True}, ("--quantise-base", "excludes")),
    ],
)
def test_what_does_not_fit_is_a_problem_of_the_check(base, tmp_path: Path, options: dict[str, Any], expected):
    own = {"num_prefix_tokens": None, "save": None, "save_interval": None, "nproc_per_node": 2}
    config = replace(given(tmp_path, base("wide"), "wide", **own), **options)
    found = {(each.option, each.kind) for each in check_run(config)}
    assert expected in found if expected else not found
