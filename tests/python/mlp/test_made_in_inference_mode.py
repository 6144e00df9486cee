"""Masks, scales and adapters that are made in `torch.inference_mode`, and trained with outside of it."""

import pytest
import torch
from compare import assert_same_bits
from convert_models import Inline
from pruned_networks import BOTH, change, network

import sparse24
from sparse24 import ConvertConfig, WeightPruning

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"soft": True}, {"refresh_steps": 2}], ids=str)
def test_masks_and_scales(options):
    model, other = network(), network()
    prunings = [WeightPruning(m, **options) for m in (model, other)]
    for step in range(4):
        with torch.inference_mode(step == 0):
            prunings[0].step()
        prunings[1].step()
        for m in (model, other):
            m(X).square().sum().backward()
            change(m, step)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p.grad, q.grad)


def add(model):
    model.add_adapters_(4)


def fit(model):
    config = ConvertConfig(recipe=BOTH, adapters=4, calibration=[X])
    assert sparse24.convert(model, config, quiet=True).converted == [""]


@pytest.mark.parametrize(
    ("make", "adapt"), [(network, add), (lambda: Inline(d=32, hidden=64), fit)], ids=["add", "fit"]
)
def test_adapters_are_trained(make, adapt):
    made = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = make()
        with torch.inference_mode(inside):
            adapt(model)
        model(X).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        made.append(model)
    for p, q in zip(*(m.parameters() for m in made), strict=True):
        assert_same_bits(p, q)
