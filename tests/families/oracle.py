"""The numbers a model has to reproduce, from golden files or from a tiny random transformers model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cordee.families.registry import ModelSpec
from cordee.model.cache import KVCache
from cordee.model.gpt import GPTModel
from cordee.weights import hf
from cordee.weights.load import load_into


@dataclass
class Numbers:
    """What a model computes: logits `[batch, seq, vocab]`, mean loss, gradients by foreign name."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


@dataclass
class Oracle:
    """A Hugging Face directory and what its model computes.

    `labels` are not shifted. `training` is there where training differs from evaluation by more than dropout.
    Gradients whose norm is below `negligible` times that of the largest are compared with that instead.
    """

    directory: Path
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    evaluation: Numbers
    training: Numbers | None
    greedy_ids: list[int]
    negligible: float = 0.0


# ---- golden files ----------------------------------------------------------------------------------------------------


def golden(directory: Path) -> Oracle:
    values = load_file(directory / "golden.safetensors")
    return Oracle(
        directory,
        values["input_ids"],
        values["attention_mask"],
        values["labels"],
        _numbers(values, ""),
        _numbers(values, "train_mode_") if "train_mode_logits" in values else None,
        values["greedy_ids"].tolist(),
    )


def _numbers(values: dict[str, Tensor], prefix: str) -> Numbers:
    start = f"{prefix}grad."
    grads = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
    return Numbers(values[f"{prefix}logits"], values[f"{prefix}loss"].squeeze(), grads)


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers_oracle(kind: str, directory: Path, **config: object) -> Oracle:
    """A tiny random model of transformers' `<kind>Config`, saved to `directory`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(sum(map(ord, json.dumps(config, sort_keys=True))))
    config = {**config, "pad_token_id": None}  # its embedding would not learn
    hf_config = getattr(transformers, f"{kind}Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", experts_implementation="eager"
    )
    model = randomised(model).eval()
    model.save_pretrained(directory)
    return recorded(
        lambda ids: model(ids).logits,
        lambda: checkpoint_gradients(model, directory / "gradients"),
        hf_config.vocab_size,
        directory,
    )


def recorded(
    forward: Callable[[Tensor], Tensor], gradients: Callable[[], dict[str, Tensor]], vocab_size: int, directory: Path
) -> Oracle:
    """What the model in `directory` computes: `forward` logits of ids, after a backward `gradients`.

    One row is padded on the left. Rows are computed one at a time and without padding, the shorter first: transformers
    gives the rows of a batch, and shorter sequences after longer ones, the frequencies of the longest.
    """
    input_ids = torch.randint(0, vocab_size, (2, 12))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[1, 3] = -100  # the first real token has no real predecessor
    logits = torch.zeros(2, 12, vocab_size)
    total, count = torch.zeros(()), 0
    for row, start in ((1, 3), (0, 0)):
        logits[row, start:] = out = forward(input_ids[row : row + 1, start:])[0]
        total = total + nn.functional.cross_entropy(out[:-1], labels[row, start + 1 :], reduction="sum")
        count += 11 - start
    loss = total / count
    loss.backward()
    numbers = Numbers(logits.detach(), loss.detach(), gradients())
    ids = greedy(forward, input_ids[:1], 6)
    return Oracle(directory, input_ids, attention_mask, labels, numbers, None, ids, negligible=1e-2)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """`model` with values large enough to matter, and none constant, which would hide a mix-up."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(std=0.15 if re.search("embed|wte", name) else 0.1)
    for buffer in stored_buffers(model):
        buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


def stored_buffers(model: nn.Module) -> list[Tensor]:
    """What a checkpoint holds besides parameters, such as the biases of routers that are moved instead of trained."""
    stored = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in stored]


def checkpoint_gradients(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """Gradients under the names and in the layout of a checkpoint, which are not always those of the modules."""
    gradients = copy.deepcopy(model)
    for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad.clone()
    for buffer in stored_buffers(gradients):
        buffer.zero_()
    gradients.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


# ---- comparisons -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(forward: Callable[[Tensor], Tensor], ids: Tensor, count: int) -> list[int]:
    """The most likely `count` tokens after `ids`, each from a forward over everything so far."""
    length = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, forward(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, length:].tolist()


def load(directory: Path) -> tuple[GPTModel, hf.HFSource]:
    source = hf.read(directory)
    model = GPTModel(source.spec.config, device="meta").eval()
    load_into(model, source)
    return model, source


def check_mathematics(oracle: Oracle) -> None:
    """Logits, loss, gradients and greedy tokens, as the README of the golden vectors says to compare them."""
    model, source = load(oracle.directory)
    _check_numbers(model, source.spec, oracle, oracle.evaluation)
    if oracle.training is not None:
        _check_numbers(model.train(), source.spec, oracle, oracle.training)
        model.eval()
    assert greedy(model, oracle.input_ids[:1], len(oracle.greedy_ids)) == oracle.greedy_ids


def _check_numbers(model: GPTModel, spec: ModelSpec, oracle: Oracle, expected: Numbers) -> None:
    real = oracle.attention_mask.bool()
    with torch.no_grad():
        logits = model(oracle.input_ids, oracle.attention_mask)
    scale = expected.logits[real].abs().max()
    assert (logits - expected.logits)[real].abs().max() <= 1e-4 * scale

    labels = torch.cat([oracle.labels[:, 1:], torch.full_like(oracle.labels[:, :1], -100)], 1)
    model.zero_grad()
    total, count = model(oracle.input_ids, oracle.attention_mask, output=lambda head, hidden: head.loss(hidden, labels))
    loss = total / count
    assert abs(loss.item() - expected.loss.item()) <= 1e-5
    loss.backward()
    found = foreign_gradients(model, spec)
    smallest = oracle.negligible * max(grad.norm() for grad in expected.grads.values())
    for name, grad in expected.grads.items():
        assert (found[name] - grad).norm() <= 1e-4 * max(grad.norm(), smallest), name


def foreign_gradients(model: GPTModel, spec: ModelSpec) -> dict[str, Tensor]:
    rules = spec.rules()
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found |= zip(rules[name].foreign, rules[name].inverse(grad), strict=True)
    return found


@torch.no_grad()
def check_cache(oracle: Oracle) -> None:
    """With a cache, filled in two parts and then token by token, logits are those without, and so are the tokens."""
    model, source = load(oracle.directory)
    prompt = oracle.input_ids.shape[1]
    ids = torch.cat([oracle.input_ids[:1], torch.tensor([oracle.greedy_ids])], 1)
    cache = KVCache(source.spec.config, 1, ids.shape[1])
    chosen = []
    for start, stop in [(0, prompt // 2), (prompt // 2, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))]:
        cached, plain = model(ids[:, start:stop], cache=cache), model(ids[:, :stop])[:, start:]
        assert (cached - plain).abs().max() <= 1e-4 * plain.abs().max()
        chosen.append(cached[0, -1].argmax().item())
    assert chosen[1:-1] == oracle.greedy_ids


def check_round_trip(oracle: Oracle, scratch: Path) -> None:
    """What is read is written again bit for bit, and the configuration says the same."""
    source = hf.read(oracle.directory)
    with hf.write(scratch, source.spec) as sink:
        for name in source.names():
            sink.put(name, source.tensor(name))
    written, original = load_file(scratch / "model.safetensors"), load_file(oracle.directory / "model.safetensors")
    original = {name: tensor for name, tensor in original.items() if not name.endswith(".inv_freq")}
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    config, published = (json.loads((path / "config.json").read_text()) for path in (scratch, oracle.directory))
    assert config == published
