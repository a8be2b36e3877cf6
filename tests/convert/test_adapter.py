"""Adapters merged while converting: PEFT's against its own merge, Megatron's against the products by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cordee.checkpoint import formats
from cordee.errors import Problem, ProblemError
from cordee.families.registry import spec_from_hf
from cordee.weights.megatron.layout import Rank
from tests.convert.test_megatron import ASCEND, CORE, LEGACY, PP, TP, VPP, convert, found_in, load
from tests.weights import models, tiny

LLAMA = {**models.MODELS["llama"], "num_hidden_layers": 4}
R, ALPHA = 4, 12


def rewrite_config(adapter: Path, **changes: object) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path):
    """A model, an adapter with random matrices as PEFT saves it, and PEFT's own merge of the two."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
    transformers = pytest.importorskip("transformers")

    def make(kind: str, dtype: torch.dtype = torch.float32, **lora: object) -> dict[str, torch.Tensor]:
        config = LLAMA if kind == "llama" else models.MODELS[kind]
        tiny.save(tmp_path / "base", config, tiny.tensors_of(spec_from_hf(config), dtype))
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        made = peft.get_peft_model(base, peft.LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights=False, **lora))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.add_(1)  # trained as a whole
        made.save_pretrained(tmp_path / "adapter")
        return dict(made.merge_and_unload().state_dict())

    return make


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all": ("llama", {"target_modules": LINEAR}),
    "some": ("llama", {"target_modules": ["v_proj", "up_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "rslora": ("llama", {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": LINEAR, "rank_pattern": {"layers.1.*q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "one layer": ("llama", {"target_modules": LINEAR, "layers_to_transform": [2]}),
    "biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "tied": ("llama tied", {"target_modules": ["q_proj", "down_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "packed": ("bloom", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "experts by themselves": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_it_is_pefts_own_merge(adapted, tmp_path, case):
    kind, lora = CASES[case]
    expected = adapted(kind, **lora)
    before = load_file(tmp_path / "base" / "model.safetensors")
    convert(tmp_path / "base", tmp_path / "out", "--lora-load", str(tmp_path / "adapter"), "--verify")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == before.keys()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    check({name: tensor for name, tensor in found.items() if "block_sparse_moe" not in name}, expected)


@pytest.mark.parametrize(
    "form", [(*CORE, TP, "2", PP, "2", VPP, "1"), (*LEGACY, TP, "4"), (*ASCEND, TP, "2")], ids=" ".join
)
@pytest.mark.filterwarnings("ignore")
def test_into_any_form_and_out_of_any_form(adapted, tmp_path, form):
    """An adapter of PEFT is merged on the way there, or into what is there already: the same."""
    expected = adapted("llama", target_modules=LINEAR)
    lora = ("--lora-load", str(tmp_path / "adapter"), "--lora-r", str(R), "--lora-alpha", str(ALPHA))
    convert(tmp_path / "base", tmp_path / "mg", *form, *lora, "--lora-target-modules", *LINEAR)
    convert(tmp_path / "mg", tmp_path / "back")
    check(load_file(tmp_path / "back" / "model.safetensors"), expected)
    convert(tmp_path / "base", tmp_path / "plain", *form)
    convert(tmp_path / "plain", tmp_path / "merged", *lora)
    check(load_file(tmp_path / "merged" / "model.safetensors"), expected)


@pytest.mark.filterwarnings("ignore")
def test_sums_are_made_in_float32(adapted, tmp_path):
    adapted("llama", torch.bfloat16, target_modules=["down_proj"])
    base, factors = (
        load_file(tmp_path / name) for name in ("base/model.safetensors", "adapter/adapter_model.safetensors")
    )
    convert(tmp_path / "base", tmp_path / "out", "--lora-load", str(tmp_path / "adapter"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj"
        a, b = (factors[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "AB")
        expected = (base[f"{name}.weight"].float() + ALPHA / R * (b @ a)).bfloat16()
        assert torch.equal(found[f"{name}.weight"], expected)


def handmade(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return path


Q = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": torch.ones(2, 24), f"{Q}.lora_B.weight": torch.ones(24, 2)}


FILE = "adapter_model.safetensors"


def found_kinds(option: str, load: Path, save: Path, *flags: object) -> set[tuple[str, str]]:
    """Kinds of the problems whose option ends with `option`, each beside it."""
    problems = found_in(load, save, *map(str, flags))
    return {(option, problem.kind) for problem in problems if problem.option.endswith(option)}


@pytest.mark.parametrize(
    ("tensors", "config", "flags", "expected"),
    [
        (GOOD, {"use_bdlora": True}, (), ("use_bdlora", "unsupported")),
        (GOOD, {"use_dora": True}, (), (FILE, "missing")),
        (GOOD, {"peft_type": "IA3"}, (), ("peft_type", "unsupported")),
        (GOOD, {"r": None}, (), (": r", "invalid")),
        (GOOD, {}, ("--lora-r", "3"), ("--lora-r", "stated")),
        (GOOD, {}, ("--lora-alpha", "3"), ("--lora-alpha", "stated")),
        (GOOD, {}, ("--lora-target-modules", "k_proj"), ("--lora-target-modules", "stated")),
        ({}, {}, (), (FILE, "empty")),
        ({**GOOD, f"{Q}.lora_magnitude_vector": torch.ones(24)}, {}, (), (FILE, "missing")),
        ({f"{Q}.lora_A.weight": torch.ones(2, 24)}, {}, (), (FILE, "missing")),
        ({**GOOD, f"{Q}.lora_B.weight": torch.ones(23, 2)}, {}, (), ("lora_B.weight", "shape")),
        ({**GOOD, f"{Q}.lora_B.weight": torch.ones(24, 3)}, {}, (), ("lora_B.weight", "shape")),
        ({name: torch.tensor(1.0) for name in GOOD}, {}, (), ("lora_A.weight", "shape")),
        (
            {f"{Q}.lora_A.weight": torch.ones(0, 24), f"{Q}.lora_B.weight": torch.ones(24, 0)},
            {},
            (),
            ("lora_A.weight", "shape"),
        ),
        (GOOD, {"r": 3}, (), ("lora_A.weight", "shape")),
        (GOOD, {"rank_pattern": {"q_proj": 3}}, (), ("lora_A.weight", "shape")),
        (GOOD, {"rank_pattern": {"q_proj": 2.5}}, (), ("rank_pattern: q_proj", "invalid")),
        (GOOD, {"r": True}, (), (": r", "invalid")),
        *((GOOD, {key: "yes"}, (), (key, "invalid")) for key in ("fan_in_fan_out", "use_rslora", "use_dora")),
        *(
            (GOOD, {"lora_alpha": alpha}, (), ("lora_alpha", "invalid"))
            for alpha in (float("nan"), float("inf"), 10**400, True, "4")
        ),
        *((GOOD, {"alpha_pattern": value}, (), ("alpha_pattern", "invalid")) for value in ([], ["q_proj"], "8", 8)),
        *(
            (GOOD, {"alpha_pattern": {"q_proj": value}}, (), ("alpha_pattern: q_proj", "invalid"))
            for value in (None, "8", float("nan"), 10**400, [1])
        ),
        *(
            (GOOD, {"alpha_pattern": {pattern: 8}}, (), ("alpha_pattern", "unbounded"))
            for pattern in (
                *("(", "(.*)*x", "(a|a)" * 30, ".*.*.*.*x", "q" * 201, "a{99999999999}", "(?x:(.*) *)", "(.*)(?#)*x"),
                "[",
            )
        ),
        (GOOD, {"alpha_pattern": {f"{i}.*": 8 for i in range(99)}}, (), ("alpha_pattern", "unbounded")),
        *(
            ({name: tensor.to(dtype) for name, tensor in GOOD.items()}, {}, (), ("weight", "dtype"))
            for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
        ),
        ({**GOOD, f"{Q}.lora_A": torch.ones(2, 24)}, {}, (), (FILE, "repeated")),
        ({**GOOD, f"{Q}.base_layer.bias": torch.ones(23)}, {}, (), ("q_proj.base_layer.bias", "shape")),
        ({name.replace("layers.0", "layers.7"): tensor for name, tensor in GOOD.items()}, {}, (), (FILE, "unknown")),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, tuple) else "",
)
def test_what_cannot_be_merged(tmp_path, tensors, config, flags, expected):
    tiny.save(tmp_path / "base", tiny.LLAMA)
    adapter = handmade(tmp_path / "adapter", tensors, **config)
    option, kind = expected
    assert (option, kind) in found_kinds(option, tmp_path / "base", tmp_path / "out", "--lora-load", adapter, *flags)


def test_a_good_adapter_of_that_form_is_merged(tmp_path):
    """So that what the cases above change is what is refused."""
    before = tiny.save(tmp_path / "base", tiny.LLAMA)
    convert(tmp_path / "base", tmp_path / "out", "--lora-load", str(handmade(tmp_path / "adapter", GOOD)))
    name = "model.layers.0.self_attn.q_proj.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found[name], before[name] + 4)  # 4/2 times a product of twos
    assert all(torch.equal(found[other], before[other]) for other in found.keys() - {name})


def test_patterns_are_of_what_names_end_with(tmp_path):
    """The first that matches says it, as in PEFT."""
    before = tiny.save(tmp_path / "base", tiny.LLAMA)
    patterns = {"proj": 2, r"layers\.1\..*": 6, r"layers\.(?:0|5)\.self_attn.*": 8, "q_proj": 10}
    adapter = handmade(tmp_path / "adapter", GOOD, r=3, rank_pattern={"q_proj": 2}, alpha_pattern=patterns)
    convert(tmp_path / "base", tmp_path / "out", "--lora-load", str(adapter))
    name = "model.layers.0.self_attn.q_proj.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found[name], before[name] + 8)  # 8/2 times a product of twos


def test_files_that_are_no_adapter(tmp_path):
    tiny.save(tmp_path / "base", tiny.LLAMA)
    adapter = handmade(tmp_path / "adapter", GOOD)

    def kinds(option: str, load: Path, *flags: object) -> set[tuple[str, str]]:
        return found_kinds(option, load, tmp_path / "out", *flags)

    lora = ("--lora-load", adapter)
    assert kinds("model directory", adapter) == {("model directory", "adapter")}
    assert kinds("--lora-r", tmp_path / "base", "--lora-r", "4") == {("--lora-r", "requires")}
    assert kinds("--lora-load", tmp_path / "base", "--lora-load", tmp_path / "base") == {("--lora-load", "unknown")}
    (adapter / FILE).write_bytes(b"broken")
    assert kinds(FILE, tmp_path / "base", *lora) == {(FILE, "unreadable")}
    (adapter / FILE).unlink()
    assert kinds("adapter", tmp_path / "base", *lora) == {("adapter", "missing")}
    (adapter / "adapter_config.json").write_text("{")
    assert kinds("adapter_config.json", tmp_path / "base", *lora) == {("adapter_config.json", "unreadable")}


def test_an_adapter_of_one_end_of_a_tied_pair(tmp_path):
    tiny.save(tmp_path / "base", {**tiny.LLAMA, "tie_word_embeddings": True})
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    adapter = handmade(tmp_path / "adapter", {f"{embedding}A": torch.ones(2, 61), f"{embedding}B": torch.ones(24, 2)})
    option = "embed_tokens.weight"
    assert found_kinds(option, tmp_path / "base", tmp_path / "out", "--lora-load", adapter) == {(option, "tied")}


# ---- Megatron --------------------------------------------------------------------------------------------------------


def by_rows(name: str) -> bool:
    """Whether tensor ranks share a weight by its outputs."""
    return any(part in name for part in ("linear_qkv", "linear_fc1", "query_key_value", "h_to_4h", "gate_proj"))


def trained(base: Path, path: Path, alpha: float | None, wrapped: bool = False) -> None:
    """A checkpoint of LoRA training on the Megatron checkpoint `base`, and W + alpha / r B A in place of its weights.

    Of a weight shared by its outputs A is on all ranks, of the others B.
    """
    shutil.copytree(base, path)
    generator = torch.Generator().manual_seed(0)
    shared: dict[tuple[str, str], torch.Tensor] = {}
    for file in sorted(path.rglob("model_optim_rng.pt")):
        own = base / file.relative_to(path)
        content, merged = (torch.load(at, weights_only=False) for at in (file, own))
        stage = file.parent.name.split("_")[3:]
        for key in [key for key in content if key.startswith("model")]:
            nested = "language_model" in content[key]
            inner = content[key]["language_model"]["encoder"] if nested else content[key]
            target = merged[key]["language_model"]["encoder"] if nested else merged[key]
            factors = {}
            for name, weight in inner.items():
                if "layers." not in name or weight.ndim != 2:
                    continue
                module = name.removesuffix(".weight")
                a, b = (
                    torch.randn(R, weight.shape[1], generator=generator),
                    torch.randn(weight.shape[0], R, generator=generator),
                )
                where = (*stage, key, module)
                if by_rows(name):
                    a = shared.setdefault(where, a)
                else:
                    b = shared.setdefault(where, b)
                start = "base_model.model." if wrapped else ""
                factors |= {f"{start}{module}.lora_A.default.weight": a, f"{start}{module}.lora_B.default.weight": b}
                target[name] = (weight.float() + ALPHA / R * (b @ a)).to(weight.dtype)
            content[key] = {"language_model": {"encoder": factors}} if nested else factors
        if alpha is not None and "args" in content:
            content["args"].lora_alpha = alpha
        torch.save(content, file)
        torch.save(merged, own)


FORMS = {
    "core": (*CORE, TP, "2", PP, "2"),
    "core, virtual stages": (*CORE, TP, "2", PP, "2", VPP, "1"),
    "legacy": (*LEGACY, TP, "4"),
    "ascendspeed": (*ASCEND, TP, "2"),
    "ascendspeed, merged": (*ASCEND, "--merge-mlp", PP, "2"),
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_megatron(tmp_path, form):
    tiny.save(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "base", *FORMS[form])
    shutil.copytree(tmp_path / "base", tmp_path / "expected")
    told = form != "legacy" and not form.startswith("ascend")
    trained(tmp_path / "expected", tmp_path / "adapter", ALPHA if told else None, wrapped=form == "core")
    flags = () if told else ("--lora-alpha", str(ALPHA))
    lora = ("--lora-load", str(tmp_path / "adapter"), *flags)
    convert(tmp_path / "base", tmp_path / "out", *lora, "--lora-r", str(R))
    convert(tmp_path / "expected", tmp_path / "by hand")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "by hand"))
    check(found, expected)
    before = load_file(tmp_path / "hf" / "model.safetensors")
    changed = {name.split(".")[-2] for name in found if not torch.equal(found[name], before[name])}
    assert changed == set(LINEAR)
    convert(tmp_path / "base", tmp_path / "other", *LEGACY, TP, "2", *lora)  # from Megatron to Megatron
    convert(tmp_path / "other", tmp_path / "other hf")
    check(load_file(tmp_path / "other hf" / "model.safetensors"), expected)


def test_what_cannot_be_merged_of_megatron(tmp_path):
    tiny.save(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "base", *CORE, TP, "2")
    shutil.copytree(tmp_path / "base", tmp_path / "spoiled")
    trained(tmp_path / "spoiled", tmp_path / "adapter", ALPHA)
    lora = ("--lora-load", str(tmp_path / "adapter"))

    def problem(*flags: str, base: str = "base") -> Problem:
        (found,) = found_in(tmp_path / base, tmp_path / "out", *lora, *flags)
        return found

    def stated(*flags: str) -> tuple[str, str, object]:
        return (found := problem(*flags)).option, found.kind, found.limit

    assert problem(base="hf").kind == "base"
    assert stated("--lora-alpha", "16") == ("--lora-alpha", "stated", 12)
    assert stated("--lora-r", "16") == ("--lora-r", "stated", {4})
    modules = {"linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"}
    assert stated("--lora-target-modules", "linear_qkv") == ("--lora-target-modules", "stated", modules)
    tiny.save(tmp_path / "other", {**LLAMA, "intermediate_size": 48})
    convert(tmp_path / "other", tmp_path / "other mg", *CORE)
    assert {found.kind for found in found_in(tmp_path / "other mg", tmp_path / "out", *lora)} == {"shape"}
    tiny.save(tmp_path / "longer", {**LLAMA, "num_hidden_layers": 5})
    convert(tmp_path / "longer", tmp_path / "longer mg", *CORE)
    assert (problem(base="longer mg").kind, problem(base="longer mg").limit) == ("layers", 5)
    shutil.rmtree(tmp_path / "adapter" / "iter_0000001" / "mp_rank_01")
    assert (problem().kind, problem().limit) == ("missing", [Rank(1, 0, 0)])
    with pytest.raises(ProblemError):
        formats.read(tmp_path / "adapter")  # by itself it is no model
    assert load(tmp_path / "base", "mp_rank_00")["iteration"] == 1


@pytest.mark.parametrize(
    ("spoil", "alpha", "expected"),
    [
        (lambda tensor: tensor.sum(), ALPHA, ("iter_0000001", "shape")),
        (lambda tensor: tensor[:0], ALPHA, ("iter_0000001", "shape")),
        (lambda tensor: tensor.bool(), ALPHA, ("iter_0000001", "dtype")),
        (lambda tensor: tensor, [ALPHA], ("args.lora_alpha", "invalid")),
        (lambda tensor: tensor, float("nan"), ("args.lora_alpha", "invalid")),
    ],
)
def test_spoiled_adapters_of_megatron(tmp_path, spoil, alpha, expected):
    tiny.save(tmp_path / "hf", LLAMA)
    convert(tmp_path / "hf", tmp_path / "base", *CORE)
    shutil.copytree(tmp_path / "base", tmp_path / "spoiled")
    trained(tmp_path / "spoiled", tmp_path / "adapter", alpha)
    (file,) = (tmp_path / "adapter").rglob("model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    content["model"] = {name: spoil(tensor) for name, tensor in content["model"].items()}
    torch.save(content, file)
    lora = ("--lora-load", str(tmp_path / "adapter"))
    assert expected in found_kinds(expected[0], tmp_path / "base", tmp_path / "out", *lora)
