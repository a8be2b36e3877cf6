"""The schema itself: every option has a type, a help text and spellings of its own."""

from __future__ import annotations

import re

import pytest

from cordee.bench.options import BenchConfig
from cordee.cli import COMMANDS
from cordee.config.argv import parse
from cordee.config.option import options_of
from cordee.config.spelling import spellings
from cordee.convert.options import ConvertConfig
from cordee.data.options import PreprocessConfig
from cordee.errors import name_of
from cordee.evaluate.options import EvaluateConfig
from cordee.generate.options import GenerateConfig
from cordee.plan.options import PlanConfig
from cordee.train.options import TrainConfig

CONFIGS = list(dict.fromkeys(command.schema for command in COMMANDS.values()))


WORDS = {
    TrainConfig: "shard all-gather reduce-scatter all-reduce all-to-all overlap recompute resume rendezvous "
    "bucket prefetch dgrad wgrad ZeRO FSDP DDP HSDP zero-bubble interleaved dropout GQA MLA RoPE SwiGLU MoE router "
    "top-k epsilon warm-up AdamW MFU TensorBoard",
    GenerateConfig: "tensor parallelism pipeline parallelism shard greedy nucleus KV cache dtype batch",
    EvaluateConfig: "perplexity data-parallel shard context window stride BOS resumes batch",
    ConvertConfig: "Megatron Hugging Face GGUF DCP layout pipeline-parallel tensor-parallel LoRA merge dtype",
    PreprocessConfig: "tokenizer .bin/.idx EOD end-of-document jsonl parquet merge stream",
    PlanConfig: "schedule forward backward dgrad wgrad reduce-scatter send/recv micro-batches timeline",
    BenchConfig: "torch.compile rounds threads preset Markdown",
}
TERMS = {
    TrainConfig: (
        *("gradient accumulation", "first-moment decay (Adam beta1)", "second-moment decay", "gradient clipping"),
        *("load-balancing auxiliary loss", "capacity factor", "ring attention", "virtual pipeline stage", "loss scale"),
        *("sliding window attention", "position embedding", "mixture of experts", "tensor parallelism"),
        *("context parallelism", "expert parallelism", "pipeline parallelism", "learning rate schedule"),
    ),
    GenerateConfig: ("softmax temperature", "fused decode path", "KV cache"),
}


@pytest.mark.parametrize("config", WORDS)
def test_help_has_the_words_of_the_field(config, capsys):
    with pytest.raises(SystemExit):
        parse(config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert [term for term in (*WORDS[config].split(), *TERMS.get(config, ())) if term not in shown] == []


@pytest.mark.parametrize("config", CONFIGS)
def test_options_are_declared_completely(config):
    for option in options_of(config):
        assert option.declared.help, option.name
        assert option.kind in (bool, int, float, str), option.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", option.name)
        assert option.group, option.name
        if option.default is None:
            assert option.optional, f"{option.name}: None must be allowed where it is the default"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_spelling_names_one_option(config):
    table = spellings(config)
    for option in options_of(config):
        assert table[option.name].option is option
        for flag in (*option.value_flags, *option.negations, *option.declared.shorthands):
            assert table[name_of(flag)].option is option


@pytest.mark.parametrize(
    ("flag", "name", "kind"),
    [
        ("--layernorm-epsilon", "norm_epsilon", "value"),
        ("--json-key", "json_keys", "value"),
        ("--pad-vocab-size-to", "padded_vocab_size", "value"),
        ("--override-opt_param-scheduler", "override_opt_param_scheduler", "value"),
        ("--use-checkpoint-lr-scheduler", "use_checkpoint_opt_param_scheduler", "value"),
        ("--use-rotary-position-embeddings", "position_embedding_type", "shorthand"),
        ("--use-distributed-optimizer", "zero_stage", "shorthand"),
        ("--disable-bias-linear", "add_bias_linear", "negation"),
        ("--no-add-gate", "add_gate", "negation"),
        ("--tokenizer-not-use-fast", "tokenizer_use_fast", "negation"),
        ("--no-load-optim", "load_optim", "negation"),
        ("--no-load-rng", "load_rng", "negation"),
        ("--no-save-optim", "save_optim", "negation"),
        ("--no-kv-cache", "use_kv_cache", "negation"),
    ],
)
def test_documented_spellings(flag, name, kind):
    tables = [spellings(config) for config in CONFIGS]
    found = [table[name_of(flag)] for table in tables if name_of(flag) in table]
    assert found
    assert (name, kind) in {(spelling.option.name, spelling.kind) for spelling in found}


def test_training_defaults_of_the_reference():
    config = TrainConfig(seq_length=8, lr=1e-3)
    assert (config.clip_grad, config.weight_decay, config.adam_beta1, config.adam_beta2) == (1.0, 0.01, 0.9, 0.999)
    assert (config.adam_eps, config.min_lr, config.lr_decay_style, config.split) == (1e-8, 0.0, "linear", "969, 30, 1")
    assert (config.initial_loss_scale, config.loss_scale_window, config.hysteresis) == (2**32, 1000, 2)
    assert (config.eval_interval, config.eval_iters, config.seed) == (1000, 100, 1234)
    assert config.num_layers is None and config.global_batch_size is None
