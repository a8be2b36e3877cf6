"""Models of every family given by options alone: experts, latent attention, windows, caps, scales, further norms."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cordee.config.load import load_config
from cordee.errors import Problem, ProblemError
from cordee.families.lenses import FORM, features_of, model_of
from cordee.families.options import with_defaults
from cordee.families.registry import presets, spec_from_options, spec_from_preset
from cordee.model.compare import canonical
from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    MoEConfig,
    NormConfig,
    YarnScaling,
)
from cordee.model.options import FeatureOptions, ModelOptions
from cordee.train.options import TrainConfig

RUN = "--seq-length 32 --lr 1 --train-iters 1 --data-path x"

# As the scripts published with MindSpeed-LLM give these models, without what is no option of a model.
LLAMA_LIKE = """--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --make-vocab-size-divisible-by 1"""
SCRIPTS = {
    "mixtral-8x7b": f"""{LLAMA_LIKE} --swiglu --untie-embeddings-and-output-weights --num-layers 32 --hidden-size 4096
        --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 --vocab-size 32000
        --max-position-embeddings 32768 --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
        --moe-router-load-balancing-type aux_loss""",
    "mistral-7b": f"""{LLAMA_LIKE} --swiglu --untie-embeddings-and-output-weights --num-layers 32 --hidden-size 4096
        --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 --vocab-size 32000
        --max-position-embeddings 32768 --sliding-window 4096""",
    "gemma2-27b": f"""{LLAMA_LIKE} --gelu-tanh --num-layers 46 --hidden-size 4608 --ffn-hidden-size 36864
        --num-attention-heads 32 --group-query-attention --num-query-groups 16 --kv-channels 128 --vocab-size 256000
        --max-position-embeddings 8192 --norm-epsilon 1e-6 --add-rmsnorm-offset --input-embeds-norm --post-norm
        --query-pre-attn-scalar 144 --output-logit-softcapping 30 --attn-logit-softcapping 50
        --interleave-sliding-window 4096""",
    "grok-1-8x5b": f"""{LLAMA_LIKE} --gelu-tanh --untie-embeddings-and-output-weights --num-layers 12
        --hidden-size 6144 --ffn-hidden-size 32768
        --num-attention-heads 48 --group-query-attention --num-query-groups 8 --kv-channels 128 --vocab-size 131072
        --max-position-embeddings 8192 --post-norm --embedding-multiplier-scale 78.38367176906169
        --output-multiplier-scale 0.5773502691896257 --attn-logit-softcapping 30 --num-experts 8 --moe-router-topk 2
        --moe-router-load-balancing-type softmax_topk""",
    "minicpm-moe-8x2b": f"""{LLAMA_LIKE} --swiglu --num-layers 40 --hidden-size 2304 --ffn-hidden-size 5760
        --num-attention-heads 36 --vocab-size 122753 --max-position-embeddings 4096 --scale-emb 12 --dim-model-base 256
        --scale-depth 1.4 --num-experts 8 --moe-router-topk 2""",
    "deepseek-v2-60b": f"""{LLAMA_LIKE} --swiglu --untie-embeddings-and-output-weights --num-layers 16
        --hidden-size 5120 --ffn-hidden-size 12288 --num-attention-heads 128 --vocab-size 102400
        --max-position-embeddings 163840 --norm-epsilon 1e-6 --multi-head-latent-attention --qk-rope-head-dim 64
        --qk-nope-head-dim 128 --q-lora-rank 1536 --kv-lora-rank 512 --v-head-dim 128 --qk-layernorm
        --first-k-dense-replace 1 --moe-layer-freq 1 --n-shared-experts 2 --num-experts 160 --moe-router-topk 6
        --moe-intermediate-size 1536 --moe-router-load-balancing-type group_limited_greedy --topk-group 3
        --moe-router-num-groups 8 --routed-scaling-factor 16.0 --rope-scaling-type yarn --rope-scaling-factor 40
        --rope-scaling-beta-fast 32 --rope-scaling-beta-slow 1 --rope-scaling-mscale 0.707
        --rope-scaling-mscale-all-dim 0.707 --rope-scaling-original-max-position-embeddings 4096""",
    "gpt4-4x16b": """--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --num-layers 8
        --hidden-size 12288 --num-attention-heads 96 --vocab-size 50257 --make-vocab-size-divisible-by 1
        --max-position-embeddings 131072 --init-method-std 0.006 --num-experts 4""",
    "bloom-7b1": """--position-embedding-type alibi --embed-layernorm --openai-gelu --attention-dropout 0
        --hidden-dropout 0 --num-layers 30 --hidden-size 4096 --num-attention-heads 32 --padded-vocab-size 250880
        --max-position-embeddings 2048""",
    "baichuan2-13b": f"""{LLAMA_LIKE.replace("rope", "alibi")} --swiglu --untie-embeddings-and-output-weights
        --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13696 --num-attention-heads 40 --vocab-size 125696
        --max-position-embeddings 4096 --norm-epsilon 1e-6 --lm-norm-weight""",
    "chatglm3-6b": f"""{LLAMA_LIKE} --swiglu --untie-embeddings-and-output-weights --num-layers 28 --hidden-size 4096
        --ffn-hidden-size 13696 --num-attention-heads 32 --kv-channels 128 --group-query-attention --num-query-groups 2
        --vocab-size 65024 --max-position-embeddings 8192 --add-qkv-bias --rotary-percent 0.5""",
}


TINY = """--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --vocab-size 512
    --max-position-embeddings 64"""


def options(flags: str) -> TrainConfig:
    return load_config(TrainConfig, [*RUN.split(), *flags.split()]).config


def problems(flags: str) -> list[Problem]:
    with pytest.raises(ProblemError) as caught:
        spec_from_options(options(flags))
    return caught.value.problems


def computes(config: ModelConfig) -> ModelConfig:
    """`config` in its canonical form, without what matters in training only."""
    layers = (
        replace(layer, mlp=replace(layer.mlp, balance=BalanceConfig(), capacity=None))
        if isinstance(layer.mlp, MoEConfig)
        else layer
        for layer in config.layers
    )
    dropout = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    return canonical(replace(config, layers=tuple(layers), init_std=0.02, **dropout))


def described(config: ModelConfig) -> ModelConfig:
    """What the words read off `config` describe."""
    return model_of({**form_of(config), **with_defaults(features_of(config))})


def form_of(config: ModelConfig) -> dict[str, Any]:
    return {name: lens.get(config) for name, lens in FORM.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_alone_give_the_model_of_a_published_script(name):
    spec = spec_from_options(options(SCRIPTS[name]))
    assert spec.family == spec_from_preset(name).family
    assert computes(spec.config) == computes(spec_from_preset(name).config)
    assert not any(key.endswith("_token_id") for key in spec.hf_config)  # the preset's tokens are not this model's


# They have properties that no option says: sinks, chunks, norms over all heads, sigmoid routers, dynamic scaling ...
UNSAID = {
    *("deepseek-v3", "gemma3", "gpt-oss", "internlm-20b", "internlm-65b", "internlm-7b", "internlm2.5", "internlm3"),
    *("llama4", "olmo2", "qwen-14b", "qwen-7b", "qwen1.5-moe", "qwen2-57b"),
}


@pytest.mark.parametrize("name", sorted(presets()))
def test_options_alone_give_every_preset_that_they_can_say(name):
    config = spec_from_preset(name).config
    said = computes(described(config)) == computes(config)
    assert said != any(name.startswith(family) for family in UNSAID)
    given = replace(options(""), **_form_options(config), **_once(features_of(config)))
    try:
        found = spec_from_options(given)
    except ProblemError as error:
        assert not said and [(problem.option, problem.kind) for problem in error.problems] == [NO_FAMILY]
        return
    assert computes(found.config) == computes(described(config))  # which is the preset itself if options can say it
    for layer in found.config.layers:
        if isinstance(layer.mlp, MoEConfig):
            assert layer.mlp.balance.expert == 0.0 and layer.mlp.capacity is None  # Megatron's defaults


def _once(words: dict) -> dict:
    """`words` without those that say what another says too."""
    again = {"input_embeds_norm": "scale_emb", "dim_model_base": "output_multiplier_scale"}
    left_out = {again[name] for name in words if name in again}
    return {name: value for name, value in words.items() if name not in left_out}


def _form_options(config: ModelConfig) -> dict:
    form = form_of(config)
    activation = {("silu", True): "swiglu", ("gelu", True): "geglu", ("gelu_tanh", True): "gelu_tanh"}
    activation[("gelu_tanh", False)] = "openai_gelu"
    words = {name: form[name] for name in form.keys() & ModelOptions.__dataclass_fields__.keys()}
    if name := activation.get((form["activation"], form["gated"])):
        words[name] = True
    words |= {"add_qkv_bias": form["qkv_bias"], "add_dense_bias": form["dense_bias"]}
    words |= {"add_bias_linear": form["mlp_bias"], "untie_embeddings_and_output_weights": not form["tied"]}
    words |= {"make_vocab_size_divisible_by": 1}
    words |= {"group_query_attention": form["num_query_groups"] != form["num_attention_heads"] or None}
    if form["position_embedding_type"] != "rope":
        del words["rotary_base"]
    match form["rope_scaling"]:
        case LinearScaling(factor=factor):
            words["rotary_seq_len_interpolation_factor"] = factor
        case Llama3Scaling() as scaling:
            words |= {**vars(scaling), "rope_scaling_type": "llama3", "rope_scaling_factor": scaling.factor}
            del words["factor"]
        case YarnScaling() as scaling:
            words |= {"rope_scaling_type": "yarn", "rope_scaling_factor": scaling.factor}
            words["original_max_position_embeddings"] = scaling.original_max_position_embeddings
            words |= {"rope_scaling_beta_fast": scaling.beta_fast, "rope_scaling_beta_slow": scaling.beta_slow}
            if scaling.attention_factor == 1.0:
                words["rope_scaling_mscale"] = features_of(config).get("rope_scaling_mscale_all_dim", 0.0)
    return words


def test_a_preset_changes_by_what_its_family_has_a_key_for():
    flags = "--model mixtral-8x7b --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 8"
    spec = spec_from_options(options(f"{flags} --num-experts 4 --sliding-window 16 --moe-router-topk 1"))
    moe = spec.config.layers[1].mlp
    assert (moe.router.num_experts, moe.router.top_k, moe.expert.ffn_hidden_size) == (4, 1, 96)
    assert [layer.attention.window for layer in spec.config.layers] == [16, 16]
    assert spec.hf_config["num_local_experts"] == 4 and spec.hf_config["bos_token_id"] == 1


NO_FAMILY = ("model options", "unknown")
SCALED_TWICE = ("--scale-emb", "excludes", "input_embeds_norm")


@pytest.mark.parametrize(
    ("flags", "option", "kind", "about"),
    [
        ("--model llama2-7b --num-experts 4", *NO_FAMILY, "--num-experts"),
        ("--model mixtral-8x7b --attn-logit-softcapping 30", *NO_FAMILY, "--attn-logit-softcapping"),
        ("--model mixtral-8x7b --no-swiglu", *NO_FAMILY, "the activation"),
        (f"{SCRIPTS['mixtral-8x7b']} --embed-layernorm", *NO_FAMILY, "--embed-layernorm"),
        (f"{SCRIPTS['gemma2-27b']} --geglu --no-gelu-tanh", *NO_FAMILY, "the activation"),
        (f"{LLAMA_LIKE} {TINY} --swiglu --moe-router-topk 2", "--moe-router-topk", "requires", "num_experts"),
        (
            f"{LLAMA_LIKE} {TINY} --swiglu --num-experts 4 --moe-router-load-balancing-type group_limited_greedy",
            *("--topk-group", "missing", "moe_router_load_balancing_type"),
        ),
        (
            f"{LLAMA_LIKE} {TINY} --swiglu --multi-head-latent-attention --kv-lora-rank 8",
            *("--v-head-dim", "missing", "multi_head_latent_attention"),
        ),
        (f"{LLAMA_LIKE} {TINY} --swiglu --scale-emb 2 --input-embeds-norm", *SCALED_TWICE),
        ("--model baichuan-13b --vocab-size 125696", *NO_FAMILY, ""),  # it would be Baichuan 2
        (f"{SCRIPTS['mixtral-8x7b']} --gelu-tanh", "--gelu-tanh", "excludes", ""),
        (
            "--model qwen2-7b --rope-scaling-type yarn --rope-scaling-factor 8",
            *("--original-max-position-embeddings", "missing", ""),
        ),
        ("--model qwen2-7b --rope-scaling-beta-fast 8", "--rope-scaling-beta-fast", "requires", ""),
        ("--model llama3.1-8b --rope-scaling-beta-fast 8", "--rope-scaling-beta-fast", "requires", ""),
        (
            "--model qwen2-7b --rope-scaling-type yarn --rotary-seq-len-interpolation-factor 2",
            *("--rope-scaling-type", "excludes", ""),
        ),
    ],
)
def test_what_no_family_has(flags, option, kind, about):
    problem = next(found for found in problems(flags) if (found.option, found.kind) == (option, kind))
    assert not about or about in (*problem.involves, *(problem.limit or ()))


def test_positions_are_stretched_as_options_say():
    yarn = "--rope-scaling-type yarn --rope-scaling-factor 8 --rope-scaling-original-max-position-embeddings 4096"
    scaling = spec_from_options(options(f"--model qwen2-7b {yarn}")).config.layers[0].attention.rope.scaling
    assert scaling == YarnScaling(
        factor=8.0, original_max_position_embeddings=4096, attention_factor=1.2079441541679836
    )
    linear = spec_from_options(options("--model llama2-7b --rotary-seq-len-interpolation-factor 4"))
    assert linear.config.layers[0].attention.rope.scaling == LinearScaling(factor=4.0)


def test_scores_of_latent_attention_stay_as_sharp_where_positions_are_stretched_otherwise():
    before = features_of(spec_from_preset("deepseek-v2-lite").config)["rope_scaling_mscale_all_dim"]
    after = features_of(spec_from_options(options("--model deepseek-v2-lite --rope-scaling-factor 8")).config)
    assert after["rope_scaling_mscale_all_dim"] == pytest.approx(before) == pytest.approx(0.707)


def test_a_size_that_followed_from_another_is_written_where_it_does_no_more():
    spec = spec_from_options(options("--model gpt2 --hidden-size 1536"))  # whose config.json leaves the MLP's width out
    assert (spec.config.hidden_size, spec.config.layers[0].mlp.ffn_hidden_size) == (1536, 3072)
    assert spec.hf_config["n_inner"] == 3072


def test_a_model_by_its_config_json(tmp_path):
    config = {**spec_from_preset("gemma2-2b").hf_config, "num_hidden_layers": 2, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = spec_from_options(options(f"--model {tmp_path} --vocab-size 512"))
    assert (spec.family.name, spec.config.num_layers, spec.config.vocab_size) == ("gemma2", 2, 512)
    assert spec_from_options(options(f"--model {tmp_path / 'config.json'} --vocab-size 512")) == spec
    assert {found.option for found in problems(f"--model {tmp_path.parent}")} == {"model directory"}


def test_every_feature_is_read_off_some_preset():
    words = {name for preset in presets() for name in features_of(spec_from_preset(preset).config)}
    elsewhere = {"apply_residual_connection_post_layernorm", "moe_layer_freq"}  # no published model has them
    assert words | elsewhere == set(FeatureOptions.__dataclass_fields__)


@pytest.mark.parametrize(
    ("flags", "sparse"),
    [
        ("", 4 * [True]),
        ("--first-k-dense-replace 1", [False, True, True, True]),
        ("--moe-layer-freq 2", 2 * [True, False]),
    ],
)
def test_which_layers_have_experts(flags, sparse):
    latent = "--multi-head-latent-attention --kv-lora-rank 8 --qk-nope-head-dim 8 --qk-rope-head-dim 4 --v-head-dim 8"
    experts = f"--num-experts 4 --moe-intermediate-size 32 --moe-router-load-balancing-type softmax_topk {flags}"
    model = f"{LLAMA_LIKE} {TINY} --swiglu --untie-embeddings-and-output-weights {latent} {experts}"
    config = spec_from_options(options(model)).config
    assert [isinstance(layer.mlp, MoEConfig) for layer in config.layers] == sparse
    assert config.layers[0].attention.scale == 12**-0.5  # small heads, and positions that are not stretched
    shorter = f"--model deepseek-v2-lite --num-layers 4 {flags or '--first-k-dense-replace 0'}"
    config = spec_from_options(options(shorter)).config
    rest = [False, False, True, False] if "freq" in flags else sparse  # the first layer stays dense, as nothing is said
    assert [isinstance(layer.mlp, MoEConfig) for layer in config.layers] == rest


def test_widths_of_layers_and_of_experts():
    of_experts = options("--model qwen3-30b-a3b --ffn-hidden-size 6144 --moe-ffn-hidden-size 768")
    assert spec_from_options(of_experts).config == spec_from_preset("qwen3-30b-a3b").config
    dense = spec_from_options(
        options("--model deepseek-v2-lite --ffn-hidden-size 64 --moe-intermediate-size 32")
    ).config
    assert (dense.layers[0].mlp.ffn_hidden_size, dense.layers[1].mlp.expert.ffn_hidden_size) == (64, 32)


@pytest.mark.parametrize(
    "flags",
    [
        "--model deepseek-v2-lite --moe-router-num-groups 1 --topk-group 1 --moe-layer-freq 1",
        "--model deepseek-v2 --rope-scaling-type yarn --rope-scaling-mscale 0.707",
        "--model llama2-7b --rotary-seq-len-interpolation-factor 1 --rotary-percent 1 --first-k-dense-replace 0",
        "--model gemma2-9b --query-pre-attn-scalar 256 --input-embeds-norm --no-embed-layernorm",
        "--model grok-1 --query-pre-attn-scalar 128 --embedding-multiplier-scale 78.38367176906169",
        "--model mixtral-8x7b --moe-router-load-balancing-type aux_loss --norm-topk-prob",
        "--model llama4-maverick --qk-nope-head-dim 4",
    ][:-1],
)
def test_what_a_model_has_anyway_may_be_said_again(flags):
    given = options(flags)
    assert spec_from_options(given) == spec_from_preset(given.model)


def test_activations_are_those_that_are_asked_for():
    """No family has LLaMA's form with GELU: another activation is no detail."""
    plain = f"{LLAMA_LIKE} {TINY}"
    assert spec_from_options(options(f"{plain} --swiglu")).family.name == "llama"
    for activation in ("--geglu", "--gelu-tanh"):
        assert [(found.option, found.kind) for found in problems(f"{plain} {activation}")] == [NO_FAMILY]


def test_a_directory_named_like_a_preset_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama2-7b").mkdir()
    assert spec_from_options(options("--model llama2-7b")) == spec_from_preset("llama2-7b")


def test_equal_models_have_one_canonical_form():
    config = spec_from_preset("gemma2-9b").config  # whose scale is said, and is that of its heads
    layer = config.layers[0]
    assert isinstance(layer.attention, AttentionConfig) and layer.attention.scale == 256**-0.5
    silent = replace(layer, attention=replace(layer.attention, scale=None))
    assert canonical(replace(config, layers=(silent,))) == canonical(replace(config, layers=(layer,)))
    other = replace(layer, norm=NormConfig(kind="rms", eps=1e-3))
    assert canonical(replace(config, layers=(other,))) != canonical(replace(config, layers=(layer,)))


LATENT = """--multi-head-latent-attention --kv-lora-rank 8 --qk-nope-head-dim 8 --qk-rope-head-dim 4 --v-head-dim 8
    --untie-embeddings-and-output-weights --swiglu --num-experts 8 --moe-router-load-balancing-type softmax_topk"""


@pytest.mark.parametrize(
    ("flags", "option", "kind"),
    [
        (
            f"{LLAMA_LIKE} {TINY} --swiglu --num-experts 4 --first-k-dense-replace 4",
            "--first-k-dense-replace",
            "at most",
        ),
        (f"{LLAMA_LIKE} {TINY} --swiglu --num-experts 1", "--moe-router-topk", "at most"),
        (f"{LLAMA_LIKE} {TINY} --swiglu --num-experts 4 --topk-group 2", "--topk-group", "requires"),
        (f"{TINY} --rotary-percent 0.5", "--rotary-percent", "requires"),
        (f"{LLAMA_LIKE} {TINY} {LATENT} --kv-channels 99", "--kv-channels", "excludes"),
        (
            f"{LLAMA_LIKE} {TINY} {LATENT} --group-query-attention --num-query-groups 2",
            *("--num-query-groups", "excludes"),
        ),
        (f"{LLAMA_LIKE} {TINY} {LATENT} --add-dense-bias", "--add-dense-bias", "invalid"),
        (f"{LLAMA_LIKE.replace('rope', 'alibi')} {TINY} {LATENT}", "--position-embedding-type", "requires"),
    ],
)
def test_no_option_is_dropped(flags, option, kind):
    assert (option, kind) in {(problem.option, problem.kind) for problem in problems(flags)}


def test_equal_ways_to_say_a_model():
    narrow = f"{LLAMA_LIKE} {TINY} --swiglu --untie-embeddings-and-output-weights --num-experts 8 --qk-layernorm"
    plain = spec_from_options(options(f"{narrow} --moe-intermediate-size 32"))
    softmax = "--moe-router-load-balancing-type softmax_topk --norm-topk-prob"
    assert spec_from_options(options(f"{narrow} --moe-intermediate-size 32 {softmax}")) == plain
    assert spec_from_options(options(f"--model mixtral-8x7b {softmax}")) == spec_from_preset("mixtral-8x7b")
    silent = spec_from_options(options(f"{LLAMA_LIKE} {TINY} {LATENT}"))
    assert silent == spec_from_options(options(f"{LLAMA_LIKE} {TINY} {LATENT} --moe-intermediate-size 128"))
