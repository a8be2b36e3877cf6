"""Families against tiny random models of transformers, made on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cordee import GPTModel
from cordee.errors import ProblemError
from cordee.families import common
from cordee.families.registry import families, spec_from_directory, spec_from_preset
from cordee.model import gpt
from cordee.model.compare import canonical
from cordee.model.init import initialise
from cordee.ops import activation
from cordee.weights import hf
from cordee.weights.load import save_from
from tests.families import oracle
from tests.families.random_mixtures import MIXTURES
from tests.families.random_models import MODELS, SCALINGS, decoders, with_rope

SUFFIX = "ForSequenceClassification"
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}


# The same examples at every run, fewer in the suite.
few, many = (
    settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for count in (4, 32)
)
every_kind = pytest.mark.parametrize("kind", MODELS | MIXTURES)


@pytest.mark.slow
@every_kind
@few
@given(data=st.data())
def test_random_models(kind, data):
    check(kind, data.draw((MODELS | MIXTURES)[kind]))


@pytest.mark.slow
@pytest.mark.exhaustive
@every_kind
@many
@given(data=st.data())
def test_many_random_models(kind, data):
    check(kind, data.draw((MODELS | MIXTURES)[kind]))


@pytest.mark.parametrize("scaling", SCALINGS)
@few
@given(data=st.data())
def test_every_scaling_of_positions(scaling, data):
    check("Llama", data.draw(with_rope(decoders(), kinds=(scaling,))))


def check(kind, config):
    with TemporaryDirectory() as scratch:
        made = oracle.transformers_oracle(kind, Path(scratch) / "model", **config)
        oracle.check_mathematics(made)
        oracle.check_cache(made)
        oracle.check_round_trip(made, Path(scratch) / "out")


CLASSIFIERS = sorted(name.removesuffix(SUFFIX) for each in families().values() if (name := each.classifier))


@pytest.mark.parametrize("kind", CLASSIFIERS)
@settings(max_examples=1, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_reward_models(kind, data):
    """The scores of a classifier with one label, read, and written again."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **data.draw((MODELS | MIXTURES)[kind]), pad_token_id=0, num_labels=1, architectures=[f"{kind}{SUFFIX}"]
    )
    torch.manual_seed(1)
    classifier = transformers.AutoModelForSequenceClassification
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with TemporaryDirectory() as scratch, torch.no_grad():
        model = oracle.randomised(classifier.from_config(config, **how)).eval()
        model.save_pretrained(f"{scratch}/theirs")
        ids = torch.randint(1, config.vocab_size, (1, 12))
        ours = GPTModel.from_pretrained(f"{scratch}/theirs")
        torch.testing.assert_close(ours(ids)[:, -1:], model(ids).logits, rtol=1e-4, atol=1e-5)
        ours.save_pretrained(f"{scratch}/ours")
        again, info = classifier.from_pretrained(f"{scratch}/ours", output_loading_info=True, **how)
        assert not any(info.values())
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_every_classifier_of_transformers_is_known():
    """Of the classes of which there are random models here."""
    import transformers

    assert sorted(kind for kind in MODELS | MIXTURES if hasattr(transformers, f"{kind}{SUFFIX}")) == CLASSIFIERS


def test_gpt2_without_its_prefix(tmp_path):
    """Published base-model files name the same tensors without `transformer.`, and are written so again."""
    from safetensors.torch import save_file

    full = oracle.transformers_oracle("GPT2", tmp_path / "full", **GPT2)
    tensors = load_file(full.directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((full.directory / "config.json").read_text())
    save_file({**bare, **masks}, tmp_path / "bare" / "model.safetensors")

    model, source = oracle.load(tmp_path / "bare")
    logits = model(full.input_ids, full.attention_mask)
    assert torch.equal(logits, oracle.load(full.directory)[0](full.input_ids, full.attention_mask))
    assert "h.0.attn.bias" in str(source.notes)
    with hf.write(tmp_path / "out", source.spec) as sink:
        save_from(model, sink)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == bare.keys()


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_scores_of_gpt2_are_scaled_in_other_ways(plain, by_layer, tmp_path):
    keys = {"scale_attn_weights": plain, "scale_attn_by_inverse_layer_idx": by_layer, "reorder_and_upcast_attn": True}
    made = oracle.transformers_oracle("GPT2", tmp_path / "model", **{**GPT2, "n_layer": 3}, **keys)
    oracle.check_mathematics(made)
    oracle.check_cache(made)
    oracle.check_round_trip(made, tmp_path / "out")
    spec = spec_from_directory(made.directory)
    written = spec.family.to_hf(spec.config)
    assert (written["scale_attn_weights"], written["scale_attn_by_inverse_layer_idx"]) == (plain, by_layer)
    assert canonical(spec.family.config(written)) == canonical(spec.config)


def test_activations_are_those_of_transformers():
    """Every name that computes one of ours is known, and no other."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 101)
    ours = {name: function(x) for name, function in activation.ACTIVATIONS.items()}
    for name in ACT2FN.keys() - {"xielu"}:  # which has parameters of its own
        found = {mine for mine, y in ours.items() if torch.allclose(y, ACT2FN[name](x).detach(), atol=1e-6)}
        assert found == ({common.ACTIVATIONS[name]} if name in common.ACTIVATIONS else set()), name


@pytest.mark.parametrize("kind", sorted(MODELS | MIXTURES))
def test_keys_that_are_left_out_or_null_mean_what_they_mean_in_transformers(kind):
    """What transformers makes of such a file, written out, is the same model; or it is asked for."""
    import huggingface_hub
    import transformers

    make = getattr(transformers, f"{kind}Config")
    family = next(family for family in families().values() if make.model_type in family.model_types)
    preset = next(iter(family.presets.values())).config
    hf = {key: 4 if key in ("n_layer", "num_hidden_layers") else value for key, value in preset.items()}
    for key in make(**hf).to_dict().keys() - {"rope_parameters"}:
        without = {name: value for name, value in hf.items() if name != key}
        for file in (without, {**without, key: None}):
            try:
                value = make(**file).to_dict().get(key)
            except (huggingface_hub.errors.StrictDataclassError, TypeError, AttributeError):
                continue  # transformers has no such model
            try:
                models = [family.config(family.skeleton(each)) for each in (file, {**file, key: value})]
            except ProblemError as error:
                assert f"config.json: {key}" in {problem.option for problem in error.problems}
            else:
                assert value is None or canonical(models[0]) == canonical(models[1]), key


@pytest.mark.parametrize(
    ("preset", "groups"),
    [
        ("llama3.2-1b", 2),
        ("gpt2", None),
        ("bloom-560m", None),
        ("gemma-7b", None),
        ("gemma2-2b", 2),
        ("gemma3-1b", 1),
        ("glm4-9b-hf", 2),
        ("glm4-9b-0414", 2),
        ("internlm3-8b", 2),
        ("mistral-7b", 2),
        ("olmo2-1b", 4),
        ("phi3-mini-4k", 4),
        ("phi4-14b", 2),
        ("qwen2-0.5b", 2),
        ("qwen2.5-7b-yarn", 4),
        ("qwen3-0.6b", 2),
    ],
)
def test_transformers_reads_what_we_write(preset, groups, tmp_path):
    """A model of our own, never seen by transformers before, computes the same there."""
    import transformers

    from cordee.model.options import ModelOptions

    small = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 128, "num_attention_heads": 4}
    small |= {"vocab_size": 50, "padded_vocab_size": 50}
    options = ModelOptions(**small, kv_channels=8, num_query_groups=groups)
    spec = spec_from_preset(preset).with_options(options)
    model = gpt.GPTModel(spec.config).eval()
    initialise(model, seed=1)
    with hf.write(tmp_path / "out", spec) as sink:
        save_from(model, sink)
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), peer.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
