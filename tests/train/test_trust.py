"""What a run trusts: every reader of a checkpoint refuses changed bytes, and no manifest ends in a traceback.

Damage is done by plain writes to files, and what is right is that nobody gives other numbers than before.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import cordee
from cordee import lock, sealed
from cordee.checkpoint import directory, source
from cordee.checkpoint.storage import location_of
from cordee.config.option import to_flag
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data.gpt_check import check
from cordee.data.indexed import IndexedDataset, fingerprint
from cordee.data.manifest import Manifest, TokenizerNote, manifest_path, read_manifest
from cordee.errors import Findings, Problem, ProblemError
from cordee.evaluate import job as evaluate
from cordee.evaluate.options import EvaluateConfig
from cordee.generate import job as generate
from cordee.generate.options import GenerateConfig
from cordee.train import job, outputs
from cordee.train.check import check_with_contents
from cordee.train.objectives import next_token
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run
from cordee.train.run_plan import TrainState
from tests.problems import facts
from tests.train import tiny
from tests.train.test_kill import start, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of four steps with checkpoints of 2 and 4, and a tokenizer of numbers beside them."""
    folder = tmp_path_factory.mktemp("trained")
    words = {str(number): number for number in range(tiny.VOCAB - 1)} | {"<eos>": tiny.VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "text.txt").write_text("1 2 3 4 5 6")
    given = tiny.config(folder, tokenizer_name_or_path=str(folder / "tokenizer"), train_iters=4, micro_batch_size=8)
    job.run(given)
    return given


@pytest.fixture
def copied(trained: TrainConfig, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint, the only one in its root."""
    root = tmp_path / "run"
    shutil.copytree(trained.save or "", root)
    shutil.rmtree(root / "iter_0000002")
    return root / "iter_0000004"


def readers(given: TrainConfig, root: Path) -> dict[str, Callable[[], object]]:
    """Everything that loads weights from a checkpoint, by its name."""
    text = str(Path(given.save or "").parent / "text.txt")
    load, out = str(root), root.parent / "out"
    resumed = tiny.resumed(given, load=load, save=load, train_iters=6, override_opt_param_scheduler=True)
    return {
        "generate": lambda: generate.run(GenerateConfig(load=load, prompt=("1 2",), max_new_tokens=1)),
        "evaluate": lambda: evaluate.run(EvaluateConfig(load=load, task_data_path=(text,))),
        "convert": lambda: convert.run(ConvertConfig(load_dir=load, save_dir=str(out))),
        "api": lambda: cordee.GPTModel.from_pretrained(load),
        "train": lambda: job.run(resumed),
    }


def flip(path: Path, place: float) -> Callable[[], None]:
    """Flip one bit at a share of the length of a file; what puts it back."""
    data = bytearray(path.read_bytes())
    at = min(int(place * len(data)), len(data) - 1)

    def write() -> None:
        data[at] ^= 1 << at % 8
        path.write_bytes(data)

    write()
    return write


def test_everybody_reads_what_is_as_it_was_saved(trained: TrainConfig, copied: Path):
    for read in readers(trained, copied.parent).values():
        read()


@pytest.mark.parametrize("name", ["generate", "evaluate", "convert", "api", "train"])
def test_a_flipped_bit_is_refused(trained: TrainConfig, copied: Path, name: str):
    read = readers(trained, copied.parent)[name]
    refused = 0
    for file in sorted(copied.iterdir()):
        for place in (0.0, 0.01, 0.3, 0.7, 0.99, 1.0):
            back = flip(file, place)
            with pytest.raises(ProblemError) as caught:
                read()
            assert file.name in str(caught.value)
            back()
            refused += 1
    assert refused == 18  # of the manifest, the metadata and the data
    assert not (copied.parent.parent / "out").exists()
    assert sorted(path.name for path in copied.parent.glob("iter_*")) == [copied.name]
    read()  # and all of it was put back


def test_an_output_that_is_replaced_outlives_a_damaged_source(trained: TrainConfig, copied: Path):
    out = copied.parent.parent / "out"
    options = ConvertConfig(load_dir=str(copied), save_dir=str(out), overwrite=True)
    convert.run(options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flip(copied / "__0_0.distcp", 0.5)
    with pytest.raises(ProblemError) as caught:
        convert.run(options)
    assert facts(caught) == [("checkpoint", str(copied), "corrupt")]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(out.parent.glob(".*"))


# ---- manifests -------------------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "2**62": 2**62,
    "2**70": 2**70,
    "1e308": 1e308,
    "nan": float("nan"),
    "text": "x",
    "path": "../x",
    "surrogates": "\ud800\0" * 300,
    "[]": [],
    "[[]]": [[]],
    "{}": {},
    "{'': 0}": {"": 0},
}
KINDS = (*WRONG, "delete", "nest", "rename")
CONFIG_READ = ("moe_aux_loss_coeff",)
# What a manifest may say as well: places that nobody reads, and values that mean what they say, so that those who read
# them go by them: the default in other words, a large number, another model of the same tensors.
ABSENT, LARGE, EMPTY = {"null", "delete", "rename"}, {"2**62", "2**70"}, {"{}", "{'': 0}"}
TEXT = {"text", "path"}
MEANT: dict[str, set[str]] = {
    "written_by": set(KINDS) - {"surrogates"},
    "model.hf_config.model_type": set(KINDS) - {"surrogates"},  # the family is named beside it
    "model.hf_config.architectures": ABSENT | {"[]", "{}"},
    "model.hf_config.architectures.0": {"delete", "rename"},
    "model.hf_config.attention_dropout": ABSENT,
    "model.hf_config.initializer_range": ABSENT | LARGE,
    "model.hf_config.rope_theta": ABSENT | LARGE,
    "model.hf_config.rms_norm_eps": LARGE,
    "model.hf_config.rope_scaling": ABSENT | EMPTY,
    **{f"model.hf_config.{name}": ABSENT for name in ("head_dim", "hidden_act", "attention_bias", "mlp_bias")},
    "model.hf_config.tie_word_embeddings": {"true"},
    "model.base_prefix": {"true"},
    # `test_counters_that_cannot_be` and the contents of the files refuse these when the run starts.
    **{f"trainer.{field.name}": {"2**62"} for field in fields(TrainState) if field.type == "int"},
    **{f"trainer.best_{name}": {"null", "delete", "2**62"} for name in ("loss", "iteration")},
    "trainer.stale_validations": {"delete", "2**62"},
    **{f"loss_scaler.{name}": {"2**62"} for name in ("scale", "good_steps", "overflows")},
    "files.__0_0.distcp": {"delete"},
    "files.__0_0.distcp.crc32": {"2**62"},
    "schedule.start_weight_decay": {"-1", "2**62"},  # of a weight decay that does not change
    "schedule.growth": {"2**62"},
    "schedule.anneal": {"delete", "2**62"},  # of a schedule that is not WSD
    "schedule.anneal_style": {"delete"},
    "data.blocks": {"null", "[]"},  # a run that trained on nothing has no order to keep
    "data.blocks.0": {"delete", "rename"},
    "data.blocks.0.0": {"2**62"},
    "data.period": {"null"},
    "data.samples": {"null", "2**62"},
    "config": EMPTY,
    "config.moe_aux_loss_coeff": ABSENT,
}
MEANT_OF_A_NOTE: dict[str, set[str]] = {
    "max_token": {"-1"},  # of no tokens
    "append_eod": {"true"},
    "tokenizer": {"null"},
    "tokenizer.type": TEXT,  # there is no tokenizer to compare it with
    "tokenizer.fingerprint": TEXT,
    "tokenizer.vocab_size": {"2**62"},
    "tokenizer.eod": {"null", "2**62"},
    **{name: EMPTY for name in ("sources", "left_out")},
    **{f"sources.{name}": {"null", "2**62", "delete", "rename"} for name in ("a.txt", "b.txt")},
    "left_out.empty text": {"2**62", "delete", "rename"},
}
# Every so many-th place of each kind of change, other ones for every kind; all of them on demand.
every = pytest.mark.parametrize("every", [20, pytest.param(1, marks=(pytest.mark.slow, pytest.mark.exhaustive))])


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a manifest, of arrays the first; of a run's options those that somebody reads."""
    for key in node if isinstance(node, dict) else range(min(1, len(node))) if isinstance(node, list) else ():
        if path != ("config",) or key in CONFIG_READ:
            yield (*path, key)
            yield from places(node[key], (*path, key))


def changed(manifest: dict[str, Any], every: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name of a place, kind of a change, and the manifest so changed: without what is there, with something else, or
    with it nested once more."""
    for number, kind in enumerate(KINDS):
        for place in list(places(manifest))[number % every :: every]:
            result = copy.deepcopy(manifest)
            parent = result
            for key in place[:-1]:
                parent = parent[key]
            value = parent[place[-1]]
            if kind in ("delete", "rename"):
                del parent[place[-1]]
                if kind == "rename" and isinstance(parent, dict):
                    parent[f"{place[-1]}_"] = value
            else:
                parent[place[-1]] = [value] if kind == "nest" else WRONG[kind]
            yield ".".join(map(str, place)), kind, result


def unsealed(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / directory.MANIFEST).read_text())
    del manifest[sealed.CHECKSUM]
    return manifest


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" + file.read_bytes())


def array(file: Path) -> None:
    file.write_text("[]")


def deep(file: Path) -> None:
    file.write_text('{"format": 2, "files": ' + "[" * 10**6 + "]" * 10**6 + "}")


def deep_but_readable(file: Path) -> None:
    file.write_text('{"format": 2, "files": ' + "[" * 900 + "]" * 900 + "}")


def huge_number(file: Path) -> None:
    file.write_text('{"format": 2, "iteration": ' + "9" * 5000 + "}")


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_another_format(file: Path) -> None:
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))


def another_place_in_the_data(file: Path) -> None:
    text = file.read_text()
    assert text.count('"consumed_samples": 32') == 1
    file.write_text(text.replace('"consumed_samples": 32', '"consumed_samples": 33'))


def without_its_checksum(file: Path) -> None:
    file.write_text(json.dumps(unsealed(file.parent)))


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "spoil",
    [
        empty,
        no_text,
        array,
        deep,
        deep_but_readable,
        huge_number,
        half,
        of_another_format,
        another_place_in_the_data,
        without_its_checksum,
        a_directory,
        a_pipe,
    ],
)
def test_a_damaged_manifest_is_refused_or_skipped(trained: TrainConfig, tmp_path: Path, capsys, spoil):
    root = tmp_path / "run"
    shutil.copytree(trained.save or "", root)
    spoil(root / "iter_0000004" / directory.MANIFEST)
    with pytest.raises(ProblemError):
        source.read(root / "iter_0000004")
    weights = source.read(root)
    assert weights.path.name == "iter_0000002" and "skipping corrupt checkpoint" in weights.notes[0]
    resumed = tiny.resumed(trained, load=str(root), save=str(root))
    assert any(problem.option == "--load" for problem in check_run(replace(resumed, ckpt_step=4)))
    job.run(resumed)
    assert "skipping corrupt checkpoint" in capsys.readouterr().err
    assert tiny.losses(resumed) == tiny.losses(trained)


def test_a_checkpoint_under_the_name_of_another_is_skipped(trained: TrainConfig, copied: Path):
    copied.rename(copied.with_name("iter_0000009"))
    resumed = tiny.resumed(trained, load=str(copied.parent), save=str(copied.parent))
    with pytest.raises(ProblemError) as caught:
        job.run(resumed)
    assert [(problem.option, problem.kind) for problem in caught.value.problems] == [("--load", "corrupt")]


@pytest.mark.parametrize("name", ["iteration", "consumed_samples", "consumed_tokens", "skipped_samples"])
def test_counters_that_cannot_be(trained: TrainConfig, copied: Path, name: str):
    manifest = unsealed(copied)
    manifest["trainer"][name] = 2**62
    (copied / directory.MANIFEST).write_text(sealed.seal(manifest))
    with pytest.raises(ProblemError):
        job.run(tiny.resumed(trained, load=str(copied.parent), save=str(copied.parent), train_iters=5))


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_changed_data_is_refused(tmp_path: Path, kind: str):
    given = tiny.config(tmp_path, exit_interval=2, micro_batch_size=8)
    job.run(given)
    file = Path(f"{given.data_path[0]}.{kind}")
    if kind == "bin":  # another token of the vocabulary, of the same number of bytes
        tokens = np.memmap(file, np.uint16, "r+")
        tokens[len(tokens) // 2] = (tokens[len(tokens) // 2] + 1) % tiny.VOCAB
        tokens.flush()
    else:  # one token of the second document becomes one of the first
        lengths = np.memmap(file, np.int32, "r+", offset=34, shape=2)
        offsets = np.memmap(file, np.int64, "r+", offset=34 + 80 * 4, shape=2)
        lengths[0], lengths[1], offsets[1] = lengths[0] + 1, lengths[1] - 1, offsets[1] + 2
        lengths.flush(), offsets.flush()
    for find in (check_with_contents, problems_of_the_run):
        (problem,) = find(tiny.resumed(given))
        assert problem.option == "--data-path" and problem.value == str(file)
    assert check_run(tiny.resumed(given)) == []  # before the run is launched, which reads them
    assert job.run(tiny.resumed(given, finetune=True, save=str(tmp_path / "anew"))) == 0


def problems_of_the_run(given: TrainConfig) -> list[Problem]:
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    return caught.value.problems


def reads_of_a_run(rank: int, world_size: int, given: TrainConfig) -> list[str]:
    """Files that the start of a run fingerprints on a rank."""
    read: list[str] = []

    def count(path: Path, bound: int) -> int:
        read.append(path.suffix)
        return fingerprint(path, bound)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "fingerprint", count)
        assert check_run(given) == [] and not read
        tiny.train_rank(rank, world_size, given)
    return read


def test_contents_of_the_data_are_read_by_one_rank_and_kept(tmp_path: Path, pool):
    given = tiny.config(tmp_path, train_iters=2, nproc_per_node=2)
    assert pool.run(reads_of_a_run, 2, given) == [[".bin", ".idx"], []]
    (kept,) = directory.read_manifest(location_of(Path(given.save or "", "iter_0000002")))["data"]["sets"]
    for name in ("bin", "idx"):
        assert kept[name] == fingerprint(Path(f"{given.data_path[0]}.{name}"))


def test_data_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch):
    def broken(path: Path, bound: int) -> int:
        raise OSError("input/output error")

    monkeypatch.setattr(next_token, "fingerprint", broken)
    given = tiny.config(tmp_path)
    for find in (check_with_contents, problems_of_the_run):
        (problem,) = find(given)
        assert (problem.option, problem.value) == ("dataset", given.data_path[0])
    (problem,) = check_with_contents(replace(given, data_path=(str(tmp_path / "absent"),)))  # in one way only
    assert "neither absent.bin" in problem.why


def test_a_fingerprint_reads_so_much_and_sees_what_it_reads(tmp_path: Path):
    file, piece, pieces = tmp_path / "file", 1 << 20, 8
    file.write_bytes(bytes(pieces * piece))
    whole, part = fingerprint(file), fingerprint(file, 3 * piece)
    expected = zlib.crc32(bytes(pieces * piece), zlib.crc32((pieces * piece).to_bytes(8, "little")))
    assert whole == expected
    for at, seen in [(0, True), (piece + 5, False), (3 * piece + piece // 2, True), (pieces * piece - 1, True)]:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(b"\1")
        assert fingerprint(file) != whole
        assert (fingerprint(file, 3 * piece) != part) == seen
        file.write_bytes(bytes(pieces * piece))
    file.write_bytes(bytes(pieces * piece + 1))
    assert fingerprint(file, 3 * piece) != part


# ---- notes beside datasets -------------------------------------------------------------------------------------------


@every
def test_no_note_of_a_dataset_ends_in_a_traceback(tmp_path: Path, every: int):
    dataset = IndexedDataset(tiny.make_data(tmp_path))
    note = TokenizerNote(type="HF", fingerprint="f" * 8, vocab_size=tiny.VOCAB, eod=0)
    Manifest(
        documents=dataset.num_documents,
        tokens=dataset.num_tokens,
        max_token=60,
        tokenizer=note,
        sources={"a.txt": 7, "b.txt": None},
        left_out={"empty text": 1},
    ).write(dataset.prefix)
    file = manifest_path(dataset.prefix)
    before, whole = read_manifest(dataset), json.loads(file.read_text())
    assert before is not None and before.tokenizer == note
    file.write_text(file.read_text().replace('"max_token": 60', '"max_token": 10'))
    with pytest.raises(ProblemError):
        read_manifest(dataset)
    del whole[sealed.CHECKSUM]
    for place, kind, wrong in changed(whole, every):
        file.write_text(sealed.seal(wrong))
        refused = bool(check(tiny.config(tmp_path), train_samples=1, vocab_size=tiny.VOCAB))
        assert refused != (kind in MEANT_OF_A_NOTE.get(place, ())), (place, kind)
    for spoil in (empty, no_text, array, deep, huge_number, a_directory):
        file.rmdir() if file.is_dir() else None
        file.write_text("{}")
        spoil(file)
        with pytest.raises(ProblemError):
            read_manifest(dataset)


@every
def test_no_manifest_ends_in_a_traceback(trained: TrainConfig, copied: Path, every: int):
    """Sealed anew, as only somebody who means it would: refused by problems, or meaning what it says."""
    manifest, file = unsealed(copied), copied / directory.MANIFEST
    resumed = tiny.resumed(trained, load=str(copied.parent), save=str(copied.parent))
    for place, kind, wrong in changed(manifest, every):
        file.write_text(sealed.seal(wrong))
        found = Findings(check_with_contents(resumed))
        found.attempt(lambda: source.read(copied.parent))
        assert bool(found.problems) != (kind in MEANT.get(place, ())), (place, kind)


# ---- two runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["save", "metrics_file", "tensorboard_dir"])
def test_a_place_that_another_run_has(tmp_path: Path, monkeypatch, option: str):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    place = {option: str(tmp_path / "place")}
    given = tiny.config(tmp_path, **place)
    with outputs.held(replace(given, **{"save": None, **place})):
        for find in (check_run, problems_of_the_run):
            (problem,) = find(given)
            assert problem.option == to_flag(option) and f"process {os.getpid()} on" in problem.why
    assert check_run(given) == []
    assert not (tmp_path / "place").exists()


def test_records_beside_checkpoints_have_one_writer_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    run = tiny.config(tmp_path, save=str(tmp_path / "run"))
    other = replace(run, save=str(tmp_path / "other"), metrics_file=str(tmp_path / "run" / "metrics.jsonl"))
    for first, second, option in ((run, other, "--metrics-file"), (other, run, "--save")):
        with outputs.held(first):
            assert [problem.option for problem in check_run(second)] == [option]


@pytest.mark.slow
def test_two_runs_into_one_folder(tmp_path: Path):
    """The second is refused by its check and as a rank that a launcher started; once the first is killed, it starts."""
    metrics = str(tmp_path / "m.jsonl")
    given = tiny.config(tmp_path, train_iters=10**4, save_interval=1, keep_last=2, metrics_file=metrics)
    process = start(given, tmp_path)
    try:
        wait_until(process, lambda: directory.is_root(location_of(given.save or "")))
        second = tiny.resumed(given, train_iters=10)
        for find in (check_run, problems_of_the_run):
            found = {problem.option: problem for problem in find(second)}
            assert found.keys() >= {"--save", "--metrics-file"}
            for option in ("--save", "--metrics-file"):
                assert f"process {process.pid} on {os.uname().nodename}" in found[option].why
        refused = start(second, tmp_path)
        _, said = refused.communicate(timeout=120)
        assert refused.returncode == 2 and f"process {process.pid} on" in said and "Traceback" not in said
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    done = directory.latest(location_of(given.save or ""))[0]
    assert done is not None
    assert job.run(tiny.resumed(given, train_iters=done + 1, override_opt_param_scheduler=True)) == 0
    assert not list(tmp_path.rglob("*.lock"))


def test_records_of_another_machine_cost_one_lease_over_all_places(tmp_path: Path, monkeypatch):
    """All three wait at the same time, else the barrier breaks; and a check waits for none of them."""
    given = tiny.config(tmp_path, metrics_file=str(tmp_path / "m"), tensorboard_dir=str(tmp_path / "board"))
    record = {"machine": "elsewhere", "host": "node0", "pid": 1, "started": "2020-01-01 00:00:00", "token": "x"}
    files = [Path(given.save or "") / ".lock", tmp_path / ".m.lock", tmp_path / "board" / ".lock"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record))
    monkeypatch.setattr(lock, "LEASE", 1e9)
    assert outputs.check_free(given) == []
    monkeypatch.setattr(lock, "LEASE", 0.1)
    barrier, acquire = threading.Barrier(3), lock.acquire

    def waiting(file: Path) -> lock.Lock:
        barrier.wait(60)
        return acquire(file)

    monkeypatch.setattr(lock, "acquire", waiting)
    with outputs.held(given):
        assert all(json.loads(file.read_text())["pid"] == os.getpid() for file in files)


def test_a_place_that_cannot_be_locked_is_a_problem(tmp_path: Path):
    given = tiny.config(tmp_path, metrics_file=str(tmp_path / "m"), tensorboard_dir=str(tmp_path / "board"))
    (tmp_path / "board").mkdir()
    os.mkfifo(tmp_path / "board" / ".lock")
    with pytest.raises(ProblemError) as error, outputs.held(given):
        pass
    assert [problem.option for problem in error.value.problems] == ["--tensorboard-dir"]
    assert list(tmp_path.rglob("*.lock")) == [tmp_path / "board" / ".lock"]


def test_a_run_that_is_not_even_planned_leaves_nothing(tmp_path: Path):
    given = tiny.config(tmp_path, tensorboard_dir=str(tmp_path / "board"), num_layers=None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProblemError):
        job.run(given)
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_stands_for_two_options_is_locked_once(tmp_path: Path):
    given = tiny.config(tmp_path, train_iters=2, micro_batch_size=8, tensorboard_dir=str(tmp_path / "x" / ".." / "run"))
    assert job.run(given) == 0
