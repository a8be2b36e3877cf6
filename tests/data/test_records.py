"""Records of dialogues through `preprocess`, into a run's cache, and before `inspect`'s doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cordee import cli
from cordee.data import inspect, preprocess
from cordee.data.indexed import IndexedDataset
from cordee.data.messages import IGNORED
from cordee.data.options import InspectConfig, PreprocessConfig
from cordee.data.records import Records, tokenizing
from cordee.data.tuning import FIELDS
from cordee.data.tuning_dataset import document, form_of, sibling, sibling_problems
from cordee.errors import ProblemError
from cordee.tokenizer import load_tokenizer
from tests.problems import facts

ALPACA = [{"instruction": f"Say {n}", "input": "", "output": f"number {n}"} for n in range(12)]
CHATML = "AlpacaStyleInstructionHandler"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A byte-level tokenizer that knows the marks of chatml."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|im_end|>", "<|im_start|>", "<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return str(folder)


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(folder: Path, tokenizer: str, **options: Any) -> PreprocessConfig:
    if "input" not in options:
        options["input"] = write(folder / "records.jsonl", ALPACA)
    defaults = {
        "output_prefix": str(folder / "out"),
        "tokenizer_name_or_path": tokenizer,
        "handler_name": CHATML,
        "prompt_type": "chatml",
    }
    return PreprocessConfig(**{**defaults, **options})


def read(prefix: Path | str) -> list[tuple[list[int], list[int], list[int]]]:
    fields = [IndexedDataset(document(str(prefix), name)) for name in FIELDS]
    return [tuple(field[i].tolist() for field in fields) for i in range(len(fields[0]))]


def test_records_become_three_pairs_of_files(tmp_path: Path, tokenizer: str):
    """Of which the text is the template's, and the answers with their end have labels."""
    preprocess.run(config(tmp_path, tokenizer))
    own = load_tokenizer(config(tmp_path, tokenizer))
    samples = read(tmp_path / "out")
    assert len(samples) == 12
    for n, (ids, mask, labels) in enumerate(samples):
        prompt = f"<|im_start|>user\nSay {n}<|im_end|>\n<|im_start|>assistant\n"
        assert own.decode(ids) == f"{prompt}number {n}<|im_end|>"
        assert own.decode(label for label in labels if label != IGNORED) == f"number {n}<|im_end|>"
        assert mask == [1] * len(ids)
        assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))


def test_long_samples_are_left_out_or_cut(tmp_path: Path, tokenizer: str, caplog):
    records = [*ALPACA, {"instruction": "a" * 80, "input": "", "output": "b" * 80}]
    path = write(tmp_path / "long.jsonl", records)
    preprocess.run(config(tmp_path, tokenizer, input=path, seq_length=60))
    assert len(read(tmp_path / "out")) == 12
    preprocess.run(config(tmp_path, tokenizer, input=path, seq_length=60, cut_long=True, overwrite=True))
    assert "1 sample cut to the length" in caplog.text
    samples = read(tmp_path / "out")
    assert len(samples) == 13 and len(samples[-1][0]) == 60
    target = [label for label in samples[-1][2] if label != IGNORED]
    assert 20 < len(target) < 40  # both sides are long: in proportion


@pytest.mark.parametrize("workers", [1, 2])
def test_packed_rows_do_not_depend_on_workers(tmp_path: Path, tokenizer: str, workers: int):
    preprocess.run(config(tmp_path, tokenizer, neat_pack=True, seq_length=128, workers=workers))
    rows = read(tmp_path / "out")
    assert all(len(ids) == 128 for ids, _, _ in rows)
    assert sum(max(mask) for _, mask, _ in rows) == 12
    used = np.mean([np.count_nonzero(mask) for _, mask, _ in rows]) / 128
    assert used > 0.7


def test_text_of_instructions(tmp_path: Path, tokenizer: str):
    handler = {"handler_name": "AlpacaPretrainHandler", "prompt_type": None}
    preprocess.run(config(tmp_path, tokenizer, **handler))
    text = load_tokenizer(config(tmp_path, tokenizer)).decode(
        IndexedDataset(tmp_path / "out_text_document")[0].tolist()
    )
    assert text.endswith("### Instruction:\nSay 0\n\n###None\n\n### Response: ASSISTANT: number 0")


def test_datasets_of_llama_factory(tmp_path: Path, tokenizer: str):
    """Two of them, in different layouts, one behind the other."""
    write(tmp_path / "a.jsonl", ALPACA[:3])
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    write(tmp_path / "b.jsonl", [{"conversations": talk}])
    info = {"first": {"file_name": "a.jsonl"}, "second": {"file_name": "b.jsonl", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    given = {"handler_name": "LlamaFactoryInstructionHandler", "dataset_dir": str(tmp_path), "input": "first,second"}
    preprocess.run(config(tmp_path, tokenizer, **given))
    own = load_tokenizer(config(tmp_path, tokenizer))
    assert [own.decode(ids).split("assistant\n")[1] for ids, _, _ in read(tmp_path / "out")] == [
        *(f"number {n}<|im_end|>" for n in range(3)),
        "ho<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"handler_name": "AlpacaHandler"}, ["--handler-name"]),
        ({"prompt_type": None}, ["--prompt-type"]),
        ({"prompt_type": "nope"}, ["--prompt-type"]),
        ({"handler_name": "GeneralInstructionHandler"}, ["--prompt-type"]),
        ({"handler_name": None}, ["--prompt-type"]),
        ({"pack": True}, ["--pack"]),
        ({"handler_name": "AlpacaStylePairwiseHandler", "pack": True, "seq_length": 9}, ["--pack"]),
        ({"handler_name": "AlpacaPretrainHandler", "prompt_type": None, "kto": True}, ["--kto"]),
        ({"map_keys": "{"}, ["--map-keys"]),
        ({"prompt_type": None, "hf_chat_template": True}, ["--hf-chat-template"]),
    ],
)
def test_what_does_not_fit_is_a_problem_before_any_work(tmp_path: Path, tokenizer: str, options, expected):
    found = preprocess.check_run(config(tmp_path, tokenizer, **options))
    assert [problem.option for problem in found] == expected


def test_broken_records_are_counted_with_their_lines(tmp_path: Path, tokenizer: str):
    broken = [{"instruction": "x"}, {"instruction": "x", "output": ""}, {"instruction": 3, "output": "y"}, 5]
    path = write(tmp_path / "broken.jsonl", [*ALPACA, *broken])
    with pytest.raises(ProblemError) as raised:
        preprocess.run(config(tmp_path, tokenizer, input=path))
    assert facts(raised) == [("--input", None, "records")]
    assert all(f"line {number}" in str(raised.value) for number in range(13, 17))
    preprocess.run(config(tmp_path, tokenizer, input=path, skip_invalid=True))
    assert len(read(tmp_path / "out")) == 12


# ---- in the cache of a run -------------------------------------------------------------------------------------------


def records_of(options: PreprocessConfig, folder: Path) -> Records:
    return Records(
        tokenizing(options, 64), str(folder), lambda: (load_tokenizer(options), options.tokenizer_name_or_path)
    )


def test_records_are_tokenized_once_and_anew_when_something_changed(tmp_path: Path, tokenizer: str, monkeypatch):
    made = []
    tokenize = preprocess.tokenize
    monkeypatch.setattr(preprocess, "tokenize", lambda *given: made.append(given) or tokenize(*given))
    options = config(tmp_path, tokenizer)
    cache = tmp_path / "cache"
    first = records_of(options, cache).prefix("data_path", options.input or "")
    assert records_of(options, cache).prefix("data_path", options.input or "") == first
    assert len(made) == 1 and len(IndexedDataset(first)) == 12
    other = config(tmp_path, tokenizer, prompt_type="default")
    assert records_of(other, cache).prefix("data_path", options.input or "") != first
    write(tmp_path / "records.jsonl", ALPACA[:5])
    again = records_of(options, cache).prefix("data_path", options.input or "")
    assert again != first and len(IndexedDataset(again)) == 5 and len(made) == 3


def test_a_prefix_is_that_of_its_ids(tmp_path: Path, tokenizer: str):
    preprocess.run(config(tmp_path, tokenizer))
    records = records_of(config(tmp_path, tokenizer), tmp_path)
    prefix = str(tmp_path / "out")
    assert records.prefix("data_path", prefix) == document(prefix)
    assert records.prefix("data_path", document(prefix)) == document(prefix)
    assert records.prefix("data_path", "0.5") == "0.5"


def test_the_layout_follows_from_the_first_record(tmp_path: Path, tokenizer: str):
    records = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    options = config(tmp_path, tokenizer, handler_name=None, input=write(tmp_path / "m.jsonl", records))
    prefix = records_of(options, tmp_path).prefix("data_path", options.input or "")
    assert load_tokenizer(options).decode(IndexedDataset(prefix)[0].tolist()).endswith("assistant\nb<|im_end|>")
    options = config(tmp_path, tokenizer, handler_name=None, input=write(tmp_path / "n.jsonl", [{"what": 1}]))
    with pytest.raises(ProblemError) as raised:
        records_of(options, tmp_path).prefix("data_path", options.input or "")
    assert [problem.option for problem in raised.value.problems] == ["--handler-name"]


# ---- preferences -----------------------------------------------------------------------------------------------------

PAIRS = [
    {"instruction": f"Ask {n}", "history": [["Hi", "Ho"]], "chosen": f"good {n}", "rejected": "bad" * (n + 1)}
    for n in range(5)
]


def texts(prefix: str, tokenizer: str, *sides: str) -> list[list[tuple[str, str]]]:
    """Of each side of a sample all of its text, and what of it is trained."""
    own = load_tokenizer(PreprocessConfig(output_prefix="", tokenizer_name_or_path=tokenizer))
    fields = [[IndexedDataset(sibling(prefix, side + name)) for name in ("input_ids", "labels")] for side in sides]
    return [
        [(own.decode(ids[i].tolist()), own.decode(i for i in labels[i] if i != IGNORED)) for ids, labels in fields]
        for i in range(len(fields[0][0]))
    ]


def test_a_pair_has_one_prompt_and_two_answers(tmp_path: Path, tokenizer: str):
    """Of which the last alone are trained, whatever the prompt has of earlier ones."""
    keys = json.dumps({"prompt": "instruction", "history": "history"})
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    given = config(tmp_path, tokenizer, input=path, handler_name=None, map_keys=keys)
    records = Records(tokenizing(given, 128), str(tmp_path), lambda: (load_tokenizer(given), tokenizer), "pairs")
    prefix = records.prefix("data_path", path)
    assert form_of(prefix) == "pairs" and list(sibling_problems(IndexedDataset(prefix))) == []
    assert records.prefix("data_path", prefix) == prefix
    for n, (chosen, rejected) in enumerate(texts(prefix, tokenizer, "chosen_", "rejected_")):
        assert [chosen[1], rejected[1]] == [f"good {n}<|im_end|>", "bad" * (n + 1) + "<|im_end|>"]
        assert chosen[0].removesuffix(chosen[1]) == rejected[0].removesuffix(rejected[1])
        assert "Ho<|im_end|>" in chosen[0]
    for form in ("dialogues", "kto"):  # found for records before they are tokenized, and for files
        other = Records(tokenizing(given, 128), str(tmp_path), lambda: (load_tokenizer(given), tokenizer), form)
        for value in (path, prefix):
            with pytest.raises(ProblemError) as raised:
                other.prefix("data_path", value)
            assert facts(raised)[0][2] == "form"


def test_samples_of_kto_have_a_flag(tmp_path: Path, tokenizer: str):
    """That of their record, or which side of a pair they are."""
    tagged = [{**ALPACA[0], "kto_tag": True}, {**ALPACA[1], "label": False}, {**ALPACA[2], "label": "maybe"}]
    alpaca, pairs = write(tmp_path / "tagged.jsonl", tagged), write(tmp_path / "pairs.jsonl", PAIRS)
    preprocess.run(config(tmp_path, tokenizer, input=alpaca, kto=True, skip_invalid=True))
    flags = IndexedDataset(sibling(document(str(tmp_path / "out")), "desirable"))
    assert [flag.tolist() for flag in flags] == [[1], [0]]
    pairwise = "AlpacaStylePairwiseHandler"
    preprocess.run(config(tmp_path, tokenizer, input=pairs, kto=True, handler_name=pairwise, overwrite=True))
    prefix = document(str(tmp_path / "out"))
    assert form_of(prefix) == "kto" and list(sibling_problems(IndexedDataset(prefix))) == []
    flags = IndexedDataset(sibling(prefix, "desirable"))
    answers = [trained for ((_, trained),) in texts(prefix, tokenizer, "")]
    assert [flag.tolist() for flag in flags] == [[1], [0]] * 5
    assert answers[:2] == ["good 0<|im_end|>", "bad<|im_end|>"] and len(answers) == 10


# ---- the doctor ------------------------------------------------------------------------------------------------------


def inspected(folder: Path, tokenizer: str, data: str, capsys, **options: Any) -> tuple[int, str]:
    given = {"tokenizer_name_or_path": tokenizer, "prompt_type": "chatml", "data_cache_path": str(folder / "cache")}
    code = inspect.run(InspectConfig(data=data, **{**given, **options}))
    return code, capsys.readouterr().out


def test_good_data_is_shown_and_found_good(tmp_path: Path, tokenizer: str, capsys):
    page = tmp_path / "page.html"
    data = write(tmp_path / "records.jsonl", ALPACA)
    code, shown = inspected(tmp_path, tokenizer, data, capsys, num=1)
    assert code == 0
    assert "\u27e6number 0<|im_end|>\u27e7" in shown and "<|im_start|>user\nSay 0" in shown
    assert "bad" not in shown
    assert inspected(tmp_path, tokenizer, data, capsys, html=str(page))[0] == 0
    assert "number 2" in page.read_text() and "color" in page.read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ids, labels: ([300, 300, *ids], [IGNORED, IGNORED, *labels]), None),
        (lambda ids, labels: (ids, [IGNORED] * len(ids)), "without a trained token"),
        (lambda ids, labels: (ids[:-1], labels[:-1]), "whose end is not trained"),
        (lambda ids, labels: (ids, ids), "with a trained role marker"),
        (lambda ids, labels: ([256, 256, *ids], [IGNORED, IGNORED, *labels]), "with BOS twice in a row"),
        (lambda ids, labels: ([259, *ids], [IGNORED, *labels]), "unknown to the tokenizer"),
    ],
)
def test_what_spoils_training_is_found(tmp_path: Path, tokenizer: str, capsys, change, expected):
    from cordee.data.indexed import IndexedDatasetBuilder

    preprocess.run(config(tmp_path, tokenizer))
    samples = [change(ids, labels) for ids, _, labels in read(tmp_path / "out")]
    for place, name in ((0, "input_ids"), (None, "attention_mask"), (1, "labels")):
        with IndexedDatasetBuilder(document(str(tmp_path / "out"), name)) as builder:
            for sample in samples:
                builder.add_sequence([1] * len(sample[0]) if place is None else sample[place])
                builder.end_document()
    for path in tmp_path.glob("out*.json"):
        path.unlink()
    code, shown = inspected(tmp_path, tokenizer, str(tmp_path / "out"), capsys, prompt_type=None, num=0)
    bad = [line for line in shown.splitlines() if line.startswith("bad")]
    assert code == (expected is not None)
    assert not bad if expected is None else any(expected in line for line in bad)


def test_both_answers_of_a_pair_are_shown(tmp_path: Path, tokenizer: str, capsys):
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    code, shown = inspected(tmp_path, tokenizer, data, capsys, num=2)
    assert code == 0 and shown.index("sample 1, chosen") < shown.index("sample 1, rejected")
    assert "\u27e6good 1<|im_end|>\u27e7" in shown and "\u27e6badbad<|im_end|>\u27e7" in shown
    assert "0 of 10 samples without a trained token" in shown


def test_inspect_from_the_command_line(tmp_path: Path, tokenizer: str, capsys):
    assert cli.main(["inspect", str(tmp_path / "none"), "--tokenizer-name-or-path", tokenizer]) == 2
    data = write(tmp_path / "records.jsonl", ALPACA)
    arguments = ["--tokenizer-name-or-path", tokenizer, "--prompt-type", "chatml", "--seq-length", "64"]
    assert cli.main(["inspect", data, *arguments]) == 0
