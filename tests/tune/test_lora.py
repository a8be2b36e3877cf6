"""LoRA against the PEFT library: forward, gradients, steps, files both ways; and one loss under every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cordee.checkpoint import adapter, files, formats
from cordee.checkpoint.source import read as read_checkpoint
from cordee.errors import ProblemError
from cordee.generate.loading import load_model
from cordee.generate.options import GenerateConfig
from cordee.model.config import LowRankConfig
from cordee.model.gpt import GPTModel
from cordee.model.specs import model_specs
from cordee.train import job, objectives
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from cordee.weights.load import load_into
from tests.data.test_tuning import columns_of, make_samples, write
from tests.problems import facts
from tests.train import tiny
from tests.tune import adapters
from tests.tune.adapters import LINEAR

peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

PLUS = 4.0  # the ratio of LoRA+
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"target_modules": list(LINEAR), "r": 4, "lora_alpha": 8}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"layers.1.*v_proj": 2}}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "packed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    "attention": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "dora": ("llama", {"target_modules": list(LINEAR), "r": 4, "use_dora": True}),
    "dora packed": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "lora plus": ("llama", {"target_modules": ["v_proj", "down_proj"]}),
}


def trained_by_peft(model: Any, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps of a run, taken by torch's AdamW on PEFT's model."""
    samples = plan_run(replace(config, save=None, save_interval=None), 1).data.open(verified=False)["train"]
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = list(named.values())
    groups = [
        {
            "params": [parameter],
            "weight_decay": config.weight_decay if parameter.ndim > 1 else 0.0,
            "lr": config.lr * ((config.lora_plus_lr_ratio or 1) if "lora_B" in name else 1),
        }
        for name, parameter in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps)
    losses, norms = [], []
    for step in range(config.train_iters or 0):
        rows = [torch.from_numpy(samples[step * tiny.BATCH + row]["tokens"]) for row in range(tiny.BATCH)]
        tokens = torch.stack(rows)
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in own]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.arange(16)[None])
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_peft(tmp_path: Path, case: str):
    """From PEFT's files, through training, into files that PEFT reads; and merged into the base."""
    name, lora = CASES[case]
    load = adapters.base(tmp_path, name)
    torch.manual_seed(1)
    theirs = adapters.peft_model(load, peft.LoraConfig(init_lora_weights=False, **lora))
    theirs.save_pretrained(tmp_path / "start")
    ratio = PLUS if case == "lora plus" else None
    config = adapters.config(
        tmp_path, load, lora_load=(str(tmp_path / "start"),), lora_plus_lr_ratio=ratio, lr=2e-3 if ratio else 1e-2
    )
    job.run(config)
    losses, norms = trained_by_peft(theirs, config)
    assert tiny.losses(config) == pytest.approx(losses, rel=1e-5)
    found = tiny.records(config)
    assert [found[step]["grad_norm"] for step in sorted(found)] == pytest.approx(norms, rel=1e-5)
    assert losses[-1] < losses[0]

    out = adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = adapters.factors(out), adapters.factors(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for key, value in ours.items():  # as a whole: of a gradient near zero Adam takes the sign, which may be rounding
        assert (value - expected[key]).norm() <= 1e-3 * expected[key].norm(), key
    again = adapters.peft_model(load, adapter=out)
    torch.testing.assert_close(logits(again.eval()), logits(theirs.eval()), rtol=1e-4, atol=1e-4)
    merged = adapters.convert(config.save, tmp_path / "merged")
    assert load_file(merged / "model.safetensors").keys() == load_file(load / "model.safetensors").keys()
    torch.testing.assert_close(logits(load_model(formats.read(merged))), logits(again), rtol=1e-5, atol=1e-5)


def of_model(config: TrainConfig) -> torch.Tensor:
    """What the model of the newest checkpoint of a run computes."""
    return logits(load_model(formats.read(config.save or "")))


def test_experts_in_peft(tmp_path: Path):
    """Each expert's own adapters, trained here, are those that PEFT finds in the files, and merges alike."""
    load = adapters.base(tmp_path, "mixtral")
    options = {"lora_target_modules": ("all-linear",), "lora_r": 2, "lora_alpha": 6.0, "train_iters": 3}
    config = adapters.config(tmp_path, load, **options)
    job.run(config)
    out = adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    model = adapters.peft_model(load, adapter=out).eval()
    torch.testing.assert_close(of_model(config), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(of_model(config), logits(load_model(formats.read(load))), atol=1e-3)
    source = adapter.read(str(load), GenerateConfig(load=str(load)), str(out))
    torch.testing.assert_close(logits(load_model(source)), of_model(config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_merged_model_is_the_one_that_was_trained(tmp_path: Path, name: str):
    """Also where experts are one stack in the files, of which PEFT's have no adapters."""
    load = adapters.base(tmp_path, name)
    config = adapters.config(tmp_path, load, lora_target_modules=("all-linear",), train_iters=3)
    job.run(config)
    source = read_checkpoint(config.save or "")
    model = GPTModel(source.spec.config)
    load_into(model, formats.read(load), origins={"base"})
    load_into(model, source, origins={"adapter"})
    torch.testing.assert_close(of_model(config), logits(model.eval()), rtol=1e-5, atol=1e-5)
    if name == "gpt_oss":
        with pytest.raises(ProblemError) as caught:
            adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
        assert facts(caught) == [("--save-model-type", "peft", "unsupported")]


# ---- layouts ---------------------------------------------------------------------------------------------------------

ALL = {"lora_target_modules": ("all-linear",), "lora_r": 4, "train_iters": 4, "save_interval": 2}
DENSE = {**ALL, "lora_dropout": 0.2, "lora_modules_to_save": ("lm_head", "norm"), "stage": "sft", "eval_iters": 1}
RUNS = {"llama": DENSE, "mixtral": ALL}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2 sequence": ("llama", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": ("llama", {"pipeline_model_parallel_size": 2}),
    "zero3": ("llama", {"zero_stage": 3}),
    "cp2": ("llama", {"context_parallel_size": 2}),
    "ep2": ("mixtral", {"expert_model_parallel_size": 2}),
}


def given(folder: Path, load: Path, name: str, **options: Any) -> TrainConfig:
    if name == "llama":
        prefix = folder / "dialogues"
        if not list(folder.glob("dialogues*")):
            write(prefix, columns_of(make_samples(60, 20)))
        options = {"data_path": (str(prefix),), "variable_seq_lengths": True, "pad_to_multiple_of": 2, **options}
    return adapters.config(folder, load, **{"micro_batch_size": 1, **RUNS[name], **options})


def train(rank: int, world_size: int, config: TrainConfig) -> None:
    tiny.train_rank(rank, world_size, objectives.named(config.stage).ready(config))


def figures(config: TrainConfig) -> dict[str, list[float]]:
    found = tiny.records(config)
    return {name: [found[step][name] for step in sorted(found)] for name in ("loss", "grad_norm")}


def stored(config: TrainConfig) -> dict[str, torch.Tensor]:
    source = read_checkpoint(config.save or "")
    return {name: source.tensor(name) for name in source.names()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], TrainConfig]:
    """A run in one process, by the name of its model."""

    @functools.cache
    def trained(name: str) -> TrainConfig:
        folder = tmp_path_factory.mktemp("alone")
        config = given(folder, adapters.base(folder, name), name)
        train(0, 1, config)
        return config

    return trained


AS_STORED = dict.fromkeys(("lora_target_modules", "lora_r", "lora_dropout", "lora_modules_to_save"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_loss_under_every_layout(pool, alone, tmp_path: Path, layout: str):
    """With dropout, and modules trained as a whole; half of the steps on one rank, from its checkpoint."""
    name, options = LAYOUTS[layout]
    reference = alone(name)
    config = given(tmp_path, Path(reference.load), name, **options)
    pool.run(train, 2, replace(config, exit_interval=2))
    train(0, 1, given(tmp_path, Path(config.save or ""), name, **AS_STORED))
    for figure, values in figures(reference).items():
        assert figures(config)[figure] == pytest.approx(values, rel=1e-5), figure
    found, expected = stored(config), stored(reference)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_has_what_is_trained_and_nothing_else(alone, name: str):
    config = alone(name)
    model = read_checkpoint(config.save or "").spec.config
    trained = {key for key, spec in model_specs(model).items() if spec.origin != "base"}
    assert trained == stored(config).keys() and {key.rpartition(".")[2] for key in trained} <= {"a", "b", "weight"}
    kept = files.tensors(files.read_metadata(read_checkpoint(config.save or "").path))
    assert {key.split(".", 1)[1] for key in kept if key.startswith("model.")} == trained
    assert {key.split(".", 1)[1].rpartition(".")[0] for key in kept if key.startswith("optimizer.")} == trained
    if name == "llama":
        assert {key for key in trained if "adapters" not in key} == {"final_norm.weight", "head.weight"}


@pytest.mark.parametrize("name", RUNS)
def test_adapters_over_their_base_and_no_other(alone, tmp_path: Path, name: str):
    """Merged where a model is run, by the run alone, beside the base, or from PEFT's files; refused by another base."""
    config = alone(name)
    run, load = str(config.save), str(config.load)
    out = adapters.convert(run, tmp_path / "out", "--save-model-type", "peft")
    expected = of_model(config)
    for path in (run, str(out)):
        source = adapter.read(load, GenerateConfig(load=load), path)
        torch.testing.assert_close(logits(load_model(source)), expected, rtol=1e-5, atol=1e-5)
    merged = adapters.convert(load, tmp_path / "merged", "--lora-load", run, "--verify")
    torch.testing.assert_close(logits(load_model(formats.read(merged))), expected, rtol=1e-5, atol=1e-5)

    other = str(adapters.base(tmp_path / "other", name, seed=1))
    with pytest.raises(ProblemError) as caught:
        adapter.read(other, GenerateConfig(load=other), run)
    assert facts(caught) == [("--lora-load", f"{run}/iter_0000004", "base")]
    resumed = replace(config, load=other, lora_load=(run,), save=None, save_interval=None)
    assert [(each.option, each.kind) for each in check_run(resumed)] == [("--lora-load", "base")]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        ("all-linear", "attention.q attention.k attention.v attention.out mlp.gate mlp.up mlp.down"),
        ("query_key_value dense dense_h_to_4h dense_4h_to_h", "attention.qkv attention.out mlp.gate_up mlp.down"),
        ("query_key_value gate_proj dense_h_to_4h", "attention.qkv mlp.gate mlp.up"),  # of AscendSpeed
        ("linear_qkv linear_proj linear_fc1 linear_fc2", "attention.qkv attention.out mlp.gate_up mlp.down"),
        ("layers.1.self_attn.q_proj v", "layers.1.attention.q attention.v"),
        ("lm_head", "head"),
    ],
)
def test_names_of_modules(tmp_path: Path, names: str, targets: str):
    config = adapters.config(tmp_path, adapters.base(tmp_path, "llama"), lora_target_modules=tuple(names.split()))
    (low_rank,) = plan_run(config, 1).spec.config.low_rank
    assert low_rank == LowRankConfig(targets=low_rank.targets, rank=16, scale=2.0)
    assert set(low_rank.targets) == set(targets.split())
    stable = replace(config, use_rslora=True, lora_r=4, lora_alpha=6.0)
    assert plan_run(stable, 1).spec.config.low_rank[0].scale == 3.0


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("llama", {"lora_target_modules": ("q_prj",)}, ("--lora-target-modules", "q_prj")),
        ("llama", {"lora_r": 8}, ("--lora-r", 8)),
        (
            "llama",
            {"lora_target_modules": ("q",), "lora_modules_to_save": ("q_proj",)},
            ("--lora-modules-to-save", "q_proj"),
        ),
        ("llama", {"lora_target_modules": ("q",), "load": None}, ("--lora-target-modules", ("q",))),
        ("llama", {"lora_load": ("BASE",)}, ("--lora-load", "BASE")),
        ("llama", {"lora_load": ("NOWHERE",)}, ("--lora-load", "NOWHERE")),
        ("mixtral", {"lora_target_modules": ("w1",), "lora_dropout": 0.1}, ("low_rank: dropout", 0.1)),
    ],
)
def test_what_does_not_fit_is_a_problem_of_the_check(tmp_path: Path, name: str, options: dict[str, Any], expected):
    load = adapters.base(tmp_path, name)
    places = {"BASE": str(load), "NOWHERE": str(tmp_path / "nowhere")}
    given = {k: tuple(places.get(each, each) for each in v) if k == "lora_load" else v for k, v in options.items()}
    config = replace(adapters.config(tmp_path, load), **given)
    found = {(each.option, each.value) for each in check_run(config)}
    option, value = expected
    assert (option, places.get(str(value), value)) in found


def test_adapters_that_are_loaded_keep_their_form(alone):
    resumed = replace(alone("llama"), load=alone("llama").save, save=None, save_interval=None)
    assert check_run(replace(resumed, **AS_STORED)) == []
    assert check_run(replace(resumed, lora_plus_lr_ratio=2.0, lora_dropout=0.0, lora_alpha=32.0)) == []
    wrong = {"lora_r": 8, "lora_alpha": 1.0, "lora_target_modules": ("q",), "lora_modules_to_save": ("embed_tokens",)}
    found = {(each.subject, each.kind) for each in check_run(replace(resumed, **wrong))}
    assert found == {(name, "stated") for name in wrong}
    anew = plan_run(
        objectives.named("sft").ready(replace(resumed, finetune=True)), 1
    )  # from the adapters, but from the first step
    assert anew.resumed is None and anew.initial.checkpoint is not None


def test_what_peft_has_and_training_has_not(tmp_path: Path):
    load = adapters.base(tmp_path, "llama")
    adapters.peft_model(load, peft.LoraConfig(target_modules=["q_proj"], bias="all")).save_pretrained(tmp_path / "bias")
    config = adapters.config(tmp_path, load, lora_load=(str(tmp_path / "bias"),))
    assert [(each.option, each.kind) for each in check_run(config)] == [("--lora-load", "unsupported")]


def test_a_head_that_is_tied(tmp_path: Path):
    """One table for both is trained as one, which PEFT's files cannot say; an adapter of one of them would untie it."""
    load = adapters.base(tmp_path, "tied")
    config = adapters.config(tmp_path, load, lora_target_modules=("q",), lora_modules_to_save=("embed_tokens",))
    job.run(replace(config, train_iters=2))
    assert not torch.equal(stored(config)["embedding.weight"], formats.read(load).tensor("embedding.weight"))
    merged = adapters.convert(config.save, tmp_path / "merged")
    assert torch.equal(logits(load_model(formats.read(merged))), of_model(config))
    with pytest.raises(ProblemError) as caught:
        adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    assert facts(caught) == [("--save-model-type", "peft", "unsupported")]
    for name in ("embed_tokens", "head"):
        wrong = replace(config, lora_target_modules=(name,), lora_modules_to_save=None, save=None)
        wrong = replace(wrong, save_interval=None)
        assert [(each.option, each.kind) for each in check_run(wrong)] == [("--lora-target-modules", "tied")]
