from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.data.readers import (
    arrow_files,
    chunk,
    csv_files,
    extension,
    hub,
    input_files,
    json_files,
    read_file,
    readers,
    stream,
    text_files,
)
from cordee.data.readers.chunk import Chunk
from cordee.errors import ProblemError
from cordee.log import logger
from tests.problems import facts, limits

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
    for module in (chunk, stream, json_files):
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


@settings(deadline=None)
@given(
    text=st.text("ab \n\r\f\v\x1c\x1d\x1e\x85\u2028\u2029\ufeff", max_size=30),
    mark=st.booleans(),
    size=st.integers(1, 9),
)
def test_plain_text_has_the_lines_that_python_reads(text, mark, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK_BYTES", size)
        path = Path(folder) / "x.txt"
        path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
        rows, invalid = everything(read_file(path, ("text",)))
        with open(path, encoding="utf-8-sig") as file:
            assert [line for (line,) in rows] == [line.removesuffix("\n") for line in file] and not invalid


def test_plain_text_of_an_old_mac_counts_its_lines(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a" * 100 + b"\rb\r" + b"c\xff\r")
    _, invalid = everything(read_file(tmp_path / "x.txt", ("text",)))
    assert ": line 3: " in invalid[0]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
@pytest.mark.parametrize("content", [b"", b"one\r\n\n two \xe4\xbd\xa0", b"\xef\xbb\xbfone\n"])
def test_a_whole_file_is_one_record(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert everything(read_file(path, ("text",), whole=True)) == ([(content.decode("utf-8-sig"),)], [])


def test_a_whole_file_that_is_no_text_is_named(tmp_path, small_records):
    path = tmp_path / "x.txt"
    for content, line in ((b"a\n\nb\xff\n", 3), (b"a" * (chunk.MAX_RECORD_BYTES + 1), 1)):
        path.write_bytes(content)
        rows, invalid = everything(read_file(path, ("text",), whole=True))
        assert rows == [] and [named.startswith(f"{path}: line {line}: ") for named in invalid] == [True]


def test_plain_text_has_no_other_key(tmp_path):
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(ProblemError) as caught:
        list(read_file(tmp_path / "x.txt", ("content",)))
    assert (facts(caught), limits(caught)) == ([("--json-keys", "content", "missing")], [("text",)])


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


def test_elements_of_an_array_that_are_no_records_are_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text":"a"},"loose [text",null,7,{"text":"b"}, [{"text": "c"}], {}]')
    rows, invalid = everything(read_file(path, ("text",)))
    assert rows == [("a",), ("b",)]
    assert [line.removeprefix(f"{path}: ") for line in invalid] == [
        "record 2: it is a JSON str, not an object",
        "record 3: it is a JSON NoneType, not an object",
        "record 4: it is a JSON int, not an object",
        "record 6: it is a JSON list, not an object",
        "record 7: it has no 'text'",
    ]


@pytest.mark.parametrize(
    ("content", "kind", "line", "records"),
    [
        ('[{"text": "a"},\n {"text": "b"}', "truncated", 2, 2),
        ('[{"text": "a"},\n {"text": "b', "truncated", 2, 1),
        ('[{"text": "a"},', "truncated", 1, 1),
        ("[", "truncated", 1, 0),
        ('[{"text": "a"}\n{"text": "b"}]', "separator", 2, 1),
        ('[{"text": "a"}}', "separator", 1, 1),
        ('[{"text": "a"} {"text": "b"}]', "separator", 1, 1),
        ('[null {"text": "b"}]', "separator", 1, 1),
        ('[{"text": "a"},]', "value", 1, 1),
        ('[{"text": "a"},,{"text": "b"}]', "value", 1, 1),
        ('[{"text": "a"}][{"text": "b"}]', "trailing", 1, 1),
        ('[{"text": "a"}]\n\n{"text": "b"}', "trailing", 3, 1),
        ('{\n"text": "a"}\n{\n"text": ', "truncated", 4, 1),
        ('{\n"text": "a"},\n{"text": "b"}', "value", 2, 1),
    ],
)
def test_values_that_are_not_separated_as_they_must_be(tmp_path, content, kind, line, records):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ProblemError) as caught:
        everything(read_file(path, ("text",)))
    assert (facts(caught), limits(caught)) == ([("--input", f"{path}:{line}", kind)], [records])


def test_what_stands_between_objects_is_not_passed_over(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{\n"text": "a"} garbage {\n"text": "b"}')
    rows, invalid = everything(read_file(path, ("text",)))
    assert rows == [("a",), ("b",)] and len(invalid) == 1 and "record 2: it is not JSON" in invalid[0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text('a\\"[]{},: \n\u2028', max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "b}", "["]), inner, max_size=3)
    ),
    max_leaves=6,
)
ARRAYS = st.lists(st.fixed_dictionaries({"text": st.text('a\\"[]{},: \n\u2028', max_size=9)}) | VALUES, max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    array=ARRAYS,
    indent=st.sampled_from([None, 0, 1]),
    change=st.sampled_from(["none", "cut", "byte", "drop", "add"]),
    data=st.data(),
)
def test_an_array_is_what_json_makes_of_it_or_a_problem(array, indent, change, data):
    content = json.dumps(array, indent=indent, ensure_ascii=data.draw(st.booleans())).encode()
    place = data.draw(st.integers(0, len(content) - 1))
    byte = bytes([data.draw(st.sampled_from(b'[]{},:"\\ \n1a\xff\0\xef'))])
    cut = {"none": content, "cut": content[:place], "byte": content[:place] + byte + content[place + 1 :]}
    cut |= {"drop": content[:place] + content[place + 1 :], "add": content[:place] + byte + content[place:]}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK_BYTES", data.draw(st.integers(1, 20)))
        path = Path(folder) / "x.json"
        path.write_bytes(cut[change])
        try:
            rows, invalid = everything(read_file(path, ("text",)))
        except ProblemError:
            rows, invalid = [], ["a problem"]
    try:
        theirs = json.loads(cut[change])
    except ValueError:
        assert invalid or not cut[change].strip()
        return
    theirs = theirs if isinstance(theirs, list) else [theirs]
    good = [value for value in theirs if isinstance(value, dict) and isinstance(value.get("text"), str)]
    if change == "none":
        assert len(invalid) == len(theirs) - len(good)
    assert rows == [(value["text"],) for value in good] or (change != "none" and invalid)


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", b'{"text": "\\ud800"}\n'), ("x.csv", b"text\nab\xff\n")])
def test_text_that_is_no_unicode(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows, invalid = everything(read_file(tmp_path / name, ("text",)))
    assert rows == [] and "is not valid UTF-8" in invalid[0] and ": line" in invalid[0]


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl", b'{"text": "ab\xff"}\n{"text": "c"}\n'), ("x.txt", b"ab\xff\nc\n")]
)
def test_bytes_that_are_no_utf8(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows, invalid = everything(read_file(tmp_path / name, ("text",)))
    assert rows == [("c",)] and ": line 1: " in invalid[0] and "utf-8" in invalid[0].lower()


def test_csv_lines_that_do_not_fit(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text,n\na,1\nb\n\nc,1,2\n"d"x,1\n"e\nf",1\n')
    rows, invalid = everything(read_file(path, ("text",)))
    assert rows == [("a",), ("e\nf",)]
    places = [line.removeprefix(f"{path}: ") for line in invalid]
    assert places[0] == "line 3: it has 1 fields, the header 2"
    assert places[1] == "line 5: it has 3 fields, the header 2"
    assert places[2].startswith("line 6: it is not CSV")


def test_a_quote_that_is_not_closed_is_named_by_where_it_begins(tmp_path):
    (tmp_path / "x.csv").write_text('text\na\n"b\nc\nd\n')
    rows, invalid = everything(read_file(tmp_path / "x.csv", ("text",)))
    assert rows == [("a",)] and invalid == [f"{tmp_path / 'x.csv'}: line 3: it is not CSV: unexpected end of data"]


def test_a_header_that_is_no_csv(tmp_path):
    (tmp_path / "x.csv").write_text('"text"s\na\n')
    with pytest.raises(ProblemError) as caught:
        list(read_file(tmp_path / "x.csv", ("text",)))
    assert facts(caught) == [("--input", tmp_path / "x.csv", "corrupt")]


def test_a_long_csv_field(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1 << 18)
    (tmp_path / "x.csv").write_text("text\n" + "y" * 500_000 + "\n")
    assert everything(read_file(tmp_path / "x.csv", ("text",)))[0] == [("y" * 500_000,)]


@pytest.mark.parametrize("name", ["csv", "parquet", "arrow file", "arrow stream"])
def test_a_column_that_is_not_there(tmp_path, name):
    file, write = FORMATS[name]
    write(tmp_path / file)
    with pytest.raises(ProblemError) as caught:
        list(read_file(tmp_path / file, ("body",)))
    assert facts(caught) == [("--json-keys", "body", "missing")] and "text" in limits(caught)[0]


def test_a_column_that_is_not_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(ProblemError) as caught:
        list(read_file(tmp_path / "x.parquet", ("text",)))
    assert (facts(caught), limits(caught)) == ([("--json-keys", "text", "type")], ["int64"])


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
    with pytest.raises(ProblemError) as caught:
        list(read_file(tmp_path / name, ("text",)))
    assert facts(caught) == [("--input", tmp_path / name, "corrupt")]


@pytest.mark.parametrize("name", ["jsonl.gz", "json.gz", "csv.gz"])
def test_a_gzip_file_that_is_cut_off(tmp_path, name):
    file, write = FORMATS[name]
    write(tmp_path / file)
    content = (tmp_path / file).read_bytes()
    for length in range(len(content)):
        (tmp_path / file).write_bytes(content[:length])
        with pytest.raises(ProblemError) as caught:
            list(read_file(tmp_path / file, ("text",)))
        assert facts(caught) == [("--input", tmp_path / file, "corrupt")]


@pytest.mark.parametrize("name", ["parquet", "arrow file", "arrow stream"])
def test_a_table_that_is_cut_off(tmp_path, name, monkeypatch):
    """A stream may lack its end mark by its format, so that one cut between two batches is whole: that is said."""
    said = []
    monkeypatch.setattr(arrow_files.logger, "warning", lambda text, *values: said.append(text % values))
    file, write = FORMATS[name]
    write(tmp_path / file)
    everything(read_file(tmp_path / file, ("text",)))
    assert not said
    content = (tmp_path / file).read_bytes()
    for length in [*range(0, len(content), len(content) // 20), len(content) - 8]:
        (tmp_path / file).write_bytes(content[:length])
        said.clear()
        try:
            everything(read_file(tmp_path / file, ("text",)))
            assert len(said) == 1 and "no end-of-stream mark" in said[0]
        except ProblemError:
            assert not said


# ---- large records ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_records(monkeypatch):
    for module in (chunk, stream, json_files, csv_files, text_files):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 200)


def write_sizes(path: Path, sizes: list[int]) -> None:
    """Records that take so many bytes each: a line, an object, a row."""
    if ".json" in path.name:
        lines = ["{" + f'"text": "{"x" * (size - 12)}"' + "}" for size in sizes]
        content = "\n".join(lines) + "\n" if "jsonl" in path.name else f"[{', '.join(lines)}]"
    else:
        content = "".join("x" * size + "\n" for size in sizes)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


@pytest.mark.parametrize("small_chunks", [1, 7, 64, 190], indirect=True)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.txt.gz", "x.jsonl.gz", "x.json.gz"])
def test_a_record_that_is_too_large_is_named_and_passed_over(tmp_path, name, small_records, small_chunks):
    for sizes in itertools.product([20, 199, 200, 201, 202, 1000], repeat=2):
        sizes = [50, *sizes, 60]
        write_sizes(tmp_path / name, sizes)
        rows, invalid = everything(read_file(tmp_path / name, ("text",)))
        less = 12 if ".json" in name else 0
        assert [len(text) for (text,) in rows] == [size - less for size in sizes if size <= 200]
        places = [f": {'record' if 'json' in name and 'jsonl' not in name else 'line'} {i}: " for i in range(5)]
        large = [places[i] for i, size in enumerate(sizes, 1) if size > 200]
        assert len(invalid) == len(large) and all(place in line for place, line in zip(large, invalid, strict=True))


@pytest.mark.parametrize("content", ["y" * 201, '"' + "y\n" * 101 + '"', '"y\n' + "z\n" * 101, ("y" * 99 + ",") * 3])
def test_a_record_of_csv_that_is_too_large_ends_the_file(tmp_path, small_records, content):
    (tmp_path / "x.csv").write_text(f"text\na\n{content}\nb\n")
    with pytest.raises(ProblemError) as caught:
        list(read_file(tmp_path / "x.csv", ("text",)))
    assert facts(caught) == [("--input", f"{tmp_path / 'x.csv'}:3", "too large")]


def test_a_value_of_a_table_that_is_too_large(tmp_path, small_records):
    import pyarrow
    from pyarrow import parquet

    texts = ["a", "\u00e9" * 100, "\u00e9" * 101, "x" * 201, "b"]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    rows, invalid = everything(read_file(tmp_path / "x.parquet", ("text",)))
    assert [text for (text,) in rows] == ["a", texts[1], "b"]
    assert [": row 3: " in invalid[0], ": row 4: " in invalid[1], len(invalid)] == [True, True, 2]


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_rows_without_text_are_cut_into_chunks(tmp_path, name):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [""] * 1000}), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("text,n\n" + ",1\n\n1\n" * 500)
    chunks = list(read_file(tmp_path / name, ("text",)))
    assert len(chunks) == -(-1000 // 64)  # of CHUNK_BYTES = 64 rows each
    rows, invalid = everything(chunks)
    assert len(rows) + len(invalid) == 1000


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a program are known on Linux only")
def test_memory_does_not_hang_on_the_length_of_a_line(tmp_path):
    """A line of 18 MB, which is one record and too large, in every format; packed or not."""
    line = "1 " * 9_000_000
    (tmp_path / "x.txt").write_text(line)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": line}) + "\n")
    (tmp_path / "x.json").write_text(json.dumps([{"text": line}]))
    (tmp_path / "x.csv").write_text(f"text\n{line}\n")
    (tmp_path / "y.csv").write_text('text\n"' + f"{'1' * 999}\n" * 18_000)
    for name in ("x.txt", "x.jsonl", "x.json", "x.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes(), 1))
    program = f"""
from pathlib import Path
from cordee.data.options import PreprocessConfig
from cordee.data.preprocess import run
from cordee.device import peak_resident_bytes
from cordee.errors import ProblemError
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        run(PreprocessConfig(input=str(path), output_prefix={str(tmp_path / "out")!r},
            tokenizer_type="NullTokenizer", vocab_size=100))
    except ProblemError as error:
        assert [problem.kind for problem in error.problems] in (["records"], ["too large"]), error
    else:
        raise AssertionError(path)
print(peak_resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000_000
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.csv", "x.parquet", "x.jsonl.gz", "x.txt.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name, monkeypatch):
    for module in (chunk, stream, json_files):
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
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
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
    assert extension(Path("A.JSONL.GZ")) == ".jsonl.gz" and extension(Path("a.md")) is None


@pytest.mark.parametrize("name", FORMATS)
def test_extensions_in_capitals_are_the_same(tmp_path, name):
    file, write = FORMATS[name]
    write(tmp_path / file)
    (tmp_path / file).rename(tmp_path / file.upper())
    (path,) = input_files(tmp_path)
    assert everything(read_file(path, ("text",))) == ([(text,) for text in TEXTS], [])


def test_of_a_directory_the_most_frequent_format_is_read(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(values))
    for name in ("b.jsonl", "a.jsonl", "c.csv", "README.md", ".hidden.csv", ".hidden2.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "sub.csv" / "deeper").mkdir(parents=True)
    for name in ("deeper/z.JSONL", "data.json", "data.idx", "d.csv"):
        (tmp_path / "sub.csv" / name).write_text("")
    (tmp_path / "sub.csv" / "up").symlink_to(tmp_path)  # round in a circle
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.csv").write_text("")
    names = ["a.jsonl", "b.jsonl", "sub.csv/deeper/z.JSONL"]
    assert [str(path.relative_to(tmp_path)) for path in input_files(tmp_path)] == names
    others = "README.md, c.csv, sub.csv/d.csv, sub.csv/data.idx"
    assert said == [(tmp_path, ".jsonl", "4 other files", others)]


@pytest.mark.parametrize(("name", "kind"), [("absent", "missing"), ("x.md", "format"), ("", "empty")])
def test_nothing_to_read(tmp_path, name, kind):
    (tmp_path / "x.md").write_text("")
    with pytest.raises(ProblemError) as caught:
        input_files(tmp_path / name)
    assert facts(caught) == [("--input", tmp_path / name, kind)]


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
    params = {"path": "json", "data_files": str(tmp_path / "absent.jsonl")}
    with pytest.raises(ProblemError) as caught:
        list(hub.read(params, ("text",)))
    assert facts(caught) == [("--hf-datasets-params", params, "unreadable")]


def test_a_column_that_datasets_does_not_have(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "x.jsonl")
    params = {"path": "json", "data_files": str(tmp_path / "x.jsonl"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ProblemError) as caught:
        list(hub.read(params, ("body",)))
    assert facts(caught) == [("--json-keys", "body", "missing")]
    assert limits(caught) == [("id", "text", "title", "meta")]


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ProblemError) as caught:
        list(hub.read({"path": "json"}, ("text",)))
    assert (facts(caught), limits(caught)) == ([("--hf-datasets-params", None, "missing")], ["datasets"])


@pytest.mark.parametrize("content", ["{", "[1]", '{"streaming: True}'])
def test_params_that_are_no_json_object(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ProblemError) as caught:
        hub.read_params(tmp_path / "p.json")
    assert facts(caught) == [("--hf-datasets-params", tmp_path / "p.json", "invalid")]
