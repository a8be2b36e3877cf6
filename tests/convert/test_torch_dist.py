"""Checkpoints in Megatron's format `torch_dist`: folders that torch's own library saves as Megatron's does, and, where
there is megatron-core, its own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata

from cordee.checkpoint import formats, torch_dist
from cordee.errors import ProblemError
from cordee.families.registry import spec_from_hf
from cordee.weights.megatron.arguments import arguments
from cordee.weights.megatron.layout import Wanted
from cordee.weights.megatron.source import Reading
from tests.convert import megatron_oracle
from tests.convert.test_megatron import CORE, TE, convert
from tests.problems import facts, limits
from tests.weights import models, tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ITERATION = "iter_0000010"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
QKV = "decoder.layers.self_attention.linear_qkv.weight"
OPTIMIZER = {  # of the state of optimizers, also as chains of them had it, nothing is to be looked at
    f"optimizer.state.exp_avg.{QKV}": torch.ones(3),
    f"chained_0.optimizer.state.fp32_param.{QKV}": torch.ones(2, 2),
    f"{QKV.removesuffix('weight')}_extra_state/shard_0_2": io.BytesIO(b"no tensor"),
    "rng_state/shard_0.0_1.1": [{"random_rng_state": 3}],
}


def whole(model: dict[str, Tensor], *, stacked: bool, own_layers: bool) -> dict[str, Tensor]:
    """The tensors of the one rank that has all of a model, as Megatron saves them with all ranks together.

    stacked: layers are of one form. own_layers: these are Megatron's own, not Transformer Engine's.
    """
    if own_layers and not any("kv_down" in name for name in model):  # it names none of latent attention otherwise
        for norm, linear in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1")):
            model = {name.replace(f".{norm}.", f".{linear}.layer_norm_"): tensor for name, tensor in model.items()}
    model = _stack(model, r"(.*)\.mlp\.experts\.local_experts\.(\d+)\.(.*)", r"\1.mlp.experts.experts.\3")
    return _stack(model, r"(decoder\.layers)\.(\d+)\.(.*)", r"\1.\3") if stacked else model


def _stack(model: dict[str, Tensor], numbered: str, name: str) -> dict[str, Tensor]:
    """Tensors whose names differ by a number, put into one by that number."""
    found: dict[str, dict[int, Tensor]] = {}
    for full, tensor in model.items():
        match = re.fullmatch(numbered, full)
        found.setdefault(match.expand(name) if match else full, {})[int(match[2]) if match else -1] = tensor
    return {
        key: torch.stack([parts[n] for n in sorted(parts)]) if -1 not in parts else parts[-1]
        for key, parts in found.items()
    }


def save(root: Path, tensors: dict[str, Tensor], common: dict[str, object] | None) -> Path:
    """A checkpoint of these and, unless it is an object among them, what is `common` to ranks."""
    folder = root / ITERATION
    folder.mkdir(parents=True)
    if common is not None:
        torch.save(common, folder / "common.pt")
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({**tensors, **OPTIMIZER}, checkpoint_id=str(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps(BACKEND))
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tensors of a tiny model by Hugging Face's names, and what the file of its one rank holds."""
    root, found = tmp_path_factory.mktemp("models"), {}

    def get(kind: str, impl: tuple[str, ...] = CORE) -> tuple[Path, dict[str, Tensor], dict[str, object]]:
        if (kind, impl) not in found:
            hf, config = root / f"{len(found)}", models.MODELS[kind]
            tensors = tiny.save(hf, config, tiny.tensors_of(spec_from_hf(config), torch.bfloat16))
            convert(hf, root / f"{len(found)}-mg", *impl)
            (file,) = (root / f"{len(found)}-mg").rglob("model_optim_rng.pt")
            found[kind, impl] = hf, tensors, settings(file)
        return found[kind, impl]

    return get


def settings(file: Path) -> dict[str, object]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file)


def beside(content: dict[str, object]) -> dict[str, object]:
    """As `common.pt` has it."""
    return {"args": content["args"], "iteration": 10, "checkpoint_version": 3.0, "optimizer": {"param_groups": []}}


@pytest.fixture
def good(made, tmp_path) -> Path:
    """The folder of an iteration that can be read, to be changed."""
    _, _, content = made("llama")
    stored = whole(content["model"], stacked=True, own_layers=True)
    return save(tmp_path / "dist", stored, beside(content)) / ITERATION


@pytest.mark.parametrize(
    ("kind", "stacked", "impl"),
    [
        ("llama", False, TE),
        ("llama tied", True, TE),
        ("gpt2", True, CORE),
        ("mixtral", True, CORE),
        ("mixtral", False, TE),
        ("qwen2_moe", True, TE),
        ("deepseek_v2", False, CORE),
    ],
    ids=str,
)
def test_tensors_are_the_same(made, tmp_path, kind, stacked, impl):
    _, tensors, content = made(kind, impl)
    root = save(tmp_path / "dist", whole(content["model"], stacked=stacked, own_layers=impl is CORE), beside(content))
    spec = spec_from_hf(models.MODELS[kind])
    source, expected = formats.read(root, Reading(spec=spec)), tiny.canonical_of(spec, tensors)
    for name, tensor in expected.items():
        assert source.dtype(name) == tensor.dtype and torch.equal(source.tensor(name), tensor), name


def test_conversion(made, good, tmp_path):
    """The checkpoint, or the folder of an iteration; its settings tell the model."""
    _, tensors, _ = made("llama")
    for number, folder in enumerate((good, good.parent)):
        assert formats.format_of(folder).name == "mg"
        convert(folder, tmp_path / f"{number}", "--verify")
        written = load_file(tmp_path / f"{number}" / "model.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_settings_among_the_tensors(made, tmp_path):
    """As core 0.19 saves them."""
    hf, tensors, content = made("llama")
    stored = whole(content["model"], stacked=True, own_layers=True)
    root = save(tmp_path / "dist", {**stored, torch_dist.COMMON: [beside(content)]}, None)
    source = formats.read(root / ITERATION)
    assert source.spec.config == formats.read(hf).spec.config
    assert any("optimizer" in note for note in source.notes)
    expected = tiny.canonical_of(source.spec, tensors)
    for name in source.names():
        part = tuple(slice(size // 3, size) for size in source.shape(name))
        assert torch.equal(source.tensor(name, part), expected[name][part]), name


def test_metadata_of_core_0_15(good, monkeypatch):
    """Its class is Megatron's own."""
    module = types.ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    module.MCoreMetadata = type("MCoreMetadata", (Metadata,), {"__module__": module.__name__})
    for name in ("megatron", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = pickle.loads((good / ".metadata").read_bytes())  # the test has written it
    content.__class__ = module.MCoreMetadata
    content.mcore_data = {QKV: {"nd_reformulated_orig_global_shape": (6, 64, 32)}}
    (good / ".metadata").write_bytes(pickle.dumps(content))
    assert formats.read(good).names()


def test_an_iteration_is_chosen(made, tmp_path):
    _, _, content = made("llama")
    stored = whole(content["model"], stacked=True, own_layers=True)
    root = save(tmp_path / "dist", stored, beside(content))
    other = {name: 2 * tensor for name, tensor in stored.items()}
    (save(tmp_path / "other", other, beside(content)) / ITERATION).rename(root / "iter_0000004")
    newest, older = formats.read(root), formats.read(root, Reading(iteration=4))
    assert torch.equal(older.tensor("final_norm.weight"), 2 * newest.tensor("final_norm.weight"))
    with pytest.raises(ProblemError) as caught:
        formats.read(root, Reading(iteration=5))
    assert facts(caught) == [("--ckpt-step", 5, "missing")] and limits(caught) == [[4, 10]]


# ---- what is none ----------------------------------------------------------------------------------------------------


def found(folder: Path) -> list[tuple[str, str]]:
    """Where something is wrong, and its kind."""
    with pytest.raises(ProblemError) as caught:
        formats.read(folder)
    return [(Path(option).name, kind) for option, _, kind in facts(caught)]


@pytest.mark.parametrize("backend", ["zarr", "fsdp", 3, ["torch_dist"]])
def test_other_backends(good, backend):
    (good / "metadata.json").write_text(json.dumps({**BACKEND, "sharded_backend": backend}))
    assert found(good) == [("metadata.json", "unknown")]


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "__0_0.distcp"])
def test_files_that_are_missing_or_cut_off(good, name):
    where, missing = (name, "missing") if name == "common.pt" else (".metadata", "unreadable")
    whole_file = (good / name).read_bytes()
    (good / name).write_bytes(whole_file[: len(whole_file) // 2])
    assert found(good) == [(where, "unreadable")]
    (good / name).unlink()
    assert found(good) == [(where, missing)]


class Harmful:
    """What makes a folder when Python unpickles it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_run(good, tmp_path):
    marker = tmp_path / "marker"
    content = settings(good / "common.pt")
    torch.save({**content, "more": Harmful(marker)}, good / "common.pt")
    assert any("mkdir" in note for note in formats.read(good).notes)
    (good / ".metadata").write_bytes(pickle.dumps(Harmful(marker)))
    assert found(good) == [(".metadata", "unreadable")]
    assert not marker.exists()
    pickle.loads((good / ".metadata").read_bytes())
    assert marker.exists()


def changed(good: Path, content: dict[str, object], **tensors: Tensor | None) -> Path:
    stored = whole(content["model"], stacked=True, own_layers=True)
    shutil.rmtree(good)
    kept = {name: tensor for name, tensor in {**stored, **tensors}.items() if tensor is not None}
    return save(good.parent, kept, beside(content)) / ITERATION


@pytest.mark.parametrize(
    ("tensor", "kinds"),
    [
        (None, {"unclear"}),
        (torch.ones(6, 64, 31), {"unclear"}),
        (torch.ones(5, 64, 32), {"unclear"}),
        (torch.ones(6 * 64, 32), {"unclear"}),
        (torch.ones(6, 64, 32, dtype=torch.int8), {"dtype"}),
        (torch.tensor(1.0), {"unreadable"}),
    ],
    ids=["missing", "width", "layers", "not stacked", "integers", "number"],
)
def test_tensors_that_are_not_the_models(made, good, tensor, kinds):
    _, _, content = made("llama")
    assert {kind for _, kind in found(changed(good, content, **{QKV: tensor}))} == kinds


def test_one_tensor_by_two_names(made, good):
    _, _, content = made("llama")
    name = QKV.replace("layers.", "layers.2.")
    assert found(changed(good, content, **{name: torch.ones(64, 32)})) == [(ITERATION, "unreadable")]


def test_tensors_without_number(made, good, monkeypatch):
    """Few bytes may say that they are of any number of layers."""
    monkeypatch.setattr(torch_dist, "PARTS", 1000)
    _, _, content = made("llama")
    assert formats.read(good).names()
    assert found(changed(good, content, **{QKV: torch.ones(1001, 1)})) == [(ITERATION, "unreadable")]


# ---- megatron-core ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stacked"),
    [("llama tied", True), ("qwen3", False), ("mixtral", True), ("mixtral", False), ("deepseek_v2", False)],
)
def test_what_megatron_saves(tmp_path, pool, kind, stacked):
    """Two tensor ranks: the same as it saves in a file of each."""
    pytest.importorskip("megatron.core", reason="needs megatron-core, of the extra `test`")
    spec = spec_from_hf(models.MODELS[kind])
    args = arguments(spec.config, Wanted().layout(spec.config), spec.config.vocab_size + 1, norm_epsilon=1e-5)
    if stacked and kind == "mixtral":
        args.moe_layer_freq = 1  # as a list it would keep layers apart, whatever they are
    metadata = {} if stacked or kind == "mixtral" else {"non_homogeneous_layers": True}
    pool.run(megatron_oracle.save, 2, tmp_path / "ranks", args, None, tmp_path / "dist", metadata)
    reading = Reading(spec=spec)
    ranks, dist = (formats.read(tmp_path / name, reading) for name in ("ranks", "dist"))
    for name in spec.shapes():
        assert torch.equal(dist.tensor(name), ranks.tensor(name)), name
