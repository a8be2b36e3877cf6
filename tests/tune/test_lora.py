"""LoRA against the PEFT library: forward, gradients, steps, files both ways; and one loss under every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cordee.checkpoint import files
from cordee.checkpoint.storage import location_of
from cordee.errors import ProblemError
from cordee.generate.loading import load_model
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.problems import facts
from tests.train import tiny
from tests.tune import adapters
from tests.tune.adapters import LINEAR

peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"target_modules": list(LINEAR), "r": 4, "lora_alpha": 8}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"layers.1.*v_proj": 2}}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "packed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    "attention": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
}


def trained_by_peft(model: Any, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps of a run, taken by torch's AdamW on PEFT's model."""
    samples = plan_run(replace(config, save=None, save_interval=None), 1).data.open(verified=False)["train"]
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = config.adam_beta1, config.adam_beta2
    decaying, others = [p for p in own if p.ndim > 1], [p for p in own if p.ndim == 1]
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)
    losses, norms = [], []
    for step in range(config.train_iters or 0):
        rows = [torch.from_numpy(samples[step * tiny.BATCH + row]["tokens"]) for row in range(tiny.BATCH)]
        tokens = torch.stack(rows)
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in own]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.arange(16)[None])
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_peft(tmp_path: Path, case: str):
    """From PEFT's files, through training, into files that PEFT reads; and merged into the base."""
    name, lora = CASES[case]
    load = adapters.base(tmp_path, name)
    torch.manual_seed(1)
    theirs = adapters.peft_model(load, peft.LoraConfig(init_lora_weights=False, **lora))
    theirs.save_pretrained(tmp_path / "start")
    config = adapters.config(tmp_path, load, lora_load=str(tmp_path / "start"))
    job.run(config)
    losses, norms = trained_by_peft(theirs, config)
    assert tiny.losses(config) == pytest.approx(losses, rel=1e-5)
    found = tiny.records(config)
    assert [found[step]["grad_norm"] for step in sorted(found)] == pytest.approx(norms, rel=1e-5)
    assert losses[-1] < losses[0]

    out = adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = adapters.factors(out), adapters.factors(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=2e-5, msg=key)
    again = adapters.peft_model(load, adapter=out)
    torch.testing.assert_close(logits(again.eval()), logits(theirs.eval()), rtol=1e-4, atol=1e-4)
    merged = adapters.convert(config.save, tmp_path / "merged")
    assert load_file(merged / "model.safetensors").keys() == load_file(load / "model.safetensors").keys()
    from cordee.checkpoint import formats

    torch.testing.assert_close(logits(load_model(formats.read(merged))), logits(again), rtol=1e-5, atol=1e-5)
