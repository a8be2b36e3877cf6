"""Every family is compared with its original, in a clone without golden vectors too."""

from __future__ import annotations

import pytest

from cordee.families.registry import families
from tests.families import test_originals
from tests.families.random_mixtures import MIXTURES
from tests.families.random_models import MODELS


@pytest.mark.parametrize("name", families())
def test_the_family_has_an_original(name):
    import transformers

    types = {getattr(transformers, f"{kind}Config").model_type for kind in MODELS | MIXTURES}
    types |= {config["model_type"] for _, config in test_originals.MODELS.values()}
    assert types & set(families()[name].model_types), "add it to random_models.py or originals.py"
