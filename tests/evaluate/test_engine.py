"""Requests: how text becomes one, and their answers, whatever is computed together, wherever, and after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.config.load import config_from_dict
from cordee.errors import ProblemError
from cordee.evaluate.engine import Engine
from cordee.evaluate.finished import Finished
from cordee.evaluate.options import EvaluateConfig
from cordee.evaluate.requests import Encoder, GenerateUntil, Likelihood, Loglikelihood, RollingLoglikelihood
from cordee.evaluate.runner import run_tasks
from cordee.evaluate.task import Result, Subject
from cordee.generate.engine import stream
from cordee.generate.options import DecodingOptions
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.parallel import inference
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from tests.generate.folders import ROWS, TEXT, VOCAB_SIZE, Folder
from tests.matrix import sampled
from tests.parallel import models
from tests.problems import facts, limits

WINDOW = 64  # tokens that the models of the folders hold


@dataclass(frozen=True)
class Doc:
    done: float = 1.0


def tokenizer_of(folder: Folder):
    return load_tokenizer(TokenizerOptions(), str(folder.directory))


def subject_of(folder: Folder) -> Subject:
    return Subject(folder.model(), tokenizer_of(folder), stop_ids=frozenset({1}))


def answers(engine: Engine, requests: Sequence[Any]) -> list[Any]:
    return [answer for _, (answer,) in engine.answers((Doc(), [request]) for request in requests)]


@torch.no_grad()
def peer_likelihood(peer: torch.nn.Module, request: Loglikelihood) -> Likelihood:
    """By transformers, alone in its batch."""
    tokens = torch.from_numpy(request.tokens)
    logs = peer(tokens[None, :-1]).logits[0].double().log_softmax(-1)[request.start - 1 :]
    labels = tokens[request.start :, None]
    return Likelihood(logs.gather(1, labels).sum().item(), bool((logs.argmax(-1, keepdim=True) == labels).all()))


@torch.no_grad()
def peer_text(peer: torch.nn.Module, tokenizer, request: GenerateUntil) -> str:
    """What transformers writes greedily, up to the first stop string."""
    ids = peer.generate(
        torch.tensor([request.prompt]),
        max_new_tokens=request.options.max_new_tokens,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=1,
        suppress_tokens=list(range(VOCAB_SIZE, ROWS)),
    )
    before = tokenizer.decode(request.prompt, skip_special_tokens=True)
    text = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)[len(before) :]
    for stop in request.until:
        text = text.partition(stop)[0]
    return text


def random_likelihoods(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[Loglikelihood]:
    generator = np.random.default_rng(seed)
    found = []
    for length in generator.integers(2, longest + 2, count).tolist():
        found.append(Loglikelihood(generator.integers(2, vocab_size, length), int(generator.integers(1, length))))
    return found


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_likelihoods_equal_those_of_transformers(name, request):
    folder = request.getfixturevalue(name)
    requests, peer = random_likelihoods(40, 300, WINDOW), folder.peer()
    for asked in requests[:10]:  # continuations that greedy decoding writes, which are not found by chance
        with torch.no_grad():
            logits = peer(torch.from_numpy(asked.tokens[None, : asked.start])).logits[0, -1]
        requests.append(Loglikelihood(np.append(asked.tokens[: asked.start], logits.argmax().item()), asked.start))
    expected = [peer_likelihood(peer, asked) for asked in requests]
    for batch_size in (1, 3, 64):
        found = answers(Engine(subject_of(folder), batch_size), requests)
        assert [likelihood.logprob for likelihood in found] == pytest.approx([e.logprob for e in expected], rel=1e-5)
        assert [likelihood.greedy for likelihood in found] == [e.greedy for e in expected]
    assert 10 <= sum(e.greedy for e in expected) < len(requests)


def rows_computed(engine: Engine, model: GPTModel, requests: Sequence[Any]) -> tuple[list[Any], list[tuple[int, int]]]:
    """Answers, and rows and tokens of every batch."""
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    found = answers(engine, requests)
    hook.remove()
    return found, shapes


def test_the_longest_come_first_and_what_is_alike_once(llama):
    subject = subject_of(llama)
    context = np.arange(10, 30)
    letters = [Loglikelihood(np.append(context, letter), len(context)) for letter in (40, 41, 42, 43)]
    others = random_likelihoods(12, 300, WINDOW)
    requests = [*letters, *others, *letters, *others]
    found, shapes = rows_computed(Engine(subject, 4), subject.model, requests)
    assert found[:16] == found[16:]
    assert sum(rows for rows, _ in shapes) == 1 + len(others)
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == max(len(r.tokens) - 1 for r in requests)
    of_peer = [peer_likelihood(llama.peer(), letter).logprob for letter in letters]
    assert [likelihood.logprob for likelihood in found[:4]] == pytest.approx(of_peer, rel=1e-5)


# ---- continuations ---------------------------------------------------------------------------------------------------


def prompts_of(folder: Folder, until: Sequence[str], **options: Any) -> list[GenerateUntil]:
    encoder = Encoder(tokenizer_of(folder), WINDOW, vocab_size=ROWS, prepend_bos=True)
    decoding = DecodingOptions(**{"max_new_tokens": 12, **options})
    contexts = [TEXT[:30], "Lily", TEXT[40:60], "", "She"]
    return [encoder.generate_until(context, until, decoding) for context in contexts]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_continuations_equal_those_of_transformers(name, request):
    folder = request.getfixturevalue(name)
    peer, tokenizer = folder.peer(), tokenizer_of(folder)
    whole = [peer_text(peer, tokenizer, asked) for asked in prompts_of(folder, ())]
    until = [text[3:5] for text in whole[:2] if len(text) > 5] + ["not written"]
    for batch_size in (1, 2, 8):
        assert answers(Engine(subject_of(folder), batch_size), prompts_of(folder, ())) == whole
        asked = prompts_of(folder, until)
        expected = [peer_text(peer, tokenizer, one) for one in asked]
        assert answers(Engine(subject_of(folder), batch_size), asked) == expected
    assert expected != whole


def test_writing_ends_with_a_stop_string(llama):
    subject = subject_of(llama)
    _, whole = rows_computed(Engine(subject, 1), subject.model, prompts_of(llama, (), use_kv_cache=False)[:1])
    (text,) = answers(Engine(subject, 1), prompts_of(llama, ())[:1])
    _, cut = rows_computed(Engine(subject, 1), subject.model, prompts_of(llama, [text[0]], use_kv_cache=False)[:1])
    assert len(cut) < len(whole)


def test_samples_depend_on_their_request_alone(llama):
    drawn = {"do_sample": True, "temperature": 2.0, "seed": 5}
    requests = prompts_of(llama, (), **drawn)
    requests += [GenerateUntil(r.prompt, r.until, r.options, number=1) for r in requests]
    expected = answers(Engine(subject_of(llama), 1), requests)
    assert answers(Engine(subject_of(llama), 4), requests) == expected
    assert answers(Engine(subject_of(llama), 3), requests[::-1]) == expected[::-1]
    assert len(set(expected)) == len(expected)


def test_names_decide_what_is_drawn(llama):
    model, options = llama.model(), DecodingOptions(max_new_tokens=6, do_sample=True, temperature=2.0)
    prompts = [[5, 9, 3]] * 3
    by_number = [token.id for token in stream(model, prompts, options)]
    assert [token.id for token in stream(model, prompts, options, names=[0, 1, 2])] == by_number
    assert [token.id for token in stream(model, prompts, options, names=[3, 4, 5])] != by_number


# ---- several processes -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "dp2": Degrees(replicate=2),
    "tp2": Degrees(tp=2),
    "pp2": Degrees(pp=2),
    "dp2 tp2": Degrees(replicate=2, tp=2),
    "dp2 pp2": Degrees(pp=2, replicate=2),
}


class Letters:
    """A tokenizer of one character a token."""

    vocab_size = models.VOCAB
    bos = eos = eod = None

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(65 + i) for i in ids)


def answer_part(rank: int, world_size: int, name: str, degrees: Degrees, batch_size: int) -> list[Any]:
    config = models.MODELS[name]
    if degrees == Degrees():
        model, stage = GPTModel(config), None
    else:
        model, stage = inference.build(config, Layout(degrees), torch.float32, torch.device("cpu"))
    initialise(model, 7)
    longest = config.max_position_embeddings
    requests: list[Any] = random_likelihoods(13, models.VOCAB, longest)
    generator = np.random.default_rng(1)
    requests += [RollingLoglikelihood(generator.integers(2, models.VOCAB, n), 8, 5) for n in (40, 1, 9, 0, 22)]
    for sampled_at_random in (False, True):
        options = DecodingOptions(max_new_tokens=5, do_sample=sampled_at_random)
        lengths = (1, 4, longest - 5, 3, 7)
        prompts = [tuple(generator.integers(2, models.VOCAB, length).tolist()) for length in lengths]
        requests += [GenerateUntil(prompt, ("B", "ZZ"), options) for prompt in prompts]
    order = generator.permutation(len(requests))
    subject = Subject(model.eval(), Letters(), stage)  # type: ignore[arg-type]
    return answers(Engine(subject, batch_size), [requests[place] for place in order])


@pytest.mark.parametrize(("layout", "name"), sampled(LAYOUTS, ["llama", "gpt2", "mixture"], per_row=1))
def test_several_processes_answer_as_one_does(pool, layout, name):
    expected = answer_part(0, 1, name, Degrees(), 4)
    for batch_size in (1, 3):
        for found in pool.run(answer_part, LAYOUTS[layout].world_size, name, LAYOUTS[layout], batch_size):
            for one, other in zip(found, expected, strict=True):
                if isinstance(other, Likelihood):
                    assert one.greedy == other.greedy
                    one, other = one.logprob, other.logprob
                assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-5))


# ---- text ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(context=st.text(alphabet="ab caLily ,\n", max_size=30), continuation=st.text(alphabet="xy dog.", min_size=1))
def test_a_pair_is_tokenized_as_one_text(llama, context, continuation):
    tokenizer = tokenizer_of(llama)
    found = Encoder(tokenizer, 1000, vocab_size=ROWS, prepend_bos=True).loglikelihood(context, continuation)
    joint = tokenizer.encode(context + continuation, add_special_tokens=False)
    assert found.tokens[0] == tokenizer.bos and 0 < found.start < len(found.tokens)
    alone = tokenizer.encode(context.rstrip(), add_special_tokens=False)
    if len(joint) > len(alone):
        assert found.tokens.tolist() == [tokenizer.bos, *joint] and found.start == 1 + len(alone)
    else:
        assert tokenizer.decode(found.tokens[1:]) == context + continuation


def test_a_space_between_belongs_to_the_continuation(llama):
    tokenizer = tokenizer_of(llama)
    encoder = Encoder(tokenizer, WINDOW, vocab_size=ROWS, prepend_bos=False)
    one, other = encoder.loglikelihood("One day, ", "she saw"), encoder.loglikelihood("One day,", " she saw")
    assert one.tokens.tolist() == other.tokens.tolist() and one.start == other.start
    assert tokenizer.decode(one.tokens[one.start :]) == " she saw"


@pytest.mark.parametrize(("name", "bos", "first"), [("llama", True, 0), ("llama", False, 0), ("gpt2", False, 1)])
def test_an_empty_context_begins_as_documents_do(name, bos, first, request):
    tokenizer = tokenizer_of(request.getfixturevalue(name))
    found = Encoder(tokenizer, WINDOW, vocab_size=ROWS, prepend_bos=bos).loglikelihood("", "Lily")
    assert found.tokens.tolist() == [first, *tokenizer.encode("Lily", add_special_tokens=False)] and found.start == 1


@pytest.mark.parametrize("bos", [True, False])
def test_what_is_too_long_is_cut_at_its_left_and_counted(llama, bos):
    tokenizer = tokenizer_of(llama)
    ids = tokenizer.encode(TEXT[:60], add_special_tokens=False)
    after = tokenizer.encode(TEXT[:60] + " Lily", add_special_tokens=False)[len(ids) :]
    begin = [0] if bos else []
    for window in range(len(after) + len(begin), len(ids) + len(after) + 4):
        encoder = Encoder(tokenizer, window, vocab_size=ROWS, prepend_bos=bos)
        found = encoder.loglikelihood(TEXT[:60], " Lily")
        kept = found.tokens[len(begin) : found.start].tolist()
        assert found.tokens[found.start :].tolist() == after
        assert found.tokens[: len(begin)].tolist() == begin
        assert kept == ids[len(ids) - len(kept) :]
        complete = len(begin) + len(ids) + len(after) - 1 <= window
        assert encoder.truncated == (not complete)
        assert len(found.tokens) - 1 == (len(begin) + len(ids) + len(after) - 1 if complete else window)


def test_what_leaves_no_room_for_a_context_is_a_problem(llama):
    encoder = Encoder(tokenizer_of(llama), 4, vocab_size=ROWS, prepend_bos=True)
    for ask in (
        lambda: encoder.loglikelihood("a", "b c d e f g h i"),
        lambda: encoder.generate_until("a", (), DecodingOptions(max_new_tokens=4)),
    ):
        with pytest.raises(ProblemError) as caught:
            ask()
        (problem,) = caught.value.problems
        assert (problem.option, problem.value) == ("--seq-length", 4)
    found = encoder.generate_until("a b c d", (), DecodingOptions(max_new_tokens=2))
    assert len(found.prompt) == 2 and found.prompt[0] == 0 and encoder.truncated == 1


def test_what_has_tokens_that_the_model_does_not_have_is_a_problem(llama):
    tokenizer = tokenizer_of(llama)
    last = tokenizer.vocab_size - 1
    word = tokenizer.vocabulary()[last].replace("\u0120", " ")
    assert last in tokenizer.encode(word, add_special_tokens=False)
    encoder = Encoder(tokenizer, WINDOW, vocab_size=last, prepend_bos=True)
    assert encoder.loglikelihood("Xyz", " zyx").tokens.max() < last
    for ask in (
        lambda: encoder.loglikelihood("Xyz", word),
        lambda: encoder.generate_until(word, (), DecodingOptions(max_new_tokens=4)),
    ):
        with pytest.raises(ProblemError) as caught:
            ask()
        assert facts(caught) == [("tokenizer", tokenizer.type, "range")] and limits(caught) == [last]


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    done: float


class Choices:
    """A task of several choices: how often the most likely one is that of the peer."""

    name = "choices"

    def __init__(self, peer: torch.nn.Module):
        self._peer = peer
        self.asked: list[Loglikelihood] = []

    def check(self, options, model) -> list:
        return []

    def needs_tokenizer(self, options) -> bool:
        return True

    def docs(self, subject: Subject, options) -> Iterator[Question]:
        for number in range(6):
            yield Question(TEXT[number * 20 :][:90], (" she", " a park", " Lily."), (number + 1) / 6)

    def requests(self, doc: Question, encoder: Encoder, options) -> list[Loglikelihood]:
        found = [encoder.loglikelihood(doc.text, choice) for choice in doc.choices]
        self.asked += found
        return found

    def score(self, answered, options) -> Result:
        right, count = 0, 0
        for _, likelihoods in answered:
            of_peer = [peer_likelihood(self._peer, asked).logprob for asked in self.asked[count * 3 :][:3]]
            right += int(np.argmax([found.logprob for found in likelihoods]) == np.argmax(of_peer))
            count += 1
        return Result(self.name, {"right": right, "count": count}, {})


def test_a_task_of_choices(llama, caplog):
    config = config_from_dict(EvaluateConfig, {"load": llama.directory, "seq_length": 20})
    (result,) = run_tasks([Choices(llama.peer())], subject_of(llama), config)
    metrics = dict(result.metrics)
    assert 0 < metrics.pop("truncated") <= 18
    assert metrics == {"right": 6, "count": 6}
    assert "cut at the left" in caplog.text


# ---- killed ----------------------------------------------------------------------------------------------------------


def mixed(folder: Folder) -> list[Any]:
    return [*random_likelihoods(20, 300, WINDOW), *prompts_of(folder, ("a",))]


def run_until_killed(folder: Folder, path: Path) -> None:
    shares = []

    def progress(share: float) -> None:
        shares.append(share)
        if len(shares) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = Engine(subject_of(folder), 3, Finished(path, "model"))
    list(engine.answers(((Doc(), [request]) for request in mixed(folder)), progress))


def test_a_killed_evaluation_resumes(llama, tmp_path):
    path = tmp_path / "results.partial"
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(llama, path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with path.open("a") as file:
        file.write('["model", "cut o')
    subject = subject_of(llama)
    everything, whole = rows_computed(Engine(subject, 3), subject.model, mixed(llama))
    known = Finished(path, "model")
    assert 9 <= len(known.results) < 20
    found, shapes = rows_computed(Engine(subject, 3, known), subject.model, mixed(llama))
    assert len(shapes) < len(whole)
    scored = lambda shapes: sum(rows for rows, length in shapes if length > 1)  # noqa: E731
    assert scored(shapes) < scored(whole)
    for one, other in zip(found, everything, strict=True):
        assert one == other if isinstance(other, str) else one.logprob == pytest.approx(other.logprob, rel=1e-5)
    _, again = rows_computed(Engine(subject, 3, Finished(path, "model")), subject.model, mixed(llama))
    assert again == []
    assert Finished(path, "other model").results == {}


def test_a_file_of_something_else_is_a_problem(tmp_path):
    path = tmp_path / "results.partial"
    path.write_text("precious\n")
    with pytest.raises(ProblemError) as caught:
        Finished(path, "model")
    (problem,) = caught.value.problems
    assert (problem.option, problem.value) == ("--output", path)
    assert path.read_text() == "precious\n"
