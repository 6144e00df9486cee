"""Conversion of networks whose weights are float8 with a scale."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from convert_models import EXACT, HIDDEN, D, Inline, WithModule, assert_near, randomize
from data import normal
from torch import nn

import sparse24
from sparse24.nn import QuantizedLinear


class Float8Linear(QuantizedLinear):
    """One scale for all rows, and a static one for the input."""

    def __init__(self, linear):
        super().__init__(linear)
        self.weight_scale = self.weight_scale.amax()

    def forward(self, x):
        scale = self.input_scale.to(x.dtype)
        x = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)


def quantised(device, change=lambda module: None, bias=True):
    module = randomize(WithModule(bias=bias)).to(device, torch.bfloat16)
    for name in ("up_proj", "down_proj"):
        setattr(module, name, QuantizedLinear(getattr(module, name)))
    change(module)
    return module


@pytest.mark.parametrize("static", [False, True])
def test_float8_weights(device, static):
    """With one scale per row, or a single one; the static scale of the second layer's input is the activation's."""

    def change(module):
        for name in ("up_proj", "down_proj") if static else ():
            layer = Float8Linear(getattr(WithModule(bias=True), name)).to(device, torch.bfloat16)
            layer.register_buffer("input_scale", torch.tensor(0.02, device=device))
            setattr(module, name, layer)

    module = quantised(device, change)
    up, down = module.up_proj, module.down_proj
    x = normal(21, D, dtype=torch.bfloat16).to(device)
    expected = sparse24.relu2_mlp(
        x,
        up.weight,
        down.weight,
        up.bias,
        down.bias,
        w1_scale=up.weight_scale,
        w2_scale=down.weight_scale,
        scale_y=torch.tensor(0.02, device=device) if static else None,
        min_tokens=0,
    )
    assert sparse24.convert(module, EXACT, quiet=True).converted == [""]
    assert_same_bits(module(x), expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_an_input_scale_of_zero(device, sparse):
    """What ``amax / 448`` of a calibration with zeros is: the activation saturates, and nothing is NaN."""
    module = quantised(device, bias=True)
    module.down_proj.register_buffer("input_scale", torch.zeros(1, device=device))
    assert sparse24.convert(module, EXACT, quiet=True).converted == [""]
    module.sparse = sparse
    out = module(normal(21, D, dtype=torch.bfloat16).to(device))
    assert out.isfinite().all()
    bias = module.down_proj.bias.expand_as(out)
    assert_near([out], [bias], 1e-2)  # 448 times a scale that is floored is next to nothing


GELU = "its activation is not zero for negative inputs, as that of a leaky or smoothed variant"
FLOAT8_REFUSALS = {
    "no scale": (
        lambda m: delattr(m.up_proj, "weight_scale"),
        "up_proj is float8 without a weight_scale in float32, one or one per row",
    ),
    "blocks": (
        lambda m: setattr(m.up_proj, "weight_scale", torch.ones(2, 2)),
        "up_proj is float8 without a weight_scale in float32, one or one per row",
    ),
    "one": (
        lambda m: setattr(m, "down_proj", nn.Linear(HIDDEN, D)),
        "of its weights one is float8 and one is not",
    ),
    "input scales": (
        lambda m: m.down_proj.register_buffer("input_scale", torch.ones(3)),
        "the input_scale of down_proj is not one float32 number",
    ),
    "activation": (
        lambda m: setattr(m, "act_fn", nn.GELU()),
        f"{GELU} (up_proj: QuantizedLinear, act_fn: GELU, down",
    ),
}


@pytest.mark.parametrize("name", FLOAT8_REFUSALS)
def test_refused_float8(device, name):
    change, reason = FLOAT8_REFUSALS[name]
    assert sparse24.convert(quantised(device, change), quiet=True).skipped[""].startswith(reason)


def test_float8_weights_that_come_without_a_scale(device):
    """A state that is assigned to a network of other layers."""
    module = Inline().to(device)
    sparse24.convert(module, quiet=True)
    state = {name: t.to(torch.float8_e4m3fn) for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="^sparse24.relu2_mlp: expected w1_scale to be a tensor for a float8 weight"):
        module(torch.randn(4, D, device=device, dtype=torch.bfloat16))


def test_refused_precision(device):
    config = sparse24.ConvertConfig("bf16")
    assert sparse24.convert(quantised(device), config, quiet=True).skipped == {"": "its weights are float8"}
    fp8 = sparse24.ConvertConfig("fp8")
    for module, reason in (
        (Inline(hidden=176), "176 hidden features are no multiple of 32: it would never run sparse"),
        (Inline(d=72), "fp8 needs multiples of 16 features, it has 72 and 72"),
    ):
        assert sparse24.convert(module, fp8, quiet=True).skipped == {"": reason}
        assert sparse24.convert(module, quiet=True).converted == [""]


def test_weights_made_in_inference_mode_are_not_copied(device):
    """They count no changes, so that each call quantises them; that is said once."""
    with torch.inference_mode():
        module = randomize(WithModule(bias=True)).to(device, torch.bfloat16)
        x = normal(21, D, dtype=torch.bfloat16).to(device)
        with pytest.warns(UserWarning, match="no copies of weights are kept that were made in inference mode"):
            sparse24.convert(module, sparse24.ConvertConfig(dtype="fp8", min_tokens=0), quiet=True)
            module.eval()
            out = module(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same_bits(module(x), out)
    assert not dict(module.named_buffers())
