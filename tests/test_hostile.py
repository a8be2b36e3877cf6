"""Whatever is in a file or behind an option, a command ends well or with problems: no other error, and no memory that a
file only promises to need.

Small sound files of every format are changed, as bytes and where they hold JSON as values; options get what they may
not. What is right is one law, so that no case needs an answer of its own.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cordee import cli
from cordee.checkpoint import formats
from cordee.checkpoint.storage import location_of
from cordee.config.load import load_as_far_as_possible
from cordee.config.option import options_of
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data.indexed import IndexedDataset
from cordee.data.readers import read_file, reading
from cordee.device import KINDS
from cordee.errors import OUTSIDE, Problem, ProblemError, problem_of, raise_all
from cordee.generate.loading import stop_ids
from cordee.plan import job as plan
from cordee.plan.timeline import read_timeline
from cordee.tensors.views import whole
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.train import job as train
from tests.generate.folders import write_tokenizer
from tests.problems import facts, limits
from tests.train import tiny as run
from tests.weights import tiny

CONSTANT = 2**26  # bytes that a command may need besides those of what it reads, twice
CLEAR = Path("/proc/self/clear_refs")  # where Linux forgets the peak of a process's memory
STRANGE = [0, -1, 1.5, 2**31, 2**63, 10**400, 1e300, float("inf"), float("nan"), True, None, "", "x", "\0", "\ud800"]
STRANGE += ["🙂", "/proc/self/mem", "../x", "9" * 5000, [], {}, [[]], [1], ["x"], {"a": 1}, {"1": {"content": 5}}]
JSON = (".json", ".yaml")


@dataclass(frozen=True)
class Subject:
    """A sound file, and what reads it. ProblemError, or nothing, is all that `read` may raise."""

    file: Path
    read: Callable[[], object]


# ---- sound files -----------------------------------------------------------------------------------------------------

HF = {**tiny.LLAMA, "vocab_size": 320, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": [1]}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def weights(path: Path) -> None:
    """Read all weights at `path`."""
    source = formats.read(path)
    for name in source.names():
        source.view(name).read(whole(source.shape(name)))


def tokenizer(path: Path) -> None:
    spec = formats.read(path).spec
    stop_ids(spec, path, load_tokenizer(TokenizerOptions(), str(path)))


def merged(model: Path, adapter: Path) -> None:
    raise_all(convert.check_run(ConvertConfig(load_dir=str(model), save_dir=f"{model} out", lora_load=(str(adapter),))))


def records(path: Path) -> None:
    with reading("--input", path):
        for chunk in read_file(path, ("text",)):
            chunk.rows(("text",))


def documents(prefix: str) -> None:
    indexed = IndexedDataset(prefix)
    for number in range(min(3, len(indexed))):
        indexed[number]


def options(command: str, argv: list[str]) -> None:
    """Parse and check a command line, all that is done before a job begins."""
    known = cli.COMMANDS[command]
    loaded = load_as_far_as_possible(known.schema, argv)
    raise_all([*loaded.problems, *cli.further(known, loaded)] if loaded.problems else cli.problems(known, loaded))
    if command == "plan":  # which needs nothing
        plan.plan(loaded.config)


def _models(root: Path) -> Iterator[tuple[str, Subject]]:
    model, sharded, pickled, adapter = (root / name for name in ("model", "sharded", "pickled", "adapter"))
    tensors = tiny.save(model, HF)
    write_tokenizer(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "pad_token_id": 0}))
    decoder = {"300": {"content": "<x>", "special": True, "lstrip": False}}
    named = {**json.loads((model / "tokenizer_config.json").read_text()), "added_tokens_decoder": decoder}
    (model / "tokenizer_config.json").write_text(json.dumps({**named, "additional_special_tokens": ["<x>"]}))
    for folder in (sharded, pickled):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(HF))
    tiny.shard(sharded, tensors, 2)
    torch.save(tensors, pickled / "pytorch_model.bin")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    where = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, HF["hidden_size"]), "B": (HF["hidden_size"], 2)}
    low_rank = {where.format(i, kind): torch.ones(shape) for i in range(2) for kind, shape in shapes.items()}
    save_file(low_rank, adapter / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        yield name, Subject(model / name, lambda: tokenizer(model))
    for folder, names in {
        model: ("config.json", "model.safetensors"),
        sharded: ("model.safetensors.index.json",),
        pickled: ("pytorch_model.bin",),
    }.items():
        yield from ((name, Subject(folder / name, lambda folder=folder: weights(folder))) for name in names)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        yield name, Subject(adapter / name, lambda: merged(model, adapter))
    for kind, name in {"gguf": "model.gguf", "dcp": ".metadata", "mg": "model_optim_rng.pt"}.items():
        convert.run(ConvertConfig(load_dir=str(model), save_dir=str(root / kind), save_model_type=kind))
        (file,) = (root / kind).rglob("*.gguf" if kind == "gguf" else name)
        yield name, Subject(file, lambda kind=kind, file=file: weights(file if kind == "gguf" else root / kind))


def _runs(root: Path) -> Iterator[tuple[str, Subject]]:
    config = run.config(root, train_iters=1, save_interval=1, lr_warmup_iters=0)
    train.run(config)
    for name in ("cordee.json", ".metadata"):
        (file,) = Path(config.save or "").rglob(name)
        yield f"checkpoint {name}", Subject(file, lambda folder=file.parent: weights(folder))
    prefix = config.data_path[0]
    for ending in ("bin", "idx"):
        yield ending, Subject(Path(f"{prefix}.{ending}"), lambda: documents(prefix))
    wanted = {**run.MODEL, "data_path": [prefix], "lr": 1e-3, "train_iters": 2, "seq_length": 16}
    settings = {"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    for name, content in {"run.yaml": wanted, "deepspeed.json": settings}.items():
        (root / name).write_text(json.dumps(content))
    base = ["--config", str(root / "run.yaml"), "--nproc-per-node", "1"]
    yield "run.yaml", Subject(root / "run.yaml", lambda: options("train", base))
    given = [*base, "--deepspeed-config", str(root / "deepspeed.json")]
    yield "deepspeed.json", Subject(root / "deepspeed.json", lambda: options("train", given))
    span = {"rank": 0, "kind": "F", "stage": 0, "micro_batch": 0, "start": 0.0, "end": 1.0}
    (root / "timeline.json").write_text(json.dumps([span, {**span, "kind": "B", "start": 1.0, "end": 2.0}]))
    timeline = root / "timeline.json"
    yield "timeline.json", Subject(timeline, lambda: read_timeline(timeline, layers=[1.0], sizes=[1.0]))


def _texts(root: Path) -> Iterator[tuple[str, Subject]]:
    import pyarrow as pa
    from pyarrow import ipc, parquet

    lines = [{"text": "Once upon a time"}, {"text": "größer\n"}]
    (root / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "a.json").write_text(json.dumps(lines))
    (root / "a.csv").write_text('number,text\n1,"one, two"\n2,three\n')
    (root / "a.txt").write_text("one\ntwo\n")
    table = pa.Table.from_pylist(lines)
    parquet.write_table(table, root / "a.parquet")
    with ipc.new_file(str(root / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"):
        yield name, Subject(root / name, lambda name=name: records(root / name))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("sound")
    return {name: subject for make in (_models, _runs, _texts) for name, subject in make(root)}


NAMES = """tokenizer.json tokenizer_config.json generation_config.json config.json model.safetensors
model.safetensors.index.json pytorch_model.bin adapter_config.json adapter_model.safetensors model.gguf .metadata
model_optim_rng.pt bin idx run.yaml deepspeed.json timeline.json a.jsonl a.json a.csv a.txt a.parquet a.arrow"""
NAMES = [*NAMES.split(), "checkpoint cordee.json", "checkpoint .metadata"]


# ---- what is done to them --------------------------------------------------------------------------------------------

HUGE = [struct.pack("<Q", number) for number in (2**63, 2**40, 2**32, 2**31 - 1, 2**20)] + [b"\xff" * 8, bytes(8)]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut, overwritten or with something put in, most often where the headers of formats are."""
    length = draw(st.sampled_from([64, 4096, len(content)]))
    at = draw(st.integers(0, max(0, min(length, len(content)) - 1)))
    if draw(st.booleans()) and draw(st.booleans()):
        at = max(0, len(content) - 1 - at)  # where archives have theirs
    new = draw(st.sampled_from(HUGE) | st.binary(max_size=4))
    kind = draw(st.sampled_from(["cut", "overwrite", "insert", "remove"]))
    if kind == "cut":
        return content[:at]
    behind = {"overwrite": at + len(new), "insert": at, "remove": at + draw(st.integers(1, 16))}[kind]
    return content[:at] + (b"" if kind == "remove" else new) + content[behind:]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON value."""
    yield here
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*here, key))


@st.composite
def twisted(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON of which one value is another, is missing, is deep in arrays, or has a key twice."""
    root = [json.loads(content)]
    ways = list(places(root[0], (0,)))
    *above, last = draw(st.sampled_from(ways[:200]))
    holder: Any = root
    for key in above:
        holder = holder[key]
    kind = draw(st.sampled_from(["replace"] * 4 + ["remove", "nest", "twice", "rename"]))
    mark = "\ue000"
    if kind == "remove" and len(above):
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["", "x", "\0", "9" * 30, "🙂"]))] = holder.pop(last)
    elif kind == "replace":
        holder[last] = draw(st.sampled_from(STRANGE))
    else:
        holder[last] = mark
    text = json.dumps(root[0]).replace("1e+300", "1e400" if draw(st.booleans()) else "1e300")
    depth = draw(st.sampled_from([50, 99, 150, 900, 990, 100_000]))
    opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
    deep = opening * depth + "1" + closing * depth
    return text.replace(json.dumps(mark), deep if kind == "nest" else '{"a": 1, "a": "x"}').encode()


def headed(content: bytes, change: Callable[[bytes], st.SearchStrategy[bytes]]) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, of which it says the length."""
    (length,) = struct.unpack("<Q", content[:8])
    return change(content[8 : 8 + length]).map(
        lambda header: struct.pack("<Q", len(header)) + header + content[8 + length :]
    )


def changes(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    if name.endswith(JSON):
        return twisted(content) | twisted(content) | damaged(content)
    if name.endswith(".safetensors"):
        return damaged(content) | headed(content, twisted)
    return damaged(content)


# ---- the law ---------------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM the peak since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def bound(read: Callable[[], object], size: int) -> None:
    """`read` ends well or with problems that can be told, in memory in proportion to the `size` of its input."""
    taken = _taken_by(read)
    if taken > 2 * size + CONSTANT:  # the first to come somewhere imports what is needed there
        taken = _taken_by(read)
    assert taken <= 2 * size + CONSTANT


def _taken_by(read: Callable[[], object]) -> int:
    """Bytes of memory that the process needs at most beside those that it has; 0 where the system does not tell."""
    before = None
    with suppress(OSError):
        CLEAR.write_text("5")
        before = resident("VmRSS")
    try:
        read()
    except ProblemError as error:
        assert str(error)
    except OUTSIDE as error:
        assert str(problem_of(error))
    return 0 if before is None else resident("VmHWM") - before


def drawn(cases: int) -> settings:
    checks = list(HealthCheck)
    return settings(max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


def counts(sample: int, whole: int) -> pytest.MarkDecorator:
    marks = (pytest.mark.slow, pytest.mark.exhaustive)
    return pytest.mark.parametrize("cases", [sample, pytest.param(whole, marks=marks)])


@counts(9, 320)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_any_file_is_read_or_refused(subjects, name, cases):
    subject = subjects[name]
    content = subject.file.read_bytes()
    subject.read()

    @drawn(cases)
    @given(changes(name, content))
    def law(changed: bytes) -> None:
        subject.file.unlink(missing_ok=True)  # an earlier one may still be mapped into memory
        subject.file.write_bytes(changed)
        bound(subject.read, len(changed))

    try:
        law()
    finally:
        subject.file.write_bytes(content)


TEXTS = ["", "0", "-1", "1", "3", "1e300", "-1e300", "1e20", "1e18", "nan", "inf", "9" * 5000, "\udcff", "a\0b", "🙂"]
TEXTS += ["1,2", "0,0,0", "9" * 30, "a,b,c", "[]", "{}", "null", "true", "-0.0", "1e-320", "2147483648", "１２", "x"]
TEXTS += ["x" * 5000, "y/" * 5000, "a=b", "/dev/null", "/dev/zero", "/proc/x", "file://host/x", "s3://", "zz://x", "."]
COMMANDS = tuple(cli.COMMANDS)


@counts(75, 2000)
def test_any_option_is_taken_or_refused(subjects, cases, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, text = str(subjects["config.json"].file.parent), str(subjects["a.txt"].file)
    base = {
        "train": ["--config", str(subjects["run.yaml"].file), "--nproc-per-node", "1"],
        "convert": ["--load-dir", model, "--save-dir", "out"],
        "generate": ["--load", model, "--prompt", "Once", "--max-new-tokens", "2"],
        "evaluate": ["--load", model, "--task-data-path", text],
        "preprocess": ["--input", text, "--output-prefix", "out", "--tokenizer-name-or-path", model],
        "data show": [str(subjects["idx"].file.with_suffix(""))],
        "inspect": [str(subjects["idx"].file.with_suffix("")), "--tokenizer-name-or-path", model],
        "plan": [],
        "quickstart": [],
        "bench": ["parity"],
    }
    base["check"] = base["train"]
    for command, argv in base.items():  # which are sound, and import what they need
        options(command, argv)
    given_to = {name: options_of(cli.COMMANDS[name].schema) for name in COMMANDS}

    @drawn(cases)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(COMMANDS))
        option = data.draw(st.sampled_from(given_to[command]))
        count = data.draw(st.integers(0, 3)) if option.shape != "one" else 1
        values = [data.draw(st.sampled_from(TEXTS)) for _ in range(0 if option.is_switch else count)]
        bound(lambda: options(command, [*base[command], option.flag, *values]), 0)

    law()
    assert not os.listdir(tmp_path), "a check makes nothing"


# ---- what no change of a file makes ----------------------------------------------------------------------------------


@pytest.fixture
def strange(tmp_path, monkeypatch) -> dict[str, str]:
    """Names of places that are none."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("nowhere/x", "dangling")
    os.symlink("loop", "loop")
    Path("file").write_text("x")
    return {name: name for name in ("pipe", "dangling", "loop")} | {
        "inside": "file/x",
        "proc": "/proc/x",
        "long": "x" * 5000,
        "deep": "/".join(["y" * 200] * 50),
    }


LINES = """
train {run} --save {place} --save-interval 1
train {run} --load {place}
train {run} --tensorboard-dir {place}
train {run} --metrics-file {place}
train {run} --deepspeed-config {place}
train {run} --model {place}
train --config {place}
convert --load-dir {place} --save-dir out
convert --load-dir {model} --save-dir {place}
convert --load-dir {model} --save-dir out --lora-load {place}
convert --load-dir {model} --save-dir out --save-model-type mg --tokenizer-model {place}/x
generate --load {model} --prompts-file {place}
generate --load {model} --prompt Once --output {place}
generate --load {model} --prompt Once --tokenizer-name-or-path {place}
evaluate --load {model} --task-data-path {place}
preprocess --input {place} --output-prefix out --tokenizer-name-or-path {model}
preprocess --input {text} --output-prefix {place}/x --tokenizer-name-or-path {model}
check {run} --load {place}
data show {place}/x
plan --timeline {place}
plan --output {place}/x.svg
quickstart --input {place}
quickstart --output {place}
bench parity --output {place}/x.md
""".strip().splitlines()


def line(subjects: dict[str, Subject], text: str, **more: str) -> list[str]:
    """A command line, with the places of sound files in it."""
    model, run_file = subjects["config.json"].file.parent, subjects["run.yaml"].file
    known = {"model": model, "text": subjects["a.txt"].file, "run": f"--config {run_file} --nproc-per-node 1"}
    return text.format(**known, **more).split()


@pytest.mark.parametrize("place", ["pipe", "dangling", "loop", "inside", "proc", "long", "deep"])
def test_places_that_are_none(subjects, strange, place, capsys):
    codes = {text: told(line(subjects, text, place=strange[place])) for text in LINES}
    assert [text for text, problems in codes.items() if not problems] == []


def told(argv: list[str]) -> list[Problem]:
    """The problems of a command line, as `cordee` would tell them."""
    try:
        words = 2 if " ".join(argv[:2]) in cli.COMMANDS else 1
        options(" ".join(argv[:words]), argv[words:])
    except ProblemError as error:
        return error.problems
    except OUTSIDE as error:
        return [problem_of(error)]
    return []


@pytest.mark.parametrize(
    ("text", "option", "kind"),
    [
        ("train {run} --save=", "--save", "empty"),
        ("preprocess --input {text} --output-prefix= --tokenizer-name-or-path {model}", "--output-prefix", "empty"),
        ("train {run} --global-batch-size 1e20", "--global-batch-size", "range"),
        ("train {run} --distributed-timeout-minutes 1e300", "--distributed-timeout-minutes", "range"),
        ("train {run} --noop-layers 0,1,2", "--noop-layers", "at most"),
        ("train {run} --load {model} --ckpt-step 4", "--ckpt-step", "requires"),
        ("train {run} --load {model} --save {model}/run --save-interval 1", "--save", "excludes"),
        ("train {run} --load file://host/x", "--load", "host"),
        ("convert --load-dir {model} --save-dir {model}/out", "--save-dir", "excludes"),
        (
            "convert --load-dir {model} --save-dir out --save-model-type mg --tokenizer-model x",
            "--tokenizer-model",
            "missing",
        ),
        ("preprocess --input {model} --output-prefix {model}/x", "--output-prefix", "excludes"),
    ],
)
def test_nonsense_is_refused(subjects, text, option, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (option, kind) in [(problem.option, problem.kind) for problem in told(line(subjects, text))]


def test_a_pipe_is_no_object_of_a_storage(strange):
    with pytest.raises(OSError, match="pipe"):
        location_of("pipe").open()


def test_errors_from_outside_are_text_and_exit_code_2(strange, monkeypatch, capsys):
    def fails(*_: object) -> None:
        os.listdir("inside/x")

    monkeypatch.setattr(cli, "_dispatch", fails)
    assert cli.main([]) == 2
    assert "inside/x" in capsys.readouterr().err


def test_a_backend_of_no_device_here():
    with pytest.raises(ProblemError) as caught:
        KINDS["cpu"].collective_backend("nccl")
    assert facts(caught) == [("--distributed-backend", "nccl", "device")] and limits(caught) == ["gloo"]
    assert [KINDS["cuda"].collective_backend(given) for given in (None, "nccl", "gloo")] == ["nccl", "nccl", "gloo"]
