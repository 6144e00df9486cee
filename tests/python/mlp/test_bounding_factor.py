"""bounding_factor: a scale of the activation that never saturates, for any input, and what uses it."""

import io

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, WithModule, randomize
from data import normal
from hypothesis import given
from hypothesis import strategies as st
from oracle import FP8

import sparse24
from sparse24.nn import QuantizedLinear

D, HIDDEN = 64, 160


def weights(device, dtype=torch.bfloat16, seed=1):
    return normal(HIDDEN, D, dtype=dtype, seed=seed).to(device)


def saturated(x, w1, factor, w1_scale):
    """How many kept activations do not fit, by the op's own count."""
    q, scale_x, scale_y = sparse24.quantize_fp8_predict(x, factor)
    return int(sparse24.linear_compress(q, w1, scale_x, w1_scale, None, scale_y)[4])


def test_is_the_largest_norm(device):
    w = weights(device, torch.float32)
    (q, scale), largest = sparse24.quantize_fp8(w.bfloat16()), w.double().norm(dim=1).max().square() / 448
    torch.testing.assert_close(sparse24.bounding_factor(w), 1.01 * largest.float().reshape(1))
    rows = (q.double() * scale).norm(dim=1).max().square() / 448
    for s in (scale, scale.reshape(-1)):
        torch.testing.assert_close(sparse24.bounding_factor(q, s), 1.01 * rows.float().reshape(1))
    one = sparse24.bounding_factor(q, scale.amax().reshape(1))
    torch.testing.assert_close(
        one, 1.01 * (q.double().norm(dim=1).max() * scale.amax()).square().float().reshape(1) / 448
    )


@given(exponent=st.integers(-12, 12), row=st.integers(0, HIDDEN - 1), sign=st.sampled_from([1, -1]))
def test_never_saturates(exponent, row, sign):
    """Not even where x is parallel to a row: a tenth less is too little then."""
    w1, w1_scale = sparse24.quantize_fp8(weights("cpu"))
    w = w1.float() * w1_scale
    longest = w[w.norm(dim=1).argmax()]
    x = torch.stack([w[row] * sign, longest]).mul(2.0**exponent).bfloat16()
    factor = sparse24.bounding_factor(w1, w1_scale)
    assert saturated(x, w1, factor, w1_scale) == 0
    assert saturated(x, w1, factor * 0.9, w1_scale) > 0


@pytest.mark.parametrize("tiny", ["x", "weights", "both"])
def test_tiny_numbers_stay_finite(device, tiny):
    x, w1, w2 = (
        normal(33, D, dtype=torch.bfloat16).to(device),
        weights(device),
        weights(device, seed=2).t().contiguous(),
    )
    x = x * 1e-25 if tiny != "weights" else x
    w1 = w1 * (0.0 if tiny == "weights" else 1e-25 if tiny == "both" else 1.0)
    factor = sparse24.bounding_factor(w1)
    out = sparse24.relu2_mlp(x, w1, w2, precision="fp8", scale_y_factor=factor, min_tokens=0)
    assert out.isfinite().all() and out.abs().max() <= 1e-20


def test_error_is_that_of_the_exact_scale(device):
    """The bound is far above what occurs; float8 has bits enough below it."""
    x, w1, w2 = normal(128, 512, dtype=torch.bfloat16), normal(1024, 512, dtype=torch.bfloat16, seed=1), None
    w2 = normal(256, 1024, dtype=torch.bfloat16, seed=2)
    x, w1, w2 = x.to(device), (w1 / 22).to(device), (w2 / 32).to(device)
    y = torch.relu(x.double() @ w1.double().t()).square()
    values, meta = sparse24.compress(y.bfloat16())
    exact = sparse24.decompress(values, meta, *y.shape).double() @ w2.double().t()

    def error(**options):
        out = sparse24.relu2_mlp(x, w1, w2, precision="fp8", min_tokens=0, **options).double()
        return ((out - exact).norm() / exact.norm()).item()

    assert error(scale_y_factor=sparse24.bounding_factor(w1)) < 1.02 * error(fused=True)


def test_the_first_gemm_compresses_by_default(device):
    x, w1, w2 = (
        normal(65, D, dtype=torch.bfloat16).to(device),
        weights(device),
        weights(device, seed=2).t().contiguous(),
    )
    options = {"precision": "fp8", "min_tokens": 0}
    for scale in ({"scale_y_factor": sparse24.bounding_factor(w1)}, {"scale_y": torch.full((1,), 0.1, device=device)}):
        fused = sparse24.relu2_mlp(x, w1, w2, **options, **scale, fused=True)
        assert_same_bits(sparse24.relu2_mlp(x, w1, w2, **options, **scale), fused)


def expected_of(module, x):
    up, down = module.up_proj, module.down_proj
    scales = {"w1_scale": up.weight_scale, "w2_scale": down.weight_scale}
    factor = sparse24.bounding_factor(up.weight, up.weight_scale)
    return sparse24.relu2_mlp(x, up.weight, down.weight, **scales, scale_y_factor=factor, min_tokens=0)


def test_modules_without_bias_use_it(device):
    m = sparse24.nn.ReLU2MLP(D, HIDDEN, device=device, dtype=torch.bfloat16, min_tokens=0).quantize_()
    x = normal(65, D, dtype=torch.bfloat16, seed=3).to(device)
    expected = expected_of(m, x)
    assert_same_bits(m(x), expected)
    # Casts leave it alone, and it travels with the weights.
    assert_same_bits(m.to(torch.bfloat16)(x), expected)
    assert m.up_proj.scale_y_factor.dtype == torch.float32
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other = sparse24.nn.ReLU2MLP(D, HIDDEN, device=device, dtype=torch.bfloat16, min_tokens=0).quantize_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(other(x), expected)
    # A given scale goes before it.
    scale_y = torch.full((1,), 0.03, device=device)
    assert not torch.equal(m(x, scale_y), expected)


def test_with_a_bias_the_scale_is_computed(device):
    """Nothing bounds it then."""
    m = sparse24.nn.ReLU2MLP(D, HIDDEN, bias=True, device=device, dtype=torch.bfloat16, min_tokens=0).quantize_()
    up, down = m.up_proj, m.down_proj
    x = normal(65, D, dtype=torch.bfloat16, seed=3).to(device)
    scales = {"w1_scale": up.weight_scale, "w2_scale": down.weight_scale}
    expected = sparse24.relu2_mlp(x, up.weight, down.weight, up.bias, down.bias, **scales, min_tokens=0)
    assert_same_bits(m(x), expected)


def test_converted_networks_without_bias_use_it(device):
    module = randomize(WithModule(bias=False)).to(device, torch.bfloat16)
    for name in ("up_proj", "down_proj"):
        setattr(module, name, QuantizedLinear(getattr(module, name)))
    x = normal(21, module.up_proj.in_features, dtype=torch.bfloat16).to(device)
    expected = expected_of(module, x)
    assert sparse24.convert(module, EXACT, quiet=True).converted == [""]
    assert_same_bits(module(x), expected)


def test_refusals(device):
    q, scale = sparse24.quantize_fp8(weights(device))
    for arguments, text in (
        ((q[0], scale), "w to have 2 dimensions, got 1"),
        ((q.view(torch.uint8),), "w to be of a floating dtype, got uint8"),
        ((q,), "scale beside a float8_e4m3fn w, and only there, got none"),
        ((weights(device), scale), "scale beside a float8_e4m3fn w, and only there, got one"),
        ((q, scale[:3]), f"scale to have 1 or {HIDDEN} elements \\(rows of w\\), got 3"),
    ):
        with pytest.raises(RuntimeError, match=f"^sparse24.bounding_factor: expected {text}$"):
            sparse24.bounding_factor(*arguments)


def test_of_nothing(device):
    assert sparse24.bounding_factor(torch.empty(0, 8, device=device)).item() == 1
    assert (
        sparse24.bounding_factor(torch.empty(8, 0, device=device, dtype=FP8), torch.ones(1, device=device)).item() == 1
    )
