"""Generation: against transformers, with and without cache, alone and in batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from cordee.errors import ProblemError
from cordee.generate.decoder import CachedDecoder, PlainDecoder, padded
from cordee.generate.engine import generate, stream
from cordee.generate.options import DecodingOptions
from cordee.model.config import (
    BalanceConfig,
    LogNScaling,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
    YarnScaling,
)
from tests.generate.folders import Folder
from tests.model import tiny

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13], [4, 4, 4, 4]]
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "top-k": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "top-p": {"do_sample": True, "top_p": 0.8, "seed": 9},
}
MOE = MoEConfig(
    router=RouterConfig(num_experts=4, top_k=2),
    expert=MLPConfig(ffn_hidden_size=16, activation="silu", gated=True),
    balance=BalanceConfig(),
)
MODELS = {
    "llama": tiny.config(),
    "learned positions": tiny.config(
        tiny.layer(tiny.attention(rope=None), norm=NormConfig(kind="layer", eps=1e-5)), learned_positions=True
    ),
    "window": tiny.config(tiny.layer(tiny.attention(window=3)), tiny.layer()),
    "alibi": tiny.config(tiny.layer(tiny.attention(rope=None, alibi=True))),
    "yarn": tiny.config(
        tiny.layer(
            tiny.attention(rope=RopeConfig(scaling=YarnScaling(factor=2.0, original_max_position_embeddings=64)))
        )
    ),
    "log n": tiny.config(tiny.layer(tiny.attention(query_scaling=LogNScaling(length=4)))),
    "latent attention": tiny.config(tiny.layer(tiny.latent_attention()), tiny.layer(tiny.latent_attention())),
    "experts": tiny.config(tiny.layer(), tiny.layer(mlp=MOE)),
}


def options(count: int = 12, **changes) -> DecodingOptions:
    return DecodingOptions(max_new_tokens=count, **changes)


@pytest.fixture(scope="module")
def model():
    return tiny.model(MODELS["llama"])


# ---- the same tokens as transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_equals_transformers(name, cache, request):
    folder = request.getfixturevalue(name)
    peer, model = folder.peer(), folder.model()
    prompts = [[7, 33, 2, 250], [9], list(range(40, 60))]
    expected = [
        peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert generate(model, prompts, options(20, use_kv_cache=cache)) == expected


@pytest.mark.parametrize("family", ["llama2", "llama2_gqa", "llama31", "codellama", "yi", "gpt2"])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_equals_golden(family, cache, shared):
    directory = shared / "golden" / family
    values = load_file(directory / "golden.safetensors")
    prompt, expected = values["input_ids"][0].tolist(), values["greedy_ids"].tolist()
    assert generate(Folder(directory).model(), [prompt], options(12, use_kv_cache=cache)) == [expected]


# ---- one result, whatever the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_cache_changes_nothing(name, way):
    model = tiny.model(MODELS[name])
    cached = generate(model, PROMPTS, options(**WAYS[way]))
    assert cached == generate(model, PROMPTS, options(use_kv_cache=False, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_changes_nothing(model, way, cache):
    together = generate(model, PROMPTS, options(use_kv_cache=cache, **WAYS[way]))
    for batch_size in (1, 3):
        assert generate(model, PROMPTS, options(use_kv_cache=cache, batch_size=batch_size, **WAYS[way])) == together


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", [True, False])
def test_samples_that_end_leave_the_others_alone(model, way, cache):
    free = generate(model, PROMPTS, options(20, **WAYS[way]))
    stop = {free[0][2], free[1][5]}
    stopped = generate(model, PROMPTS, options(20, use_kv_cache=cache, **WAYS[way]), stop_ids=stop)
    for whole, part in zip(free, stopped, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stop]
        assert part == (whole[: ends[0] + 1] if ends else whole)
    assert len(stopped[0]) <= 3 and len({len(part) for part in stopped}) > 1


def test_the_logits_of_both_decoders_agree(model):
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    decoders = CachedDecoder(model, 12), PlainDecoder(model)
    with torch.no_grad():
        first = [decoder.begin([[1, 2, 3, 4], [5, 6], [7]]) for decoder in decoders]
        torch.testing.assert_close(*first)
        for step in tokens.T:
            torch.testing.assert_close(*[decoder.extend(step) for decoder in decoders])
        for decoder in decoders:
            decoder.keep(torch.tensor([2, 0, 0]))  # out of order, and one twice, as a beam search takes them
        kept = [decoder.extend(torch.tensor([8, 8, 9])) for decoder in decoders]
        torch.testing.assert_close(*kept)


def test_padding_is_on_the_left():
    ids, mask = padded([[1, 2], [3]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2], [0, 3]] and mask is not None and mask.tolist() == [[1, 1], [0, 1]]
    ids, mask = padded([[1, 2], [3, 4]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2], [3, 4]] and mask is None


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_the_seed_decides(model):
    def drawn(seed):
        return generate(model, PROMPTS, options(do_sample=True, seed=seed))

    torch.manual_seed(0)
    first = drawn(1)
    torch.manual_seed(99)
    assert drawn(1) == first
    assert drawn(2) != first


def test_samples_of_one_prompt_differ(model):
    samples = generate(model, [[1, 2, 3]] * 4, options(do_sample=True))
    assert len({tuple(sample) for sample in samples}) == 4


# ---- what a request may be -------------------------------------------------------------------------------------------


def test_rows_beyond_the_tokenizer_are_never_written(model):
    used = 10
    for way in WAYS.values():
        written = generate(model, PROMPTS, options(30, **way), vocab_size=used)
        assert max(map(max, written)) < used
    assert max(map(max, generate(model, PROMPTS, options(30)))) >= used


def test_every_problem_is_reported(model):
    prompts = [[], [1, 99], [1] * 120, [1] * 140, [1, -1]]
    with pytest.raises(ProblemError) as caught:
        generate(model, prompts, options(20))
    problems = caught.value.problems
    assert [problem.option for problem in problems] == [f"prompt {n}" for n in range(1, 6)]
    assert "token id 99" in problems[1].why and "token id -1" in problems[4].why
    assert [(p.value, p.kind, p.limit) for p in problems[2:4]] == [(140, "at most", 128), (160, "at most", 128)]


@pytest.mark.parametrize("cache", [True, False])
def test_the_whole_context_can_be_used(model, cache):
    longest = model.config.max_position_embeddings
    (written,) = generate(model, [[1] * (longest - 5)], options(5, use_kv_cache=cache))
    assert len(written) == 5


def test_a_model_without_numbers_is_a_problem(model):
    broken = tiny.model(MODELS["llama"])
    with torch.no_grad():
        broken.final_norm.weight[0] = float("nan")
    with pytest.raises(ProblemError, match="not finite"):
        generate(broken, [[1]], options(2))


# ---- streaming -------------------------------------------------------------------------------------------------------


def test_tokens_come_as_they_are_written(model):
    prompts = PROMPTS[:2]
    tokens = stream(model, prompts, options(5))
    first = [next(tokens) for _ in range(4)]
    assert [(token.sample, token.last) for token in first] == [(0, False), (1, False), (0, False), (1, False)]
    everything = [*first, *tokens]
    expected = generate(model, prompts, options(5))
    for number, ids in enumerate(expected):
        own = [token for token in everything if token.sample == number]
        assert [token.id for token in own] == ids
        assert [token.last for token in own] == [False] * 4 + [True]


def test_generate_tells_of_every_token(model):
    heard = []
    written = generate(model, PROMPTS, options(4), on_token=heard.append)
    assert len(heard) == sum(map(len, written)) and heard[0].id == written[0][0]


def test_problems_show_before_the_first_token(model):
    with pytest.raises(ProblemError):
        stream(model, [[]], options(2))


def test_the_model_is_left_as_it_was():
    changes = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "embedding_dropout": 0.5}
    model = tiny.model(dataclasses.replace(MODELS["llama"], **changes)).train()
    tokens = stream(model, [[1, 2]], options(6))
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    rest = [token.id for token in tokens]
    assert model.training
    assert generate(model, [[1, 2]], options(6))[0][1:] == rest  # no dropout
    model(torch.tensor([[1, 2]])).sum().backward()  # parameters are still trainable


# ---- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, story",
    [
        (
            "stories260K",
            "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
            "she saw a big, red ball. She wanted to play with it, but it was too high.",
        ),
        (
            "tinystories-656K",
            "Once upon a time, there was a little girl named Lily. She had a toy car that she loved very much. One "
            "day, she went to the park to play with her toy car in the park.",
        ),
    ],
)
def test_a_real_model_tells_its_story(name, story, shared):
    from cordee.generate.text import continuation, encode_prompts
    from cordee.tokenizer import load_tokenizer
    from cordee.tokenizer.options import TokenizerOptions

    directory = shared / "data" / "models" / name
    model = Folder(directory).model()
    tokenizer = load_tokenizer(TokenizerOptions(), str(directory))
    prompts = [[tokenizer.bos]]
    assert name != "stories260K" or encode_prompts(tokenizer, [""]) == prompts
    (tokens,) = generate(model, prompts, options(100))
    assert continuation(tokenizer, prompts[0], tokens).strip().startswith(story)
