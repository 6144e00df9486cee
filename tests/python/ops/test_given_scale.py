"""Given scales that cannot be divided by: zero, which ``amax / 448`` of zeros is, or subnormal; and unusual ones."""

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import activations, integers
from torch import nn

import sparse24

TINY = torch.finfo(torch.float32).tiny
#: The last two of them have finite inverses.
SMALL = (0.0, -0.0, 1e-45, 1e-39, -1e-39, 2.0**-127, TINY * 0.75)
OTHERS = (TINY, -TINY, -0.37, 3e38, torch.inf, -torch.inf, torch.nan)
SCALING = pytest.mark.parametrize("scaling", ["row", "tensor"])


def mixed(count, scaling, scales=SMALL + OTHERS):
    """One for each row, of which the first is an ordinary one, or each of them alone."""
    if scaling == "tensor":
        return [torch.tensor([scale]) for scale in scales]
    return [torch.tensor([0.37, *scales]).repeat(count)[:count]]


@SCALING
@pytest.mark.parametrize("op", [sparse24.quantize_fp8, sparse24.compress_fp8], ids=lambda op: op.__name__)
def test_conversions(device, dtype, scaling, op):
    x = activations(45, 96, dtype)
    reference = getattr(oracle, op.__name__)
    for scale in mixed(45, scaling):
        options = {"scaling": scaling}
        got = op(x.to(device), scale.to(device), **options)
        for result, expected in zip(got, reference(x, scale, **options), strict=True):
            assert_same_bits(result, expected, f"scale {scale.tolist()}")


@SCALING
def test_conversion_along_tokens(device, scaling):
    x = activations(45, 96, torch.bfloat16)
    for scale in mixed(96, scaling):
        got = sparse24.compress_fp8(x.to(device), scale.to(device), "relu2", -2, scaling)
        for result, expected in zip(got, oracle.compress_fp8(x, scale, "relu2", -2, scaling), strict=True):
            assert_same_bits(result, expected, f"scale {scale.tolist()}")


@SCALING
def test_first_product(device, scaling):
    """linear_relu2 and linear_compress store what the conversions store, and count what saturates."""
    x, w = integers(45, 48, dtype=torch.bfloat16), integers(96, 48, dtype=torch.bfloat16, seed=1)
    h = (x.float() @ w.float().t()).bfloat16()
    for scale in mixed(45, scaling):
        args = (x.to(device), w.to(device), None, None, None, scale.to(device))
        values, meta, used, _, saturated = sparse24.linear_compress(*args, out_dtype=torch.float8_e4m3fn)
        for result, expected in zip(
            (values, meta, used), oracle.compress_fp8(h, scale, "relu2", -1, scaling), strict=True
        ):
            assert_same_bits(result, expected, f"scale {scale.tolist()}")
        dense, _, dense_saturated = sparse24.linear_relu2(*args, out_dtype=torch.float8_e4m3fn)
        y = h.float().relu().square()
        assert_same_bits(dense, oracle.quantize_fp8(y, scale, scaling)[0], f"scale {scale.tolist()}")
        beyond = (y / oracle.used_scale(scale, scaling)).abs() > 448
        assert dense_saturated.item() == beyond.sum()
        pattern = oracle.Pattern.of_meta(meta, 45, 96, torch.float8_e4m3fn, -1)
        assert saturated.item() == (beyond & pattern.mask()).sum()


@pytest.mark.parametrize("scale", SMALL)
def test_what_is_stored_with_a_small_scale_is_finite(device, scale):
    x = activations(4, 32, torch.bfloat16, specials=False).to(device)
    for source in (x, torch.zeros_like(x)):
        values, used = sparse24.quantize_fp8(source, torch.tensor([scale], device=device), "tensor")
        assert (values.float() * used).isfinite().all() and (used == TINY).all()


def test_prediction_with_a_small_factor(device):
    x = activations(5, 64, torch.bfloat16, specials=False).to(device)
    for factor in SMALL:
        predicted = sparse24.quantize_fp8_predict(x, torch.tensor([factor], device=device))[2]
        assert (predicted >= TINY).all() and predicted.isfinite().all()


def network(device, dtype=torch.bfloat16):
    x, w1, w2 = (activations(*shape, dtype, specials=False) for shape in ((8, 32), (64, 32), (32, 64)))
    return x.to(device), w1.to(device), w2.to(device)


PATHS = {"sparse": {}, "dense": {"sparse": False}, "unfused": {"fused": False}, "few": {"min_tokens": 100}}


@pytest.mark.parametrize("path", PATHS)
def test_network(device, path):
    """A token whose scale is zero is finite, and the others do not see it."""
    operands = network(device)
    options = {"precision": "fp8", "min_tokens": 0} | PATHS[path]
    scale = torch.full((8,), 0.1, device=device)
    expected = sparse24.relu2_mlp(*operands, scale_y=scale, **options)
    scale[3] = 0
    got = sparse24.relu2_mlp(*operands, scale_y=scale, **options)
    assert got.isfinite().all()
    others = torch.arange(8, device=device) != 3
    assert_same_bits(got[others], expected[others])
    for small in SMALL:
        one = torch.tensor([small], device=device)
        assert sparse24.relu2_mlp(*operands, scale_y=one, **options).isfinite().all(), small


def test_training_with_a_scale_of_zero(device):
    leaves = [t.requires_grad_() for t in network(device)]
    out = sparse24.relu2_mlp(*leaves, precision="fp8", min_tokens=0, scale_y=torch.zeros(1, device=device))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), leaves))


def test_delayed_scale_of_a_batch_of_zeros(device):
    """As the documentation of linear_relu2 recommends: amax / 448 of an earlier call."""
    x, w1, _ = network(device)
    q, w_scale = sparse24.quantize_fp8(w1)
    one = torch.ones(1, device=device)
    *_, amax, _ = sparse24.linear_compress(*zip_scaled(torch.zeros_like(x), q, w_scale), None, one)
    for source in (torch.zeros_like(x), x):
        args = (*zip_scaled(source, q, w_scale), None, amax / 448)
        assert sparse24.linear_compress(*args)[0].float().isfinite().all()
        assert sparse24.linear_relu2(*args)[0].float().isfinite().all()


def zip_scaled(x, w, w_scale):
    q, scale = sparse24.quantize_fp8(x)
    return q, w, scale, w_scale


class Float8Linear(nn.Module):
    """As libraries store quantised layers: a weight, its scale and a static one of the input."""

    def __init__(self, w, input_scale):
        super().__init__()
        values, scale = sparse24.quantize_fp8(w)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale.flatten())
        self.register_buffer("input_scale", input_scale)

    def forward(self, x):
        return x @ (self.weight.float() * self.weight_scale[:, None]).to(x.dtype).t()


class Float8Network(nn.Module):
    def __init__(self, w1, w2):
        super().__init__()
        one = torch.ones(1, device=w1.device)
        self.up_proj, self.down_proj = Float8Linear(w1, one), Float8Linear(w2, torch.zeros_like(one))

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)).square())


def test_converted_network_with_an_input_scale_of_zero(device):
    x, w1, w2 = network(device)
    model = Float8Network(w1, w2)
    assert len(sparse24.convert(model, quiet=True).converted) == 1
    assert model(x).isfinite().all()


def test_statistics_with_a_scale_of_zero():
    stats = sparse24.activation_stats(activations(8, 64, torch.bfloat16, specials=False), fp8_scale=torch.zeros(1))
    assert stats.fp8_saturated == 1 and stats.fp8_underflow == 0
