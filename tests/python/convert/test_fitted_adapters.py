"""Adapters that a conversion fits: what they are fitted to, in which range they are, and when they are none."""

import pytest
import torch
from convert_models import Inline
from torch import nn

import sparse24
from sparse24 import ConvertConfig


def inputs(scale):
    return torch.randn(256, 32, generator=torch.Generator().manual_seed(1)) * scale


def product(dtype, scale):
    """What adapters add to a weight."""
    torch.manual_seed(0)
    model = Inline(d=32, hidden=64).to(dtype)
    config = ConvertConfig(sparse_weights="up", adapters=8, calibration=[inputs(scale).to(dtype)])
    assert sparse24.convert(model, config, quiet=True).converted == [""]
    return (model.sparse24_up_left.double() @ model.sparse24_up_right.double()).detach()


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_they_are_the_same_for_inputs_of_any_size(scale):
    """In float16 too, whose smallest numbers have few digits."""
    expected = product(torch.float32, 1.0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 5e-3)):
        assert (product(dtype, scale) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_none_are_fitted_to_what_is_not_finite(value):
    model = nn.Sequential(Inline(d=32, hidden=64), Inline(d=32, hidden=64))
    with torch.no_grad():
        next(model[0].parameters())[3, 4:8] = value
    report = sparse24.convert(model, ConvertConfig(sparse_weights="up", adapters=4), quiet=True)
    assert report.skipped == {"0": "adapters are fitted to weights, and its first one has NaN or infinity"}
    assert report.converted == ["1"] and all(p.isfinite().all() for p in model[1].parameters())


def test_calibration_needs_weights():
    with torch.device("meta"):
        model = Inline(d=32, hidden=64)
    wanted = r"sparse24\.convert: expected model to have its weights for calibration, got some on the meta device"
    with pytest.raises(RuntimeError, match=wanted):
        sparse24.convert(model, ConvertConfig(sparse_weights="up", calibration=[inputs(1)]))
    assert type(model) is Inline
