"""What techniques do to a module: chained, said once, and refused where something would be lost."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from cordee.model.cache import KVCache
from cordee.model.placement import BlockPlacement, ConflictError, Placement, after, altered, before
from tests.model import tiny
from tests.parallel import models


def times(factor: float):
    return lambda x: x * factor


def test_wrappers_are_chained_and_recorded():
    placement = BlockPlacement()
    assert not placement.applied and placement.enter(3.0) == 3.0
    placement.wrap("enter", "first", after(lambda x: x + 1))
    placement.wrap("enter", "second", before(times(2)))
    placement.wrap("enter", "third", after(times(10)))
    assert placement.enter(3.0) == 70.0
    told = [(change.hook, change.by) for change in placement.applied]
    assert told == [("enter", name) for name in ("first", "second", "third")]
    assert placement.applied and placement.exit(3.0) == 3.0


def test_a_hook_cannot_be_overwritten():
    placement = BlockPlacement()
    with pytest.raises(AttributeError):
        placement.enter = times(2)
    placement.wrap("enter", "first", after(times(2)))
    with pytest.raises(ConflictError) as told:
        placement.replace("enter", "second", times(3))
    assert (told.value.hook, told.value.by, told.value.other) == ("enter", "second", "first")
    assert placement.enter(1.0) == 2.0


@pytest.mark.parametrize("name", ["view_of_weight", "product", "applied", "prodct"])
def test_nothing_is_changed_without_a_record(name: str):
    linear = tiny.model(tiny.config()).layers["0"].attention.qkv
    with pytest.raises(AttributeError):
        setattr(linear.placement, name, times(2))
    assert not linear.placement.applied and linear.placement.view("weight")(linear.weight) is linear.weight


def test_one_technique_takes_over_from_another_by_name():
    placement = BlockPlacement()
    placement.wrap("enter", "border", after(times(2)))
    placement.replace("enter", "overlap", times(3), instead_of="border", final=True)
    assert placement.enter(1.0) == 3.0
    assert [change.by for change in placement.applied] == ["overlap"]
    wrap = partial(placement.wrap, "enter", "late", after(times(2)))
    replace = partial(placement.replace, "enter", "late", times(2), instead_of="overlap")
    for change in (wrap, replace):
        with pytest.raises(ConflictError) as told:
            change()
        assert (told.value.by, told.value.other) == ("late", "overlap")


def test_a_fact_is_said_once():
    placement = tiny.model(tiny.config()).layers["0"].attention.placement
    placement.set("one", first_head=3)
    placement.set("two", first_head=3)
    with pytest.raises(ConflictError) as told:
        placement.set("three", first_head=4)
    assert (told.value.hook, told.value.by, told.value.other) == ("first_head", "three", "one")
    assert placement.first_head == 3


@pytest.mark.parametrize("name", ["core", "view_of_weight", "applied"])
def test_unknown_seams_are_refused(name):
    with pytest.raises(AssertionError):
        BlockPlacement().wrap(name, "test", after(times(2)))


@pytest.mark.parametrize("name", models.MODELS)
def test_every_seam_of_every_module_is_noticed(name):
    model = tiny.model(models.MODELS[name])
    assert altered(model) is None
    kinds = {type(module): path for path, module in model.named_modules()}
    for path in kinds.values():
        own = getattr(model.get_submodule(path), "placement", Placement())
        for seam in vars(own).keys() - {"applied"}:
            changed = copy.deepcopy(model)
            placement = changed.get_submodule(path).placement
            if seam not in own.hooks:
                placement.set("test", **{seam: object()})
            else:
                placement.wrap(seam, "test", after(times(2)))
            assert altered(changed) is not None
            assert altered(changed, honoured=(seam,)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.register_forward_hook(lambda *a: None),
        lambda mlp: mlp.down.register_forward_pre_hook(lambda *a: None),
        lambda mlp: setattr(mlp, "forward", mlp.forward),
    ],
)
def test_what_is_done_beside_the_seams_is_noticed(change):
    model = tiny.model(tiny.config())
    change(model.layers["0"].mlp)
    assert altered(model) is not None


def bent(inner):
    def product(x, weight, bias, before):
        y = inner(x, weight, bias, before=before)
        return y + 0.3 * torch.sin(y * 9)

    return product


def test_latent_attention_does_not_multiply_past_what_is_done_to_a_projection():
    """Its short way over cached tokens knows of the weight alone."""
    config = tiny.config(tiny.layer(tiny.latent_attention()))
    ids = torch.randint(0, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    plain, model = tiny.model(config), tiny.model(config)
    model.layers["0"].attention.kv_up.placement.wrap("product", "test", bent)
    cache = KVCache(config, batch_size=2, max_length=7)
    with torch.inference_mode():
        cached = torch.cat([model(part, cache=cache) for part in ids.split(3, 1)], 1)
        torch.testing.assert_close(cached, model(ids))
        assert not torch.allclose(cached, plain(ids), atol=1e-3)
