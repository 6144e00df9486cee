"""linear_relu2_gradient_fp8: bit for bit the separate steps, wherever the sums of the product are exact."""

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, integers, relayout
from oracle import FP8
from roots import round_to

import sparse24

#: No tokens, tails of groups, of tiles and of the padding, tokens in multiples of 32, no D, no features.
SHAPES = [
    (0, 64, 96),
    (1, 64, 16),
    (2, 16, 64),
    (127, 80, 176),
    (129, 64, 1888),
    (32, 32, 192),
    (300, 0, 64),
    (33, 16, 0),
]
NAMES = ("dh", "dh_transposed", "y_transposed", "amax", "saturated")


def operands(tokens, depth, features, device, seed=0, specials=False):
    grad = integers(tokens, depth, dtype=FP8, limit=3, seed=seed)
    w = integers(features, depth, dtype=FP8, limit=3, seed=seed + 1)
    if specials and depth:
        grad[::5, 0] = w[::7, 0] = torch.nan
    h = activations(tokens, features, torch.bfloat16, seed=seed + 2, specials=specials)
    y = oracle.quantize_fp8(h.float().relu().square(), torch.tensor([0.3]), "tensor")[0]
    scales = (torch.tensor([s]) for s in (0.75, 1.25, 0.3, 0.02))
    return [t.to(device) for t in (grad, w, y, *scales)]


def transposed(codes):
    rows, cols = codes.shape
    out = torch.zeros(cols, oracle.round_up(rows, 32), dtype=torch.uint8)
    out[:, :rows] = codes.view(torch.uint8).t()
    return out.view(FP8)


def reference(grad, w, y, *scales):
    """From the definition."""
    grad, w, y, *scales = (t.cpu().float() for t in (grad, w, y, *scales))
    scale_grad, scale_w, scale_y, scale_dh = scales
    product = round_to(grad @ w.t() + 0.0, torch.bfloat16).float() * (2 * y.sqrt())
    to_dh = scale_grad * scale_w * scale_y.sqrt()
    scaled = product * (to_dh * scale_dh.reciprocal())
    dh = oracle.quantize_fp8(scaled, torch.ones(1), "tensor")[0]
    found = product.abs().nan_to_num(nan=0.0)
    amax = (found.max().reshape(1) if found.numel() else torch.zeros(1)) * to_dh
    return dh, transposed(dh), transposed(y.to(FP8)), amax, (scaled.abs() > 448).sum().to(torch.int32).reshape(1)


def check(*args):
    for name, result, expected in zip(NAMES, sparse24.linear_relu2_gradient_fp8(*args), reference(*args), strict=True):
        assert_same_bits(result, expected, name)
        assert result.device == args[0].device and result.is_contiguous()


@pytest.mark.parametrize("specials", [True, False], ids=["specials", "finite"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(poisoned_memory, device, shape, specials):
    check(*operands(*shape, device, specials=specials))


def test_many_tiles(cuda):
    for tokens, features in ((2048, 4128), (4100, 1664)):
        check(*operands(tokens, 128, features, cuda, seed=5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    args = operands(21, 96, 96, device, seed=4)
    expected = sparse24.linear_relu2_gradient_fp8(*args)
    if layout != "expanded":
        args[:3] = (relayout(t, layout) for t in args[:3])
        for name, a, b in zip(NAMES, sparse24.linear_relu2_gradient_fp8(*args), expected, strict=True):
            assert_same_bits(a, b, name)


def test_errors(checked_device):
    def made(*shape, dtype=FP8):
        return torch.ones(*shape, device=checked_device).to(dtype)

    one = made(1, dtype=torch.float32)
    good = [made(4, 16), made(64, 16), made(4, 64), one, one, one, one]
    wrong = {
        "grad to be float8_e4m3fn, got bfloat16": (0, made(4, 16, dtype=torch.bfloat16)),
        "grad to have a multiple of 16 columns, got 24": (0, made(4, 24)),
        "w to have 16 columns .columns of grad., got 32": (1, made(64, 32)),
        "w to have a multiple of 16 rows, got 40": (1, made(40, 16)),
        "y to have 4 rows .rows of grad., got 5": (2, made(5, 64)),
        "y to have 64 columns .rows of w., got 48": (2, made(4, 48)),
        "scale_grad to be float32, got bfloat16": (3, made(1, dtype=torch.bfloat16)),
        "scale_dh to have 1 element .one scale., got 4": (6, made(4, dtype=torch.float32)),
    }
    for rule, (place, value) in wrong.items():
        args = [*good]
        args[place] = value
        with pytest.raises(RuntimeError, match=rf"sparse24\.linear_relu2_gradient_fp8: expected {rule}"):
            sparse24.linear_relu2_gradient_fp8(*args)
