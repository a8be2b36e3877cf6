"""What is printed reads back to the same run and says where each value comes from."""

from __future__ import annotations

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.config.load import load_config
from cordee.config.render import changes, to_yaml, with_origins
from cordee.errors import Problem
from cordee.train.options import TrainConfig

ARGV = ["--seq-length", "8", "--lr", "1e-5", "--data-path", "0.3", "a b", "--tokenizer-kwargs", "eos", "no: #"]


def reload(loaded, tmp_path_factory):
    file = tmp_path_factory.mktemp("render") / "printed.yaml"
    file.write_text(to_yaml(loaded), encoding="utf-8")
    return load_config(TrainConfig, ["--config", str(file)]).config


def test_printed_yaml_loads_to_the_same_run(tmp_path_factory):
    loaded = load_config(
        TrainConfig, [*ARGV, "--rampup-batch-size", "1", "2", "3", "--no-async-save", "--save", "null"]
    )
    assert reload(loaded, tmp_path_factory) == loaded.config


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_survives(tmp_path_factory, text):
    loaded = load_config(TrainConfig, ARGV, overrides={"save": text, "data_path": ["1", text]})
    assert reload(loaded, tmp_path_factory) == loaded.config


def test_other_yaml_readers_see_the_same_types(tmp_path):
    read = yaml.safe_load(to_yaml(load_config(TrainConfig, ARGV)))
    assert (read["lr"], read["adam_eps"], read["async_save"], read["save"]) == (1e-5, 1e-8, True, None)
    assert read["data_path"] == [0.3, "a b"] or read["data_path"] == ["0.3", "a b"]


def test_origins_are_comments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("\nclip_grad: 2\n")
    printed = to_yaml(load_config(TrainConfig, [*ARGV, "--config", "run.yaml"]).derive(nproc_per_node=2))
    comments = {line.split(":")[0]: line.split("  # ")[-1] for line in printed.splitlines() if "  # " in line}
    assert comments["clip_grad"] == "run.yaml:2"
    assert comments["lr"] == "--lr"
    assert comments["seed"] == "default"
    assert comments["nproc_per_node"] == "derived"
    assert len(comments) == len(TrainConfig.__dataclass_fields__)


def test_changes_lists_only_what_differs():
    text = changes(load_config(TrainConfig, [*ARGV, "--clip-grad", "1.0", "--bf16"]))
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "tokenizer_kwargs",
        "seq_length",
        "data_path",
        "lr",
        "bf16",
    ]


def test_problems_name_the_line_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("min_lr: 3\n")
    loaded = load_config(TrainConfig, [*ARGV, "--config", "run.yaml"])
    found = [Problem(option, 1, "why", "fix") for option in ("--min-lr", "--lr", "--seed", "model directory")]
    assert [problem.place for problem in with_origins(found, loaded)] == ["run.yaml:1", "", "", ""]
    assert str(with_origins(found, loaded)[0]).startswith("--min-lr (run.yaml:1) = 1\n")
