"""Reward models: scores and losses are those of transformers' classifiers, whatever the layout; so are their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cordee import GPTModel
from cordee.checkpoint import formats
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data.messages import IGNORED
from cordee.data.tuning_collate import last_tokens
from cordee.errors import ProblemError
from cordee.evaluate import job as evaluate
from cordee.evaluate.options import EvaluateConfig
from cordee.families.registry import spec_from_directory, spec_from_hf
from cordee.generate import job as generate
from cordee.generate.loading import load_model
from cordee.generate.options import GenerateConfig
from cordee.model import gpt
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.matrix import sampled
from tests.train import tiny
from tests.train.test_preference import LAYOUTS, figures, given, once, ready, train
from tests.weights.tiny import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PAD = tiny.VOCAB  # a token that the data has not
CENTER = 0.3
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": tiny.VOCAB + 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {},
    "adapters": {"lora_target_modules": ("all-linear",), "lora_r": 4},  # over a language model, whose head is untied
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Reward models of two families, one with a tied embedding, and a language model."""
    import transformers as hf

    made = {"llama": "LlamaForSequenceClassification", "gemma": "GemmaForSequenceClassification"}
    made["adapters"] = "LlamaForCausalLM"
    for name, architecture in made.items():
        torch.manual_seed(len(name))
        shape = SHAPE if name == "adapters" else {**SHAPE, "num_labels": 1}
        config = (hf.GemmaConfig if name == "gemma" else hf.LlamaConfig)(**shape)
        made[name] = str(tmp_path_factory.mktemp(name))
        getattr(hf, architecture)(config).save_pretrained(made[name])
    return made


def rewarding(folder: Path, models: dict[str, str], kind: str, **options: Any) -> TrainConfig:
    load, common = models[kind], {"rm_center_coefficient": CENTER, **KINDS[kind]}
    return given(folder, (load, load), stage="rm", **{**common, **options})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models) -> Callable[[str], TrainConfig]:
    """Of one pair a micro-batch."""
    return once(lambda kind: rewarding(tmp_path_factory.mktemp("alone"), models, kind))


def rows_of(config: TrainConfig) -> list[tuple[Tensor, Tensor]]:
    """The pairs of the first step."""
    dataset = plan_run(replace(ready(config), save=None, save_interval=None), 1).data.open(verified=False)["train"]
    samples = [dataset[index] for index in range(config.global_batch_size or 1)]
    return [tuple(torch.from_numpy(s[f"{side}_input_ids"]) for side in ("chosen", "rejected")) for s in samples]


def classifier(path: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values())
    return model.eval()


@torch.no_grad()
def scores(model: GPTModel, rows: list[Tensor]) -> list[float]:
    """By ours, of each row alone."""
    return [model(row[None])[0, -1].item() for row in rows]


@torch.no_grad()
def their_scores(model: Any, rows: list[Tensor]) -> list[float]:
    """By transformers, padded to one batch."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    return model(padded, attention_mask=padded != model.config.pad_token_id).logits[:, 0].tolist()


# ---- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_is_what_the_formula_gives(alone, models, kind: str):
    """The first step: the loss, its gradient and what is reported, of the logits of transformers in float64."""
    config, model = alone(kind), classifier(models[kind], dtype=torch.float64)
    sides = [
        torch.stack([model(row[None]).logits[0, 0] for row in side]) for side in zip(*rows_of(config), strict=True)
    ]
    chosen, rejected = sides
    loss = -torch.log(1 / (1 + torch.exp(rejected - chosen))).mean() + CENTER * ((chosen + rejected) ** 2).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    wanted = {"loss": loss, "grad_norm": norm, "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    wanted |= {"rewards/margins": (chosen - rejected).mean(), "rewards/accuracies": (chosen > rejected).double().mean()}
    found = figures(config)
    for figure, value in wanted.items():
        assert found[figure][0] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), figure


@pytest.mark.parametrize(("layout", "kind"), sampled(LAYOUTS, KINDS, whole=["tp2 sequence", "cp2 ring"]))
def test_one_loss_under_every_layout(pool, alone, models, tmp_path: Path, layout: str, kind: str):
    ranks, options = LAYOUTS[layout]
    config = rewarding(tmp_path, models, kind, **options)
    pool.run(train, ranks, config)
    wanted, found = figures(alone(kind)), figures(config)
    assert len(found["loss"]) == 3 and len(found["validation"]) == 2
    for figure, values in wanted.items():
        assert found[figure] == pytest.approx(values, rel=1e-5, abs=1e-6), figure


@pytest.mark.parametrize("kind", ["llama", "adapters"])
def test_resumes(pool, alone, models, tmp_path: Path, kind: str):
    """On other ranks too, which have to find the head that was drawn and trained beside adapters."""
    first = rewarding(tmp_path, models, kind, exit_interval=1, save_interval=1)
    train(0, 1, first)
    pool.run(train, 2, tiny.resumed(first, tensor_model_parallel_size=2, exit_interval=2))
    train(0, 1, tiny.resumed(first))
    assert figures(first)["loss"] == pytest.approx(figures(alone(kind))["loss"], rel=1e-5)


def test_the_last_token_of_an_answer():
    """Behind the last label; of a row without any, the last one that is no padding."""
    x = IGNORED
    labels = torch.tensor([[x, 5, 6, x, x], [x, x, x, x, x], [7, x, x, 7, x]])
    counted = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert last_tokens(labels, counted).nonzero().tolist() == [[0, 3], [1, 2], [2, 4]]
    assert last_tokens(labels).nonzero().tolist() == [[0, 3], [1, 4], [2, 4]]


# ---- files -----------------------------------------------------------------------------------------------------------


def converted(source: str, folder: Path, **options: Any) -> Path:
    convert.run(ConvertConfig(load_dir=source, save_dir=str(folder), **options))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_has_the_same_scores(alone, models, tmp_path: Path, kind: str):
    """Of a model of theirs that is read, of what is trained and written, and of that where it is read again."""
    config = alone(kind)
    assert config.save is not None
    rows = [row for pair in rows_of(config) for row in pair]
    if kind != "adapters":
        assert scores(GPTModel.from_pretrained(models[kind]), rows) == pytest.approx(
            their_scores(classifier(models[kind]), rows), rel=1e-5, abs=1e-5
        )
    trained = load_model(formats.read(config.save))
    written = converted(config.save, tmp_path / "hf", verify=True)
    wanted = scores(trained, rows)
    assert their_scores(classifier(written), rows) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    settings = json.loads((written / "config.json").read_text())
    assert check_run(rewarding(tmp_path, {kind: str(written)}, kind, save=str(tmp_path / "next"))) == []
    assert settings["id2label"] == {"0": "LABEL_0"} and settings["pad_token_id"] == PAD
    assert scores(GPTModel.from_pretrained(written), rows) == pytest.approx(wanted, rel=1e-6)
    again = converted(str(converted(str(written), tmp_path / "dcp", save_model_type="dcp")), tmp_path / "again")
    assert their_scores(classifier(again), rows) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_peft_has_the_same_scores(alone, models, tmp_path: Path):
    """The head that is trained beside adapters goes with them."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
    from transformers import AutoModelForSequenceClassification

    config = alone("adapters")
    rows = [row for pair in rows_of(config) for row in pair]
    written = converted(config.save, tmp_path / "peft", save_model_type="peft")
    base = AutoModelForSequenceClassification.from_pretrained(models["adapters"], num_labels=1)
    model = peft.PeftModel.from_pretrained(base, written).eval()
    assert their_scores(model, rows) == pytest.approx(
        scores(load_model(formats.read(config.save)), rows), rel=1e-5, abs=1e-5
    )


def test_goes_on_from_what_it_has_written(alone, models, tmp_path: Path):
    """A reward model that is loaded keeps its head: the first loss is that of the checkpoint itself."""
    config = alone("adapters")
    written = converted(config.save, tmp_path / "hf")
    options = {"train_iters": 1, "lr_warmup_iters": 0, "lr_decay_style": "constant"}
    files = rewarding(tmp_path / "a", {"llama": str(written)}, "llama", **options)
    run = rewarding(tmp_path / "b", {"adapters": str(config.save)}, "adapters", finetune=True, **options)
    runs = (files, run)
    for each in runs:
        train(0, 1, each)
    assert figures(runs[0])["loss"] == pytest.approx(figures(runs[1])["loss"], rel=1e-5)


def test_begins_at_the_checkpoint_of_a_language_model(models, tmp_path: Path):
    """The head that is drawn is a function of the seed, whatever the format of the weights beside it."""
    options = {"train_iters": 1, "lr_warmup_iters": 0, "lr_decay_style": "constant"}
    tuned = given(tmp_path / "sft", (models["adapters"],) * 2, stage="simpo", save_interval=1, **options)
    train(0, 1, tuned)
    loads = {"run": str(tuned.save), "hf": str(converted(str(tuned.save), tmp_path / "hf"))}
    runs = [
        rewarding(tmp_path / f"of {name}", {"llama": path}, "llama", finetune=name == "run", **options)
        for name, path in loads.items()
    ]
    for each in runs:
        train(0, 1, each)
    assert figures(runs[0])["loss"] == pytest.approx(figures(runs[1])["loss"], rel=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_with_more_labels_is_no_reward_model(models, tmp_path: Path):
    hf = json.loads((Path(models["llama"]) / "config.json").read_text())
    for labels in ({"id2label": {"0": "no", "1": "yes"}}, {"id2label": None}, {"num_labels": 3}):
        (tmp_path / "config.json").write_text(json.dumps({**hf, **labels}))
        with pytest.raises(ProblemError) as found:
            spec_from_directory(tmp_path)
        assert [problem.kind for problem in found.value.problems] == ["labels"]


def kinds(problems: list[Any]) -> list[tuple[str, str]]:
    return [(problem.option, problem.kind) for problem in problems]


def test_what_has_no_head_over_the_vocabulary_writes_no_text(alone, models, tmp_path: Path):
    load = models["llama"]
    for found in (
        generate.check_run(GenerateConfig(load=load, prompt=("1 2",), tokenizer_type="NullTokenizer", vocab_size=61)),
        evaluate.check_run(EvaluateConfig(load=load, task="perplexity", task_data_path="x")),
        check_run(given(tmp_path, (load, load), stage="dpo")),
    ):
        assert ("--load", "reward model") in kinds(found)
    referring = check_run(given(tmp_path, (models["adapters"], load), stage="dpo"))
    assert kinds(referring) == [("--ref-model", "reward model")]
    with pytest.raises(ProblemError):
        GPTModel.from_pretrained(load).generate([1, 2])


def test_a_language_model_with_values_writes_text(models):
    """The value head is no part of what writes; what trains a language model leaves it out."""
    spec, notes = spec_from_directory(models["adapters"]).with_heads(score=True, lm_head=True), []
    model = gpt.GPTModel(spec.config)
    model.bind(1, 8)
    assert "score.weight" in dict(model.named_parameters())
    assert not spec.without_values("--load", notes).config.score and notes


def test_only_transformers_has_a_place_for_it(alone, tmp_path: Path):
    for target in ("mg", "gguf", "mindformers"):
        options = ConvertConfig(load_dir=alone("llama").save, save_dir=str(tmp_path / target), save_model_type=target)
        assert ("--save-model-type", "reward model") in kinds(convert.check_run(options))


@pytest.mark.parametrize(
    ("given", "padding"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 3}, 3),
        ({"eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": 3}, 1),
        ({"eos_token_id": 60, "bos_token_id": 60}, 59),
        ({"eos_token_id": 2, "bos_token_id": None}, 60),
    ],
)
def test_padding_ends_no_text(given: dict[str, Any], padding: int):
    """Else transformers takes the score at the token before the end."""
    written = spec_from_hf({**LLAMA, **given}).with_heads(score=True, lm_head=False).hf_config
    assert written["pad_token_id"] == padding
