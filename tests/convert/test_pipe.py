"""What pipelines of DeepSpeed save, made here by hand from a model of Hugging Face, comes back bit for bit."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cordee.checkpoint import formats
from cordee.errors import Problem, ProblemError
from cordee.families.registry import spec_from_hf
from tests.convert.test_megatron import ASCEND, CORE, TP, convert, found_in
from tests.weights import models, tiny

BLOOM, LLAMA = models.MODELS["bloom"], {**models.MODELS["llama"], "attention_bias": False}
LAYERS, TENSOR, ROWS = 6, 2, 64  # rows of the embedding, with those that fill it up to a multiple
ROW_SPLIT = re.compile(r"word_embeddings.weight|.*(query_key_value|h_to_4h|gate_proj|up_proj|lm_head)\.(weight|bias)")
COLUMN_SPLIT = re.compile(r".*(dense|dense_4h_to_h|down_proj)\.weight")
Modules = dict[int, dict[str, Tensor]]


def part(name: str, tensor: Tensor, rank: int) -> Tensor:
    """What a tensor rank holds of a tensor: its rows, its columns, or all of it."""
    dim = 0 if ROW_SPLIT.fullmatch(name) else 1 if COLUMN_SPLIT.fullmatch(name) else None
    return tensor.clone() if dim is None else tensor.chunk(TENSOR, dim)[rank].clone()


def bloom(tensors: dict[str, Tensor], gap: int = 2) -> Modules:
    """The modules of BLOOM by their numbers: q, k and v of each head stand together in its files too."""
    modules: Modules = {1: {}, 1 + gap + LAYERS - 1 + gap: {}}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name == "word_embeddings.weight":
            modules[1][name] = torch.cat([tensor, tensor[-(ROWS - len(tensor)) :]])
        elif name.startswith("word_embeddings_layernorm."):
            modules[1][name.replace("_layernorm", ".norm")] = tensor
        elif name.startswith("ln_f."):
            modules[1 + gap + LAYERS - 1 + gap][name.removeprefix("ln_f.")] = tensor
        else:
            _, layer, rest = name.split(".", 2)
            modules.setdefault(1 + gap + int(layer), {})[rest] = tensor
    return modules


def llama(tensors: dict[str, Tensor]) -> Modules:
    """Those of an early LLaMA: attention under its early name, gate and up apart, a head of its own."""
    modules: Modules = {1: {}, 4 + LAYERS: {}, 5 + LAYERS: {}}
    for name, tensor in tensors.items():
        match name.removeprefix("model.").split(".", 2):
            case ["embed_tokens", _]:
                modules[1]["word_embeddings.weight"] = torch.cat([tensor, tensor[-(ROWS - len(tensor)) :]])
            case ["lm_head", _]:
                modules[5 + LAYERS]["lm_head.weight"] = torch.cat([tensor, tensor[-(ROWS - len(tensor)) :]])
            case ["norm", _]:
                modules[4 + LAYERS]["weight"] = tensor
            case ["layers", number, rest]:
                rest = rest.replace("self_attn.o_proj", "attention.dense")
                modules.setdefault(3 + int(number), {})[rest] = tensor
    for number in range(3, 3 + LAYERS):
        q, k, v = (modules[number].pop(f"self_attn.{kind}_proj.weight") for kind in "qkv")
        heads = [tensor.view(-1, 2 if kind else 1, 4, 32) for tensor, kind in ((q, 1), (k, 0), (v, 0))]
        modules[number]["attention.query_key_value.weight"] = torch.cat(heads, 1).reshape(-1, 32)
        modules[number]["attention.rotary_emb.inv_freq"] = torch.ones(2)
    return modules


def save_layers(path: Path, modules: Modules, **args: object) -> None:
    """Training's files: one for each module and rank, and settings for each rank and each of two stages."""
    path.mkdir(parents=True)
    for number, tensors in modules.items():
        for rank in range(TENSOR):
            state = OrderedDict((name, part(name, tensor, rank)) for name, tensor in tensors.items())
            torch.save(state, path / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    for rank in range(2 * TENSOR):
        settings = argparse.Namespace(tensor_model_parallel_size=TENSOR, pipeline_model_parallel_size=2, **args)
        state = {"module": None, "args": settings, "iteration": 1000, "mp_world_size": TENSOR, "dp_world_size": 1}
        torch.save(state, path / f"mp_rank_{rank:02d}_model_states.pt")


def save_stages(path: Path, modules: Modules) -> None:
    """The files of AscendSpeed's converter of BLOOM: two stages, the embedding by the name of what is tied to it."""
    path.mkdir(parents=True)
    for rank in range(2 * TENSOR):
        held = {}
        for number, tensors in modules.items():
            if (number < 3 + LAYERS // 2) == (rank < TENSOR):
                start = "tied_modules.embed" if number == 1 else f"{number}"
                norm = "final_layernorm." if number > 2 + LAYERS else ""
                held |= {f"{start}.{norm}{name}": part(name, tensor, rank % TENSOR) for name, tensor in tensors.items()}
        content = {"checkpoint_version": 3.0, "module": {"module": held}, "dp_world_size": 0}
        torch.save(content, path / f"mp_rank_{rank:02d}_model_states.pt")


@pytest.fixture
def made(tmp_path) -> Callable[[dict], tuple[Path, dict[str, Tensor]]]:
    def make(config: dict) -> tuple[Path, dict[str, Tensor]]:
        return tmp_path / "hf", tiny.save(
            tmp_path / "hf", config, tiny.tensors_of(spec_from_hf(config), torch.bfloat16)
        )

    return make


def check_back(there: Path, back: Path, tensors: dict[str, Tensor], *flags: str) -> None:
    assert formats.format_of(there).name == "mg"
    convert(there, back, *flags)
    found = load_file(back / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("gap", [2, 1], ids=["until 2023", "since then"])
def test_bloom_in_files_of_layers(made, tmp_path, gap):
    hf, tensors = made(BLOOM)
    save_layers(tmp_path / "ds" / "global_step1000", bloom(tensors, gap))
    (tmp_path / "ds" / "latest").write_text("global_step1000")
    check_back(tmp_path / "ds", tmp_path / "a", tensors, "--model", str(hf))
    check_back(tmp_path / "ds" / "global_step1000", tmp_path / "b", tensors, "--model", str(hf))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_what_a_trainer_saves_for_deepspeed_beside_a_model_is_no_model(made, tmp_path, name):
    """Folders of Hugging Face's Trainer and of LLaMA-Factory; that of DeepSpeed itself is still read as such."""
    hf, tensors = made(LLAMA)
    save_layers(hf / "global_step1000", llama(tensors))
    (hf / "latest").write_text("global_step1000")
    (hf / "model.safetensors").rename(hf / name)
    if name == "pytorch_model.bin":
        torch.save(tensors, hf / name)
    assert formats.format_of(hf / "global_step1000").name == "mg"
    if name.startswith("adapter"):
        (hf / "config.json").rename(hf / "adapter_config.json")
        with pytest.raises(ProblemError) as caught:
            formats.format_of(hf)
        assert [problem.kind for problem in caught.value.problems] == ["adapter"]
    else:
        assert formats.format_of(hf).name == "hf"
        convert(hf, tmp_path / "out")
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_bloom_in_files_of_stages(made, tmp_path):
    hf, tensors = made(BLOOM)
    save_stages(tmp_path / "ds" / "release", bloom(tensors))
    (tmp_path / "ds" / "latest").write_text("release\n")
    check_back(tmp_path / "ds", tmp_path / "a", tensors, "--model", str(hf))


def test_llama_in_files_of_layers(made, tmp_path, caplog):
    """Without files of settings, without tensor ranks in the names, and with a config.json beside them."""
    hf, tensors = made(LLAMA)
    save_layers(tmp_path / "ds", llama(tensors))
    for file in (tmp_path / "ds").glob("mp_rank_*"):
        file.unlink()
    (tmp_path / "ds" / "config.json").write_text((hf / "config.json").read_text())
    check_back(tmp_path / "ds", tmp_path / "a", tensors)
    whole = llama(tensors)
    (tmp_path / "whole").mkdir()
    for number, module in whole.items():
        torch.save(OrderedDict(module), tmp_path / "whole" / f"layer_{number:02d}-model_states.pt")
    check_back(tmp_path / "whole", tmp_path / "b", tensors, "--model", str(hf))
    assert "files do not say so, and they are read as groups of heads" in caplog.text


def test_settings_tell_the_model(made, tmp_path):
    _, tensors = made(LLAMA)
    settings = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 4,
        "position_embedding_type": "rope",
        "max_position_embeddings": 32,
        "seq_length": 32,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    }
    save_layers(tmp_path / "ds", llama(tensors), **settings)
    convert(tmp_path / "ds", tmp_path / "a", "--true-vocab-size", "61")
    found = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_into_other_formats(made, tmp_path):
    """The same files as from the model itself."""
    hf, tensors = made(BLOOM)
    save_layers(tmp_path / "ds", bloom(tensors))
    for name, flags in (("core", (*CORE, TP, "4")), ("ascend", (*ASCEND, "--deepspeed", TP, "2"))):
        convert(tmp_path / "ds", tmp_path / f"{name}-a", *flags, "--model", str(hf), "--verify")
        convert(hf, tmp_path / f"{name}-b", *flags)
        files = sorted((tmp_path / f"{name}-b").rglob("*.pt"))
        assert files
        for file in files:
            same = tmp_path / f"{name}-a" / file.relative_to(tmp_path / f"{name}-b")
            assert file.read_bytes() == same.read_bytes()


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def problem_of(load: Path, save: Path, hf: Path) -> Problem:
    (problem,) = found_in(load, save, "--model", str(hf))
    return problem


@pytest.fixture
def broken(made, tmp_path) -> Callable[[], Problem]:
    """What is wrong with files of layers in `ds`."""
    hf, tensors = made(BLOOM)
    save_layers(tmp_path / "ds", bloom(tensors), num_layers=LAYERS)

    return lambda: problem_of(tmp_path / "ds", tmp_path / "out", hf)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ("layer_05-model_01-*", "layer_05-model_01-model_states.pt"),
        ("layer_05-*", "those of module 5"),
        ("layer_03-*", "those of module 3"),
        ("layer_08-*", "those of module 8"),
        ("layer_01-*", "the embedding"),
        ("layer_10-*", "the final norm"),
        ("layer_*-model_01-*", "layer_01-model_01-model_states.pt"),
    ],
)
def test_files_that_are_missing(broken, tmp_path, lost, expected):
    for file in (tmp_path / "ds").glob(lost):
        file.unlink()
    problem = broken()
    assert problem.kind == "missing" and expected in problem.limit


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_file_that_is_cut_off(broken, tmp_path, kept):
    file = tmp_path / "ds" / "layer_04-model_01-model_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    problem = broken()
    assert (problem.option, problem.kind) == (str(file), "unreadable")


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(file, weights_only=False)  # the test has written it
    change(content)
    torch.save(content, file)


def disagreement(problem: Problem) -> Any:
    assert problem.kind == "disagree"
    return problem.limit


def test_ranks_that_disagree(broken, tmp_path):
    ds = tmp_path / "ds"
    rewrite(ds / "mp_rank_02_model_states.pt", lambda content: content.update(iteration=2000))
    assert disagreement(broken()) == "iteration"
    rewrite(ds / "mp_rank_02_model_states.pt", lambda content: content.update(iteration=1000))
    rewrite(ds / "mp_rank_03_model_states.pt", lambda content: setattr(content["args"], "num_layers", 7))
    assert disagreement(broken()) == "num_layers"
    rewrite(ds / "mp_rank_03_model_states.pt", lambda content: setattr(content["args"], "num_layers", LAYERS))
    rewrite(ds / "layer_04-model_01-model_states.pt", lambda content: content["input_layernorm.weight"].add_(1))
    norm = "language_model.encoder.layers.1.input_layernorm.weight"
    assert disagreement(broken()) == norm
    rewrite(ds / "layer_04-model_01-model_states.pt", lambda content: content.pop("input_layernorm.weight"))
    assert disagreement(broken()) == (1, 0)  # tensor and pipeline rank


def test_stages_that_do_not_fit(made, tmp_path):
    hf, tensors = made(BLOOM)
    ds = tmp_path / "ds"
    save_stages(ds, bloom(tensors))

    (ds / "mp_rank_03_model_states.pt").rename(tmp_path / "kept")
    assert problem_of(ds, tmp_path / "out", hf).limit == ["mp_rank_03_model_states.pt"]
    (tmp_path / "kept").rename(ds / "mp_rank_03_model_states.pt")
    (ds / "mp_rank_01_model_states.pt").rename(tmp_path / "kept")
    assert problem_of(ds, tmp_path / "out", hf).limit == ["mp_rank_01_model_states.pt"]
    (tmp_path / "kept").rename(ds / "mp_rank_01_model_states.pt")
    rewrite(
        ds / "mp_rank_01_model_states.pt", lambda content: content["module"]["module"].pop("4.input_layernorm.weight")
    )
    assert "module.10.final_layernorm.weight" in disagreement(problem_of(ds, tmp_path / "out", hf))
