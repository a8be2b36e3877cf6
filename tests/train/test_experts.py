"""How experts are trained is said by options, for a model of any family."""

from __future__ import annotations

import pytest

from cordee.config.option import to_flag
from cordee.errors import ProblemError
from cordee.families.registry import spec_from_options, spec_from_preset
from cordee.model.config import BalanceConfig, CapacityConfig
from cordee.train import job
from cordee.train.experts import ignored, with_training
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.train import tiny

MIXTURE = {"num_experts": 4, "moe_router_topk": 2, "untie_embeddings_and_output_weights": True}


def options(**given) -> TrainConfig:
    return TrainConfig(seq_length=16, lr=1.0, train_iters=1, data_path=("x",), **given)


def mixture(preset: str, **given):
    trained = with_training(spec_from_preset(preset), options(**given)).config
    return next(layer.mlp for layer in trained.layers if hasattr(layer.mlp, "router"))


def problems(preset: str, **given) -> dict[str, str]:
    with pytest.raises(ProblemError) as caught:
        mixture(preset, **given)
    return {problem.option: problem.kind for problem in caught.value.problems}


def test_what_is_not_given_is_the_models():
    for preset in ("mixtral-8x7b", "deepseek-v2", "gpt4-4x13b"):
        spec = spec_from_preset(preset)
        assert with_training(spec, options()) == spec


def test_balance():
    given = {"moe_aux_loss_coeff": 0.003, "moe_device_level_aux_loss_coeff": 0.05, "moe_comm_aux_loss_coeff": 0.02}
    expected = {"expert": 0.003, "device": 0.05, "communication": 0.02, "z": 0.1, "num_devices": 8, "top_devices": 3}
    balance = mixture("deepseek-v2", **given, moe_z_loss_coeff=0.1, seq_aux=False).balance
    assert balance == BalanceConfig(**expected, per_sequence=False)
    third = mixture("deepseek-v3", moe_device_level_aux_loss_coeff=0.05).balance
    assert (third.device, third.num_devices, third.top_devices) == (0.05, 8, 4)


def test_capacity():
    limited = mixture("mixtral-8x7b", moe_expert_capacity_factor=1.5, moe_token_drop_policy="position")
    assert limited.capacity == CapacityConfig(factor=1.5, drop="position", pad=False)
    assert mixture("gpt4-4x13b", moe_expert_capacity_factor=-1.0).capacity is None
    changed = mixture("gpt4-4x13b", moe_pad_expert_input_to_capacity=False).capacity
    assert changed == CapacityConfig(factor=1.1, drop="probs", pad=False)


def test_options_that_could_have_no_effect():
    given = {"moe_aux_loss_coeff": 0.0, "moe_token_drop_policy": "probs", "moe_expert_capacity_factor": 0.0}
    assert problems("llama2-7b", **given) == dict.fromkeys(
        ("--moe-aux-loss-coeff", "--moe-expert-capacity-factor", "--moe-token-drop-policy"), "requires"
    )
    assert problems("mixtral-8x7b", moe_aux_loss_coeff=0.0, seq_aux=True) == {"--seq-aux": "requires"}
    given = {"moe_device_level_aux_loss_coeff": 0.1, "moe_pad_expert_input_to_capacity": True}
    assert problems("mixtral-8x7b", **given, moe_expert_capacity_factor=-1.0) == {
        "--moe-device-level-aux-loss-coeff": "requires",
        "--moe-pad-expert-input-to-capacity": "requires",
    }
    assert problems("mixtral-8x7b", moe_expert_capacity_factor=0.0) == {"--moe-expert-capacity-factor": "invalid"}


def test_a_run_finds_them_with_all_other_problems(tmp_path):
    given = tiny.config(tmp_path, moe_z_loss_coeff=0.1, seq_length=64)
    assert {problem.option for problem in check_run(given)} >= {"--moe-z-loss-coeff", "--seq-length"}


def test_a_run_that_goes_on_is_told_the_same_again(tmp_path):
    given = tiny.config(tmp_path, **MIXTURE, train_iters=2, moe_z_loss_coeff=0.1, moe_aux_loss_coeff=0.5)
    assert job.run(given) == 0
    further = tiny.resumed(given, moe_z_loss_coeff=None)
    (problem,) = check_run(further)
    assert (problem.option, problem.kind, problem.limit) == ("--moe-z-loss-coeff", "resume", 0.1)
    assert check_run(tiny.resumed(given)) == check_run(tiny.resumed(given, moe_z_loss_coeff=0.0)) == []


def losses_of(folder, **given) -> list[dict]:
    folder.mkdir()
    config = tiny.config(folder, **MIXTURE, train_iters=8, save_interval=8, **given)
    assert spec_from_options(config).family.name == "mixtral"
    assert job.run(config) == 0
    return [{"loss": line["loss"], **line["metrics"]} for line in tiny.records(config).values()]


def test_a_run_trains_its_experts_as_told(tmp_path):
    plain = losses_of(tmp_path / "plain", moe_aux_loss_coeff=0.0)
    balanced = losses_of(tmp_path / "balanced", moe_aux_loss_coeff=1.0, moe_z_loss_coeff=0.1)
    assert plain[0]["loss"] == balanced[0]["loss"] and plain[7]["loss"] != balanced[7]["loss"]
    assert "z_loss" in balanced[0] and "z_loss" not in plain[0]
    assert balanced[7]["load_balancing_loss"] < plain[7]["load_balancing_loss"]
    limited = losses_of(tmp_path / "limited", moe_expert_capacity_factor=0.5)
    assert all(line["dropped_fraction"] > 0.4 for line in limited) and "dropped_fraction" not in plain[0]


SOFTMAX = {"moe_router_load_balancing_type": "softmax_topk", "group_query_attention": None, "num_query_groups": None}
SOFTMAX |= {"multi_head_latent_attention": True, "kv_lora_rank": 8}
SOFTMAX |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
NO_LOSS = {"moe_aux_loss_coeff": 1.0, "seq_aux": True}
NO_LOSS |= {"moe_device_level_aux_loss_coeff": 0.1, "moe_comm_aux_loss_coeff": 0.1}


def test_softmax_topk_trains_no_auxiliary_loss(tmp_path):
    """MindSpeed-LLM: "softmax over all then top-k, no renormalise, no aux"."""

    def run(name: str, **given):
        config = tiny.config(make(tmp_path / name), **MIXTURE, **SOFTMAX, train_iters=3, save_interval=3, **given)
        assert job.run(config) == 0
        return config

    plain, asked = run("plain"), run("asked", **NO_LOSS)
    assert tiny.losses(plain) == tiny.losses(asked)
    assert not any("ignored" in note for note in plan_run(tiny.resumed(plain), 1).notes)
    (note,) = (note for note in plan_run(tiny.resumed(asked), 1).notes if "ignored" in note)
    assert all(to_flag(name) in note for name in NO_LOSS)
    assert any("normalises its latents" in note for note in plan_run(tiny.resumed(plain), 1).notes)
    untold = check_run(tiny.resumed(asked, moe_router_load_balancing_type=None))
    assert "--moe-router-load-balancing-type" in {problem.option for problem in untold}


def make(folder):
    folder.mkdir()
    return folder


def test_softmax_topk_leaves_out_the_loss_of_a_configuration_but_not_that_of_logits():
    spec = spec_from_preset("deepseek-v2-lite")
    assert next(layer.mlp for layer in spec.config.layers[1:]).balance.expert > 0
    kind = {"moe_router_load_balancing_type": "softmax_topk"}
    assert "own configuration" in next(ignored(spec, options(**kind)))
    assert mixture("deepseek-v2-lite", **kind, moe_z_loss_coeff=0.1).balance == BalanceConfig(z=0.1)
    assert not list(ignored(spec, options(moe_aux_loss_coeff=0.1)))  # nobody names a type: the loss is asked for
    assert mixture("deepseek-v2-lite", moe_aux_loss_coeff=0.1).balance.expert == 0.1


@pytest.mark.parametrize("said", [{"moe_router_load_balancing_type": "aux_loss"}, {"num_experts": 8}])
def test_only_group_limited_routers_look_at_single_sequences(said):
    given = {**said, "moe_aux_loss_coeff": 0.1, "seq_aux": True}
    assert mixture("mixtral-8x7b", **given).balance == BalanceConfig(expert=0.1)
    assert "--seq-aux" in next(ignored(spec_from_preset("mixtral-8x7b"), options(**given)))
    limited = {**given, "moe_router_load_balancing_type": "group_limited_greedy"}
    assert mixture("deepseek-v2", **limited).balance.per_sequence
    assert not list(ignored(spec_from_preset("deepseek-v2"), options(**limited)))
