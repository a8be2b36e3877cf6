"""Flags, YAML and Python values to one configuration, and every problem at once."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.bench.options import BenchConfig
from cordee.cli import COMMANDS
from cordee.config import laws
from cordee.config.load import config_from_dict, load_as_far_as_possible, load_config
from cordee.config.option import Option, options_of, to_flag
from cordee.config.spelling import spellings
from cordee.data.options import PreprocessConfig
from cordee.errors import ProblemError
from cordee.generate.options import GenerateConfig
from cordee.train.options import TrainConfig

NEEDED = ["--seq-length", "8", "--lr", "1e-3"]


def load(*argv, schema: Any = TrainConfig, files=(), **overrides):
    needed = NEEDED if schema is TrainConfig else []
    return load_config(schema, [*needed, *(["--config", *files] if files else []), *argv], overrides=overrides)


def problems(*argv, schema: Any = TrainConfig, files=(), **overrides):
    with pytest.raises(ProblemError) as caught:
        load(*argv, schema=schema, files=files, **overrides)
    return caught.value.problems


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file and return its name relative to the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--micro-batch-size", "4"], "micro_batch_size", 4),
        (["--micro-batch-size=4"], "micro_batch_size", 4),
        (["--train-iters", "1e3"], "train_iters", 1000),
        (["--min-lr", "1e-5"], "min_lr", 1e-5),
        (["--min-lr", "0"], "min_lr", 0.0),
        (["--rotary-base", "1000000"], "rotary_base", 1e6),
        (["--bf16"], "bf16", True),
        (["--swiglu"], "swiglu", True),
        (["--no-swiglu"], "swiglu", False),
        (["--swiglu", "--no-swiglu"], "swiglu", False),
        (["--no-async-save"], "async_save", False),
        (["--disable-bias-linear"], "add_bias_linear", False),
        (["--no-load-optim"], "load_optim", False),
        (["--tokenizer-not-use-fast"], "tokenizer_use_fast", False),
        (["--layernorm-epsilon", "1e-6"], "norm_epsilon", 1e-6),
        (["--use-rotary-position-embeddings"], "position_embedding_type", "rope"),
        (["--position-embedding-type", "absolute"], "position_embedding_type", "learned_absolute"),
        (["--use-distributed-optimizer"], "zero_stage", 1),
        (["--zero-stage", "3"], "zero_stage", 3),
        (["--rampup-batch-size", "16", "8", "1000"], "rampup_batch_size", (16, 8, 1000)),
        (["--data-path", "0.3", "a", "0.7", "b"], "data_path", ("0.3", "a", "0.7", "b")),
        (["--split", "949,50,1"], "split", "949,50,1"),
        (["--tokenizer-kwargs", "eos_token", "<|end|>"], "tokenizer_kwargs", {"eos_token": "<|end|>"}),
        (["--tokenizer-kwargs", "a=x=y", "b=true", "c=3"], "tokenizer_kwargs", {"a": "x=y", "b": True, "c": 3}),
        (["--override-opt_param-scheduler"], "override_opt_param_scheduler", True),
        (["--lr", "5", "--lr", "7"], "lr", 7.0),
    ],
)
def test_flags(argv, name, value):
    loaded = load(*argv)
    assert getattr(loaded.config, name) == value
    assert type(getattr(loaded.config, name)) is type(value)
    assert loaded.origins[name] == argv[-1 if argv[-1].startswith("--") else 0].partition("=")[0]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("min_lr: 1e-5", "min_lr", 1e-5),
        ("min-lr: 1.5e-05", "min_lr", 1.5e-5),
        ("train_iters: 1e3", "train_iters", 1000),
        ("initial_loss_scale: 65536", "initial_loss_scale", 65536.0),
        ("bf16: true", "bf16", True),
        ("bf16: yes", "bf16", True),
        ("no_load_optim: true", "load_optim", False),
        ("no-load-optim: false", "load_optim", True),
        ("load_optim: off", "load_optim", False),
        ("disable_bias_linear: true", "add_bias_linear", False),
        ("layernorm_epsilon: 1e-6", "norm_epsilon", 1e-6),
        ("use_distributed_optimizer: true", "zero_stage", 1),
        ("override_opt_param_scheduler: true", "override_opt_param_scheduler", True),
        ("save: null", "save", None),
        ("save:", "save", None),
        ("save: 'null'", "save", "null"),
        ("save: 010", "save", "010"),
        ("save: no", "save", "no"),
        ("split: 949, 50, 1", "split", "949, 50, 1"),
        ("data_path: corpus", "data_path", ("corpus",)),
        ("data_path: [0.3, a, 0.70, b]", "data_path", ("0.3", "a", "0.70", "b")),
        ("data_path:\n- a", "data_path", ("a",)),
        ("rampup_batch_size: [16, 8, 1e3]", "rampup_batch_size", (16, 8, 1000)),
        ("tokenizer_kwargs: {eos: '</s>', fast: true}", "tokenizer_kwargs", {"eos": "</s>", "fast": True}),
        ("tokenizer_kwargs: [eos, '</s>']", "tokenizer_kwargs", {"eos": "</s>"}),
    ],
)
def test_yaml(write, line, name, value):
    loaded = load("--config", write(f"# comment\n{line}\n"))
    assert getattr(loaded.config, name) == value
    assert type(getattr(loaded.config, name)) is type(value)
    assert loaded.origins[name] == "run.yaml:2"


def test_later_sources_win(write):
    first = write("clip_grad: 1.5\nweight_decay: 0.1\nseed: 1\nmin_lr: 1e-6\n", "first.yaml")
    second = write("weight_decay: 0.2\nseed: 2\nmin_lr: 2e-6\n", "second.yaml")
    loaded = load("--config", first, second, "--seed", "3", "--min-lr", "3e-6", min_lr=4e-6)
    config, origins = loaded.config, loaded.origins
    assert (config.clip_grad, origins["clip_grad"]) == (1.5, "first.yaml:1")
    assert (config.weight_decay, origins["weight_decay"]) == (0.2, "second.yaml:1")
    assert (config.seed, origins["seed"]) == (3, "--seed")
    assert (config.min_lr, origins["min_lr"]) == (4e-6, "python")
    assert (config.adam_eps, origins["adam_eps"]) == (1e-8, "default")


def test_null_takes_back_what_an_earlier_file_gave(write):
    first, second = write("save: there\n", "first.yaml"), write("save: ~\n", "second.yaml")
    assert load("--config", first, "--config", second).config.save is None


MUTUAL = {
    (command, name, other)
    for command, known in COMMANDS.items()
    for name, others in laws.replaced(known.schema).items()
    for other in others
    if name in laws.replaced(known.schema)[other]
}


def _other_than_default(option: Option) -> object:
    return next(choice for choice in (*option.choices, 1) if choice != option.default)


def test_a_flag_replaces_what_it_excludes_in_a_file(write):
    """For every pair of options that exclude each other; two of one source are a problem."""
    assert {("train", "num_epochs", "train_iters"), ("plan", "num_layers", "num_layer_list")} <= MUTUAL
    for command, name, other in sorted(MUTUAL):
        schema = COMMANDS[command].schema
        known = {option.name: option for option in options_of(schema)}
        words = {key: [str(_other_than_default(known[key]))] * (known[key].length or 1) for key in (name, other)}
        lines = {key: f"{key}: [{', '.join(values)}]" for key, values in words.items()}
        file = write(lines[other].replace("[1]", "1"))
        flag = [to_flag(name), *words[name] * (not known[name].is_switch)]
        needed = [word for option in known.values() if option.required for word in (option.flag, "2")]
        loaded = load_as_far_as_possible(schema, [*needed, "--config", file, *flag])
        assert (loaded.problems, loaded.origins[name], loaded.origins[other]) == ([], to_flag(name), "default")
        assert getattr(loaded.config, other) == known[other].default
        (note,) = loaded.notes
        assert note.startswith(f"{to_flag(name)} replaces {other} ") and note.endswith("(run.yaml:1)")
        file = write("\n".join(lines.values()).replace("[1]", "1"))
        both = load_as_far_as_possible(schema, [*needed, "--config", file])
        assert not both.notes and {name, other} <= {
            each for problem in (*both.problems, *laws.problems(both.config)) for each in problem.names
        }


def test_what_replaces_nothing(write):
    """A detail of runs of another kind, what is switched off, and what a file says itself."""
    file = write("train_samples: 64\nbf16: true\nlr_warmup_fraction: 0\n")
    loaded = load("--config", file, "--lr-decay-iters", "5", "--no-fp16")
    assert (loaded.config.train_samples, loaded.config.bf16, loaded.notes) == (64, True, [])
    assert [problem.option for problem in laws.problems(loaded.config)] == ["--lr-decay-iters"]
    assert load("--config", file, "--model", "llama2-7b").config.lr_warmup_fraction == 0
    loaded = load("--config", write("lr_warmup_iters: 0"), "--model", "llama2-7b")
    assert (loaded.config.lr_warmup_fraction, loaded.notes) == (None, [])  # of the recipe, and nothing is lost


def test_derived_values_are_marked():
    loaded = load().derive(nproc_per_node=4)
    assert (loaded.config.nproc_per_node, loaded.origins["nproc_per_node"]) == (4, "derived")
    assert loaded.origins["lr"] == "--lr"


def test_all_problems_are_reported_together(write):
    file = write(
        """\
        mico_batch: 3
        num_layers: 2.5
        zero_stage: 7
        optimizer: {name: adam}
        optim: {lr: 3}
        seed: ~
        no_add_gate: maybe
        data_path: [[a]]
        clip_grad: -1
        clip_grad: 1
        rampup_batch_size: 16
        """
    )
    found = problems(
        *("--config", file, "--global-bach-size", "3", "--tensor-modell-size=2", "word"),
        *("--hidden_size", "8", "--min-lr", "low", "--tokenizer-kwargs", "a", "b", "c", "--lr-decay-style", "cosin"),
    )
    shown = {f"{problem.option} ({problem.place})" if problem.place else problem.option: problem for problem in found}
    kinds = {option: problem.kind for option, problem in shown.items()}
    assert set(shown) == {
        *("mico_batch (run.yaml:1)", "num_layers (run.yaml:2)", "zero_stage (run.yaml:3)", "optimizer (run.yaml:4)"),
        *("optim (run.yaml:5)", "seed (run.yaml:6)", "no_add_gate (run.yaml:7)", "data_path (run.yaml:8)"),
        *("clip_grad (run.yaml:9)", "clip_grad (run.yaml:10)", "rampup_batch_size (run.yaml:11)"),
        *("--global-bach-size", "--tensor-modell-size", "word", "--hidden_size", "--min-lr"),
        *("--tokenizer-kwargs", "--lr-decay-style"),
    }
    assert "micro_batch_size" in shown["mico_batch (run.yaml:1)"].names
    assert shown["mico_batch (run.yaml:1)"].value == "3"
    assert (kinds["clip_grad (run.yaml:10)"], shown["clip_grad (run.yaml:10)"].limit) == ("repeated", 9)
    assert kinds["optim (run.yaml:5)"] == kinds["data_path (run.yaml:8)"] == "nested"
    assert kinds["num_layers (run.yaml:2)"] == kinds["--min-lr"] == "type"
    assert kinds["rampup_batch_size (run.yaml:11)"] == kinds["--tokenizer-kwargs"] == "count"
    assert kinds["--lr-decay-style"] == kinds["zero_stage (run.yaml:3)"] == "choice"
    assert "global_batch_size" in shown["--global-bach-size"].names
    assert shown["--tensor-modell-size"].value == "2"
    assert "hidden_size" in shown["--hidden_size"].names
    for problem in found:
        assert problem.why and problem.fix


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["--num-layers", "0"], "range"),
        (["--hidden-dropout", "1"], "range"),
        (["--lr-warmup-fraction", "1.1"], "range"),
        (["--adam-beta1", "-1"], "range"),
        (["--rampup-batch-size", "1", "0", "2"], "range"),
        (["--rampup-batch-size", "1", "2"], "count"),
        (["--clip-grad", "nan"], "range"),
        (["--clip-grad", "inf"], "range"),
        (["--train-iters", "1e400"], "type"),
        (["--train-iters", "eight"], "type"),
        (["--micro-batch", "3"], "unknown"),  # no abbreviations
        (["--data-path", "a", "--data-path", "b"], "repeated"),
        (["--zero-stage", "3", "--use-distributed-optimizer"], "excludes"),
        (["--norm-epsilon", "1e-5", "--layernorm-epsilon", "1e-6"], "excludes"),
        (["--train-iters"], "missing"),
        (["--data-path"], "missing"),
        (["--tokenizer-kwargs"], "missing"),
        (["--bf16=maybe"], "syntax"),
        (["--config"], "syntax"),
    ],
)
def test_bad_flags(argv, kind):
    (problem,) = problems(*argv)
    last = [word.partition("=")[0] for word in argv if word.startswith("--")][-1]
    assert (problem.option.partition("/")[0], problem.kind) == (last, kind)
    assert problem.fix


def test_a_missing_value_hides_no_other_problem():
    found = problems("--seq-length", "--train-iters", "--adam-beta1", "2", "--bf16", "--train-itres", "--lr", "-1")
    assert [(problem.option, problem.kind) for problem in found] == [
        *(("--seq-length", "missing"), ("--train-iters", "missing"), ("--adam-beta1", "range"), ("--lr", "range")),
        ("--train-itres", "unknown"),
    ]


def test_shorthand_cannot_be_false(write):
    (problem,) = problems("--config", write("use_distributed_optimizer: false\n"))
    assert problem.kind == "choice" and "zero_stage" in problem.names


def test_missing_options_are_reported_once_each(write):
    with pytest.raises(ProblemError) as caught:
        load_config(TrainConfig, ["--lr", "fast"])
    assert [problem.option for problem in caught.value.problems] == ["--lr", "--seq-length"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("a: [1", "syntax"), ("- a\n- b\n", "syntax"), ("just words", "syntax"), (b"\xff\xfe", "unreadable")],
)
def test_bad_files(tmp_path, text, kind):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (problem,) = problems("--config", str(file))
    assert (problem.option, problem.kind) == ("--config", kind)
    assert str(file) in str(problem.value)


def test_missing_file():
    (problem,) = problems("--config", "nowhere.yaml")
    assert (problem.option, problem.value, problem.kind) == ("--config", "nowhere.yaml", "unreadable")


def test_empty_file_gives_nothing(write):
    assert load("--config", write("# nothing yet\n")).config == load().config


def test_python_values():
    values = {"seq_length": 8, "lr": 1e-3, "data_path": ["a"], "bf16": True, "rampup_batch_size": (1, 2, 3)}
    config = config_from_dict(TrainConfig, {**values, "tokenizer_kwargs": {"x": 1}, "no_load_rng": True, "save": None})
    assert config == TrainConfig(
        seq_length=8,
        lr=1e-3,
        data_path=("a",),
        bf16=True,
        rampup_batch_size=(1, 2, 3),
        tokenizer_kwargs={"x": 1},
        load_rng=False,
    )


def test_python_paths_and_numpy_numbers(tmp_path):
    import numpy as np

    config = config_from_dict(TrainConfig, {"seq_length": np.int64(8), "lr": np.float32(0.5), "save": tmp_path})
    assert (config.seq_length, config.lr, config.save) == (8, 0.5, str(tmp_path))


def test_bad_python_values():
    with pytest.raises(ProblemError) as caught:
        config_from_dict(TrainConfig, {"seq_length": True, "lr": object(), "nothing": 3, "bf16": 2, "seed": [1, 2]})
    assert {p.option for p in caught.value.problems} == {"seq_length", "lr", "nothing", "bf16", "seed"}


@settings(deadline=None, max_examples=50)
@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.integers(min_value=0, max_value=2**62))
def test_numbers_survive_exactly(rate, seed):
    config = config_from_dict(GenerateConfig, {"load": "x", "seed": seed})
    assert config.seed == seed
    assert config_from_dict(TrainConfig, {"seq_length": 8, "lr": 1.0, "min_lr": rate}).min_lr == rate


def test_positional_and_its_flag():
    assert load_config(BenchConfig, ["train", "--rounds", "2"]).config.suite == "train"
    assert load_config(BenchConfig, ["--rounds", "2", "--suite", "resume"]).config.suite == "resume"
    assert [p.option for p in problems("trian", schema=BenchConfig)] == ["--suite"]


def test_both_spellings_of_json_keys():
    for flag in ("--json-keys", "--json-key"):
        config: Any = load("--output-prefix", "x", flag, "title", "text", schema=PreprocessConfig).config
        assert config.json_keys == ("title", "text")


def test_a_prompt_may_look_like_anything():
    argv = ["--load", "x", "--prompt", "- a list", "--prompts-file=--odd"]
    config: Any = load(*argv, schema=GenerateConfig).config
    assert (config.prompt, config.prompts_file) == (("- a list",), "--odd")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "lr"),
        ("per_device_train_batch_size", "micro_batch_size"),
        ("per_device_eval_batch_size", "micro_batch_size"),
        ("gradient_accumulation_steps", "global_batch_size"),
        ("warmup_ratio", "lr_warmup_fraction"),
        ("warmup_steps", "lr_warmup_iters"),
        ("num_train_epochs", "num_epochs"),
        ("epochs", "num_epochs"),
        ("max_steps", "train_iters"),
        ("logging_steps", "log_interval"),
        ("save_steps", "save_interval"),
        ("eval_steps", "eval_interval"),
    ],
)
def test_names_of_other_programs_are_answered_with_ours(write, theirs, ours):
    """As a flag, with either kind of dashes, and as a key; the option that is meant is not missing besides."""
    given = [word for name in ("lr", "seq_length") if name != ours for word in (to_flag(name), "1")]
    ways = [[to_flag(theirs), "3"], [f"--{theirs}", "3"], ["--config", write(f"{theirs}: 3\n")]]
    for argv in ways:
        with pytest.raises(ProblemError) as caught:
            load_config(TrainConfig, [*given, *argv])
        (problem,) = caught.value.problems
        assert (problem.subject, problem.value, problem.kind, problem.limit) == (theirs, "3", "unknown", ours)
        assert ours in problem.names


def test_every_name_of_other_programs_means_one_option_and_is_none_of_ours():
    for command in COMMANDS.values():
        named = [name for option in options_of(command.schema) for name in option.declared.elsewhere]
        assert len(named) == len(set(named)) and not set(named) & spellings(command.schema).keys()


@pytest.mark.parametrize(
    ("words", "shown", "hidden"),
    [
        (["zero"], ["--zero-stage"], ["--lr", "--seq-length"]),
        (["learning_rate"], ["--lr"], ["--seq-length"]),
        (["lr_warmup", "fraction"], ["--lr-warmup-fraction"], ["--lr-warmup-iters", "--zero-stage"]),
        (["nothing-like-it"], [], ["--lr", "--zero-stage"]),
        ([], ["--lr", "--zero-stage"], []),
    ],
)
def test_help_about_words(capsys, words, shown, hidden):
    with pytest.raises(SystemExit) as ended:
        load("--help", *words)
    assert ended.value.code == 0
    flags = {line.split()[0].rstrip(",") for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    assert flags >= {"--config", *shown} and not flags & set(hidden)


def test_words_that_are_no_options():
    with pytest.raises(ProblemError) as caught:
        load_config(TrainConfig, ["-lr", "3", "--seq-length", "8", "--lr", "1", "stray", "--train-itres", "4"])
    found = {problem.option: problem for problem in caught.value.problems}
    assert {option: problem.kind for option, problem in found.items()} == {"-lr": "unknown", "--train-itres": "unknown"}
    assert "lr" in found["-lr"].names and "train_iters" in found["--train-itres"].names
