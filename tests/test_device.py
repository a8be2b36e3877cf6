"""Which device a machine is taken to have."""

from __future__ import annotations

import pytest
import torch

from cordee import device


@pytest.mark.parametrize(("accelerator", "kind"), [(None, "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_an_accelerator_without_support_leaves_the_cpu(monkeypatch, accelerator: str | None, kind: str):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator or "cpu"))
    assert device.kind().name == kind
