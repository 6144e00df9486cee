"""Calls of modules for inference pass the checks of relu2_mlp by, with its bits, or are left to it."""

import sys

import pytest
import torch
from compare import assert_same_bits
from small_network import HIDDEN, OUT, D, tokens

import sparse24
from sparse24.mlp import inference


def module(device, dtype, *, quantised=False, **options):
    torch.manual_seed(0)
    made = sparse24.nn.ReLU2MLP(D, HIDDEN, OUT, **options, device=device, dtype=dtype, min_tokens=8)
    return made.quantize_() if quantised else made


@torch.no_grad()
def in_full(m, x, **options):
    up, down = m.up_proj, m.down_proj
    scales = [getattr(layer, "weight_scale", None) for layer in (up, down)]
    options = {"w1_scale": scales[0], "w2_scale": scales[1], "threshold": m.threshold, "min_tokens": 8} | options
    return sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, **options)


@pytest.fixture
def alone(monkeypatch):
    """Calls that are left to relu2_mlp fail."""

    def fails(*_args, **_kwargs):
        raise AssertionError("relu2_mlp was called")

    def use():
        monkeypatch.setattr("sparse24.nn.relu2_mlp", fails)
        monkeypatch.setattr(sys.modules["sparse24.convert.run"], "relu2_mlp", fails)

    return use


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"threshold": 0.25}], ids=str)
def test_16_bits(device, dtype, options, alone):
    m = module(device, dtype, **options)
    x = tokens(24, dtype, device)
    expected = in_full(m, x)
    alone()
    with torch.no_grad():
        assert_same_bits(m(x), expected)
        assert_same_bits(m(x.view(2, 3, 4, D)), expected.view(2, 3, 4, OUT))
    with torch.inference_mode():
        assert_same_bits(m(x), expected)


@pytest.mark.parametrize("scale", ["bounded", "given", "row"])
def test_float8(device, scale, alone):
    m = module(device, torch.bfloat16, quantised=True, bias=scale == "row")
    x = tokens(24, torch.bfloat16, device)
    scale_y = torch.tensor(0.01, device=device) if scale == "given" else None
    factor = m.up_proj.scale_y_factor if scale == "bounded" else None
    expected = in_full(m, x, scale_y=scale_y, scale_y_factor=factor)
    alone()
    with torch.no_grad():
        assert_same_bits(m(x, scale_y), expected)


@pytest.mark.parametrize("config", ["bf16", "fp8"])
def test_converted(device, config, alone):
    torch.manual_seed(0)
    layers = torch.nn.Linear(D, HIDDEN), Square(), torch.nn.Linear(HIDDEN, OUT)
    m = torch.nn.Sequential(*layers).to(device, torch.bfloat16).eval()
    x = tokens(24, torch.bfloat16, device)
    with torch.no_grad():
        before = m(x)
    sparse24.convert(m, sparse24.ConvertConfig(dtype=config, min_tokens=8), quiet=True)
    alone()
    with torch.no_grad():
        out = m(x)
    assert (out - before).norm() < 0.3 * before.norm()
    assert not torch.equal(out, before)


class Square(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


def left(m, x, scale_y=None):
    """Whether a call is left to relu2_mlp."""
    found = []

    def spy(*args, **kwargs):
        found.append(inference.inferred(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse24.nn.inferred", spy)
        out = m(x, scale_y)
    taken = bool(found) and found[-1] is not None
    assert not taken or found[-1] is out
    return not taken


@torch.no_grad()
@pytest.mark.usefixtures("not_by_few_tokens")
def test_what_is_left_to_relu2_mlp(device):
    x = tokens(24, torch.bfloat16, device)
    m = module(device, torch.bfloat16)
    assert not left(m, x)
    assert left(m, x[:7]) and left(m, x[:0]) and left(m, x[0])
    assert left(module(device, torch.bfloat16, precision="fp8"), x)
    assert left(module(device, torch.float32), x)
    with torch.autocast(device, torch.float16):
        assert left(m, x)
    assert left(module(device, torch.bfloat16, recipe=sparse24.Recipe(sparse_weights="up")), x)
    m.sparse = False
    assert left(m, x)
    m = module(device, torch.bfloat16, quantised=True)
    assert not left(m, x) and left(m, x, torch.full((24,), 0.01, device=device))
    with pytest.raises(RuntimeError, match="sparse24.relu2_mlp: expected scale_y"):
        m(x, torch.full((23,), 0.01, device=device))
