"""`cordee generate` from options to text and results."""

from __future__ import annotations

import json
import logging
import resource
import shutil

import pytest
import torch

from cordee.api import GPTModel
from cordee.config.load import config_from_dict
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem, ProblemError
from cordee.families.registry import spec_from_hf
from cordee.generate import job
from cordee.generate.engine import generate
from cordee.generate.loading import load_model, stop_ids
from cordee.generate.options import DecodingOptions, GenerateConfig
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.weights import hf
from tests.generate.folders import Folder, model_directory, write_tokenizer
from tests.problems import facts


def run(folder, **options):
    config = config_from_dict(GenerateConfig, {"load": folder.directory, "max_new_tokens": 6, **options})
    return job.run(config)


def test_prompts_are_continued_in_order(llama, capsys, tmp_path):
    output = tmp_path / "results.jsonl"
    assert run(llama, prompt=["Once", "She loved to play", "red ball"], output=output, batch_size=2) == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["Once", "She loved to play", "red ball"]
    shown = capsys.readouterr().out
    places = [shown.index(record["prompt"] + record["text"]) for record in records]
    assert places == sorted(places)
    for record in records:
        assert record["finish"] == ("length" if len(record["tokens"]) == 6 else "stop")


def test_tokens_are_the_engines(llama, tmp_path):
    model = llama.model()
    run(llama, prompt=["Once upon"], output=tmp_path / "out")
    record = json.loads((tmp_path / "out").read_text())
    ids = load_tokenizer(TokenizerOptions(), str(llama.directory)).encode("Once upon")
    options = DecodingOptions(max_new_tokens=6)
    assert generate(model, [ids], options, stop_ids={1}, vocab_size=300) == [record["tokens"]]


def test_several_continuations_of_a_prompt(llama, tmp_path, capsys):
    run(llama, prompt=["Once", "One"], num_return_sequences=3, do_sample=True, output=tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert [(record["prompt"], record["number"]) for record in records] == [
        (prompt, number) for prompt in ("Once", "One") for number in range(3)
    ]
    assert len({tuple(record["tokens"]) for record in records}) == 6
    assert "--- 6 of 6" in capsys.readouterr().out


def test_prompts_of_a_file(llama, tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n\nShe loved\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "cordee"):
        run(llama, prompts_file=file, output=tmp_path / "out")
    assert "1 blank line " in caplog.text
    records = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["Once", "She loved"]


def test_prompts_are_the_lines_that_python_reads(tmp_path):
    """Neither of the separators that only `str.splitlines` takes for line ends, nor the byte order mark, counts."""
    file = tmp_path / "prompts.txt"
    content = "\ufeffa\fb\vc\u2028d\u2029e\x85f\x1cg\x1dh\x1ei\r\n second \rthird\n"
    file.write_bytes(content.encode())
    with open(file, encoding="utf-8-sig") as lines:
        expected = [line.removesuffix("\n") for line in lines]
    assert len(expected) == 3
    lines = {f"{file}: line {number}": line for number, line in enumerate(expected, 1)}
    assert job._prompts(GenerateConfig(load="", prompts_file=str(file))) == lines


def test_prompts_that_are_no_utf8_are_named(llama, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a\nb\xff\nc\nd\xfe\n")
    with pytest.raises(ProblemError) as caught:
        run(llama, prompts_file=file)
    assert [(problem.option, problem.value) for problem in caught.value.problems] == [
        ("--prompts-file", f"{file}: line 2"),
        ("--prompts-file", f"{file}: line 4"),
    ]


def test_a_single_prompt_has_no_heading(llama, capsys):
    run(llama, prompt=["Once"])
    assert capsys.readouterr().out.startswith("Once")


def problems_of(llama, **options) -> list[Problem]:
    with pytest.raises(ProblemError) as caught:
        run(llama, **options)
    return caught.value.problems


@pytest.mark.parametrize("content", [b"\n  \n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_a_problem(llama, tmp_path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert [problem.option for problem in problems_of(llama, prompts_file=file)] == ["--prompts-file"]


def test_results_are_never_replaced(llama, tmp_path):
    output = tmp_path / "out"
    output.write_text("precious")
    (problem,) = problems_of(llama, prompt=["Once"], output=output)
    assert (problem.option, problem.kind) == ("--output", "taken")
    assert output.read_text() == "precious"


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "load_part", None)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    for name, kind in (("file/folder/out", "unwritable"), ("file/out", "unwritable"), ("link", "taken")):
        given = str(tmp_path / name)
        first, *more = problems_of(llama, prompt=["Once"], output=given, pipeline_model_parallel_size=90)
        assert (first.option, first.value, first.kind) == ("--output", given, kind)
        assert [problem.option for problem in more] == ["--pipeline-model-parallel-size"]


def test_the_folder_of_the_output_is_made(llama, tmp_path):
    run(llama, prompt=["Once"], output=tmp_path / "new" / "folder" / "out.jsonl")
    assert (tmp_path / "new" / "folder" / "out.jsonl").read_text()


def test_a_disk_that_is_full_is_a_problem(llama, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        (problem,) = problems_of(llama, prompt=["Once"], output=tmp_path / "out")
        assert (problem.option, problem.kind) == ("--output", "unwritable")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().out.startswith("Once")


def test_a_prompt_that_is_too_long_is_a_problem(llama, tmp_path):
    (problem,) = problems_of(llama, prompt=["Once"], max_new_tokens=64)
    assert (problem.option, problem.kind, problem.limit) == ("prompt 1", "at most", 64)
    file = tmp_path / "prompts.txt"
    file.write_text("\nOnce\n")
    (problem,) = problems_of(llama, prompts_file=file, max_new_tokens=64)
    assert (problem.option, problem.kind, problem.limit) == (f"{file}: line 2", "at most", 64)


def test_tokens_beyond_the_embedding_matter_where_they_occur(tmp_path, capsys, caplog):
    """As long as no text has one, the rows of the embedding may be fewer than the tokens."""
    folder = model_directory("Llama", tmp_path / "small", vocab_size=290)
    tokenizer = load_tokenizer(TokenizerOptions(), str(folder.directory))
    assert tokenizer.vocab_size == 300
    run(folder, prompt=["Xyz"], max_new_tokens=20)
    assert capsys.readouterr().out and "290 to 299" in caplog.text
    word = next(text for i, text in tokenizer.vocabulary().items() if i >= 290 and text.isalpha())
    wrong = max(tokenizer.encode(word))
    (problem,) = problems_of(folder, prompt=["Xyz", word])
    assert (problem.option, problem.kind, problem.limit) == ("prompt 2", "range", wrong) and wrong >= 290


def test_the_tokenizer_can_be_elsewhere(llama, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(llama.directory / name)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    run(llama, prompt=["Once"])
    expected = capsys.readouterr().out
    run(llama, load=tmp_path / "model", tokenizer_name_or_path=tmp_path / "tokenizer", prompt=["Once"])
    assert capsys.readouterr().out == expected
    with pytest.raises(ProblemError, match="it holds no tokenizer"):
        run(llama, load=tmp_path / "model", prompt=["Once"])


NO = object()


def with_ids(folder, directory, of_config, of_generation):
    """The model of `folder` with `eos_token_id` in its config.json and generation_config.json, NO for no such key or
    file, and no tokenizer."""
    shutil.copyfile(folder.directory / "model.safetensors", directory / "model.safetensors")
    config = json.loads((folder.directory / "config.json").read_text())
    config.pop("eos_token_id")
    config |= {} if of_config is NO else {"eos_token_id": of_config}
    (directory / "config.json").write_text(json.dumps(config))
    if of_generation is not NO:
        (directory / "generation_config.json").write_text(json.dumps(of_generation))
    return Folder(directory)


PROMPT = [0, 50, 60]


@pytest.mark.parametrize(
    "of_config, of_generation",
    [
        *((ids, NO) for ids in (1, 191, [1, 191], NO, None, -1, 9999, [191, 9999])),
        *((191, {"eos_token_id": ids}) for ids in (1, [274, 1], None)),
        (191, {"temperature": 0.6}),
        (NO, {"eos_token_id": 191}),
    ],
)
def test_texts_end_where_transformers_ends_them(llama, tmp_path, of_config, of_generation):
    folder = with_ids(llama, tmp_path, of_config, of_generation)
    peer = folder.peer()
    expected = peer.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :].tolist()
    model = GPTModel.from_pretrained(tmp_path)
    assert model.generate(PROMPT, max_new_tokens=8) == expected
    stop = stop_ids(model.spec, tmp_path, None)
    ids = peer.generation_config.eos_token_id
    assert stop == {i for i in (ids if isinstance(ids, list) else [ids]) if i is not None and 0 <= i < 320}
    # A tokenizer's eos ends a text too, though transformers does not look at it.
    assert stop_ids(model.spec, tmp_path, load_tokenizer(TokenizerOptions(), str(llama.directory))) == stop | {1}


def test_the_tokenizers_eos_hides_no_other_stop_token(shared, tmp_path):
    """config.json alone says [2, 315], the tokenizer </s>, which is 2: transformers stops after seven tokens."""
    source = shared / "data/models/stories260K"
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 315]}))
    model = GPTModel.from_pretrained(tmp_path)
    prompt = model.tokenizer.encode("Once upon a time")
    peer = Folder(tmp_path).peer()
    expected = peer.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    assert expected[-1] == 315
    assert model.generate(prompt, max_new_tokens=40) == expected


@pytest.mark.parametrize("ids", ["x", {"a": 1}, [1, "a"], True, 1.0, [1.5], [[1]]])
def test_what_is_no_token_id_is_a_problem(llama, tmp_path, ids):
    """transformers refuses these where it loads or generates."""
    spec = hf.read(llama.directory).spec
    for config, file in ((spec.hf_config | {"eos_token_id": ids}, None), (spec.hf_config, {"eos_token_id": ids})):
        if file is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(file))
        with pytest.raises(ProblemError) as error:
            stop_ids(spec_from_hf(config), tmp_path, None)
        (problem,) = error.value.problems
        assert problem.option.endswith("eos_token_id") and problem.value == ids


@pytest.mark.parametrize("content", [b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_generation_config_is_a_problem(llama, tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ProblemError) as error:
        stop_ids(hf.read(llama.directory).spec, tmp_path, None)
    (problem,) = error.value.problems
    assert problem.option == str(tmp_path / "generation_config.json")


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_type_can_be_chosen(llama, dtype):
    model = load_model(hf.read(llama.directory), dtype)
    assert str(model.head.weight.dtype) == f"torch.{dtype or 'float32'}"
    assert not model.training


def test_a_type_that_is_none_is_a_problem(llama):
    with pytest.raises(ProblemError) as caught:
        load_model(hf.read(llama.directory), "float3")
    assert [(problem.option, problem.value) for problem in caught.value.problems] == [("--dtype", "float3")]


def test_a_device_that_is_not_there_is_a_problem(llama):
    for name in ("abacus", "hpu"):
        with pytest.raises(ProblemError, match="--device"):
            load_model(hf.read(llama.directory), device=name)


def test_a_file_of_gguf_says_the_same(llama, tmp_path):
    """Model and tokenizer come from the file."""
    options = ConvertConfig(load_dir=str(llama.directory), save_dir=str(tmp_path / "m"), save_model_type="gguf")
    assert convert.run(options) == 0
    for name, place in (("a", llama.directory), ("b", tmp_path / "m" / "model.gguf"), ("c", tmp_path / "m")):
        run(llama, load=place, prompt=["Once upon", "red"], output=tmp_path / name)
    first, *others = ((tmp_path / name).read_text() for name in "abc")
    assert first.count("tokens") == 2 and all(other == first for other in others)


@pytest.mark.parametrize("content", [b"GGUF", b"no model", b""])
def test_a_file_that_is_no_gguf_is_a_problem(llama, tmp_path, content):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ProblemError) as caught:
        run(llama, load=file, prompt=["Once"])
    assert facts(caught) == [(str(file), None, "unreadable")]


def test_without_a_model_what_does_not_need_it_is_found(tmp_path):
    nothing = str(tmp_path / "nothing")
    values = {"load": nothing, "prompts_file": f"{nothing}.gz", "device": "nowhere"}
    for named in ({}, {"tokenizer_name_or_path": nothing}):
        problems = job.check_run(config_from_dict(GenerateConfig, {**values, **named}))
        options = ["--prompts-file", "model directory", "--device", *(["--tokenizer-name-or-path"] if named else [])]
        assert [problem.option for problem in problems] == options
    assert (problems[0].value, problems[0].kind) == (f"{nothing}.gz", "missing")
    (tmp_path / "nothing.gz").write_bytes(b"no gzip")
    (problem, *_) = job.check_run(config_from_dict(GenerateConfig, values))
    assert (problem.option, problem.kind) == ("--prompts-file", "corrupt")


def test_all_that_is_wrong_is_told_together(llama, tmp_path):
    (tmp_path / "there").touch()
    values = {"load": llama.directory, "prompt": ["Once"], "output": tmp_path / "there", "top_k": 3, "dtype": "float16"}
    degrees = {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 90, "max_new_tokens": 10**6}
    problems = job.check_run(config_from_dict(GenerateConfig, {**values, **degrees}))
    alone = config_from_dict(GenerateConfig, {**values, "device": "nowhere"})
    assert "--device" in [problem.option for problem in job.check_run(alone)]
    assert [problem.option for problem in problems] == [
        *("--top-k", "--output"),
        *("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "prompt 1"),
    ]
    fine = {"load": llama.directory, "prompt": ["Once"], "max_new_tokens": 6}
    assert job.check_run(config_from_dict(GenerateConfig, fine)) == []
