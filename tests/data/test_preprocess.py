from __future__ import annotations

import functools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cordee import lock
from cordee.data import preprocess, process_map
from cordee.data.indexed import IndexedDataset, IndexedDatasetBuilder
from cordee.data.manifest import manifest_path, read_manifest
from cordee.data.options import PreprocessConfig
from cordee.data.readers import chunk, json_files, stream
from cordee.errors import ProblemError
from cordee.log import logger
from tests.data import peer
from tests.problems import facts, limits


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    for name in ("info", "warning"):
        monkeypatch.setattr(logger, name, lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (chunk, stream, json_files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 50)


def numbers(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(map(str, random.integers(0, 99, random.integers(1, 20)))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str], **columns: list[str]) -> Path:
    rows = [{"text": text, **{key: values[i] for key, values in columns.items()}} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, **values) -> IndexedDataset:
    """Numbers as text to a pair; the tokenizer's eod is 99."""
    config = {"output_prefix": str(folder / "out"), "tokenizer_type": "NullTokenizer", "vocab_size": 100} | values
    assert preprocess.run(PreprocessConfig(**config)) == 0
    key = config.get("json_keys", ("text",))[0]
    return IndexedDataset(f"{config['output_prefix']}_{key}_document")


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_every_text_is_a_document(tmp_path, said):
    texts = numbers(30)
    dataset = run(tmp_path, input=str(write_jsonl(tmp_path / "x.jsonl", texts)))
    assert [list(map(int, text.split())) for text in texts] == [sequence.tolist() for sequence in dataset[:]]
    assert dataset.dtype == np.int32
    assert dataset.document_indices.tolist() == list(range(31))
    assert outputs(tmp_path) == ["out_text_document.bin", "out_text_document.idx", "out_text_document.json"]
    assert any(re.fullmatch(r"Processed 30 documents \([\d.]+ docs/s, [\d.]+ MB/s\)\.", line) for line in said)


def test_bytes_of_one_document(tmp_path):
    run(tmp_path, input=str(write_jsonl(tmp_path / "x.jsonl", ["5 6"])), append_eod=True)
    assert (tmp_path / "out_text_document.bin").read_bytes() == struct.pack("<3i", 5, 6, 99)
    assert (tmp_path / "out_text_document.idx").stat().st_size == 62


def test_megatron_reads_it(tmp_path):
    dataset = run(tmp_path, input=str(write_jsonl(tmp_path / "x.jsonl", numbers(5))), append_eod=True)
    theirs = peer.megatron().indexed.IndexedDataset(str(tmp_path / "out_text_document"))
    assert len(theirs) == 5
    for ours, other in zip(dataset[:], theirs[:], strict=True):
        np.testing.assert_array_equal(ours, other)


def test_the_output_does_not_hang_on_the_workers(tmp_path, small_chunks):
    source = str(write_jsonl(tmp_path / "x.jsonl", numbers(200)))
    results = set()
    for name, values in {"a": {}, "b": {"workers": 2}, "c": {"n_subs": 3}}.items():
        run(tmp_path, input=source, output_prefix=str(tmp_path / name), append_eod=True, **values)
        results.add(files_of(tmp_path / f"{name}_text_document"))
    assert len(results) == 1


def test_each_key_has_its_own_pair(tmp_path):
    texts, titles = numbers(12, 1), numbers(12, 2)
    source = write_jsonl(tmp_path / "x.jsonl", texts, title=titles)
    run(tmp_path, input=str(source), json_keys=("text", "title"))
    for key, column in (("text", texts), ("title", titles)):
        dataset = IndexedDataset(tmp_path / f"out_{key}_document")
        assert [" ".join(map(str, sequence)) for sequence in dataset[:]] == column


def test_empty_texts_are_no_documents_and_counted(tmp_path, said):
    source = write_jsonl(tmp_path / "x.jsonl", ["1 2", "", "3", ""], title=["4", "5", "", "6"])
    run(tmp_path, input=str(source), json_keys=("text", "title"), append_eod=True)
    assert [s.tolist() for s in IndexedDataset(tmp_path / "out_text_document")[:]] == [[1, 2, 99], [3, 99]]
    assert [s.tolist() for s in IndexedDataset(tmp_path / "out_title_document")[:]] == [[4, 99], [5, 99], [6, 99]]
    assert "Left out of 4 records: 3 empty text" in said


def test_elements_of_an_array_that_are_no_records_stop_the_job_or_are_counted(tmp_path, said):
    source = tmp_path / "x.json"
    source.write_text('[{"text":"1 2"},"loose text",null,7,{"text":"3"}]')
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(source))
    assert (facts(caught), limits(caught)) == ([("--input", None, "records")], [5])
    assert str(caught.value).count(f"{source}: record ") == 3
    assert outputs(tmp_path) == []
    assert [s.tolist() for s in run(tmp_path, input=str(source), skip_invalid=True)[:]] == [[1, 2], [3]]
    assert "Left out of 5 records: 3 invalid" in said


def test_an_array_that_is_cut_off_leaves_nothing(tmp_path, small_chunks):
    source = tmp_path / "x.json"
    content = json.dumps([{"text": text} for text in numbers(1000)])
    source.write_text(content[: content.index("}", len(content) // 2) + 1])
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(source), skip_invalid=True)
    assert facts(caught) == [("--input", f"{source}:1", "truncated")]
    assert outputs(tmp_path) == []


def test_long_records_are_left_out_under_all_keys(tmp_path, said):
    source = write_jsonl(tmp_path / "x.jsonl", ["1 2 3", "1 2", "1"], title=["7", "8", "7 8 9"])
    run(tmp_path, input=str(source), json_keys=("text", "title"), append_eod=True, seq_length=4)
    assert [s.tolist() for s in IndexedDataset(tmp_path / "out_text_document")[:]] == [[1, 2, 99]]
    assert [s.tolist() for s in IndexedDataset(tmp_path / "out_title_document")[:]] == [[8, 99]]
    assert "Left out of 3 records: 2 too long" in said


BROKEN = ['{"text": "1 2"}', '{"text": "3"', '{"text": 4}', '{"text": "5"}']


def test_a_broken_line_stops_the_job_and_leaves_nothing(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(BROKEN))
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(tmp_path / "x.jsonl"))
    assert (facts(caught), limits(caught)) == ([("--input", None, "records")], [4])
    named = re.findall(rf"{tmp_path / 'x.jsonl'}: line (\d)", str(caught.value))
    assert named == ["2", "3"]
    assert outputs(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_lines_can_be_skipped_and_are_counted(tmp_path, said, workers):
    (tmp_path / "x.jsonl").write_text("\n".join(BROKEN * 10))
    dataset = run(tmp_path, input=str(tmp_path / "x.jsonl"), skip_invalid=True, workers=workers)
    assert [s.tolist() for s in dataset[:]] == [[1, 2], [5]] * 10
    assert "Left out of 40 records: 20 invalid" in said
    [places] = [line for line in said if line.startswith("Invalid records")]
    assert "line 2: it is not JSON" in places and "and 10 more" in places
    assert read_manifest(dataset).left_out == {"invalid": 20, "empty text": 0, "too long": 0}


@pytest.mark.parametrize(("text", "records", "left_out"), [("", 0, ""), ('{"text": ""}\n', 1, "(1 empty text)")])
def test_nothing_in_the_input(tmp_path, text, records, left_out):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(tmp_path / "x.jsonl"))
    assert (facts(caught), limits(caught)) == ([("--input", None, "empty")], [records])
    assert left_out in str(caught.value)
    assert outputs(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_whole_files_are_documents(tmp_path, workers):
    folder = tmp_path / "texts"
    folder.mkdir()
    contents = {"a.txt": "1 2\n3\n", "b.txt": "4", "c.txt": ""}
    for name, content in contents.items():
        (folder / name).write_text(content)
    dataset = run(tmp_path, input=str(folder), whole_files=True, workers=workers)
    assert [s.tolist() for s in dataset[:]] == [[1, 2, 3], [4]]
    assert read_manifest(dataset).left_out["empty text"] == 1
    lines = run(tmp_path, input=str(folder), output_prefix=str(tmp_path / "lines"))
    assert [s.tolist() for s in lines[:]] == [[1, 2], [3], [4]]


def test_whole_files_among_others(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / "in" / name, ["1"])
    (tmp_path / "in" / "c.TXT").write_text("2\n3")
    assert [s.tolist() for s in run(tmp_path, input=str(tmp_path / "in"), whole_files=True)[:]] == [[2, 3]]


def test_records_are_no_whole_files(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ["1"])
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(tmp_path / "x.jsonl"), whole_files=True)
    assert (facts(caught), limits(caught)) == ([("--whole-files", True, "format")], [(".txt", ".txt.gz")])


GSM8K = [{"question": f"{i} 1", "answer": "2", "level": i} for i in range(3)]


@pytest.mark.parametrize(
    ("records", "keys", "there"),
    [
        (GSM8K, ("text",), ("question", "answer")),
        ([{"a": "1"}, {"b": "2"}], ("text",), ("a", "b")),
        ([{"messages": ["1"]}], ("text",), ("messages",)),
        (GSM8K, ("question", "solution"), ("question", "answer")),
    ],
)
def test_records_with_other_keys_are_told_which(tmp_path, records, keys, there):
    """As columns of tables are, and what is named then works where it is text."""
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(tmp_path / "x.jsonl"), json_keys=keys)
    assert (facts(caught), limits(caught)) == ([("--json-keys", " ".join(keys), "missing")], [there])
    if records is GSM8K:
        assert len(run(tmp_path, input=str(tmp_path / "x.jsonl"), json_keys=there)) == len(records)


@pytest.mark.parametrize("lines", [['{"text": "1"}', '{"no": "2"}'], ['{"no": "1"}', "{"], ["{}"]])
def test_a_record_without_its_key_among_others_is_a_broken_record(tmp_path, lines):
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(tmp_path / "x.jsonl"))
    assert facts(caught) == [("--input", None, "records")]


def test_all_problems_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProblemError) as error:
        run(
            tmp_path,
            input=str(tmp_path / "absent"),
            output_prefix=str(tmp_path / "file" / "out"),
            tokenizer_type="Llama2Tokenizer",
        )
    assert [problem.option for problem in error.value.problems] == ["--output-prefix", "--tokenizer-model", "--input"]


def test_what_exists_is_replaced_only_if_told_to(tmp_path):
    source = str(write_jsonl(tmp_path / "x.jsonl", ["1"]))
    run(tmp_path, input=source)
    write_jsonl(tmp_path / "x.jsonl", ["2 3"])
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=source)
    assert facts(caught) == [("--output-prefix", str(tmp_path / "out"), "exists")]
    assert limits(caught) == [["out_text_document.bin", "out_text_document.idx"]]
    assert run(tmp_path, input=source, overwrite=True)[0].tolist() == [2, 3]


def test_what_another_process_writes_is_left_to_it(tmp_path, monkeypatch):
    source = str(write_jsonl(tmp_path / "x.jsonl", ["1"]))
    before = files_of(tmp_path / "out_text_document") if run(tmp_path, input=source) else None
    monkeypatch.setattr(lock, "acquire", functools.partial(lock.acquire, patience=0))
    with lock.acquire(tmp_path / "out_text_document.lock"), pytest.raises(ProblemError) as caught:
        run(tmp_path, input=source, overwrite=True)
    assert facts(caught) == [("--output-prefix", str(tmp_path / "out"), "held")]
    assert [holder.pid for holder in limits(caught)] == [os.getpid()]
    assert files_of(tmp_path / "out_text_document") == before
    assert outputs(tmp_path) == [f"out_text_document.{kind}" for kind in ("bin", "idx", "json")]


def test_a_lock_that_cannot_be_had_is_a_problem(tmp_path):
    os.mkfifo(tmp_path / "out.lock")
    given = PreprocessConfig(output_prefix=str(tmp_path / "out"))
    with pytest.raises(ProblemError) as error, preprocess._own(given, [str(tmp_path / "out")]):
        pass
    assert [problem.option for problem in error.value.problems] == ["--output-prefix"]


def test_a_tokenizer_without_an_end_cannot_append_it(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "x.jsonl", ["1"])
    values = {"tokenizer_type": "PretrainedFromHF", "tokenizer_name_or_path": str(tmp_path)}
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(source), append_eod=True, **values)
    assert facts(caught) == [("--append-eod", True, "requires")]


def test_the_manifest_says_how_it_was_made(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["1 2", "50"])
    write_jsonl(tmp_path / "in" / "b.jsonl", ["3"])
    dataset = run(tmp_path, input=str(tmp_path / "in"), append_eod=True)
    manifest = read_manifest(dataset)
    assert (manifest.documents, manifest.tokens, manifest.max_token) == (3, 7, 99)
    assert manifest.append_eod and manifest.tokenizer.vocab_size == 100 and manifest.tokenizer.eod == 99
    assert list(manifest.sources) == [str(tmp_path / "in" / name) for name in ("a.jsonl", "b.jsonl")]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_loads(tmp_path, streaming, said):
    pytest.importorskip("datasets")
    source = write_jsonl(tmp_path / "x.jsonl", ["1 2", "3"])
    params = {"path": "json", "data_files": str(source), "split": "train", "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "params.json").write_text(json.dumps(params))
    dataset = run(tmp_path, hf_datasets_params=str(tmp_path / "params.json"), streaming=streaming, input="ignored")
    assert [s.tolist() for s in dataset[:]] == [[1, 2], [3]]
    assert "--input ignored is not read: --hf-datasets-params says what is." in said


def test_disk_full(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedDatasetBuilder, "add_documents", full)
    with pytest.raises(ProblemError) as caught:
        run(tmp_path, input=str(write_jsonl(tmp_path / "x.jsonl", ["1"])))
    assert facts(caught) == [("--output-prefix", str(tmp_path / "out"), "unwritable")]
    assert outputs(tmp_path) == []


def test_folders_of_input_and_output(tmp_path):
    """Text of subfolders is read in the order of paths, and the folder of the output is made, unless nothing comes."""
    for name, text in (("b/2.JSONL", "2"), ("a.jsonl", "1"), ("b/c/3.jsonl", "3")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "in" / name, [text])
    prefix = str(tmp_path / "deep" / "out") + "/"
    with pytest.raises(ProblemError):
        run(tmp_path, input=str(tmp_path / "in"), output_prefix=prefix, vocab_size=3)
    assert not (tmp_path / "deep").exists()
    for _ in range(2):
        dataset = run(tmp_path, input=str(tmp_path / "in"), output_prefix=prefix, overwrite=True)
        assert [s.tolist() for s in dataset[:]] == [[1], [2], [3]]


def test_an_input_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "in").mkdir()
    monkeypatch.setattr(Path, "iterdir", refused)
    config = PreprocessConfig(input=str(tmp_path / "in"), output_prefix=str(tmp_path / "out"), vocab_size=9)
    found = [(problem.option, problem.kind) for problem in preprocess.check_run(config)]
    assert ("--input", "unreadable") in found


# ---- merging ---------------------------------------------------------------------------------------------------------


def parts(folder: Path, *, manifests: bool = True) -> list[list[int]]:
    """Pairs a_1, a_2 (and b_1 of another group); the documents of a_1 and a_2."""
    folder.mkdir()
    documents = []
    for name, texts in (("a_2", ["5", "6 7"]), ("a_1", ["1 2", "3"]), ("b_1", ["9"])):
        run(folder, input=str(write_jsonl(folder / "x.jsonl", texts)), output_prefix=str(folder / name))
    (folder / "x.jsonl").unlink()
    for path in folder.glob("*.json"):
        if not manifests:
            path.unlink()
    documents = [[1, 2], [3], [5], [6, 7]]
    return documents


def merge(tmp_path: Path, **values) -> None:
    config = {"input": str(tmp_path / "in"), "output_prefix": str(tmp_path / "out"), "merge_group_keys": ("a",)}
    assert preprocess.run(PreprocessConfig(**(config | values))) == 0


def test_pairs_of_a_group_are_joined_by_name(tmp_path):
    documents = parts(tmp_path / "in")
    merge(tmp_path, merge_group_keys=("a_", "b_"))
    dataset = IndexedDataset(tmp_path / "out_a_")
    assert [s.tolist() for s in dataset[:]] == documents
    assert dataset.problems() == []
    assert IndexedDataset(tmp_path / "out_b_")[0].tolist() == [9]
    manifest = read_manifest(dataset)
    assert manifest.documents == 4 and manifest.tokenizer.vocab_size == 100


def test_a_merged_output_is_that_of_one_run(tmp_path):
    parts(tmp_path / "in")
    merge(tmp_path, merge_group_keys=("a_",))
    run(
        tmp_path,
        input=str(write_jsonl(tmp_path / "x.jsonl", ["1 2", "3", "5", "6 7"])),
        output_prefix=str(tmp_path / "w"),
    )
    assert files_of(tmp_path / "out_a_") == files_of(tmp_path / "w_text_document")


def test_merging_beside_the_parts_does_not_merge_the_result_again(tmp_path):
    documents = parts(tmp_path / "in")
    prefix = str(tmp_path / "in" / "all")
    for _ in range(2):
        merge(tmp_path, merge_group_keys=("a_",), output_prefix=prefix, overwrite=True)
    assert [s.tolist() for s in IndexedDataset(f"{prefix}_a_")[:]] == documents


def test_a_missing_partner(tmp_path):
    parts(tmp_path / "in")
    (tmp_path / "in" / "a_1_text_document.idx").unlink()
    (tmp_path / "in" / "b_1_text_document.bin").unlink()
    with pytest.raises(ProblemError) as error:
        merge(tmp_path, merge_group_keys=("a_", "b_", "c_"))
    assert [(option, value) for option, value, _ in facts(error)] == [
        ("dataset", str(tmp_path / "in" / "a_1_text_document")),
        ("dataset", str(tmp_path / "in" / "b_1_text_document")),
        ("--merge-group-keys", "c_"),
    ]
    assert limits(error)[:2] == [("a_1_text_document.idx",), ("b_1_text_document.bin",)]
    assert outputs(tmp_path) == []


def test_no_directory_to_merge(tmp_path):
    with pytest.raises(ProblemError) as caught:
        merge(tmp_path)
    assert facts(caught) == [("--input", tmp_path / "in", "missing")]


def test_pairs_of_different_tokenizers_are_not_joined(tmp_path):
    parts(tmp_path / "in")
    source = str(write_jsonl(tmp_path / "x.jsonl", ["1"]))
    run(tmp_path, input=source, output_prefix=str(tmp_path / "in" / "a_3"), vocab_size=50)
    with pytest.raises(ProblemError) as caught:
        merge(tmp_path, merge_group_keys=("a_",))
    assert facts(caught) == [("--merge-group-keys", None, "tokenizers")]


def test_pairs_without_manifests_are_joined_without_one(tmp_path, said):
    parts(tmp_path / "in", manifests=False)
    merge(tmp_path, merge_group_keys=("a_",))
    assert not manifest_path(tmp_path / "out_a_").exists()
    assert any("gets no manifest" in line for line in said)


# ---- processes -------------------------------------------------------------------------------------------------------


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    os._exit(3)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_results_come_in_order(monkeypatch, method):
    monkeypatch.setattr(process_map, "_start_method", lambda: method)
    with process_map.process_map(square, 2) as squares:
        assert list(squares(range(50))) == [i * i for i in range(50)]


def test_only_a_bounded_number_of_items_is_taken():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with process_map.process_map(square, 2) as squares:
        results = squares(items())
        next(results)
        assert len(taken) <= 2 * process_map._AHEAD
        results.close()


def test_a_process_that_dies_is_a_problem():
    with pytest.raises(ProblemError) as caught, process_map.process_map(die, 2) as deaths:
        list(deaths(range(5)))
    assert facts(caught) == [("--workers", 2, "invalid")]


def start(folder: Path, texts: int) -> subprocess.Popen:
    """A job in its own process, large enough to be interrupted."""
    write_jsonl(folder / "x.jsonl", numbers(20) * (texts // 20))
    program = f"""
import signal, sys
from cordee.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets what it starts in the background ignore
sys.exit(main(["preprocess", "--input", {str(folder / "x.jsonl")!r}, "--output-prefix", {str(folder / "out")!r},
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--workers", "2"]))
"""
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, start_new_session=True)


def living(session: int) -> list[int]:
    """Processes of a session."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(entry.name))
    return pids


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_job_leaves_no_output_and_no_process(tmp_path, sent):
    process = start(tmp_path, 400_000)
    try:
        deadline = time.monotonic() + 30
        while not any((tmp_path / name).exists() for name in ("out_text_document.bin.incomplete",)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(process.pid, sent)
        process.wait(30)
        while living(process.pid):
            assert time.monotonic() < deadline, "a worker outlives the job"
            time.sleep(0.05)
    finally:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode in {signal.SIGTERM: (143,), signal.SIGINT: (130,), signal.SIGKILL: (-9,)}[sent]
    left = outputs(tmp_path)
    assert not [name for name in left if name.endswith((".bin", ".idx", ".json"))]
    if sent != signal.SIGKILL:
        assert left == []


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a program are known on Linux only")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Peak memory of the whole job in its own process, for 6 MB and for 24 MB of text."""
    peaks = []
    for texts in (120_000, 480_000):
        folder = tmp_path / str(texts)
        folder.mkdir()
        write_jsonl(folder / "x.jsonl", numbers(20) * (texts // 20))
        program = f"""
from cordee.data.options import PreprocessConfig
from cordee.device import peak_resident_bytes
from cordee.data.preprocess import run
run(PreprocessConfig(input={str(folder / "x.jsonl")!r}, output_prefix={str(folder / "out")!r},
    tokenizer_type="NullTokenizer", vocab_size=100))
print(peak_resident_bytes())
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 8_000_000
