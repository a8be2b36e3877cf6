from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee.data.readers import chunk, csv_files, extension, hub, input_files, json_files, read_file, readers, stream
from cordee.data.readers.chunk import Chunk
from cordee.errors import ProblemError
from cordee.log import logger

TEXTS = [
    "plain",
    'quotes " and \\ back\\slashes \\" {[]}',
    "two\nlines\r\nand\ttab",
    "",
    "\u4f60\u597d \U0001f600 e\u0301",
    "x" * 3000,
    "{",
    '}"',
    "\\",
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, request):
    """So that every test crosses the border between blocks many times."""
    size = getattr(request, "param", 64)
    for module in (chunk, stream, json_files, csv_files):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)


def everything(chunks: list[Chunk] | object, keys=("text",)) -> tuple[list, list[str]]:
    """All rows and the places of all invalid records."""
    rows, invalid, done = [], [], []
    for one in chunks:
        got, bad = one.rows(keys)
        rows += got
        invalid += [f"{b.place}: {b.why}" for b in bad]
        done.append(one.done)
    assert done == sorted(done) and all(0 <= share <= 1 for share in done)
    return rows, invalid


def records(texts=TEXTS) -> list[dict]:
    return [
        {"id": i, "text": text, "title": f"t{i}", "meta": {"text": "inner", "list": ["{"]}}
        for i, text in enumerate(texts)
    ]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=record["id"] % 2 == 0) + "\n" for record in records()))


def write_array(path: Path) -> None:
    path.write_text(json.dumps(records(), ensure_ascii=False))


def write_pretty_array(path: Path) -> None:
    path.write_text(json.dumps(records(), indent=4))


def write_pretty_objects(path: Path) -> None:
    path.write_text("\n".join(json.dumps(record, indent=1) for record in records()))


def write_bom(path: Path) -> None:
    write_jsonl(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records()), path, row_group_size=2)


def write_dictionary_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array(TEXTS).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": texts}), path)


def write_arrow(path: Path, stream: bool = False) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(records())
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_csv(path: Path) -> None:
    import csv

    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "title"])
        writer.writerows([i, text, f"t{i}"] for i, text in enumerate(TEXTS))


def zipped(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def write_zipped(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


FORMATS = {
    "jsonl": ("x.jsonl", write_jsonl),
    "json with an object a line": ("x.json", write_jsonl),
    "json with a byte order mark": ("x.json", write_bom),
    "json array": ("x.json", write_array),
    "json array over many lines": ("x.json", write_pretty_array),
    "json objects over many lines": ("x.json", write_pretty_objects),
    "jsonl.gz": ("x.jsonl.gz", zipped(write_jsonl)),
    "json.gz": ("x.json.gz", zipped(write_array)),
    "csv": ("x.csv", write_csv),
    "csv.gz": ("x.csv.gz", zipped(write_csv)),
    "parquet": ("x.parquet", write_parquet),
    "parquet with a dictionary": ("x.parquet", write_dictionary_parquet),
    "arrow file": ("x.arrow", write_arrow),
    "arrow stream": ("x.arrow", lambda path: write_arrow(path, stream=True)),
}


@pytest.mark.parametrize("small_chunks", [1, 7, 64, 1 << 20], indirect=True)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_every_text(tmp_path, name, small_chunks):
    file, write = FORMATS[name]
    write(tmp_path / file)
    rows, invalid = everything(read_file(tmp_path / file, ("text",)))
    assert rows == [(text,) for text in TEXTS]
    assert invalid == []


@pytest.mark.parametrize("name", ["jsonl", "json array", "csv", "parquet", "arrow file"])
def test_several_keys_stay_together(tmp_path, name):
    file, write = FORMATS[name]
    write(tmp_path / file)
    rows, invalid = everything(read_file(tmp_path / file, ("title", "text")), ("title", "text"))
    assert rows == [(f"t{i}", text) for i, text in enumerate(TEXTS)] and invalid == []


def test_plain_text_is_a_record_a_line(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("one\r\n\r\ntwo \u4f60\nthree\rfour\n  \n".encode())
    rows, _ = everything(read_file(path, ("text",)))
    assert rows == [("one",), ("",), ("two \u4f60",), ("three",), ("four",), ("  ",)]


def test_plain_text_is_what_datasets_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\r\n\r\ntwo\n\n\nthree\n  \nlast without end")
    loaded = datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert everything(read_file(path, ("text",)))[0] == [(text,) for text in loaded["text"]]


def test_plain_text_has_no_other_key(tmp_path):
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(ProblemError, match="lines have no key but 'text'"):
        list(read_file(tmp_path / "x.txt", ("content",)))


def test_broken_lines_are_named(tmp_path):
    lines = [
        '{"text": "a"}',
        '{"text": "b"',
        "",
        '{"no": 1}',
        '{"text": null}',
        '{"text": 5}',
        '["text"]',
        '{"text": "c"}',
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    rows, invalid = everything(read_file(path, ("text",)))
    assert rows == [("a",), ("c",)]
    assert [line.removeprefix(f"{path}: ") for line in invalid] == [
        "line 2: it is not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)",
        "line 4: it has no 'text'",
        "line 5: its 'text' is null, not text",
        "line 6: its 'text' is int, not text",
        "line 7: it is a JSON list, not an object",
    ]


def test_a_broken_object_does_not_hide_the_next(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"}, {"text": }, {"text": "b"}]')
    rows, invalid = everything(read_file(path, ("text",)))
    assert rows == [("a",), ("b",)]
    assert len(invalid) == 1 and f"{path}: record 2: it is not JSON" in invalid[0]


def test_an_array_that_is_cut_off(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records())[:-40])
    with pytest.raises(ProblemError, match="ends inside an object"):
        list(read_file(path, ("text",)))


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", b'{"text": "\\ud800"}\n'), ("x.csv", b"text\nab\xff\n")])
def test_text_that_is_no_unicode(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows, invalid = everything(read_file(tmp_path / name, ("text",)))
    assert rows == [] and "is not valid Unicode text" in invalid[0] and ": line" in invalid[0]


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl", b'{"text": "ab\xff"}\n{"text": "c"}\n'), ("x.txt", b"ab\xff\nc\n")]
)
def test_bytes_that_are_no_utf8(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows, invalid = everything(read_file(tmp_path / name, ("text",)))
    assert rows == [("c",)] and ": line 1: " in invalid[0] and "utf-8" in invalid[0]


def test_csv_lines_that_do_not_fit(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text,n\na,1\nb\n\nc,1,2\n"d"x,1\n"e\nf",1\n')
    rows, invalid = everything(read_file(path, ("text",)))
    assert rows == [("a",), ("e\nf",)]
    places = [line.removeprefix(f"{path}: ") for line in invalid]
    assert places[0] == "line 3: it has 1 fields, the header 2"
    assert places[1] == "line 5: it has 3 fields, the header 2"
    assert places[2].startswith("line 6: it is not CSV")


def test_a_long_csv_field(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CHUNK_BYTES", 1 << 18)
    (tmp_path / "x.csv").write_text("text\n" + "y" * 500_000 + "\n")
    assert everything(read_file(tmp_path / "x.csv", ("text",)))[0] == [("y" * 500_000,)]


@pytest.mark.parametrize("name", ["csv", "parquet", "arrow file", "arrow stream"])
def test_a_column_that_is_not_there(tmp_path, name):
    file, write = FORMATS[name]
    write(tmp_path / file)
    with pytest.raises(ProblemError, match=r"--json-keys = body\n.*no such column; it has .*text"):
        list(read_file(tmp_path / file, ("body",)))


def test_a_column_that_is_not_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(ProblemError, match="this column is int64, not text"):
        list(read_file(tmp_path / "x.parquet", ("text",)))


def test_null_in_a_table(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    rows, invalid = everything(read_file(tmp_path / "x.parquet", ("text",)))
    assert rows == [("a",), ("b",)]
    assert invalid == [f"{tmp_path / 'x.parquet'}: row 2: its 'text' is null, not text"]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl.gz"])
def test_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"ARROW1 nonsense nonsense nonsense")
    with pytest.raises(ProblemError, match=r"x\."):
        list(read_file(tmp_path / name, ("text",)))


def test_a_gzip_file_that_is_cut_off(tmp_path):
    zipped(write_jsonl)(tmp_path / "x.jsonl.gz")
    content = (tmp_path / "x.jsonl.gz").read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(content[:-20])
    with pytest.raises(ProblemError, match="cannot be unpacked"):
        list(read_file(tmp_path / "x.jsonl.gz", ("text",)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.csv", "x.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name, monkeypatch):
    for module in (chunk, stream, json_files, csv_files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 14)
    words = [f"word{random.Random(i).randrange(10**6)}" for i in range(200)]
    texts = [" ".join(words[i % 100 : i % 100 + 100]) for i in range(6000)]  # about 6 MB
    path = tmp_path / name
    if name == "x.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=200)
    elif name == "x.json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        header = "text\n" if name == "x.csv" else ""
        path.write_text(header + "".join((json.dumps({"text": t}) if "json" in name else t) + "\n" for t in texts))
    del texts
    count = 0
    list(read_file(path, ("text",)).__iter__().__next__().rows(("text",)))  # imports
    tracemalloc.start()
    for one in read_file(path, ("text",)):
        count += len(one.rows(("text",))[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6000
    assert peak < 1_000_000


# ---- which files -----------------------------------------------------------------------------------------------------


def test_known_extensions():
    assert set(readers()) >= {".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow", ".jsonl.gz"}
    assert extension(Path("a.jsonl.gz")) == ".jsonl.gz" and extension(Path("a.b.csv")) == ".csv"
    assert extension(Path("a.md")) is None


def test_of_a_directory_the_most_frequent_format_is_read(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    for name in ("b.jsonl", "a.jsonl", "c.csv", "README.md", ".hidden.csv", ".hidden2.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "sub.csv").mkdir()
    assert [path.name for path in input_files(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert said == [f"Of {tmp_path} only the files ending in .jsonl are read; 2 are not: README.md, c.csv"]


@pytest.mark.parametrize(
    ("name", "why"), [("absent", "no such file or directory"), ("x.md", "format of this file"), ("", "holds no file")]
)
def test_nothing_to_read(tmp_path, name, why):
    (tmp_path / "x.md").write_text("")
    with pytest.raises(ProblemError, match=why):
        input_files(tmp_path / name)


# ---- datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", [None, "train"])
def test_what_datasets_loads(tmp_path, streaming, split):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "x.jsonl")
    params = {"path": "json", "data_files": str(tmp_path / "x.jsonl"), "streaming": streaming}
    params |= {"split": split} if split else {}
    params |= {"cache_dir": str(tmp_path / "cache")}
    rows, invalid = everything(hub.read(params, ("text",)))
    assert rows == [(text,) for text in TEXTS] and invalid == []


def test_what_datasets_cannot_load(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ProblemError, match="cannot be loaded"):
        list(hub.read({"path": "json", "data_files": str(tmp_path / "absent.jsonl")}, ("text",)))


def test_a_column_that_datasets_does_not_have(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "x.jsonl")
    params = {"path": "json", "data_files": str(tmp_path / "x.jsonl"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ProblemError, match="no such column; it has id, text, title, meta"):
        list(hub.read(params, ("body",)))


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ProblemError, match=r'pip install "cordee\[datasets\]"'):
        list(hub.read({"path": "json"}, ("text",)))


@pytest.mark.parametrize("content", ["{", "[1]", '{"streaming: True}'])
def test_params_that_are_no_json_object(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ProblemError, match="JSON"):
        hub.read_params(tmp_path / "p.json")
