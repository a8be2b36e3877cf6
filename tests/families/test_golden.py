"""Families against the golden vectors of published architectures: every folder there is."""

from __future__ import annotations

import json

import pytest

from cordee.families.registry import spec_from_hf
from tests.conftest import SHARED
from tests.families import oracle

FOLDERS = sorted(path.parent for path in SHARED.glob("golden/*/golden.safetensors"))
V5_FOLDERS = [path for path in FOLDERS if (path / "config_v5.json").exists()]

ABSENT = pytest.param(None, marks=pytest.mark.skip(reason="needs the golden vectors beside the checkout"), id="absent")


def each(folders):
    return pytest.mark.parametrize("folder", folders or [ABSENT], ids=lambda path: path.name)


every_folder = each(FOLDERS)


@every_folder
def test_mathematics(folder):
    oracle.check_mathematics(oracle.golden(folder))


@every_folder
def test_cache(folder):
    oracle.check_cache(oracle.golden(folder))


@every_folder
def test_round_trip(folder, tmp_path):
    oracle.check_round_trip(oracle.golden(folder), tmp_path / "out")


@each(V5_FOLDERS)
def test_both_spellings_of_a_configuration_agree(folder):
    old, new = (json.loads((folder / name).read_text()) for name in ("config.json", "config_v5.json"))
    assert spec_from_hf(old).config == spec_from_hf(new).config
