"""A run is checked as a whole before it starts, without torch, and goes on only from what it fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of
from cordee.config.load import load_as_far_as_possible
from cordee.data.build import build_datasets
from cordee.errors import ProblemError
from cordee.families.registry import ModelSpec, spec_from_options, spec_from_preset
from cordee.model.config import LayerConfig
from cordee.model.options import ModelOptions
from cordee.train import job
from cordee.train.check import check_with_contents
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def options_of(problems) -> list[str]:
    return [problem.option for problem in problems]


def test_a_good_run(tmp_path: Path):
    given = tiny.config(tmp_path, eval_iters=2)
    assert check_run(given) == []
    plan = plan_run(given, 2)
    assert plan.iterations == 6
    assert plan.data.samples == {"train": 48, "valid": 16, "test": 0}
    assert plan.degrees.data == 2
    assert plan.resumed is None and plan.initial.weights is None


def test_records_of_another_run_are_noted(tmp_path: Path):
    """Not where the run resumes, and not where there is nothing yet."""
    places = {"metrics_file": str(tmp_path / "m.jsonl"), "tensorboard_dir": str(tmp_path / "board")}
    first = tiny.config(tmp_path, **places, exit_interval=2)

    def noted(given: TrainConfig) -> list[bool]:
        notes = plan_run(given, 1).notes
        return [any(place in note for note in notes) for place in places.values()]

    assert noted(first) == [False, False]
    job.run(first)
    assert noted(tiny.resumed(first)) == [False, False]
    assert noted(replace(first, save=str(tmp_path / "second"))) == [True, True]


def test_check_needs_no_torch(tmp_path: Path):
    given = tiny.config(tmp_path)
    script = f"""
import sys
from pathlib import Path
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run
assert check_run(TrainConfig(**{vars(given)!r})) == []
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=180)


def test_all_problems_at_once(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    given = tiny.config(tmp_path, stage="alchemy", data_path=(str(tmp_path / "absent"),), max_position_embeddings=None)
    found = options_of(check_run(given))
    assert {"--stage", "--save", "--max-position-embeddings"} < set(found)
    assert sum("absent" in str(problem) for problem in check_run(given)) == 1
    assert len(set(map(str, check_run(given)))) == len(found)


def test_options_model_data_and_places_in_one_round(tmp_path: Path):
    (tmp_path / "board").write_text("a file")
    given = tiny.config(
        tmp_path,
        lr_warmup_iters=6,
        max_position_embeddings=8,
        num_query_groups=3,
        data_path=(str(tmp_path / "absent"),),
        tensorboard_dir=str(tmp_path / "board"),
        metrics_file=str(tmp_path),
    )
    problems = check_run(given)
    options = options_of(problems)
    assert {"--lr-warmup-iters", "--seq-length", "--tensorboard-dir", "--metrics-file"} < set(options)
    assert options.count("--seq-length") == 1
    said = "\n".join(map(str, problems))
    assert "absent" in said and "num-query-groups" in said


def test_a_load_that_is_not_there_hides_nothing_of_a_model_in_flags(tmp_path: Path):
    absent = str(tmp_path / "absent")
    of_layout = {"tensor_model_parallel_size": 3, "seq_length": 999}
    alone, with_load = (
        {(problem.option, problem.value, problem.limit) for problem in check_run(tiny.config(tmp_path, **given))}
        for given in (of_layout, {**of_layout, "load": absent})
    )
    assert {"--tensor-model-parallel-size", "--seq-length"} <= {option for option, *_ in alone}
    assert with_load - alone == {("--load", absent, None)} and alone < with_load
    shapeless = tiny.config(tmp_path, **dict.fromkeys(tiny.MODEL), load=absent)  # the shape would come from there
    assert options_of(check_run(shapeless)) == ["--load"]


def test_a_problem_with_a_list_is_shown_like_any_other(tmp_path: Path):
    listed = {**spec_from_preset("qwen3-30b-a3b").hf_config, "mlp_only_layers": [999]}
    (tmp_path / "config.json").write_text(json.dumps(listed))
    found = check_run(tiny.config(tmp_path, **dict.fromkeys(tiny.MODEL), model=str(tmp_path)))
    assert [999] in [problem.value for problem in found]


def test_a_new_model_ends_texts_as_its_tokenizer_does(tmp_path: Path):
    """A preset's eos is that of its published tokenizer, and an ordinary token of another."""
    small = {**dict.fromkeys(tiny.MODEL), "model": "llama2-7b", "num_layers": 1, "padded_vocab_size": 61}
    given = tiny.config(tmp_path, **{**small, "tokenizer_type": "NullTokenizer", "vocab_size": 61})
    hf_config = plan_run(given, 1).spec.hf_config
    assert (hf_config["bos_token_id"], hf_config["eos_token_id"]) == (None, 60)
    assert spec_from_preset("llama2-7b").with_tokens(1, 2) == spec_from_preset("llama2-7b")
    several = ModelSpec(**vars(spec_from_preset("llama2-7b")) | {"hf_config": {"eos_token_id": [2, 315]}})
    assert several.with_tokens(None, 315) == several


def test_experts_need_a_model_that_has_some(tmp_path: Path):
    with pytest.raises(ProblemError) as caught:
        plan_run(tiny.config(tmp_path, expert_model_parallel_size=2), 2)
    assert "--expert-model-parallel-size" in {problem.option for problem in caught.value.problems}


def test_a_deepspeed_file_tells_what_it_does_not_do(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 1, "overlap_comm": true}}')
    notes = plan_run(tiny.config(tmp_path, deepspeed_config=str(file)), 1).notes
    assert [note for note in notes if "zero_optimization.overlap_comm" in note]


def test_checkpoint_and_data_in_one_round(run, tmp_path: Path):
    changed = tiny.resumed(run, lr=5e-3, tensorboard_dir=str(Path(run.save) / "metrics.jsonl"))
    assert options_of(check_run(changed)) == ["--tensorboard-dir", "--load"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bf16": True, "initial_loss_scale": 65536.0}, "--initial-loss-scale"),
        ({"fp16": True, "initial_loss_scale": 65536.0}, None),
        ({"sgd_momentum": 0.5}, "--sgd-momentum"),
        ({"lr_decay_style": "constant", "min_lr": 1e-4}, "--min-lr"),
        ({"lr_warmup_iters": 0, "lr_warmup_init": 1e-4}, "--lr-warmup-init"),
        ({"moe_token_dispatcher_type": "allgather"}, "--moe-token-dispatcher-type"),
        ({}, None),
    ],
)
def test_options_without_effect_are_told(tmp_path: Path, options: dict, named: str | None):
    notes = [note for note in plan_run(tiny.config(tmp_path, **options), 1).notes if note.startswith("ignored: ")]
    assert len(notes) == (named is not None)
    assert named is None or named in notes[0]


def test_sequence_longer_than_the_loaded_model(tmp_path: Path):
    first = tiny.config(tmp_path)
    job.run(first)
    longer = tiny.config(
        tmp_path,
        load=first.save,
        finetune=True,
        save=None,
        save_interval=None,
        seq_length=64,
        max_position_embeddings=None,
    )
    assert options_of(check_run(longer)) == ["--seq-length"]


def test_fewer_rows_than_tokens_that_are_asked_for(tmp_path: Path):
    given = tiny.config(tmp_path, tokenizer_type="NullTokenizer", vocab_size=100, padded_vocab_size=61)
    assert "--padded-vocab-size" in options_of(check_run(given))


def test_tokenizer_that_has_more_tokens_than_the_model(tmp_path: Path):
    """Tokens that do not occur are no fault. Those that do are refused by the data's manifest, and as they are read."""
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(70)}, unk_token="0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = tiny.config(tmp_path, tokenizer_name_or_path=str(tmp_path))
    assert check_run(given) == []
    assert [note for note in plan_run(given, 1).notes if "61 to 69" in note]


def test_model_options_that_contradict_the_checkpoint(tmp_path: Path):
    first = tiny.config(tmp_path)
    job.run(first)
    (problem,) = check_run(tiny.resumed(first, ffn_hidden_size=64))
    assert (problem.option, problem.kind) == ("--load", "model")
    assert problem.limit == {"--ffn-hidden-size": (48, 64)}
    assert check_run(tiny.resumed(first, **{name: None for name in tiny.MODEL})) == []


def test_padded_vocabulary_is_the_same_model_again(tmp_path: Path):
    padded = tiny.config(tmp_path, make_vocab_size_divisible_by=None)  # Megatron pads to a multiple of 128
    job.run(padded)
    assert plan_run(tiny.resumed(padded), 1).spec.config.vocab_size == 128
    too_large = tiny.resumed(padded, vocab_size=200, make_vocab_size_divisible_by=100)
    assert options_of(check_run(too_large)) == ["--vocab-size", "--make-vocab-size-divisible-by"]


# ---- places --------------------------------------------------------------------------------------------------------


def test_directory_of_another_run(tmp_path: Path):
    first = tiny.config(tmp_path)
    job.run(first)
    (problem,) = check_run(first)
    assert (problem.option, problem.kind) == ("--save", "taken")
    (problem,) = check_run(replace(first, load=first.save, finetune=True))
    assert problem.option == "--save"
    assert check_run(tiny.resumed(first)) == []


def test_nothing_to_load_yet(tmp_path: Path):
    given = tiny.config(tmp_path)
    again = tiny.resumed(given)  # the one command that starts a run and goes on with it
    assert check_run(again) == []
    assert "starts from initial weights" in plan_run(again, 1).notes[0]
    (problem,) = check_run(tiny.resumed(given, exit_on_missing_checkpoint=True))
    assert problem.option == "--load"
    (problem,) = check_run(replace(again, load=str(tmp_path / "typo")))
    assert (problem.option, problem.kind) == ("--load", "missing")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("no model")
    (problem,) = check_run(tiny.resumed(given, load=str(tmp_path / "else")))
    assert (problem.option, problem.kind) == ("--load", "format")


def test_checkpoint_by_step_and_by_path(tmp_path: Path):
    first = tiny.config(tmp_path)
    job.run(first)
    assert plan_run(tiny.resumed(first, ckpt_step=2), 1).resumed.path.name == "iter_0000002"
    by_path = tiny.resumed(first, load=str(Path(first.save) / "iter_0000004"))
    assert plan_run(by_path, 1).resumed.manifest["iteration"] == 4
    (problem,) = check_run(tiny.resumed(first, ckpt_step=3))
    assert (problem.option, problem.kind, problem.limit) == ("--load", "corrupt", [6, 4, 2])


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    given = tiny.config(tmp_path_factory.mktemp("run"))
    job.run(given)
    return given


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"seq_length": 8}, ["--seq-length"]),
        ({"dataloader_type": "cyclic"}, ["--dataloader-type"]),
        ({"split": "80,20,0"}, ["--data-path"]),
        ({"seed": 1}, ["--seed"]),
        ({"seed": 1, "load_rng": False}, []),
        ({"optimizer": "sgd"}, ["--optimizer"]),
        ({"optimizer": "sgd", "load_optim": False}, []),
        ({"optimizer": "foreach_adam"}, []),
        ({"lr": 5e-3}, ["--load"]),
        ({"train_iters": 9}, ["--train-iters"]),
        ({"train_iters": 9, "lr": 5e-3}, ["--load"]),
        ({"train_iters": 9, "override_opt_param_scheduler": True}, []),
        ({"train_iters": 9, "use_checkpoint_opt_param_scheduler": True}, []),
        (
            {"seed": 1, "seq_length": 8, "lr": 5e-3, "optimizer": "sgd"},
            ["--seed", "--seq-length", "--load", "--optimizer"],
        ),
        ({"micro_batch_size": 2, "bf16": True, "zero_stage": 3, "save_interval": 1}, []),
    ],
)
def test_what_has_to_be_the_same(run, changed: dict, named: list[str]):
    assert options_of(check_run(tiny.resumed(run, **changed))) == named


def test_longer_run_is_told_how(run):
    (problem,) = check_run(tiny.resumed(run, train_iters=9))
    assert (problem.value, problem.kind) == (9, "length")


def test_nothing_left_to_train_is_told(run):
    assert any("step 6 of 6: nothing is left to train" in note for note in plan_run(tiny.resumed(run), 1).notes)
    longer = tiny.resumed(run, train_iters=9, override_opt_param_scheduler=True)
    assert not any("nothing is left" in note for note in plan_run(longer, 1).notes)


def test_order_of_the_data_stays_as_it_was(run):
    """Six steps are within the first epoch; sixty go on in blocks of an epoch, where Megatron would shuffle all."""
    longer = plan_run(tiny.resumed(run, train_iters=60, override_opt_param_scheduler=True), 1)
    same = plan_run(tiny.resumed(run), 1)
    assert longer.data.identity["blocks"] == [[1, False]] == same.data.identity["blocks"]
    fresh = plan_run(replace(run, save=str(Path(run.save, "new")), train_iters=60), 1)
    assert fresh.data.identity["blocks"] == [[4, True]]
    assert any("another length" in note for note in longer.notes)
    assert not any("another length" in note for note in same.notes)
    before, after = (
        build_datasets(run, count, 0, 0, train_blocks=plan.data.identity["blocks"]).train
        for count, plan in ((48, same), (480, longer))
    )
    assert before is not None and after is not None and len(after) >= 480
    assert all((before[i]["tokens"] == after[i]["tokens"]).all() for i in range(len(before)))


@pytest.mark.parametrize("option", ["train_iters", "eval_iters"])
def test_more_tokens_than_can_be_counted(tmp_path: Path, option: str):
    """2^63 tokens are 2^56 steps of 8 samples of 16 tokens, and samples overlap by one."""
    split = {"split": "60,20,20"}
    assert options_of(check_run(tiny.config(tmp_path, **split, **{option: 2**63 // (8 * 17)}))) == []
    assert options_of(check_run(tiny.config(tmp_path, **split, **{option: 2**56}))) == ["--" + option.replace("_", "-")]


def test_schedule_of_the_checkpoint_or_of_the_options(run):
    old = plan_run(tiny.resumed(run, lr=5e-3, use_checkpoint_opt_param_scheduler=True), 1)
    new = plan_run(tiny.resumed(run, lr=5e-3, override_opt_param_scheduler=True), 1)
    assert (old.schedule.max_lr, new.schedule.max_lr) == (1e-2, 5e-3)


def test_manifest_is_the_whole_story(run):
    manifest = directory.read_manifest(location_of(Path(run.save) / "iter_0000006"))
    assert manifest["trainer"] == {
        "iteration": 6,
        "consumed_samples": 48,
        "consumed_tokens": 48 * tiny.LENGTH,
        "skipped_iterations": 0,
        "skipped_samples": 0,
        "best_loss": None,
        "best_iteration": None,
        "stale_validations": 0,
        "validation_due": False,
        "wandb_run": None,
    }
    assert ModelSpec.from_dict(manifest["model"]).config.hidden_size == 32
    assert manifest["config"]["seq_length"] == tiny.LENGTH
    assert json.dumps(manifest)


def test_damaged_checkpoint_is_noted(tmp_path: Path):
    first = tiny.config(tmp_path)
    job.run(first)
    (Path(first.save) / "iter_0000006" / ".metadata").unlink()
    plan = plan_run(tiny.resumed(first), 1)
    assert plan.resumed.path.name == "iter_0000004"
    assert any("iter_0000006" in note for note in plan.notes)
    with pytest.raises(ProblemError):
        plan_run(tiny.resumed(first, ckpt_step=6), 1)


def test_laws_of_the_model_are_told_whatever_the_number_of_processes(tmp_path: Path):
    degrees = {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 2}
    given = tiny.config(tmp_path, nproc_per_node=5, num_layers_per_virtual_pipeline_stage=1, **degrees)
    found = check_run(given)
    assert {"processes", "--tensor-model-parallel-size"} <= {problem.option for problem in found}
    assert not any(problem.kind == "requires" for problem in found)


def test_options_that_change_what_is_loaded(tmp_path: Path):
    given = tiny.config(tmp_path, train_iters=2)
    assert job.run(given) == 0
    (problem,) = check_run(tiny.resumed(given, rotary_base=5.0))
    assert (problem.option, problem.kind) == ("--load", "model")
    assert problem.limit == {"--rotary-base": (10000.0, 5.0)}
    (problem,) = check_run(tiny.resumed(given, num_layers=3))
    assert problem.limit == {"--num-layers": (2, 3)}
    anew = plan_run(tiny.resumed(given, rotary_base=5.0, finetune=True, save=str(tmp_path / "new")), 1)
    assert "the options change the model that is loaded: --rotary-base 10000.0 -> 5.0" in anew.notes
    notes = plan_run(tiny.resumed(given, hidden_dropout=0.1), 1).notes
    assert any("--hidden-dropout 0.0 -> 0.1" in note for note in notes)
    assert check_run(tiny.resumed(given, rotary_base=1e4, num_layers=2)) == []


def test_a_run_that_goes_on_by_a_changed_config_json(tmp_path: Path):
    """What no option says is compared too."""
    model = tmp_path / "model"
    model.mkdir()
    hf = spec_from_preset("gemma3-270m").hf_config | {
        "num_hidden_layers": 6,
        "hidden_size": 32,
        "vocab_size": tiny.VOCAB,
    }
    (model / "config.json").write_text(json.dumps(hf | {"intermediate_size": 32, "head_dim": 8}))
    plain = dict.fromkeys(tiny.MODEL)
    given = tiny.config(tmp_path, **plain, model=str(model), train_iters=2)
    assert job.run(given) == 0
    assert check_run(tiny.resumed(given)) == []
    (model / "config.json").write_text(json.dumps(hf | {"intermediate_size": 32, "head_dim": 8, "rope_theta": 5e3}))
    (problem,) = check_run(tiny.resumed(given))
    assert problem.limit["layers.attention.rope.theta"] == (1000000.0, 5000.0)


GPT = {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_bias_linear": True}


def layer_of(folder: Path, *argv: str, **options: Any) -> tuple[LayerConfig, list[str]]:
    """The first layer of the model that flags in this order lead to, and what is said to be ignored."""
    given = tiny.config(folder, **{"swiglu": None, "group_query_attention": None, "num_query_groups": None, **options})
    flags = load_as_far_as_possible(TrainConfig, argv)
    said = {name: getattr(flags.config, name) for name, origin in flags.origins.items() if origin != "default"}
    plan = plan_run(replace(given, **said), 1)
    return plan.spec.config.layers[0], [note for note in plan.notes if note.startswith("ignored")]


@pytest.mark.parametrize("flags", [("--swiglu", "--no-add-gate"), ("--no-add-gate", "--swiglu")])
def test_no_add_gate_with_swiglu_is_the_fused_form_of_the_same(tmp_path: Path, flags: tuple[str, ...]):
    """AscendSpeed: with --swiglu gate and up are one matrix, which is what --no-add-gate says of the gate layer."""
    layer, notes = layer_of(tmp_path, *flags)
    assert layer == layer_of(tmp_path, "--swiglu")[0] and layer.mlp.gated
    assert len(notes) == 1 and "--no-add-gate" in notes[0]
    with pytest.raises(ProblemError, match="no family has a model"):  # GPT-2 has no gate, and it is not dropped
        layer_of(tmp_path, *flags, **GPT)


def test_no_add_gate_alone_means_no_gate(tmp_path: Path):
    layer, notes = layer_of(tmp_path, "--no-add-gate", **GPT)
    assert (layer.mlp.gated, layer.mlp.activation, notes) == (False, "gelu", [])
    assert layer_of(tmp_path, "--add-gate") == layer_of(tmp_path, "--swiglu")  # as AscendSpeed has it by default


def test_rows_that_are_said_exactly_are_not_rounded(tmp_path: Path):
    rows = {"padded_vocab_size": 100, "make_vocab_size_divisible_by": 64}
    _, notes = layer_of(tmp_path, "--swiglu", **rows)
    assert len(notes) == 1 and "--make-vocab-size-divisible-by 64" in notes[0]
    assert layer_of(tmp_path, "--swiglu", **{**rows, "make_vocab_size_divisible_by": 50})[1] == []


def test_query_groups_count_only_with_group_query_attention(tmp_path: Path):
    """Megatron's arguments.py gives the model None for --num-query-groups where --group-query-attention is off."""
    layer, notes = layer_of(tmp_path, "--swiglu", "--num-query-groups", "2")
    assert (layer.attention.num_heads, layer.attention.num_kv_heads) == (4, 4)
    assert len(notes) == 1 and "--num-query-groups 2" in notes[0]
    layer, notes = layer_of(tmp_path, "--swiglu", "--num-query-groups", "2", "--group-query-attention")
    assert (layer.attention.num_kv_heads, notes) == (2, [])
    assert layer_of(tmp_path, "--swiglu", "--group-query-attention")[0].attention.num_kv_heads == 1
    assert layer_of(tmp_path, "--swiglu", "--num-query-groups", "4")[1] == []  # that many there are


@pytest.mark.parametrize("model, heads", [("llama3-8b", 2), ("llama2-7b", 32)])
def test_query_groups_of_a_known_model_count_if_it_has_groups(tmp_path: Path, model: str, heads: int):
    unsaid = dict.fromkeys(tiny.MODEL) | {"num_layers": 1, "model": model, "num_query_groups": 2}
    plan = plan_run(tiny.config(tmp_path, **unsaid), 1)
    assert plan.spec.config.layers[0].attention.num_kv_heads == heads
    assert any("--num-query-groups" in note for note in plan.notes) == (model == "llama2-7b")
    same = spec_from_options(ModelOptions(model=model, group_query_attention=model == "llama3-8b"))
    assert same == spec_from_preset(model)


def test_a_split_without_training_is_refused(tmp_path: Path):
    for find in (check_run, check_with_contents):
        (problem,) = find(tiny.config(tmp_path, split="0,1,1"))
        assert (problem.option, problem.value) == ("--split", "0,1,1")
