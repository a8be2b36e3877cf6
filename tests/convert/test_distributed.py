"""State dicts in torch's distributed checkpoint format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cordee.checkpoint import formats
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.errors import ProblemError
from cordee.families.registry import spec_from_hf
from tests.weights import tiny


def save(path, state) -> None:
    dcp.save(state, checkpoint_id=str(path), no_dist=True)
    (path / "config.json").write_text(json.dumps(tiny.LLAMA))


@pytest.mark.parametrize("names", ["hf", "canonical"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_plain_state_dict(tmp_path, names, nested):
    spec = spec_from_hf(tiny.LLAMA)
    tensors = tiny.tensors_of(spec, torch.bfloat16)
    state = tensors if names == "hf" else tiny.canonical_of(spec, tensors)
    more = {"optimizer": {"step": torch.ones(3)}}
    save(tmp_path / "dcp", {"model": state, **more} if nested else state)
    assert formats.format_of(tmp_path / "dcp").name == "dcp"
    assert job.run(ConvertConfig(load_dir=str(tmp_path / "dcp"), save_dir=str(tmp_path / "hf"), verify=True)) == 0
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_torch_reads_what_is_written(tmp_path, dtype):
    tensors = tiny.save(tmp_path / "hf", tiny.LLAMA)
    flags = {"save_model_type": "dcp", "params_dtype": dtype, "verify": True}
    assert job.run(ConvertConfig(load_dir=str(tmp_path / "hf"), save_dir=str(tmp_path / "dcp"), **flags)) == 0
    expected = {name: tensor.to(getattr(torch, dtype)) if dtype else tensor for name, tensor in tensors.items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pt")
    assert torch.load(tmp_path / "all.pt", weights_only=True).keys() == tensors.keys()
    assert job.run(ConvertConfig(load_dir=str(tmp_path / "dcp"), save_dir=str(tmp_path / "back"))) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)


def kind_of_problem(path: Path) -> str:
    with pytest.raises(ProblemError) as caught:
        formats.read(path)
    (problem,) = caught.value.problems
    return problem.kind


def test_what_is_none(tmp_path):
    save(tmp_path / "dcp", {"something": torch.ones(3)})
    assert kind_of_problem(tmp_path / "dcp") == "unknown"
    (tmp_path / "dcp" / ".metadata").write_bytes(b"broken")
    assert kind_of_problem(tmp_path / "dcp") == "unreadable"
    (tmp_path / "dcp" / ".metadata").unlink()
    assert kind_of_problem(tmp_path / "dcp") == "unreadable"


def test_data_that_is_missing_or_cut_off(tmp_path):
    save(tmp_path / "dcp", tiny.tensors_of(spec_from_hf(tiny.LLAMA)))
    file = next((tmp_path / "dcp").glob("*.distcp"))
    size = file.stat().st_size
    os.truncate(file, size // 2)
    with pytest.raises(ProblemError, match=rf"{file.name} has {size // 2} bytes of"):
        formats.read(tmp_path / "dcp")
    file.unlink()
    with pytest.raises(ProblemError, match=rf"{file.name} has 0 bytes of"):
        formats.read(tmp_path / "dcp")
