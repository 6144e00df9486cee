"""2:4 weights that several networks share, or both layers of one: they are written once, or not at all."""

import pytest
import torch
from compare import assert_same_bits
from convert_models import Inline
from torch import nn

import sparse24
from sparse24 import ConvertConfig, Recipe, WeightPruning, prune24, soft_threshold24
from sparse24.mlp.weights import soft_scale


def two(kinds=("both", "both")):
    torch.manual_seed(0)
    model = nn.Sequential(*(sparse24.nn.ReLU2MLP(32, 64, recipe=Recipe(sparse_weights=kind)) for kind in kinds))
    for name in ("up_proj", "down_proj"):
        model[1].get_submodule(name).weight = model[0].get_submodule(name).weight
    return model


def tied(kind):
    torch.manual_seed(0)
    module = sparse24.nn.ReLU2MLP(32, 64, recipe=Recipe(sparse_weights=kind))
    module.down_proj.weight = nn.Parameter(module.up_proj.weight.detach().t())
    return module


@pytest.mark.parametrize("soft", [False, True])
def test_settled_once(soft):
    model = two()
    pruning = WeightPruning(model, soft=soft)
    pruning.step()
    expected = [w.detach().clone() for w in model[0].entering_weights()]
    pruning.settle_()
    for actual, w in zip(model.parameters(), expected, strict=True):
        assert_same_bits(actual, w)


@pytest.mark.parametrize("of", ["gradients", "weights"])
def test_decays_once(of):
    model = two()
    pruning = WeightPruning(model, decay=0.25, decay_of=of)
    pruning.step()
    w = model[0].up_proj.weight
    before, rest = w.detach().clone(), (w - prune24(w)).detach()
    w.grad = torch.zeros_like(w)
    pruning.decay_()
    assert_same_bits(w.grad if of == "gradients" else before - 0.25 * rest, 0.25 * rest if of == "gradients" else w)


def embedded():
    model = nn.Sequential(two()[0], nn.Embedding(64, 32))
    model[1].weight = model[0].up_proj.weight
    return model


@pytest.mark.parametrize("make", [lambda: tied("up"), lambda: two(("up", "both")), embedded])
def test_what_something_else_multiplies_dense_is_not_written_to(make):
    model = make()
    with pytest.raises(
        RuntimeError, match=r"to be pruned alike wherever they are shared \(or settle=False\), got tied"
    ):
        WeightPruning(model)
    pruning = WeightPruning(model, settle=False)
    pruning.step()
    before = [w.detach().clone() for w in model.parameters()]
    with pytest.raises(RuntimeError, match="to be pruned alike"):
        pruning.settle_()
    for w, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(w, old)


def test_tied_layers_with_the_same_groups_are_settled():
    module = tied("both")
    pruning = WeightPruning(module, soft=True)
    pruning.step()
    w = module.up_proj.weight
    expected = soft_threshold24(w.detach(), -1, soft_scale(w))
    pruning.settle_()
    assert_same_bits(w, expected)
    assert_same_bits(module.down_proj.weight, expected.t())


def converted(**options):
    torch.manual_seed(0)
    model = nn.Sequential(Inline(d=32, hidden=64), Inline(d=32, hidden=64)).eval()
    names = list(dict(model[0].named_children()))
    model[1].get_submodule(names[0]).weight = model[0].get_submodule(names[0]).weight
    assert sparse24.convert(model, ConvertConfig(min_tokens=1 << 40, **options), quiet=True).converted == ["0", "1"]
    return model


@pytest.mark.parametrize("how", ["hard", "soft", "adapters"])
@torch.no_grad()
def test_merged_once(how):
    x = torch.randn(64, 32)
    model = converted(sparse_weights="up", adapters=4 if how == "adapters" else 0)
    if how == "soft":
        WeightPruning(model, soft=True).step()
    expected = model(x)
    sparse24.revert(model, merge=True)
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_different_adapters_are_not_merged():
    x = torch.randn(64, 32)
    model = converted(sparse_weights="up", adapters=4)
    model[0].sparse24_up_left.mul_(2)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"sparse24\.revert: expected weights that several networks share to be the"):
        sparse24.revert(model, merge=True)
    assert_same_bits(model(x), expected)
