"""Perplexity: windows by property, sums against transformers and published results."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cordee.config.load import config_from_dict
from cordee.data.indexed import IndexedDatasetBuilder
from cordee.errors import ProblemError
from cordee.evaluate.documents import Document
from cordee.evaluate.engine import Engine
from cordee.evaluate.job import option_problems
from cordee.evaluate.options import EvaluateConfig
from cordee.evaluate.requests import RollingLoglikelihood, windows
from cordee.evaluate.runner import run_tasks
from cordee.evaluate.task import Subject
from cordee.evaluate.tasks.perplexity import TASK, Score
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.parallel import inference
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from tests.evaluate.test_engine import LAYOUTS
from tests.generate.folders import TEXT, Folder, model_directory
from tests.matrix import sampled
from tests.parallel import models
from tests.problems import facts, limits

TEXTS = [TEXT, "One day, she saw a big, red ball.", "", "Lily", TEXT[20:60]]


def documents(*lengths: int, seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [Document(generator.integers(2, 300, length), None, 0.0) for length in lengths]


def tokenizer_of(folder):
    return load_tokenizer(TokenizerOptions(), str(folder.directory))


def evaluate(folder, paths, *, tokenizer=True, **options):
    """The result of the task on files."""
    model = folder.model()
    values = {"load": folder.directory, "task_data_path": [str(path) for path in paths], **options}
    subject = Subject(model, tokenizer_of(folder) if tokenizer else None)
    return run(subject, values)


def run(subject, values):
    (result,) = run_tasks([TASK], subject, config_from_dict(EvaluateConfig, values))
    return result


def score(model, documents, window, stride, batch_size, stage=None) -> Score:
    """The sums of `documents` under `model`."""
    engine = Engine(Subject(model, None, stage), batch_size)
    asked = ((document, [RollingLoglikelihood(document.tokens, window, stride)]) for document in documents)
    total = Score()
    for document, (logprob,) in engine.answers(asked):
        total += Score.of(document, logprob)
    return total


@torch.no_grad()
def reference(folder, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Total nats and number of tokens by transformers, each token from the window that first reaches it."""
    peer = folder.peer()
    nats, scored = 0.0, 1
    for start in range(0, len(ids) - 1, stride):
        inputs = torch.tensor([ids[start : start + window]])
        logs = peer(inputs).logits[0].double().log_softmax(-1)
        for place in range(inputs.shape[1]):
            target = start + place + 1
            if scored <= target < len(ids):
                nats -= logs[place, ids[target]].item()
                scored = target + 1
        if scored == len(ids):
            break
    return nats, scored - 1


# ---- windows ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_after_what_the_window_gives(length, window, data):
    stride = data.draw(st.integers(1, window))
    tokens = np.arange(100, 100 + length)
    scored = []
    for number, piece in enumerate(windows(tokens, window, stride)):
        assert 0 < len(piece.inputs) == piece.length <= window
        assert piece.inputs[0] == 100 + number * stride
        for label in piece.tokens[piece.first :].tolist():
            context = label - piece.inputs[0]
            assert context > window - stride or piece.inputs[0] == 100
            scored.append(label)
    assert scored == list(range(101, 100 + length))


def test_windows_are_disjoint_at_full_stride():
    pieces = list(windows(np.arange(11), 4, 4))
    assert [piece.inputs.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(piece.first == 1 for piece in pieces)


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("window, stride", [(64, 64), (16, 16), (16, 5), (10, 1)])
def test_score_equals_transformers(name, window, stride, request):
    folder = request.getfixturevalue(name)
    model = folder.model()
    texts = documents(40, 2, 1, 17, 33, 0, 16)
    found = score(model, texts, window, stride, batch_size=3)
    expected = [reference(folder, text.tokens.tolist(), window, stride) for text in texts]
    assert found.tokens == sum(count for _, count in expected) == 39 + 1 + 16 + 32 + 15
    assert found.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-6)
    assert (found.documents, found.unscored) == (7, 2)


def test_the_batch_size_changes_nothing(llama):
    model = llama.model()
    texts = documents(*range(3, 60, 4))
    scores = [score(model, texts, 20, 7, batch_size) for batch_size in (1, 4, 100)]
    for other in scores[1:]:
        assert other.tokens == scores[0].tokens
        assert other.nats == pytest.approx(scores[0].nats, rel=1e-6)


def test_more_context_is_scored_where_the_stride_is_smaller(llama):
    model = llama.model()
    texts = documents(50)
    values = {stride: score(model, texts, 12, stride, 4).nats for stride in (12, 6, 1)}
    assert len(set(values.values())) == 3  # every token has other contexts


def test_metrics_by_hand():
    metrics = Score(nats=6.0, tokens=3, documents=2, num_bytes=12).metrics()
    expected = {
        "loss": 2.0,
        "perplexity": math.exp(2.0),
        "tokens": 3,
        "documents": 2,
        "bits_per_byte": 6.0 / math.log(2) / 12,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert "bits_per_byte" not in Score(nats=6.0, tokens=3, num_bytes=None).metrics()
    total = Score(1.0, 2, 3, 4, 5) + Score(10.0, 20, 30, 40, None)
    assert total == Score(11.0, 22, 33, 44, None)


# ---- several processes -----------------------------------------------------------------------------------------------

WHOLE = Degrees()


def score_part(rank: int, world_size: int, name: str, degrees: Degrees) -> Score:
    """The score that one process of several finds."""
    if degrees == WHOLE:
        model, stage = GPTModel(models.MODELS[name]), None
    else:
        layout = Layout(degrees)
        model, stage = inference.build(models.MODELS[name], layout, torch.float32, torch.device("cpu"))
    initialise(model, 7)
    model.eval()
    generator = np.random.default_rng(0)
    lengths = (40, 2, 1, 17, 33, 0, 16, 9, 21)
    texts = [Document(generator.integers(2, models.VOCAB, length), length, 0.0) for length in lengths]
    return score(model, texts, 12, 5, 3, stage)


@pytest.mark.parametrize(("layout", "name"), sampled(LAYOUTS, ["llama", "gpt2", "mixture"], per_row=1))
def test_several_processes_find_what_one_finds(pool, layout, name):
    expected = score_part(0, 1, name, WHOLE)
    assert expected.tokens == sum(max(0, length - 1) for length in (40, 2, 1, 17, 33, 0, 16, 9, 21))
    for found in pool.run(score_part, LAYOUTS[layout].world_size, name, LAYOUTS[layout]):
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
        assert replace(found, nats=expected.nats) == expected


# ---- files -----------------------------------------------------------------------------------------------------------


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def expected_metrics(folder, texts, *, bos: int | None):
    """Loss and number of tokens of texts that fit in one window, after the token `bos`."""
    ids = [tokenizer_of(folder).encode(text, add_special_tokens=False) for text in texts]
    ids = [i if bos is None else [bos, *i] for i in ids]
    nats, tokens = map(sum, zip(*(reference(folder, i, 64, 64) for i in ids), strict=True))
    return nats / tokens, tokens


@pytest.mark.parametrize("bos", [True, False])
def test_documents_of_records(llama, tmp_path, bos):
    result = evaluate(llama, [write_jsonl(tmp_path / "a.jsonl", TEXTS)], prepend_bos=bos)
    loss, tokens = expected_metrics(llama, TEXTS, bos=0 if bos else None)
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert (result.metrics["tokens"], result.metrics["documents"]) == (tokens, len(TEXTS))
    if bos:
        size = sum(len(text.encode()) for text in TEXTS)
        assert result.metrics["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / size, rel=1e-6)
    else:
        assert "bits_per_byte" not in result.metrics  # the text of the first tokens was not scored


def test_a_bos_that_only_the_configuration_names(gpt2, tmp_path):
    """GPT-2's bos is its eos, and no tokenizer puts it before a text."""
    result = evaluate(gpt2, [write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    assert result.metrics["loss"] == pytest.approx(expected_metrics(gpt2, TEXTS, bos=1)[0], rel=1e-6)


def test_lines_and_whole_files(llama, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    lines = evaluate(llama, [file])
    assert lines.metrics == evaluate(llama, [write_jsonl(tmp_path / "a.jsonl", TEXTS)]).metrics
    whole = evaluate(llama, [file], whole_files=True)
    assert whole.metrics["documents"] == 1
    loss, tokens = expected_metrics(llama, ["\n".join(TEXTS)], bos=0)
    assert whole.metrics["loss"] == pytest.approx(loss, rel=1e-6) and whole.metrics["tokens"] == tokens


def test_other_columns(llama, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": TEXTS[1], "answer": TEXTS[3]}) + "\n", encoding="utf-8")
    both = evaluate(llama, [file], json_keys=["question", "answer"])
    same = evaluate(llama, [write_jsonl(tmp_path / "b.jsonl", [TEXTS[1], TEXTS[3]])])
    assert both.metrics == same.metrics


@pytest.mark.parametrize("stored_bos", [True, False])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_tokens_that_are_stored(llama, tmp_path, stored_bos, with_tokenizer):
    tokenizer = tokenizer_of(llama)
    with IndexedDatasetBuilder(tmp_path / "data", np.uint16) as builder:
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=stored_bos)
            builder.add_sequence(np.array(ids[: len(ids) // 2]))  # a document may be several sequences
            builder.add_sequence(np.array(ids[len(ids) // 2 :]))
            builder.end_document()
    result = evaluate(llama, [tmp_path / "data"], tokenizer=with_tokenizer)
    expected = evaluate(llama, [write_jsonl(tmp_path / "a.jsonl", TEXTS)], prepend_bos=stored_bos or with_tokenizer)
    for name in ("loss", "tokens", "documents"):
        assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-6)
    assert "bits_per_byte" not in result.metrics


def test_parts_and_their_total(llama, tmp_path):
    first, second = write_jsonl(tmp_path / "a.jsonl", TEXTS[:2]), write_jsonl(tmp_path / "b.jsonl", TEXTS[2:])
    result = evaluate(llama, [first, second])
    whole = evaluate(llama, [write_jsonl(tmp_path / "c.jsonl", TEXTS)])
    assert list(result.parts) == [str(first), str(second)]
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-5)


def test_only_the_first_documents(llama, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    result = evaluate(llama, [file], max_eval_samples=2)
    alone = evaluate(llama, [write_jsonl(tmp_path / "b.jsonl", TEXTS[:2])])
    assert result.metrics == pytest.approx(alone.metrics, rel=1e-5)


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_broken_records(llama, tmp_path, caplog):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with file.open("a") as out:
        out.write('{"text": "cut o\n')
    with pytest.raises(ProblemError) as caught:
        evaluate(llama, [file])
    assert facts(caught) == [("--task-data-path", f"{file}: line 6", "records")]
    result = evaluate(llama, [file], skip_invalid=True)
    assert "1 record left out" in caplog.text
    assert result.metrics["documents"] == len(TEXTS)


@pytest.mark.parametrize(
    "options, wrong",
    [
        ({"seq_length": 65}, ["--seq-length"]),
        ({"stride": 65}, ["--stride"]),
        ({"seq_length": 66, "stride": 65}, ["--seq-length", "--stride"]),
        ({"seq_length": 66, "stride": 67}, ["--stride", "--seq-length"]),
        ({"seq_length": 64}, []),
    ],
)
def test_windows_that_do_not_fit(llama, options, wrong):
    config = config_from_dict(EvaluateConfig, {"load": llama.directory, "task_data_path": ["x"], **options})
    windows = replace(config, task_data_path=())
    found = [*option_problems(config), *TASK.check(windows, llama.model().config)]
    assert [problem.option for problem in found] == wrong


def test_nothing_to_score(llama, tmp_path, caplog):
    files = [write_jsonl(tmp_path / name, ["", ""]) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ProblemError) as caught:
        evaluate(llama, files)
    assert facts(caught) == [("--task-data-path", str(file), "empty") for file in files]
    assert "2 documents without a token to predict" in caplog.text


def test_ids_that_the_model_does_not_have(llama, tmp_path):
    with IndexedDatasetBuilder(tmp_path / "data", np.uint16) as builder:
        builder.add_sequence(np.array([5, 400]))
        builder.end_document()
    with pytest.raises(ProblemError) as caught:
        evaluate(llama, [tmp_path / "data"])
    assert facts(caught) == [("--task-data-path", str(tmp_path / "data"), "range")]
    assert limits(caught) == [400]


def test_texts_with_tokens_that_the_model_does_not_have(tmp_path):
    """The rows of the embedding may be fewer than the tokens, as long as none of the others occurs."""
    small = model_directory("Llama", tmp_path / "small", vocab_size=290)
    words = sorted(text for i, text in tokenizer_of(small).vocabulary().items() if i >= 290 and text.isalpha())
    fine = write_jsonl(tmp_path / "fine.jsonl", ["Xyz, zyx!"])
    assert evaluate(small, [fine]).metrics["documents"] == 1
    wrong = write_jsonl(tmp_path / "wrong.jsonl", ["Xyz, zyx!", words[0]])
    with pytest.raises(ProblemError) as caught:
        evaluate(small, [fine, wrong])
    assert facts(caught) == [("--task-data-path", str(wrong), "range")] and limits(caught)[0] >= 290


def test_a_model_without_numbers_is_a_problem(llama, tmp_path):
    model = llama.model()
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    values = {"load": llama.directory, "task_data_path": [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))]}
    with pytest.raises(ProblemError) as caught:
        run(Subject(model, tokenizer_of(llama)), values)
    assert facts(caught) == [("--dtype", "float32", "not finite")]


# ---- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, perplexity, tokens, wikitext",
    [("stories260K", 4.836, 38_179, 215.6), ("tinystories-656K", 27.13, 19_471, 884.6)],
)
def test_known_results(name, perplexity, tokens, wikitext, shared):
    """The table of the data's README, measured with transformers and its tokens: texts cut at the model's context."""
    from transformers import AutoTokenizer

    data = shared / "data"
    model = Folder(data / "models" / name).model()
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / name)

    def measure(texts):
        ids = [[tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]][:512] for t in texts]
        return score(model, [Document(np.array(i), None, 0.0) for i in ids], 512, 512, 8)

    lines = (data / "tinystories" / "valid_sample.jsonl").read_text(encoding="utf-8").splitlines()
    stories = measure([json.loads(line)["text"] for line in lines[:100]])
    assert stories.tokens == tokens
    assert stories.metrics()["perplexity"] == pytest.approx(perplexity, rel=2e-4)
    lines = (data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    wiki = measure([line for line in lines if len(line) > 200][:40])
    assert wiki.metrics()["perplexity"] == pytest.approx(wikitext, rel=2e-3)
