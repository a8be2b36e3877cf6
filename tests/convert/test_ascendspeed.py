"""AscendSpeed's older forms, and the options of its converters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.convert.test_megatron import ASCEND, PP, TP, convert, found_in
from tests.weights import models, tiny

LLAMA = models.MODELS["llama"]
EARLY = {"mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}
JOINED = {"mlp.proj": "mlp.dense_h_to_4h"}


@pytest.fixture
def hf(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    return tmp_path / "hf", tiny.save(tmp_path / "hf", LLAMA)


def rename(path: Path, names: dict[str, str]) -> None:
    for file in path.rglob("*.pt"):
        content = torch.load(file, weights_only=True)
        encoder = content["model"]["language_model"]["encoder"]
        for old, new in names.items():
            encoder = {name.replace(old, new): tensor for name, tensor in encoder.items()}
        content["model"]["language_model"]["encoder"] = encoder
        torch.save(content, file)


@pytest.mark.parametrize(
    ("flags", "names"), [((), EARLY), (("--merge-mlp",), JOINED)], ids=["before November 2023", "gate and up joined"]
)
def test_other_names_of_the_mlp(hf, tmp_path, flags, names):
    path, tensors = hf
    convert(path, tmp_path / "there", *ASCEND, TP, "2", PP, "2", *flags)
    rename(tmp_path / "there", names)
    convert(tmp_path / "there", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_iteration_may_be_given_itself(hf, tmp_path):
    path, tensors = hf
    convert(path, tmp_path / "there", *ASCEND, "--deepspeed", TP, "2")
    convert(tmp_path / "there" / "release", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_options_of_its_converters(hf, tmp_path):
    """`convert_weights_from_huggingface.py` and `convert_weights_when_tp_pp_change.py`."""
    path, tensors = hf
    sizes = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    convert(path, tmp_path / "a", *ASCEND, *sizes, "--make-vocab-size-divisible-by", "8")
    source = ("--src-tensor-model-parallel-size", "2", "--src-pipeline-model-parallel-size", "2")
    target = ("--tgt-tensor-model-parallel-size", "4", "--orig-vocab-size", "61")
    convert(tmp_path / "a", tmp_path / "b", *ASCEND, *source, *target)
    assert len(list((tmp_path / "b" / "release").iterdir())) == 4
    for model, flags, kind in (
        (tmp_path / "b", ("--src-tensor-model-parallel-size", "2"), "stated"),
        (path, ("--src-tensor-model-parallel-size", "2"), "requires"),
        (path, ("--pse",), "stated"),
    ):
        assert [problem.kind for problem in found_in(model, tmp_path / "c", *flags)] == [kind]
    convert(tmp_path / "b", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_has_no_effect_is_said(hf, tmp_path, caplog):
    with caplog.at_level("WARNING", "cordee"):
        convert(hf[0], tmp_path / "out", "--max-queue-size", "50", "--megatron-path", "x")
    assert "--max-queue-size" in caplog.text and "--megatron-path" in caplog.text
