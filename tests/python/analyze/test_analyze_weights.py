"""The loss of a model with 2:4 weights, with adapters and without."""

import pytest
import torch
from convert_models import D, Inline, Stack
from data import normal
from torch import nn

import sparse24
from sparse24 import prune24


def test_losses_with_and_without_adapters():
    torch.manual_seed(0)
    model, x = Stack(Inline()), normal(64, D, dtype=torch.float32)
    model.train()
    target = model(x).detach()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def loss(output, batch):
        return (output - target).square().mean()

    found = sparse24.analyze_weights(model, [x], loss, ranks=(0, 8, D))
    assert list(found) == ["dense", "pruned", "rank 8", f"rank {D}"]
    layer = model.layers[0]
    h = torch.relu(x @ prune24(layer.c_fc.weight).t()).square()
    wanted = (h @ layer.c_proj.weight.t() + x - target).square().mean().item()
    assert found["dense"] == 0 and found["pruned"] == pytest.approx(wanted, rel=1e-4)
    assert found["pruned"] > found["rank 8"] > found[f"rank {D}"] < 1e-6
    assert type(layer) is Inline and model.training and set(model.state_dict()) == set(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_refusals():
    with pytest.raises(RuntimeError, match="sparse24.analyze_weights: expected batches to have at least one, got none"):
        sparse24.analyze_weights(Stack(Inline()), [])
    with pytest.raises(RuntimeError, match="expected model to have networks that can be converted"):
        sparse24.analyze_weights(nn.Linear(D, D), [torch.zeros(1, D)], lambda *_: 0.0)
    with pytest.raises(RuntimeError, match="expected loss to give a number, got a tensor of 128"):
        sparse24.analyze_weights(Stack(Inline()), [torch.zeros(2, D)])
    with pytest.raises(RuntimeError, match="expected loss to give a number, got None"):
        sparse24.analyze_weights(Stack(Inline()), [torch.zeros(2, D)], lambda *_: None)
    for ranks, sentence in ((4, "a sequence of numbers, got int"), ((4, -1), "at least 0, got -1")):
        with pytest.raises(RuntimeError, match=f"analyze_weights: expected ranks to be {sentence}"):
            sparse24.analyze_weights(Stack(Inline()), [torch.zeros(2, D)], ranks=ranks)
    for calibration in (torch.zeros(3, D), 4):  # rows are no batches
        with pytest.raises(RuntimeError, match="analyze_weights: expected calibration to be an iterable of batches"):
            sparse24.analyze_weights(Stack(Inline()), [torch.zeros(2, D)], calibration=calibration)


def test_a_conversion_is_not_undone():
    """What is converted for a look is reverted after it, and with it what was converted before."""
    model = Stack(Inline(), Inline())
    sparse24.convert(model.layers[1], quiet=True)
    with pytest.raises(RuntimeError, match="expected model to have no converted networks, got layers.1"):
        sparse24.analyze_weights(model, [torch.zeros(2, D)], lambda *_: 0.0)
    assert type(model.layers[0]) is Inline and type(model.layers[1]) is not Inline
