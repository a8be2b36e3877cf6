"""Hugging Face to Megatron's formats and back, by the options of `cordee convert`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cordee.checkpoint import formats
from cordee.config.load import load_config
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem, ProblemError
from cordee.families.registry import families, spec_from_hf, spec_from_preset
from cordee.model.compare import canonical
from cordee.weights.megatron.arguments import arguments, spec_of_arguments
from cordee.weights.megatron.layout import Rank, Wanted
from tests.matrix import sampled
from tests.weights import models, tiny

CORE = ("--save-model-type", "mg", "--use-mcore-models")
LEGACY = ("--save-model-type", "mg")
ASCEND = ("--save-model-type", "ascendspeed")
TP, PP = "--target-tensor-parallel-size", "--target-pipeline-parallel-size"
EP, VPP = "--target-expert-parallel-size", "--num-layers-per-virtual-pipeline-stage"


def convert(load: Path, save: Path, *flags: str) -> None:
    assert job.run(options(load, save, *flags)) == 0


def options(load: Path, save: Path, *flags: str) -> ConvertConfig:
    return load_config(ConvertConfig, ["--load-dir", str(load), "--save-dir", str(save), *flags]).config


def found_in(load: Path, save: Path, *flags: str) -> list[Problem]:
    before = save.exists()
    with pytest.raises(ProblemError) as caught:
        job.run(options(load, save, *flags))
    assert save.exists() == before and not list(save.parent.glob(f".{save.name}.*")), "something was left behind"
    return caught.value.problems


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Hugging Face directories and their tensors by the name of a tiny model."""
    root, found = tmp_path_factory.mktemp("models"), {}

    def get(kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if kind not in found:
            path = root / kind.replace(" ", "-")
            config = models.MODELS.get(kind) or models.tiny_preset(kind)
            found[kind] = path, tiny.save(path, config, tiny.tensors_of(spec_from_hf(config), torch.bfloat16))
        return found[kind]

    return get


def check_round_trip(made, kind: str, scratch: Path, *flags: str, form: str = "mg") -> None:
    """The way there and back, bit for bit, `config.json` too."""
    path, tensors = made(kind)
    convert(path, scratch / "there", *flags)
    assert formats.format_of(scratch / "there").name == form
    convert(scratch / "there", scratch / "back")
    written = load_file(scratch / "back" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    config, published = (json.loads((at / "config.json").read_text()) for at in (scratch / "back", path))
    assert {**config, "torch_dtype": "", "dtype": ""} == {**published, "torch_dtype": "", "dtype": ""}


TE = (*CORE, "--transformer-impl", "transformer_engine")
MINDFORMERS = ("--save-model-type", "mindformers")
FORMS = {"core": CORE, "te": TE, "legacy": LEGACY, "ascendspeed": ASCEND, "mindformers": MINDFORMERS}
STAGES = (  # of 6 layers
    f"{PP} 1",
    f"{PP} 2",
    f"{PP} 3",
    f"{PP} 3 --num-layer-list 1,3,2",
    f"{PP} 2 {VPP} 1",
    f"{PP} 3 {VPP} 1",
    f"{PP} 3 {VPP} 2",  # virtual stages in name only
)


@pytest.mark.parametrize(
    ("form_and_stages", "tensor"), sampled(map(" ".join, product(("core", "legacy"), STAGES)), ("1", "2", "4"))
)
def test_every_layout_comes_back(made, tmp_path, form_and_stages, tensor):
    form, *stages = form_and_stages.split()
    check_round_trip(made, "llama", tmp_path, *FORMS[form], TP, tensor, *stages)


MIXTURES = {"deepseek_v2", "deepseek_v3", "gpt_moe", "gpt_oss", "grok", "llama4", "mixtral", "qwen2_moe", "qwen3_moe"}
NEITHER = MIXTURES | {"gemma2", "gemma3", "glm4", "olmo2", "qwen3"}  # experts, more norms, or norms elsewhere
INEXPRESSIBLE = {
    "core": {"olmo2"},
    "te": {"olmo2"},
    "legacy": NEITHER,
    "ascendspeed": NEITHER,
    "mindformers": NEITHER | {"baichuan", "bloom", "chatglm", "glm", "gpt2", "internlm2", "phi3", "qwen"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", families())
@pytest.mark.parametrize("form", FORMS)
def test_every_family_comes_back(made, tmp_path, kind, form):
    split = () if form == "mindformers" else (TP, "2", PP, "2", "--make-vocab-size-divisible-by", "8")
    if kind in INEXPRESSIBLE[form]:
        found = found_in(made(kind)[0], tmp_path / "out", *FORMS[form], *split)
        assert "inexpressible" in {problem.kind for problem in found}
        return
    name = "mindformers" if form == "mindformers" else "mg"
    check_round_trip(made, kind, tmp_path, *FORMS[form], *split, form=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind_and_impl", "experts"),
    sampled(
        map(" ".join, product(models.SPARSE, ("local", "transformer_engine", "mindspeed"))),
        ("2", "4", "1 --moe-grouped-gemm", "2 --moe-grouped-gemm"),
        per_row=2,
    ),
)
def test_every_mixture_comes_back(made, tmp_path, kind_and_impl, experts):
    (kind, impl), (expert, *grouped) = kind_and_impl.rsplit(maxsplit=1), experts.split()
    tensor = "1" if impl == "mindspeed" and kind.startswith("deepseek") else "2"
    stages = (PP, "2") if expert == "2" else (PP, "1")  # so that folders have two and three numbers
    flags = ("--transformer-impl", impl, TP, tensor, EP, expert, *stages, *grouped)
    check_round_trip(made, kind, tmp_path, *CORE, *flags)


@pytest.mark.parametrize("flags", [(), ("--merge-mlp",), ("--deepspeed",), (PP, "3")], ids=" ".join)
def test_ascendspeed_comes_back(made, tmp_path, flags):
    check_round_trip(made, "llama", tmp_path, *ASCEND, TP, "2", *flags)
    there = tmp_path / "there"
    tracker = "latest" if "--deepspeed" in flags else "latest_checkpointed_iteration.txt"
    assert (there / tracker).read_text() == "release\n"
    file = "mp_rank_01_model_states.pt" if "--deepspeed" in flags else "mp_rank_01/model_optim_rng.pt"
    if PP not in flags:
        content = torch.load(there / "release" / file, weights_only=True)
        assert content["checkpoint_version"] == 3.0 and "args" not in content
        model = content["module" if "--deepspeed" in flags else "model"]["language_model"]
        assert len(model["embedding"]["word_embeddings"]["weight"]) == 128  # 61 filled up to 2 x 128
        assert ("layers.0.mlp.proj.weight" in model["encoder"]) == ("--merge-mlp" in flags)


@pytest.mark.parametrize("kind", ["llama", "llama tied", "qwen2"])
def test_mindformers_comes_back(made, tmp_path, kind):
    check_round_trip(made, kind, tmp_path, "--save-model-type", "mindformers", form="mindformers")
    names = load_file(tmp_path / "there" / "model.safetensors").keys()
    assert {"model.tok_embeddings.embedding_weight", "model.layers.5.attention.wq.weight"} <= names
    assert {"model.layers.0.feed_forward.w3.weight", "model.layers.0.ffn_norm.weight", "model.norm_out.weight"} <= names


def test_between_megatrons(made, tmp_path):
    """Every arrow between Megatron's formats, one after the other, ends where it began."""
    path, tensors = made("llama")
    steps = [
        (*LEGACY, TP, "2", PP, "3"),
        (*CORE, TP, "4", PP, "2", VPP, "1", "--load-from-legacy"),
        (*CORE, TP, "1", PP, "3", "--num-layer-list", "3,2,1"),
        (*CORE, "--save-to-legacy", PP, "2", VPP, "3"),
        (*LEGACY, TP, "4"),
    ]
    for number, flags in enumerate(steps):
        convert(path, tmp_path / str(number), *flags)
        path = tmp_path / str(number)
    convert(path, tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_mixture_between_megatrons(made, tmp_path):
    path, tensors = made("mixtral")
    for number, flags in enumerate([(TP, "2", EP, "2"), ("--moe-grouped-gemm", EP, "4", PP, "3"), (TP, "4")]):
        convert(path, tmp_path / str(number), *CORE, *flags)
        path = tmp_path / str(number)
    convert(path, tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


# ---- what is in the files, by hand -----------------------------------------------------------------------------------


def load(path: Path, folder: str) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path / "iter_0000001" / folder / "model_optim_rng.pt", weights_only=True)


def test_what_core_holds(made, tmp_path):
    path, hf = made("llama")
    convert(path, tmp_path / "mg", *CORE, TP, "2", PP, "3", VPP, "1", "--make-vocab-size-divisible-by", "16")
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "1"
    folders = {folder.name for folder in (tmp_path / "mg" / "iter_0000001").iterdir()}
    assert folders == {f"mp_rank_{t:02d}_{p:03d}" for t in range(2) for p in range(3)}

    first, last = load(tmp_path / "mg", "mp_rank_01_000"), load(tmp_path / "mg", "mp_rank_01_002")
    assert first.keys() == {"args", "checkpoint_version", "iteration", "model0", "model1"}
    assert (first["checkpoint_version"], first["iteration"]) == (3.0, 1)
    args = first["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 3)
    assert (args.virtual_pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage) == (2, 1)
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by, args.num_query_groups) == (64, 16, 4)
    assert args.params_dtype == torch.bfloat16 and args.bf16

    # Stage 0 holds layers 0 and 3, and tensor rank 1 the last 2 of 4 groups, each 2 heads of 4, then k, then v.
    layer = "model.layers.3.self_attn"
    q, k, v = (hf[f"{layer}.{kind}_proj.weight"].view(4, -1, 32) for kind in "qkv")
    groups = torch.cat([q, k, v], 1)[2:].flatten(0, 1)
    assert torch.equal(first["model1"]["decoder.layers.0.self_attention.linear_qkv.weight"], groups)
    q, k, v = (hf[f"{layer}.{kind}_proj.bias"].view(4, -1) for kind in "qkv")
    bias = torch.cat([q, k, v], 1)[2:].flatten()
    assert torch.equal(first["model1"]["decoder.layers.0.self_attention.linear_qkv.bias"], bias)
    out = hf[f"{layer}.o_proj.weight"][:, 16:]
    assert torch.equal(first["model1"]["decoder.layers.0.self_attention.linear_proj.weight"], out)
    gate, up = (hf[f"model.layers.3.mlp.{kind}_proj.weight"][12:] for kind in ("gate", "up"))
    assert torch.equal(first["model1"]["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate, up]))
    norm = hf["model.layers.3.post_attention_layernorm.weight"]
    assert torch.equal(first["model1"]["decoder.layers.0.pre_mlp_layernorm.weight"], norm)

    # 61 tokens are filled up to 64 rows with the last one.
    rows = hf["model.embed_tokens.weight"]
    rows = torch.cat([rows, rows[-1:].expand(3, -1)])[32:]
    assert torch.equal(first["model0"]["embedding.word_embeddings.weight"], rows)
    assert torch.equal(last["model1"]["output_layer.weight"][:29], hf["lm_head.weight"][32:])
    assert torch.equal(last["model1"]["decoder.final_layernorm.weight"], hf["model.norm.weight"])
    assert "output_layer.weight" not in last["model0"]


def test_a_tied_head_is_copied_to_the_last_stage(made, tmp_path):
    path, hf = made("llama tied")
    convert(path, tmp_path / "core", *CORE, PP, "2")
    convert(path, tmp_path / "legacy", *LEGACY, PP, "2")
    core, legacy = load(tmp_path / "core", "mp_rank_00_001"), load(tmp_path / "legacy", "mp_rank_00_001")
    assert torch.equal(core["model"]["output_layer.weight"], hf["model.embed_tokens.weight"])
    assert torch.equal(legacy["model"]["word_embeddings_for_head"]["weight"], hf["model.embed_tokens.weight"])
    convert(path, tmp_path / "one", *CORE)
    assert "output_layer.weight" not in load(tmp_path / "one", "mp_rank_00")["model"]


def test_what_legacy_holds(made, tmp_path):
    path, hf = made("gpt2")
    convert(path, tmp_path / "mg", *LEGACY, PP, "2", "--num-layer-list", "2,4")
    model = load(tmp_path / "mg", "mp_rank_00_001")["model"]["language_model"]
    assert model.keys() == {"encoder"}
    assert (
        "layers.3.mlp.dense_h_to_4h.bias" in model["encoder"] and "layers.4.input_norm.weight" not in model["encoder"]
    )
    assert torch.equal(model["encoder"]["layers.0.input_norm.bias"], hf["transformer.h.2.ln_1.bias"])
    first = load(tmp_path / "mg", "mp_rank_00_000")
    assert first["args"].num_layer_list == "2,4"
    embedding = first["model"]["language_model"]["embedding"]
    assert torch.equal(embedding["position_embeddings"]["weight"], hf["transformer.wpe.weight"])


def test_where_experts_are(made, tmp_path):
    path, hf = made("mixtral")
    convert(path, tmp_path / "list", *CORE, TP, "2", EP, "2")
    convert(path, tmp_path / "grouped", *CORE, TP, "2", EP, "2", "--moe-grouped-gemm")
    # Expert 3 is the second of expert rank 1; the second number of a folder is the expert rank where stages are one.
    one, grouped = (load(tmp_path / kind, "mp_rank_01_001")["model"] for kind in ("list", "grouped"))
    prefix = "model.layers.4.block_sparse_moe"
    gate, up = (hf[f"{prefix}.experts.3.{kind}.weight"][12:] for kind in ("w1", "w3"))
    down = hf[f"{prefix}.experts.3.w2.weight"][:, 12:]
    experts = "decoder.layers.4.mlp.experts"
    assert torch.equal(one[f"{experts}.local_experts.1.linear_fc1.weight"], torch.cat([gate, up]))
    assert torch.equal(one[f"{experts}.local_experts.1.linear_fc2.weight"], down)
    assert torch.equal(one["decoder.layers.4.mlp.router.weight"], hf[f"{prefix}.gate.weight"])
    weight1, weight2 = grouped[f"{experts}.weight1"], grouped[f"{experts}.weight2"]
    assert weight1.shape == (32, 2 * 24) and weight2.shape == (2 * 12, 32)
    assert torch.equal(weight1.view(2, 32, -1)[1], torch.cat([gate, up]).t())  # as GroupedMLP.forward reads it
    assert torch.equal(weight2.view(2, -1, 32)[1], down.t())


def test_what_mindspeed_holds(made, tmp_path):
    path, hf = made("deepseek_v2")
    convert(path, tmp_path / "mg", *CORE, "--transformer-impl", "mindspeed")
    model = load(tmp_path / "mg", "mp_rank_00")["model"]
    attention, prefix = "decoder.layers.1.self_attention", "model.layers.1.self_attn"
    packed = torch.cat([hf[f"{prefix}.q_a_proj.weight"], hf[f"{prefix}.kv_a_proj_with_mqa.weight"]])
    assert torch.equal(model[f"{attention}.linear_qkv.weight"], packed)
    assert torch.equal(model[f"{attention}.linear_qb.weight"], hf[f"{prefix}.q_b_proj.weight"])
    assert torch.equal(model[f"{attention}.linear_kvb.weight"], hf[f"{prefix}.kv_b_proj.weight"])
    assert torch.equal(model[f"{attention}.k_layernorm.weight"], hf[f"{prefix}.kv_a_layernorm.weight"])


# ---- options ---------------------------------------------------------------------------------------------------------


def test_settings_alone_tell_the_model(made, tmp_path):
    """Without config.json beside it, as Megatron itself leaves a checkpoint."""
    for kind, extra in (("llama", ()), ("gpt2", ()), ("qwen2", ())):
        path, tensors = made(kind)
        there = tmp_path / kind
        convert(path, there, *CORE, TP, "2", "--make-vocab-size-divisible-by", "8")
        (there / "config.json").unlink()
        convert(there, tmp_path / f"{kind}-back", "--true-vocab-size", "61", *extra)
        written = load_file(tmp_path / f"{kind}-back" / "model.safetensors")
        assert {name: written[name].shape for name in written} == {name: tensors[name].shape for name in tensors}
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({str(i): i for i in range(61)}))
    convert(tmp_path / "llama", tmp_path / "counted", "--vocab-file", str(vocabulary))
    assert len(load_file(tmp_path / "counted" / "model.safetensors")["lm_head.weight"]) == 61
    convert(tmp_path / "llama", tmp_path / "padded")
    assert len(load_file(tmp_path / "padded" / "model.safetensors")["lm_head.weight"]) == 64


def test_the_original_model_tells_the_model(made, tmp_path):
    """As MindSpeed-LLM's converter has it: the original in --save-dir, the result in mg2hf inside."""
    path, tensors = made("mixtral")
    convert(path, tmp_path / "mg", *CORE, EP, "2")
    (tmp_path / "mg" / "config.json").unlink()
    (problem,) = found_in(tmp_path / "mg", tmp_path / "out")
    assert problem.kind == "unclear" and "model" in problem.involves
    original = tmp_path / "original"
    shutil.copytree(path, original)
    (original / "tokenizer.json").write_text("{}")
    convert(tmp_path / "mg", original, "--save-model-type", "hf", "--use-mcore-models", "--load-model-type", "mg")
    written = load_file(original / "mg2hf" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert (original / "mg2hf" / "tokenizer.json").is_file()
    convert(tmp_path / "mg", tmp_path / "told", "--model", str(path))
    assert (tmp_path / "told" / "model.safetensors").is_file()


def test_older_spellings(made, tmp_path):
    path, _ = made("llama")
    flags = "--loader llama2_hf --saver megatron --model-type GPT --tokenizer-model None --params-dtype bf16"
    convert(path, tmp_path / "mg", *flags.split(), TP, "2", "--target-expert-model-parallel-size", "1")
    assert formats.read(tmp_path / "mg").dialect.title == "Megatron's legacy format"
    flags = "--loader megatron --saver megatron --save-model-type save_huggingface_llama"
    (problem,) = found_in(tmp_path / "mg", tmp_path / "hf", *flags.split(), "--use-mcore-models")
    assert (problem.option, problem.kind) == ("--use-mcore-models", "stated")
    convert(tmp_path / "mg", tmp_path / "hf", *flags.split())
    assert formats.format_of(tmp_path / "hf").name == "hf"


def test_dry_run_tells_and_writes_nothing(made, tmp_path, capsys):
    path, tensors = made("llama")
    convert(path, tmp_path / "mg", *CORE, TP, "2", "--dry-run")
    told = capsys.readouterr().out
    assert not (tmp_path / "mg").exists()
    assert "mp_rank_01/model_optim_rng.pt" in told.replace("\n", "") and "MiB" in told
    convert(path, tmp_path / "hf", "--dry-run")
    assert f"{sum(tensor.nbytes for tensor in tensors.values()):,}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [CORE, (*LEGACY, "--params-dtype", "fp16"), ("--params-dtype", "fp32")])
def test_verify(made, tmp_path, caplog, flags):
    path, _ = made("llama")
    with caplog.at_level("INFO", "cordee"):
        convert(path, tmp_path / "out", *flags, "--verify")
    assert "51 tensors are bit for bit" in caplog.text and "logits of 16 tokens are the same" in caplog.text


def test_verify_finds_a_wrong_byte(made, tmp_path):
    from cordee.convert.verify import verify

    path, _ = made("llama")
    convert(path, tmp_path / "out", *CORE)
    file = tmp_path / "out" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    source, written = formats.read(path), formats.read(tmp_path / "out")
    keys = ("model", "decoder.layers.2.mlp.linear_fc2.weight")
    region = next(iter(written.files.values())).file.tensors[keys]
    with file.open("r+b") as stream:
        stream.seek(region.offset + 10)
        stream.write(b"\xff")
    with pytest.raises(ProblemError) as caught:
        verify(source, formats.read(tmp_path / "out"), {name: source.dtype(name) for name in source.names()})
    assert "layers.2.mlp.down.weight" in str(caught.value)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flags", "named"),
    [
        ("mixtral", LEGACY, "mlp.router.weight"),
        ("gemma2", LEGACY, "attention_post_norm.weight"),
        ("mixtral", MINDFORMERS, "model.layers.*.block_sparse_moe.gate.weight"),
    ],
)
def test_parameters_that_have_no_place(made, tmp_path, kind, flags, named):
    (problem,) = found_in(made(kind)[0], tmp_path / "out", *flags)
    assert problem.kind == "inexpressible" and named in problem.limit


@pytest.mark.parametrize(
    ("kind", "flags", "option", "law", "limit"),
    [
        ("llama", (*CORE, PP, "2", "--num-layer-list", "a,b"), "--num-layer-list", "form", None),
        ("deepseek_v2", (*CORE, "--transformer-impl", "mindspeed", TP, "2"), TP, "at most", 1),
        ("llama", (*ASCEND, "--deepspeed", PP, "2"), PP, "at most", 1),
        ("llama", (*ASCEND, "--tokenizer-model", "x"), "--tokenizer-model", "excludes", "--save-model-type"),
        ("llama", (*CORE, TP, "3"), "--target-tensor-parallel-size", "divides", 4),
        ("llama", (*CORE, TP, "8"), "--target-tensor-parallel-size", "divides", 4),
        ("llama", (*CORE, PP, "4"), "--target-pipeline-parallel-size", "divides", 6),
        ("llama", (*CORE, PP, "2", "--num-layer-list", "3,4"), "--num-layer-list", "sum", 6),
        ("llama", (*CORE, PP, "2", "--num-layer-list", "1,2,3"), "--num-layer-list", "length", 2),
        ("llama", (*CORE, PP, "2", "--num-layer-list", "3,3", VPP, "1"), "--num-layer-list", "excludes", VPP),
        ("llama", (*CORE, PP, "2", VPP, "2"), VPP, "divides", 6),
        ("llama", (*CORE, VPP, "2"), VPP, "requires", "--target-pipeline-parallel-size 2 or more"),
        ("llama", (*CORE, EP, "2"), "--target-expert-parallel-size", "requires", None),
        ("mixtral", (*CORE, EP, "3"), "--target-expert-parallel-size", "divides", 4),
        ("llama", (TP, "2"), "--target-tensor-parallel-size", "requires", "--save-model-type mg"),
        ("llama", (*LEGACY, "--moe-grouped-gemm"), "--moe-grouped-gemm", "requires", "--use-mcore-models"),
        ("llama", (*LEGACY, "--save-to-legacy"), "--save-to-legacy", "requires", "--use-mcore-models"),
        ("llama", (*CORE, "--deepspeed"), "--deepspeed", "requires", "--save-model-type ascendspeed"),
        ("llama", (*CORE, "--model-type", "BERT"), "--model-type", "stated", "GPT"),
        ("llama", (*CORE, "--model-type-hf", "mixtral"), "--model-type-hf", "stated", None),
        ("llama", (*CORE, "--model-type-hf", "lama2"), "--model-type-hf", "unknown", ("llama2",)),
        ("qwen2", (*CORE, "--no-add-qkv-bias"), "--add-qkv-bias", "stated", True),
        ("llama", (*CORE, "--embed-layernorm"), "--embed-layernorm", "stated", False),
        ("llama", (*CORE, "--load-model-type", "mg"), "--load-model-type", "stated", "hf"),
        ("llama", ("--use-mcore-models",), "--use-mcore-models", "requires", "--save-model-type mg"),
    ],
    ids=lambda value: " ".join(value[-4:]) if isinstance(value, tuple) else str(value),
)
def test_laws_that_are_broken(made, tmp_path, kind, flags, option, law, limit):
    found = found_in(made(kind)[0], tmp_path / "out", *flags)
    assert (option, law, limit) in [(problem.option, problem.kind, problem.limit) for problem in found]


def test_several_problems_at_once(made, tmp_path):
    found = found_in(made("mixtral")[0], tmp_path / "out", *CORE, TP, "3", PP, "4", EP, "3")
    assert {problem.option for problem in found if problem.kind == "divides"} == {
        "--target-tensor-parallel-size",
        "--target-pipeline-parallel-size",
        "--target-expert-parallel-size",
    }


@pytest.fixture
def megatron(made, tmp_path) -> Path:
    """A checkpoint of 2 tensor ranks and 2 stages, to be spoiled."""
    path, _ = made("llama")
    convert(path, tmp_path / "mg", *CORE, TP, "2", PP, "2")
    return tmp_path / "mg"


def rewrite(path: Path, folder: str, change) -> None:
    content = load(path, folder)
    change(content)
    torch.save(content, path / "iter_0000001" / folder / "model_optim_rng.pt")


def test_a_missing_rank(megatron, tmp_path):
    shutil.rmtree(megatron / "iter_0000001" / "mp_rank_01_000")
    (problem,) = found_in(megatron, tmp_path / "out")
    assert (problem.kind, problem.limit) == ("missing", [Rank(1, 0, 0)])
    shutil.rmtree(megatron / "iter_0000001" / "mp_rank_01_001")  # all of tensor rank 1: the settings tell
    (problem,) = found_in(megatron, tmp_path / "out")
    assert (problem.kind, problem.limit) == ("missing", [Rank(1, 0, 0), Rank(1, 1, 0)])


def test_a_missing_file(megatron, tmp_path):
    (megatron / "iter_0000001" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    (problem,) = found_in(megatron, tmp_path / "out")
    assert problem.kind == "missing" and "mp_rank_01_000" in problem.option


def test_a_truncated_file(megatron, tmp_path):
    file = megatron / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt"
    os.truncate(file, file.stat().st_size // 2)
    (problem,) = found_in(megatron, tmp_path / "out")
    assert problem.kind == "unreadable" and "mp_rank_01_001" in problem.option


def disagreement(load: Path, save: Path) -> object:
    """What ranks disagree about."""
    (problem,) = found_in(load, save)
    assert problem.kind == "disagree"
    return problem.limit


def test_ranks_that_disagree(megatron, tmp_path):
    rewrite(megatron, "mp_rank_01_001", lambda content: content.update(iteration=7))
    assert disagreement(megatron, tmp_path / "out") == "iteration"
    rewrite(megatron, "mp_rank_01_001", lambda content: content.update(iteration=1))
    rewrite(megatron, "mp_rank_01_001", lambda content: setattr(content["args"], "num_layers", 5))
    assert disagreement(megatron, tmp_path / "out") == "num_layers"
    rewrite(megatron, "mp_rank_01_001", lambda content: setattr(content["args"], "num_layers", 6))
    norm = "decoder.layers.1.input_layernorm.weight"
    rewrite(megatron, "mp_rank_01_001", lambda content: content["model"][norm].add_(1))
    assert disagreement(megatron, tmp_path / "out") == norm  # found while it is being written: nothing is left
    rewrite(megatron, "mp_rank_01_001", lambda content: content["model"].pop(norm))
    assert disagreement(megatron, tmp_path / "out") == (1, 1)  # tensor and pipeline rank


def test_tensors_that_are_not_the_models(megatron, tmp_path, caplog):
    for folder in ("mp_rank_00_000", "mp_rank_01_000"):
        rewrite(megatron, folder, lambda content: content["model"].update(extra=torch.ones(2)))
    (problem,) = found_in(megatron, tmp_path / "out")
    assert (problem.kind, problem.limit) == ("unclear", {"extra"})
    with caplog.at_level("INFO", "cordee"):
        convert(megatron, tmp_path / "out", "--no-checking")
    assert "extra" in caplog.text


def test_shapes_that_are_not_the_models(megatron, tmp_path):
    config = json.loads((megatron / "config.json").read_text())
    (megatron / "config.json").write_text(json.dumps({**config, "intermediate_size": 28}))
    wrong = {str(problem.limit).removeprefix("decoder.layers.") for problem in found_in(megatron, tmp_path / "out")}
    assert {f"{n}.mlp.linear_{fc}.weight" for n in range(3) for fc in ("fc1", "fc2")} == wrong
    (megatron / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert [problem.limit for problem in found_in(megatron, tmp_path / "out")] == ["num_layers"]
    (megatron / "config.json").write_text(json.dumps({**config, "vocab_size": 70}))
    assert [problem.limit for problem in found_in(megatron, tmp_path / "out")] == ["vocab_size"]


class Foreign:
    """Unpickled, it would run a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_foreign_code_is_not_run(megatron, tmp_path, caplog):
    marker = tmp_path / "ran"
    rewrite(megatron, "mp_rank_01_000", lambda content: content.update(callback=Foreign(marker)))
    rewrite(megatron, "mp_rank_00_000", lambda content: content.update(callback=Foreign(marker)))
    with caplog.at_level("INFO", "cordee"):
        convert(megatron, tmp_path / "out")
    assert "posix.system" in caplog.text and not marker.exists()


def test_what_a_training_checkpoint_carries_is_passed_over(megatron, tmp_path, caplog):
    import numpy as np

    state = {"rng_state": [{"np_rng_state": np.random.get_state()}], "optimizer": {"exp_avg": torch.ones(3)}}
    for folder in ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"):
        rewrite(megatron, folder, lambda content: content.update(state))
    with caplog.at_level("INFO", "cordee"):
        convert(megatron, tmp_path / "out")
    assert "optimizer is not converted" in caplog.text


def test_output_that_exists(made, tmp_path):
    path, _ = made("llama")
    convert(path, tmp_path / "mg", *CORE)
    before = sorted(tmp_path.rglob("*"))
    assert [problem.kind for problem in found_in(path, tmp_path / "mg", *CORE)] == ["not empty"]
    assert sorted(tmp_path.rglob("*")) == before
    convert(path, tmp_path / "mg", *CORE, TP, "2", "--overwrite")
    assert (tmp_path / "mg" / "iter_0000001" / "mp_rank_01").is_dir()


def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for flags in (CORE, (), ("--save-model-type", "dcp"), ("--workers", "3")):
        assert [problem.kind for problem in found_in(made("llama")[0], tmp_path / "out", *flags)] == ["unwritable"]


TOLD = ["llama2-7b", "llama3.1-8b", "gemma2-9b", "mistral-7b", "minicpm-2b", "qwen3-8b", "bloom-7b1", "baichuan2-13b"]


@pytest.mark.parametrize("name", [*TOLD, "gpt2", "chatglm3-6b"])
def test_settings_alone_tell_a_dense_model(name):
    config = spec_from_preset(name).config
    settings = arguments(config, Wanted().layout(config), config.vocab_size)
    assert canonical(spec_of_arguments(settings, config.vocab_size, "x").config) == canonical(config)


@pytest.mark.parametrize("name", ["olmo2-7b", "gemma3-4b", "mixtral-8x7b", "deepseek-v2", "qwen-7b"])
def test_settings_that_do_not_tell_all_say_so(name):
    config = spec_from_preset(name).config
    settings = arguments(config, Wanted().layout(config), config.vocab_size)
    with pytest.raises(ProblemError) as caught:
        spec_of_arguments(settings, config.vocab_size, "x")
    assert {problem.kind for problem in caught.value.problems} == {"unclear"}


def test_settings_of_megatron_itself():
    """Defaults that mean nothing are passed over, and what changes the mathematics is not."""
    config = spec_from_preset("gpt2").config
    settings = arguments(config, Wanted().layout(config), config.vocab_size)
    settings.rotary_base, settings.rotary_percent = 10000, 1.0
    assert spec_of_arguments(settings, config.vocab_size, "x").family.name == "gpt2"
    settings.squared_relu = True
    with pytest.raises(ProblemError) as caught:
        spec_of_arguments(settings, config.vocab_size, "x")
    assert [problem.limit for problem in caught.value.problems] == [["squared_relu"]]
