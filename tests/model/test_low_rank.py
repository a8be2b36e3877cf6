"""Low-rank adapters and prefixes against their definitions: changed weights, PEFT, keys and values by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from cordee.errors import ProblemError
from cordee.families.count import canonical_shapes, count_parameters, shapes_of
from cordee.families.registry import spec_from_hf
from cordee.generate.decoder import CachedDecoder, unsupported_reason
from cordee.model.config import LowRankConfig, ModelConfig
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.model.inputs import Context
from cordee.model.latent_attention import LatentAttention
from cordee.model.moe import MoE, loop_dispatch
from cordee.model.parameter import of_origins, train_only
from cordee.model.rotary import Positions
from cordee.ops.attention import Scores
from cordee.ops.dropout import DropoutRNG
from cordee.ops.mask import AttentionMask
from cordee.weights import hf
from cordee.weights.load import load_into, save_from
from tests.model import tiny
from tests.parallel import models
from tests.weights import tiny as saved

RANK, SCALE = 2, 1.5
SLICES = {
    "q": (1, slice(0, -2)),
    "k": (1, slice(-2, -1)),
    "v": (1, slice(-1, None)),
    "gate": (0, slice(0, 1)),
    "up": (0, slice(1, 2)),
}


def low_rank(*targets: str, **changes) -> tuple[LowRankConfig, ...]:
    return (LowRankConfig(**{"targets": targets, "rank": RANK, "scale": SCALE, **changes}),)


def everywhere(config: ModelConfig) -> ModelConfig:
    """An adapter on every projection, those of fused ones by slices."""
    targets = {full for _, name, full in config.projections() if name not in ("qkv", "gate_up")}
    return replace(config, low_rank=low_rank(*sorted(targets)))


def model_of(config: ModelConfig, seed: int = 0) -> GPTModel:
    """Initialised, with random factors B."""
    model = tiny.model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ids(batch: int = 2, seq: int = 11) -> Tensor:
    return torch.randint(0, tiny.VOCAB, (batch, seq), generator=torch.Generator().manual_seed(0))


def loss_of(model: GPTModel, **given) -> Tensor:
    labels = ids().roll(-1, 1)
    return model(ids(), output=lambda head, hidden: head.loss(hidden, labels)[0], **given)


LLAMA, LATENT, MIXTURE = (models.MODELS[name] for name in ("llama", "latent", "mixture"))
GPT2 = replace(models.MODELS["gpt2"], tie_word_embeddings=False)
CONFIGS = {
    "gqa": everywhere(LLAMA),
    "fused": replace(LLAMA, low_rank=low_rank("qkv", "gate_up", "layers.1.attention.out")),
    "multi-head": everywhere(GPT2),
    "latent": everywhere(LATENT),
    "mixture": everywhere(MIXTURE),
}


# ---- the definition --------------------------------------------------------------------------------------------------


def changed_weights(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values W + scale * B A of the weights that adapters are on."""
    parameters = dict(model.named_parameters())
    weights: dict[str, Tensor] = {}
    for name, a in parameters.items():
        path, found, rest = name.partition(".adapters.")
        if not found or not rest.endswith(".a"):
            continue
        weight = weights.get(path, parameters[f"{path}.weight"].detach())
        piece = rest.removesuffix(".a")
        b = parameters[f"{path}.adapters.{piece}.b"]
        change = torch.zeros_like(weight)
        index = [slice(None)] * weight.ndim
        if piece in SLICES and path.endswith(("qkv", "gate_up")):
            dim, part = SLICES[piece]
            index[dim + weight.ndim - (4 if path.endswith("qkv") else 3)] = part
        product = torch.einsum("e...r,eri->e...i", b, a) if ".experts." in path else torch.einsum("...r,ri->...i", b, a)
        change[tuple(index)] = product
        weights[path] = weight + SCALE * change
    for path, weight in weights.items():
        yield f"{path}.weight", weight


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_is_the_model_with_changed_weights(config: ModelConfig):
    model = model_of(config)
    train_only(model, {"adapter"})
    adapters = of_origins(model, {"adapter"})
    assert len(adapters) == 2 * len({(path, name) for path, name, _ in config.adapted()})
    loss = loss_of(model)
    found = dict(zip(adapters, torch.autograd.grad(loss, list(adapters.values())), strict=True))
    base = GPTModel(replace(config, low_rank=()))
    values = {name: p.detach() for name, p in of_origins(model, {"base"}).items()} | dict(changed_weights(model))
    labels = ids().roll(-1, 1)
    given = {"output": lambda head, hidden: head.loss(hidden, labels)[0]}
    expected = functional_call(base.eval(), values, (ids(),), given)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for (name, grad), wanted in zip(found.items(), torch.autograd.grad(expected, list(adapters.values())), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5, msg=name)
        assert grad.abs().max() > 0, name


def test_rows_of_a_head_are_normalised_before_the_adapter_is_added():
    config = replace(models.MODELS["qk norm"], low_rank=low_rank("head"))
    model = model_of(config)
    low = model.head.adapters["head"]
    hidden = torch.randn(2, 5, config.hidden_size)
    expected = hidden @ (torch.nn.functional.normalize(model.head.weight, dim=-1) + SCALE * low.b @ low.a).t()
    torch.testing.assert_close(model.head.logits(hidden), expected * config.logit_scale)


def test_experts_one_after_the_other_have_their_adapters():
    model = model_of(CONFIGS["mixture"])
    expected = loss_of(model)
    for module in model.modules():
        if isinstance(module, MoE):
            module.placement.replace("dispatch", "test", loop_dispatch)
    torch.testing.assert_close(loss_of(model), expected)


def test_dropout_is_of_what_goes_into_the_adapter_and_only_in_training():
    config = replace(LLAMA, low_rank=low_rank("k", "down", dropout=0.5))
    model = model_of(config)
    plain = model_of(replace(LLAMA, low_rank=low_rank("k", "down")))
    assert torch.equal(loss_of(model), loss_of(plain))
    low = model.layers["0"].mlp.down.adapters["down"]
    x = torch.ones(2, 5, 48)
    seen = []

    def drop(x: Tensor, rate: float, site: str, *, first: int) -> Tensor:
        seen.append((rate, site, first))
        return 2 * x

    assert torch.equal(low.dropped(x, drop), 2 * x) and low.dropped(x, None) is x
    assert seen == [(0.5, "layers.0.mlp.down.down", 0)]
    model.train()
    torch.manual_seed(0)
    losses = torch.stack([loss_of(model) for _ in range(2)])
    assert losses[0] != losses[1] and not torch.isclose(losses, loss_of(plain)).any()


@pytest.mark.parametrize("scaling", [False, True], ids=["lora", "rslora"])
@pytest.mark.filterwarnings("ignore")
def test_is_pefts_lora(tmp_path, scaling: bool):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
    transformers = pytest.importorskip("transformers")
    rank, alpha = 4, 12
    # Small weights, so that rounding stays small.
    random = saved.tensors_of(spec_from_hf(saved.LLAMA))
    saved.save(
        tmp_path, saved.LLAMA, {name: tensor * 0.1 for name, tensor in random.items()}
    )  # so that rounding is small
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    chosen = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=scaling,
        init_lora_weights=False,
        target_modules=[name.split(".")[1] for name in names.values()] + ["lm_head", "embed_tokens"],
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), chosen).eval()
    source = hf.read(tmp_path)
    scale = alpha / rank**0.5 if scaling else alpha / rank
    config = replace(source.spec.config, low_rank=low_rank(*names, "head", "embedding", rank=rank, scale=scale))
    model = GPTModel(config).eval()
    load_into(model, source, origins={"base"})
    train_only(model, {"adapter"})
    parameters, pairs = dict(theirs.named_parameters()), {}  # ours by name, with PEFT's and whether that is transposed
    for name in of_origins(model, {"adapter"}):
        path, _, rest = name.partition(".adapters.")
        piece, factor = rest.split(".")
        if piece == "embedding":  # PEFT's A is looked up
            pairs[name] = f"model.embed_tokens.lora_embedding_{'B' if factor == 'a' else 'A'}.default", True
        else:
            place = "lm_head" if piece == "head" else f"model.layers.{path.split('.')[1]}.{names[piece]}"
            pairs[name] = f"{place}.lora_{factor.upper()}.default.weight", False
    with torch.no_grad():
        for name, (other, transposed) in pairs.items():
            value = parameters[f"base_model.model.{other}"]
            own = model.get_parameter(name)
            own.copy_((value.t() if transposed else value).view(own.shape))
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    output = theirs(input_ids=tokens, labels=tokens)
    output.loss.backward()
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), 1)
    total, count = model(tokens, output=lambda head, hidden: head.loss(hidden, labels))
    (total / count).backward()
    torch.testing.assert_close(total / count, output.loss, rtol=1e-5, atol=1e-6)
    assert len(pairs) == len([p for p in parameters.values() if p.requires_grad])
    for name, (other, transposed) in pairs.items():
        wanted = parameters[f"base_model.model.{other}"].grad
        grad = model.get_parameter(name).grad
        wanted = (wanted.t() if transposed else wanted).view(grad.shape)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6, msg=name)


# ---- prefixes --------------------------------------------------------------------------------------------------------


def plain_core(prefix: Tensor | None, kv_up: Tensor | None):
    """An attention core of a few lines that puts keys and values of `prefix` before all others.

    `prefix` is `[kv_heads, 2, tokens, head_dim]`, or, with `kv_up` `[heads, nope + value, latent]`, compressed.
    """

    def core(q: Tensor, k: Tensor, v: Tensor, mask, scores: Scores) -> Tensor:
        count = 0
        if prefix is not None and kv_up is not None:
            latent, rope = prefix.split((kv_up.shape[-1], prefix.shape[-1] - kv_up.shape[-1]), -1)
            count, nope = len(prefix), k.shape[-1] - rope.shape[-1]
            up = torch.einsum("hdr,nr->hnd", kv_up, latent)
            keys = torch.cat((up[..., :nope], rope.expand(len(up), -1, -1)), -1)
            k, v = (torch.cat((p.expand(len(q), -1, -1, -1), t), 2) for p, t in ((keys, k), (up[..., nope:], v)))
        elif prefix is not None:
            count = prefix.shape[2]
            k, v = (torch.cat((prefix[:, i].expand(len(q), -1, -1, -1), t), 2) for i, t in enumerate((k, v)))
        seen = q.shape[2]
        distance = torch.arange(seen)[:, None] - torch.arange(seen)
        visible = distance >= 0
        if scores.window is not None:
            visible &= distance < scores.window
        visible = torch.cat((torch.ones(seen, count, dtype=torch.bool), visible), 1)
        repeat = q.shape[1] // k.shape[1]
        score = scores.scale * q @ k.repeat_interleave(repeat, 1).transpose(-1, -2)
        if scores.softcap is not None:
            score = scores.softcap * torch.tanh(score / scores.softcap)
        if scores.slopes is not None:
            distance = torch.cat((torch.zeros(seen, count), distance), 1)
            score = score - torch.tensor(scores.slopes)[:, None, None] * distance
        score = score.masked_fill(~visible, float("-inf"))
        if scores.sinks is not None:
            score = torch.cat((score, scores.sinks[None, :, None, None].expand(len(q), -1, seen, 1)), -1)
        return score.softmax(-1)[..., : count + seen] @ v.repeat_interleave(repeat, 1)

    return core


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma", "latent", "mixture"])  # ALiBi; window and softcap; sinks
def test_prefix_is_keys_and_values_before_all_others(name: str):
    config = models.MODELS[name]
    model = model_of(replace(config, num_prefix_tokens=3, init_std=0.2))
    train_only(model, {"adapter"})
    prefixes = of_origins(model, {"adapter"})
    base = GPTModel(replace(config, init_std=0.2)).eval()
    initialise(base, 0)
    for layer in base.own_layers():
        prefix = model.get_parameter(f"layers.{layer.index}.attention.prefix")
        kv_up = layer.attention.kv_up.weight if isinstance(layer.attention, LatentAttention) else None
        layer.attention.placement.replace("core", "test", plain_core(prefix, kv_up))
    loss, expected = loss_of(model), loss_of(base, position_ids=torch.arange(3, 3 + ids().shape[1])[None])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    given = list(prefixes.values())
    for grad, wanted in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
        assert grad.abs().max() > 0


def test_every_document_and_padding_see_the_prefix():
    model = model_of(replace(LLAMA, num_prefix_tokens=3))
    segments = torch.tensor([[0] * 4 + [1] * 7] * 2)
    positions = torch.tensor([[*range(4), *range(7)]] * 2)
    packed = model(ids(), position_ids=positions, segments=segments)
    apart = torch.cat((model(ids()[:, :4]), model(ids()[:, 4:])), 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    padding = torch.tensor([[1] * 11, [0] * 3 + [1] * 8])
    torch.testing.assert_close(
        model(ids(), attention_mask=padding)[1, 3:], model(ids()[1:, 3:])[0], rtol=1e-4, atol=1e-5
    )


def test_dropout_of_tokens_is_the_same_behind_a_prefix():
    """The expansion of latent attention runs over a prefix too."""
    places = torch.arange(4)[None]
    dropout_rng = DropoutRNG(0, torch.arange(2))
    context = Context(
        Positions(places), AttentionMask(4, 4), dropout_rng=dropout_rng, residual_indices=places, block_indices=places
    )
    x = torch.ones(2, 7, 16)
    dropped = context.drop(x, 0.5, "site", first=0)
    assert torch.equal(dropped[:, 3:], context.drop(x[:, 3:], 0.5, "site", first=0))
    assert len(dropped.flatten(0, 1).unique(dim=0)) == 14  # every token, and every one of the prefix, has its own


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        everywhere(LLAMA),
        everywhere(LATENT),
        replace(LLAMA, num_prefix_tokens=3),
        replace(everywhere(LATENT), num_prefix_tokens=3),
        replace(models.MODELS["gemma"], num_prefix_tokens=3),
    ],
    ids=["low rank", "latent", "prefix", "latent prefix", "window prefix"],
)
def test_tokens_one_by_one_are_tokens_at_once(config: ModelConfig):
    model = model_of(config)
    assert unsupported_reason(model) is not None  # the fused path does not know them
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    decoder = CachedDecoder(model, 12)
    grown = [decoder.begin(prompts), *(decoder.extend(torch.tensor([token, token + 1])) for token in (9, 11, 13))]
    for row, prompt in enumerate(prompts):
        whole = model(torch.tensor([[*prompt, *(token + row for token in (9, 11, 13))]]))[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack([logits[row] for logits in grown]), whole, rtol=1e-4, atol=1e-5)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGS.values(), replace(LATENT, num_prefix_tokens=3)])
def test_shapes_are_known_without_a_model(config: ModelConfig):
    for prefixed in (config, replace(config, num_prefix_tokens=2), replace(config, tie_word_embeddings=True)):
        specs = GPTModel(prefixed, device="meta").parameter_specs()
        for origin, shapes in (("base", canonical_shapes(prefixed)), ("adapter", shapes_of(prefixed, "adapter"))):
            assert shapes == {name: spec.shape for name, spec in specs.items() if spec.origin == origin}
        assert count_parameters(prefixed) == sum(math.prod(spec.shape) for spec in specs.values())
        assert count_parameters(prefixed, {"base"}) == count_parameters(
            replace(prefixed, low_rank=(), num_prefix_tokens=0)
        )


def test_begins_as_pefts_do():
    model = tiny.model(replace(LLAMA, low_rank=low_rank("q", "down", rank=16), num_prefix_tokens=4))
    for name, value in of_origins(model, {"adapter"}).items():
        if name.endswith(".b"):
            assert not value.any()
        elif name.endswith(".a"):  # kaiming_uniform_(a=sqrt(5))
            bound = 1 / math.sqrt(value.shape[-1])
            assert 0.97 * bound < value.abs().max() < bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert torch.equal(loss_of(tiny.model(replace(LLAMA, low_rank=low_rank("q", "down")))), loss_of(tiny.model(LLAMA)))


def test_the_first_that_names_a_projection_counts():
    chosen = (*low_rank("layers.1.attention.q", rank=5), *low_rank("q", "down", rank=3))
    model = GPTModel(replace(LLAMA, low_rank=chosen), device="meta")
    ranks = {name: spec.shape[0] for name, spec in model.parameter_specs().items() if name.endswith(".a")}
    assert ranks == {
        "layers.0.attention.qkv.adapters.q.a": 3,
        "layers.0.mlp.down.adapters.down.a": 3,
        "layers.1.attention.qkv.adapters.q.a": 5,
        "layers.1.mlp.down.adapters.down.a": 3,
    }


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (LLAMA, {"low_rank": low_rank("q", rank=0)}, ("low_rank: rank", 0)),
        (LLAMA, {"low_rank": low_rank("q", dropout=1.0)}, ("low_rank: dropout", 1.0)),
        (LLAMA, {"low_rank": low_rank("head", dropout=0.1)}, ("low_rank: dropout", 0.1)),
        (MIXTURE, {"low_rank": low_rank("experts.up", dropout=0.1)}, ("low_rank: dropout", 0.1)),
        (LLAMA, {"low_rank": low_rank("q_proj")}, ("low_rank: targets", "q_proj")),
        (LLAMA, {"low_rank": low_rank("q", "kv_up")}, ("low_rank: targets", "kv_up")),
        (LLAMA, {"num_prefix_tokens": -1}, ("num_prefix_tokens", -1)),
    ],
)
def test_what_there_cannot_be(config: ModelConfig, changes: dict, expected: tuple):
    with pytest.raises(ProblemError) as raised:
        replace(config, **changes)
    assert expected in [(problem.option, problem.value) for problem in raised.value.problems]


def test_base_weights_come_from_a_source_and_go_to_files_alone(tmp_path):
    saved.save(tmp_path / "base", saved.LLAMA)
    source = hf.read(tmp_path / "base")
    config = replace(source.spec.config, low_rank=low_rank("q", "up"))
    model = GPTModel(config)
    initialise(model, 3, {"adapter"})
    report = load_into(model, source, origins={"base"})
    assert report.parameters == len(canonical_shapes(config))
    with pytest.raises(ProblemError) as raised:
        load_into(model, source)
    assert {problem.option for problem in raised.value.problems} == shapes_of(config, "adapter").keys()
    with hf.write(tmp_path / "out", source.spec) as sink:
        save_from(model, sink, {"base"})
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
