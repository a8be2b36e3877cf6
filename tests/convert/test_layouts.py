"""Every family in every layout that it allows, bit for bit; of what it does not allow, a reason."""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import product
from pathlib import Path

import pytest
import torch

from cordee.checkpoint import formats
from cordee.errors import ProblemError
from cordee.families.registry import families, spec_from_hf
from cordee.model.config import AttentionConfig, ModelConfig, MoEConfig
from tests.convert.test_megatron import ASCEND, CORE, EP, INEXPRESSIBLE, LEGACY, PP, TE, TP, VPP, convert, found_in
from tests.weights import models, tiny

FORMS = {"core": CORE, "te": TE, "legacy": LEGACY, "ascendspeed": ASCEND}
STAGES = (  # of 4 layers
    (),
    (PP, "2"),
    (PP, "3"),
    (PP, "3", "--num-layer-list", "1,2,1"),
    (PP, "2", "--num-layer-list", "3,1"),
    (PP, "2", VPP, "1"),
    (PP, "2", VPP, "2"),
)


def is_allowed(config: ModelConfig, tensor: int, stages: tuple[str, ...], expert: int) -> bool:
    """Whether a model can be laid out like this: groups of heads, layers and experts go round."""
    groups = [
        layer.attention.num_kv_heads if isinstance(layer.attention, AttentionConfig) else layer.attention.num_heads
        for layer in config.layers
    ]
    experts = [layer.mlp.router.num_experts for layer in config.layers if isinstance(layer.mlp, MoEConfig)]
    even = stages != (PP, "3")
    return even and all(count % tensor == 0 for count in groups) and (expert == 1 or bool(experts))


FAMILIES = [pair for pair in product(families(), FORMS) if pair[0] not in INEXPRESSIBLE[pair[1]]]


def one_form_each() -> list[tuple[str, str]]:
    """Every family in one of the forms that can express it, in other ones in turn; all are in `FAMILIES`."""
    forms = {kind: [form for name, form in FAMILIES if name == kind] for kind in families()}
    return [(kind, found[turn % len(found)]) for turn, (kind, found) in enumerate(forms.items()) if found]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "form"), FAMILIES)
def test_every_family_in_every_layout(tmp_path, kind, form):
    check_layouts(tmp_path, kind, form, list(product((1, 2, 4), STAGES, (1, 2, 4))), back=(STAGES[3], STAGES[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), one_form_each())
def test_every_family_in_some_layouts(tmp_path, kind, form):
    """Each number of tensor ranks, of stages, of expert ranks; other ones together for each family."""
    turn = FAMILIES.index((kind, form))
    sizes = (1, 2, 4)
    chosen = [(sizes[i % 3], STAGES[(turn + 2 * i) % len(STAGES)], sizes[(turn + i // 3 + i) % 3]) for i in range(3)]
    check_layouts(tmp_path, kind, form, chosen, back=STAGES)


def check_layouts(
    tmp_path: Path,
    kind: str,
    form: str,
    layouts: list[tuple[int, tuple[str, ...], int]],
    back: Collection[tuple[str, ...]],
) -> None:
    """With stages as in `back`, a layout is also written back to Hugging Face's form, and the files are compared."""
    config = models.tiny_preset(kind)
    spec = spec_from_hf(config)
    assert spec.config.num_layers == 4
    tiny.save(tmp_path / "hf", config, tiny.tensors_of(spec, torch.bfloat16))
    sparse = any(isinstance(layer.mlp, MoEConfig) for layer in spec.config.layers)
    for tensor, stages, expert in dict.fromkeys((t, s, e if sparse else 1) for t, s, e in layouts):
        flags = (*FORMS[form], TP, str(tensor), EP, str(expert), *stages)
        if not is_allowed(spec.config, tensor, stages, expert):
            assert {found.kind for found in found_in(tmp_path / "hf", tmp_path / "refused", *flags)} == {"divides"}
            continue
        convert(tmp_path / "hf", tmp_path / "mg", *flags, "--overwrite")
        check_same(tmp_path / "hf", tmp_path / "mg")
        if stages in back:
            convert(tmp_path / "mg", tmp_path / "back", "--overwrite")
            assert stored(tmp_path / "back") == stored(tmp_path / "hf")


def check_same(first: Path, second: Path) -> None:
    expected, found = formats.read(first), formats.read(second)
    assert expected.names() == found.names()
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.tensor(name), expected.tensor(name)), name


def stored(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor by its name, as they stand in a file of safetensors."""
    content = (path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    data = memoryview(content)[start:]
    return {name: (t["dtype"], t["shape"], bytes(data[slice(*t["data_offsets"])])) for name, t in header.items()}


@pytest.mark.parametrize("flags", [(*CORE, TP, "3"), (*CORE, PP, "5")], ids=" ".join)
def test_a_layout_that_is_refused(tmp_path, flags):
    tiny.save(tmp_path / "hf", models.tiny_preset("llama"))
    with pytest.raises(ProblemError) as caught:
        convert(tmp_path / "hf", tmp_path / "mg", *flags)
    assert {problem.kind for problem in caught.value.problems} == {"divides"}
