"""Hugging Face directories: every way weights are stored, everything that can be wrong, and writing them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from cordee.checkpoint import formats
from cordee.errors import Problem, ProblemError
from cordee.families.registry import spec_from_hf
from cordee.weights import hf, mindformers
from cordee.weights.staging import UNFINISHED
from tests.weights import tiny

INDEX = "model.safetensors.index.json"


def problems_of(function, *args, **kwargs) -> list[Problem]:
    with pytest.raises(ProblemError) as caught:
        function(*args, **kwargs)
    return caught.value.problems


def kinds_of(function, *args, **kwargs) -> list[str]:
    return [problem.kind for problem in problems_of(function, *args, **kwargs)]


@pytest.fixture
def llama(tmp_path):
    """A directory with a tiny Llama, and its tensors."""
    return tmp_path, tiny.save(tmp_path, tiny.LLAMA)


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- reading ---------------------------------------------------------------------------------------------------------


def store_single(directory, tensors):
    save_file(tensors, directory / "model.safetensors")


def store_bin(directory, tensors):
    torch.save(tensors, directory / "pytorch_model.bin")


def store_old_bin(directory, tensors):
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def store_sharded_bin(directory, tensors):
    tiny.shard(directory, tensors, suffix="bin")


WAYS = {
    "single": store_single,
    "sharded": tiny.shard,
    "bin": store_bin,
    "bin of old torch": store_old_bin,
    "sharded bin": store_sharded_bin,
}


@pytest.mark.parametrize("model", tiny.MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_storing_reads_the_same(way, model, tmp_path):
    spec = spec_from_hf(tiny.MODELS[model])
    tensors = tiny.tensors_of(spec)
    (tmp_path / "config.json").write_text(json.dumps(tiny.MODELS[model]))
    WAYS[way](tmp_path, tensors)
    source = hf.read(tmp_path)
    expected = tiny.canonical_of(spec, tensors)
    assert source.names() == list(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.tensor(name), tensor)
        index = tuple(slice(size // 3, size // 3 + max(1, size // 2)) for size in tensor.shape)
        assert torch.equal(source.tensor(name, index), tensor[index])
        out = torch.empty_like(tensor[index], dtype=torch.float64)
        source.copy_into(out, name, index)
        assert torch.equal(out, tensor[index].double())


def test_what_transformers_saves_in_shards(tmp_path):
    import transformers

    torch.manual_seed(0)
    keys = {key: tiny.LLAMA[key] for key in tiny.LLAMA if key not in ("architectures", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = hf.read(tmp_path)
    expected = tiny.canonical_of(source.spec, dict(model.state_dict()))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in expected.items())


def test_types_are_kept_and_mixed_ones_widened(llama):
    directory, tensors = llama
    mixed = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    q, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    mixed |= {q: tensors[q].half(), norm: tensors[norm]}
    tiny.save(directory, tiny.LLAMA, mixed)
    source = hf.read(directory)
    assert source.dtype("final_norm.weight") == torch.float32
    assert source.dtype("layers.1.attention.qkv.weight") == torch.bfloat16
    assert source.dtype("layers.0.attention.qkv.weight") == torch.float32  # holds float16 and bfloat16 exactly
    wide = {name: tensor.float() for name, tensor in mixed.items()}
    expected = tiny.canonical_of(source.spec, wide)["layers.0.attention.qkv.weight"]
    assert torch.equal(source.tensor("layers.0.attention.qkv.weight"), expected)


def test_buffers_of_old_checkpoints_are_ignored_and_told(llama):
    directory, tensors = llama
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    tiny.save(directory, tiny.LLAMA, {**tensors, **buffers})
    (note,) = hf.read(directory).notes
    assert "2 tensors" in note and "inv_freq" in note


def test_a_stored_copy_of_a_tied_head_is_left_out(tmp_path):
    tensors = tiny.save(tmp_path, tiny.MODELS["llama tied"])
    embedding = tensors["model.embed_tokens.weight"]
    tiny.save(tmp_path, tiny.MODELS["llama tied"], {**tensors, "lm_head.weight": embedding.clone()})
    source = hf.read(tmp_path)
    assert "lm_head.weight" in source.notes[0] and "head.weight" not in source.names()
    tiny.save(tmp_path, tiny.MODELS["llama tied"], {**tensors, "lm_head.weight": embedding + 1})
    assert kinds_of(hf.read, tmp_path) == ["tied"]


def test_a_tied_pair_stored_as_its_head(tmp_path):
    tensors = tiny.save(tmp_path, tiny.MODELS["llama tied"])
    embedding = tensors.pop("model.embed_tokens.weight")
    tiny.save(tmp_path, tiny.MODELS["llama tied"], {**tensors, "lm_head.weight": embedding})
    source = hf.read(tmp_path)
    assert torch.equal(source.tensor("embedding.weight"), embedding)
    assert "read as the embedding" in source.notes[0]
    write_all(tmp_path / "out", source)
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656K"])
def test_real_models_are_read(shared, name):
    directory = shared / "data" / "models" / name
    source, stored = hf.read(directory), load_file(directory / "model.safetensors")
    head = stored.get("model.embed_tokens.weight", stored.get("lm_head.weight"))
    assert torch.equal(source.tensor("embedding.weight"), head)
    assert sum(source.tensor(name).numel() for name in source.names()) in (260_032, 656_000)


def test_a_missing_head_hints_at_tying(llama):
    directory, tensors = llama
    tiny.save(directory, tiny.LLAMA, {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    (problem,) = problems_of(hf.read, directory)
    assert problem.kind == "missing" and '"tie_word_embeddings": true' in problem.fix


def test_missing_unknown_and_misshapen_tensors_are_all_listed(llama):
    directory, tensors = llama
    missing = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    wrong = {
        "model.embed_tokens.weight": torch.zeros(60, 24),
        "model.layers.1.self_attn.k_proj.weight": torch.zeros(24, 12),
    }
    unknown = {"model.layers.0.adapter.weight": torch.zeros(1), "score.weight": torch.zeros(1)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    tiny.save(directory, tiny.LLAMA, {**kept, **wrong, **unknown})
    first, second, *others = problems_of(hf.read, directory)
    assert (first.kind, first.limit) == ("missing", set(missing))
    assert (second.kind, second.limit) == ("unknown", unknown.keys())
    assert {(problem.kind, problem.option.split(": ")[1]) for problem in others} == {("shape", name) for name in wrong}


def test_quantised_weights_are_refused(llama):
    directory, tensors = llama
    name = "model.layers.0.mlp.up_proj.weight"
    tiny.save(directory, tiny.LLAMA, {**tensors, name: tensors[name].to(torch.int8)})
    (problem,) = problems_of(hf.read, directory)
    assert problem.option.endswith(name) and problem.kind == "dtype"
    tiny.save(directory, tiny.LLAMA, {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    assert kinds_of(hf.read, directory) == ["dtype"]


def cut_file(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    "damage", [cut_file, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 99)]
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_are_named(kind, damage, llama):
    directory, tensors = llama
    if kind.endswith(".bin"):
        (directory / "model.safetensors").unlink()
        torch.save(tensors, directory / kind)
    damage(directory / kind)
    (problem,) = problems_of(hf.read, directory)
    assert problem.option == str(directory / kind) and problem.kind == "unreadable"


def test_code_in_a_bin_file_is_not_run(llama):
    directory, _ = llama
    (directory / "model.safetensors").unlink()
    torch.save({"x": subprocess.Popen}, directory / "pytorch_model.bin")
    assert kinds_of(hf.read, directory) == ["unreadable"]
    torch.save([1, 2], directory / "pytorch_model.bin")
    assert kinds_of(hf.read, directory) == ["unreadable"]


def test_no_weights_at_all(llama):
    directory, tensors = llama
    (directory / "model.safetensors").unlink()
    assert kinds_of(hf.read, directory) == ["missing"]
    for path in tiny.shard(directory, tensors):
        assert path.is_file()
    (directory / "model.safetensors.index.json").unlink()
    assert kinds_of(hf.read, directory) == ["index"]


def test_every_missing_and_damaged_shard_is_named(llama):
    directory, tensors = llama
    (directory / "model.safetensors").unlink()
    first, second, third = tiny.shard(directory, tensors)
    first.unlink()
    cut_file(third)
    found = {(problem.option, problem.kind) for problem in problems_of(hf.read, directory)}
    assert {(str(first), "missing"), (str(third), "unreadable")} <= found
    assert not any(second.name in option for option, _ in found)


def test_an_index_that_does_not_fit_its_shards(llama):
    directory, tensors = llama
    (directory / "model.safetensors").unlink()
    first, second, _ = tiny.shard(directory, tensors)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = next(name for name, file in content["weight_map"].items() if file == first.name)
    content["weight_map"][moved] = second.name
    index.write_text(json.dumps(content))
    found = [(problem.option, problem.kind, problem.limit) for problem in problems_of(hf.read, directory)]
    assert (str(index), "absent", [moved]) in found and (str(index), "unnamed", [moved]) in found


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("whole", [False, True], ids=["stale", "with its shards"])
def test_a_whole_file_is_read_before_an_index(suffix, whole, tmp_path):
    """As transformers does; other values in the shards show which is read."""
    import transformers

    tensors = tiny.save(tmp_path, tiny.LLAMA)
    if suffix == "bin":
        (tmp_path / "model.safetensors").unlink()
        store_bin(tmp_path, tensors)
    for path in tiny.shard(tmp_path, {name: tensor + 1 for name, tensor in tensors.items()}, suffix=suffix):
        if not whole:
            path.unlink()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    source = hf.read(tmp_path)
    assert all(torch.equal(source.tensor(name), t) for name, t in tiny.canonical_of(source.spec, dict(peer)).items())
    assert "index.json" in source.notes[0]


INDICES = [
    *("{", "[]", "{}", "[" * 10**5),
    *('{"weight_map": {}}', '{"weight_map": {"x": "../elsewhere"}}', '{"weight_map": {"x": ".."}}'),
]


@pytest.mark.parametrize("content", INDICES, ids=lambda content: content[:40])
def test_an_index_that_is_none(content, llama):
    directory, tensors = llama
    (directory / "model.safetensors").unlink()
    tiny.shard(directory, tensors)
    (directory / "model.safetensors.index.json").write_text(content)
    assert all(problem.option.startswith(str(directory)) for problem in problems_of(hf.read, directory))


@pytest.mark.parametrize("length", [2, 2**40, 2**60, 2**63])
@pytest.mark.parametrize("header", ["{}", "7", "[" * 10**5])
def test_whether_names_are_mindformers_is_asked_of_no_more_than_a_header(length, header, llama):
    directory, _ = llama
    (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header.encode())
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # takes no room
    tracemalloc.start()
    try:
        assert not mindformers.recognises(directory)
        assert tracemalloc.get_traced_memory()[1] < 2**29
    finally:
        tracemalloc.stop()


def test_configurations_that_are_nested_without_end(llama):
    directory, _ = llama
    (directory / "config.json").write_text("[" * 10**5)
    assert [problem.option for problem in problems_of(hf.read, directory)] == [str(directory / "config.json")]


@pytest.mark.parametrize(("name", "key"), [("config.json", "hidden_size"), (INDEX, "model.norm.weight")])
def test_a_key_with_two_values_is_refused(name, key, llama):
    """Of which readers take the first or the last; the same value twice says nothing else."""
    directory, tensors = llama
    tiny.shard(directory, tensors, 2)
    (directory / "model.safetensors").unlink()
    content = (directory / name).read_text()
    value = json.loads(content).get(key) or json.loads(content)["weight_map"][key]
    stated = f"{json.dumps(key)}: {json.dumps(value)}"
    (directory / name).write_text(content.replace(stated, f"{stated}, {stated}"))
    assert hf.read(directory).tensor("final_norm.weight").numel()
    (directory / name).write_text(content.replace(stated, f'{stated}, {json.dumps(key)}: "other"'))
    with pytest.raises(ProblemError) as caught:
        hf.read(directory)
    assert [problem.kind for problem in caught.value.problems] == ["index" if name == INDEX else "corrupt"]
    assert key in caught.value.problems[0].why


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("there", ["", "global_step8"])
def test_partitions_of_zero_are_no_weights(config, there, llama):
    """The names are those of DeepSpeed and of a trainer of transformers that uses it."""
    directory, _ = llama
    (directory / "model.safetensors").rename(directory / "kept")
    if not config:
        (directory / "config.json").unlink()
    (directory / "latest").write_text("global_step8")
    (directory / "global_step8").mkdir()
    for rank in range(2):
        for kind, name in (("", "model"), ("bf16_", "optim")):
            (directory / "global_step8" / f"{kind}zero_pp_rank_{rank}_mp_rank_00_{name}_states.pt").touch()
    with pytest.raises(ProblemError) as caught:
        formats.read(directory / there)
    (problem,) = caught.value.problems
    assert problem.kind == "partitioned" and "zero_to_fp32.py" in problem.fix and "stage3_gather" in problem.fix
    if config and not there:
        (directory / "kept").rename(directory / "model.safetensors")
        assert formats.format_of(directory).name == "hf"


def test_an_index_of_a_gigabyte_is_not_read(llama):
    directory, _ = llama
    (directory / "model.safetensors").unlink()
    with (directory / "model.safetensors.index.json").open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        assert kinds_of(hf.read, directory) == ["index"]
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_pipe_instead_of_a_shard_is_not_waited_for(kind, llama):
    directory, tensors = llama
    (directory / "model.safetensors").unlink()
    first, *_ = tiny.shard(directory, tensors, suffix=kind)
    first.unlink()
    os.mkfifo(first)
    assert (str(first), "unreadable") in [(problem.option, problem.kind) for problem in problems_of(hf.read, directory)]


def _moved(entries: dict, by: int) -> None:
    entries[min(entries)]["data_offsets"] = [offset + by for offset in entries[min(entries)]["data_offsets"]]


def _overlapping(entries: dict) -> None:
    first, second, *_ = sorted(entries.values(), key=lambda entry: entry["data_offsets"])
    second |= first


HEADERS = {
    **{f"moved by {by}": lambda entries, by=by: _moved(entries, by) for by in (-4096, 3, 32, 2**60)},
    "overlapping": _overlapping,
    "a huge shape": lambda entries: entries[min(entries)].update(shape=[2**32, 2**32]),
    "a hole": lambda entries: entries.pop(min(entries)),
}


@pytest.mark.parametrize("change", HEADERS)
def test_safetensors_whose_tensors_are_elsewhere(change, llama):
    """Which its library finds."""
    directory, _ = llama
    content = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__", None)
    HEADERS[change](entries)
    header = json.dumps(entries).encode()
    changed = len(header).to_bytes(8, "little") + header + content[8 + length :]
    for bad in (changed, (2**60).to_bytes(8, "little") + content[8:], content + bytes(64)):
        (directory / "model.safetensors").write_bytes(bad)
        assert kinds_of(hf.read, directory) == ["unreadable"]


MEMORY = """
import sys, torch
from cordee.device import peak_resident_bytes
from cordee.families.registry import spec_from_hf
from cordee.weights import hf, mindformers
directory = sys.argv[1]
source = hf.read(directory)
out = {name: torch.zeros(source.shape(name)) for name in source.names()}
before = peak_resident_bytes()
for name, tensor in out.items():
    source.copy_into(tensor, name)
print(peak_resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a program are known on Linux only")
@pytest.mark.parametrize("way", ["single", "bin", "sharded"])
def test_loading_holds_one_tensor_beside_the_model(way, tmp_path):
    """Of 40 MB of weights, with 8 MB in the largest canonical tensor, no more than that is ever held beside them."""
    config = {**tiny.LLAMA, "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    tensors = tiny.tensors_of(spec_from_hf(config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    WAYS[way](tmp_path, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    largest = 2 * 2048 * 512 * 4
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert total > 39e6 and int(run.stdout) < largest + 8e6  # some MB for Python's own bookkeeping


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_all(path, source, **options):
    with hf.write(path, source.spec, **options) as sink:
        for name in source.names():
            sink.put(name, source.tensor(name))


@pytest.mark.parametrize("model", tiny.MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_exact(model, dtype, tmp_path):
    config = tiny.MODELS[model]
    tensors = tiny.save(tmp_path / "a", config, tiny.tensors_of(spec_from_hf(config), dtype))
    write_all(tmp_path / "b", hf.read(tmp_path / "a"))
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[n], t) and written[n].dtype == dtype for n, t in tensors.items())
    expected = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == expected


def test_shards_are_as_small_as_asked_and_indexed(llama, tmp_path):
    directory, tensors = llama
    limit = 8000
    write_all(tmp_path / "out", hf.read(directory), max_shard_size=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        part = load_file(file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in part.items())
        assert {name for name, where in index["weight_map"].items() if where == file.name} == part.keys()
    again = hf.read(tmp_path / "out")
    assert all(torch.equal(again.tensor(name), hf.read(directory).tensor(name)) for name in again.names())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_written_is_said_in_the_spelling_found(key, llama, tmp_path):
    directory, tensors = llama
    edit_config(directory, **{key: "float32"})
    write_all(tmp_path / "out", hf.read(directory), dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[key] == "bfloat16" and len({"dtype", "torch_dtype"} & config.keys()) == 1
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name].bfloat16()) for name, tensor in written.items())


def test_assets_are_copied(llama, tmp_path):
    directory, _ = llama
    files = ["generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt"]
    files += ["special_tokens_map.json", "chat_template.jinja", "tokenization_x.py", "LICENSE"]
    for name in [*files, "optimizer.pt", "README.md"]:
        (directory / name).write_text(name)
    write_all(tmp_path / "out", hf.read(directory), assets=directory)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*files, "config.json", "model.safetensors"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"


class Interrupted(Exception):
    pass


def test_an_interrupted_write_leaves_nothing(llama, tmp_path):
    directory, _ = llama
    source, target = hf.read(directory), tmp_path / "deep" / "out"
    with pytest.raises(Interrupted), hf.write(target, source.spec, max_shard_size=1) as sink:
        sink.put("embedding.weight", source.tensor("embedding.weight"))
        sink.put("head.weight", source.tensor("head.weight"))
        raise Interrupted
    assert not (tmp_path / "deep").exists()


def test_what_a_killed_write_left_is_swept_up(llama, tmp_path):
    directory, _ = llama
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "shard-9").write_text("old")
    assert kinds_of(write_all, tmp_path / "out", hf.read(directory)) == ["foreign"]
    assert (tmp_path / ".out.new" / "shard-9").exists()
    with (tmp_path / ".out.new" / UNFINISHED).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert kinds_of(write_all, tmp_path / "out", hf.read(directory)) == ["in use"]
    write_all(tmp_path / "out", hf.read(directory))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert not (tmp_path / ".out.new").exists()


def test_a_full_disk_is_a_problem_and_leaves_nothing(llama, tmp_path, monkeypatch):
    directory, _ = llama

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    (tmp_path / "to").mkdir()
    assert kinds_of(write_all, tmp_path / "to" / "out", hf.read(directory)) == ["unwritable"]
    assert list((tmp_path / "to").iterdir()) == []


def test_nothing_is_replaced_unless_asked(llama, tmp_path):
    directory, _ = llama
    source, target = hf.read(directory), tmp_path / "out"
    target.mkdir()
    write_all(target, source)  # an empty directory is no loss
    (target / "stale.txt").write_text("x")
    assert kinds_of(hf.write, target, source.spec) == ["not empty"]
    write_all(target, source, overwrite=True)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_overwrite_replaces_models_only(llama, tmp_path):
    directory, _ = llama
    spec = hf.read(directory).spec
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    assert kinds_of(hf.write, tmp_path / "home", spec, overwrite=True) == ["foreign"]
    assert kinds_of(hf.write, tmp_path / "home" / "thesis.tex", spec) == ["file"]


def test_a_sink_wants_every_parameter_once_and_in_shape(llama, tmp_path):
    directory, _ = llama
    source = hf.read(directory)
    norm = source.tensor("final_norm.weight")
    with pytest.raises(AssertionError), hf.write(tmp_path / "out", source.spec) as sink:
        sink.put("final_norm.weight", norm[:-1])
    with pytest.raises(AssertionError), hf.write(tmp_path / "out", source.spec) as sink:
        sink.put("final_norm.weight", norm)
        sink.put("final_norm.weight", norm)
    with pytest.raises(AssertionError), hf.write(tmp_path / "out", source.spec) as sink:
        sink.put("final_norm.weight", norm)
    assert not (tmp_path / "out").exists()
