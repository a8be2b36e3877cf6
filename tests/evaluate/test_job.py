"""`cordee evaluate` from options to a table and a file."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from cordee.checkpoint.storage import Location, location_of
from cordee.config.load import config_from_dict
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data.readers import text_files
from cordee.errors import ProblemError
from cordee.evaluate import job
from cordee.evaluate.documents import Document
from cordee.evaluate.finished import Finished, fingerprint_files
from cordee.evaluate.options import EvaluateConfig
from cordee.evaluate.requests import windows
from cordee.evaluate.runner import run_tasks
from cordee.evaluate.task import Result, Subject, all_tasks
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from tests.checkpoint.stores import ROOT, FaultyStorage
from tests.generate.folders import TEXT, write_tokenizer
from tests.matrix import on_demand
from tests.problems import facts, limits


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "held out.txt"
    file.write_text(f"{TEXT}\n{TEXT[:40]}\n", encoding="utf-8")
    return file


def run(folder, *paths, **options):
    values = {"load": folder.directory, "task_data_path": [str(path) for path in paths], **options}
    return job.run(config_from_dict(EvaluateConfig, values))


def test_results_are_shown_and_written(llama, text, tmp_path, capsys):
    output = tmp_path / "made" / "results.json"
    assert run(llama, text, output=output) == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["model"] == str(llama.directory)
    (result,) = content["results"]
    assert result["task"] == "perplexity"
    assert result["parts"] == {str(text): result["metrics"]}
    shown = capsys.readouterr().out
    assert f"{result['metrics']['perplexity']:.6g}" in shown and f"{result['metrics']['tokens']:,}" in shown


def resume_from(llama, folder, kept):
    """Evaluate a text of one window, for which the file of an interrupted evaluation has `kept`; its file, and ids."""
    text, output, partial = (folder / name for name in ("a.txt", "out.json", "out.json.partial"))
    text.write_text("Lily")
    ids = load_tokenizer(TokenizerOptions(), str(llama.directory)).encode("Lily")
    (window,) = windows(np.array(ids), 64, 64)
    model = f"{fingerprint_files(location_of(llama.directory))} torch.float32"
    partial.write_text(json.dumps([model, window.key, kept]) + "\n")
    assert run(llama, text, output=output) == 0
    assert not partial.exists()
    return output, ids


def test_an_interrupted_evaluation_resumes(llama, tmp_path):
    output, ids = resume_from(llama, tmp_path, [-6.0, False])
    (result,) = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert result["metrics"]["loss"] == pytest.approx(6.0 / (len(ids) - 1))


@pytest.mark.parametrize(
    "line",
    [
        *('["{model}", "{key}", null]', '["{model}", "{key}", [1, 2]]', '["{model}", "{key}", [-1.5]]'),
        *('["{model}", "{key}", [-Infinity, false]]', '["{model}", ["{key}"], [-1.5, false]]', "[1, 2]", "{{}}", "7"),
        *('["{model}", "{key}", {{"a": 1.5}}]', '["another", "{key}", [NaN, true]]', "[" * 10**5),
    ],
)
def test_what_holds_no_results_is_a_problem(tmp_path, line):
    partial = tmp_path / "out.json.partial"
    content = line.format(model="ours", key="0" * 32)
    partial.write_text(f"{content}\n")
    with pytest.raises(ProblemError) as caught:
        Finished(partial, "ours")
    assert facts(caught) == [("--output", partial, "corrupt")]
    assert partial.read_text() == f"{content}\n"


def test_a_text_is_no_result_of_a_window(llama, tmp_path):
    resume_from(llama, tmp_path, "ab")


def test_a_document_without_a_token_to_score_is_named(llama, tmp_path):
    class Ends:
        """Continuations, by the number of the document."""

        name = "ends"

        def docs(self, subject, options):
            yield from (Document(np.array([1]), None, 0.5), Document(np.array([]), None, 1.0))

        def requests(self, doc, encoder, options):
            return [encoder.loglikelihood("Once", " upon" * len(doc.tokens))]

        def score(self, answered, options):
            return Result(self.name, {"documents": len(list(answered))}, {})

    config = config_from_dict(EvaluateConfig, {"load": llama.directory, "task_data_path": ["x"]})
    subject = Subject(llama.model(), load_tokenizer(TokenizerOptions(), str(llama.directory)))
    with pytest.raises(ProblemError) as caught:
        run_tasks([Ends()], subject, config)
    assert facts(caught) == [("continuation", "''", "empty")]
    assert caught.value.problems[0].place == "document 2 of ends"


def test_checkpoints_in_a_store_are_told_apart():
    storage = FaultyStorage()
    found = []
    for name in ("a", "b", "a"):
        folder = Location(storage, ROOT) / name
        with (folder / "iter_0000001" / "cordee.json").write() as file:
            file.write(name.encode())
        found.append(fingerprint_files(folder))
    assert found[0] == found[2] != found[1]
    with pytest.raises(AssertionError):
        fingerprint_files(Location(storage, ROOT) / "nothing")


@pytest.mark.parametrize("content", ['[{"text": "a b"}, {"text": "c"}', '[{"text": "a b"} {"text": "c"}]'])
def test_an_array_that_is_no_json_is_a_problem(llama, tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ProblemError) as caught:
        run(llama, file, skip_invalid=True)
    (problem,) = caught.value.problems
    assert (problem.option, problem.value) == ("--task-data-path", f"{file}:1")


def test_a_file_that_is_one_document_has_a_largest_size(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 40)
    file = tmp_path / "x.txt"
    file.write_text(TEXT[:40])
    run(llama, file, whole_files=True)
    file.write_text(TEXT[:41])
    with pytest.raises(ProblemError) as caught:
        run(llama, file, whole_files=True)
    assert facts(caught) == [("--task-data-path", f"{file}: line 1", "records")]


@pytest.mark.parametrize("name", ["x.jsonl", "data.idx"])
def test_records_are_no_whole_files(llama, tmp_path, name):
    file = tmp_path / name
    file.write_text('{"text": "a b"}\n')
    with pytest.raises(ProblemError) as caught:
        run(llama, file.with_suffix("") if name == "data.idx" else file, whole_files=True)
    assert ("--whole-files", True, "format") in facts(caught)


def test_the_keys_that_records_have_are_named(llama, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n' * 3)
    with pytest.raises(ProblemError) as caught:
        run(llama, file)
    assert (facts(caught), limits(caught)) == ([("--json-keys", "text", "missing")], [("question", "answer")])
    file.write_text('{"text": "a"}\n{"question": "a"}\n')
    with pytest.raises(ProblemError) as caught:
        run(llama, file)
    assert facts(caught) == [("--task-data-path", f"{file}: line 2", "records")], "others have it"


def test_a_total_stands_below_several_files(llama, text, tmp_path, capsys):
    other = tmp_path / "b.txt"
    other.write_text(TEXT, encoding="utf-8")
    run(llama, text, other)
    assert "total" in capsys.readouterr().out


def test_tasks_are_found_by_their_files():
    assert all_tasks().keys() == {"perplexity"}
    assert all(name == task.name for name, task in all_tasks().items())


def test_a_file_that_is_one_document_is_utf8(llama, tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"a\nb\xe9\n")
    for whole in (True, False):
        with pytest.raises(ProblemError) as caught:
            run(llama, file, whole_files=whole)
        assert facts(caught) == [("--task-data-path", f"{file}: line 2", "records")]


def test_a_text_that_cannot_be_decompressed_is_named(llama, tmp_path):
    file = tmp_path / "x.txt.gz"
    file.write_bytes(b"no gzip")
    for whole in (True, False):
        with pytest.raises(ProblemError) as caught:
            run(llama, file, whole_files=whole)
        assert facts(caught) == [("--task-data-path", file, "corrupt")]


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "load_part", None)
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "out.json")
    with pytest.raises(ProblemError) as caught:
        run(llama, text, output=output)
    assert facts(caught) == [("--output", output, "unwritable")]


def test_without_a_model_what_does_not_need_it_is_found(tmp_path):
    nothing = str(tmp_path / "nothing")
    values = {"load": nothing, "task_data_path": [nothing], "tokenizer_name_or_path": nothing, "task": ["perplexity"]}
    problems = job.check_run(config_from_dict(EvaluateConfig, values))
    options = ["model directory", "--task-data-path", "--tokenizer-name-or-path"]
    assert [problem.option for problem in problems] == options
    assert "--hf-datasets-params" not in problems[1].fix  # an option that evaluation does not have
    del values["tokenizer_name_or_path"]
    problems = job.check_run(config_from_dict(EvaluateConfig, values))
    assert [problem.option for problem in problems] == options[:2]


def test_every_problem_is_reported(llama, tmp_path):
    with pytest.raises(ProblemError) as caught:
        run(llama, tmp_path / "nothing", tmp_path, task=["perplexty", "perplexity"], seq_length=100)
    problems = caught.value.problems
    data = "--task-data-path"
    assert [problem.option for problem in problems] == ["--task", "--seq-length", data, data]
    assert (problems[0].kind, problems[0].limit) == ("unknown", ("perplexity",))


@pytest.mark.slow
@pytest.mark.parametrize("given", [("--tensor-model-parallel-size", "2"), *on_demand((("--nproc-per-node", "2"),))])
def test_by_the_command_on_two_processes(llama, text, tmp_path, given):
    command = [
        sys.executable,
        "-m",
        "cordee",
        "evaluate",
        "--load",
        str(llama.directory),
        "--task-data-path",
        str(text),
    ]
    found = []
    for name, more in (("one", ()), ("two", given)):
        output = tmp_path / f"{name}.json"
        done = subprocess.run([*command, *more, "--output", str(output)], check=True, capture_output=True, text=True)
        assert done.stdout.count("perplexity") == 2  # the table and its column, shown once
        (result,) = json.loads(output.read_text(encoding="utf-8"))["results"]
        found.append(result["metrics"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_processes_that_are_no_whole_copies(llama, text):
    config = config_from_dict(
        EvaluateConfig,
        {"load": llama.directory, "task_data_path": [str(text)], "nproc_per_node": 3, "tensor_model_parallel_size": 2},
    )
    (problem,) = job.option_problems(config)
    assert (problem.option, problem.value, problem.kind, problem.limit) == ("processes", 3, "divisible", 2)


def test_results_are_never_replaced(llama, text, tmp_path):
    output = tmp_path / "out"
    output.write_text("precious")
    with pytest.raises(ProblemError) as caught:
        run(llama, text, output=output)
    assert [(problem.option, problem.kind) for problem in caught.value.problems] == [("--output", "taken")]
    assert output.read_text() == "precious"


def test_the_tokenizer_can_be_elsewhere(llama, text, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(llama.directory / name)
    with pytest.raises(ProblemError) as caught:
        run(llama, text, load=tmp_path / "model")
    assert facts(caught) == [("--tokenizer-name-or-path", str(tmp_path / "model"), "empty")]
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    run(llama, text)
    expected = capsys.readouterr().out
    run(llama, text, load=tmp_path / "model", tokenizer_name_or_path=tmp_path / "tokenizer")
    assert capsys.readouterr().out == expected


def test_a_file_of_gguf_has_the_same_results(llama, text, tmp_path):
    options = ConvertConfig(load_dir=str(llama.directory), save_dir=str(tmp_path / "m"), save_model_type="gguf")
    assert convert.run(options) == 0
    for name, place in (("a", llama.directory), ("b", tmp_path / "m" / "model.gguf")):
        run(llama, text, load=place, output=tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text(encoding="utf-8"))["results"] for name in "ab")
    assert first[0]["metrics"]["perplexity"] > 1
    assert first == second


def test_all_that_is_wrong_is_told_together(llama, text):
    values = {"load": llama.directory, "task": ["perplexitee"], "output": text, "pipeline_model_parallel_size": 90}
    problems = job.check_run(config_from_dict(EvaluateConfig, values))
    options = ["--task-data-path", "--output", "--pipeline-model-parallel-size", "--task"]
    assert [problem.option for problem in problems] == options
