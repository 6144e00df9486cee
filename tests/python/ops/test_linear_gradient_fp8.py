"""linear_gradient_fp8: bit for bit the separate steps, wherever the sums of the product are exact."""

from dataclasses import dataclass

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, integers, relayout
from oracle import FP8, Pattern
from roots import round_to
from torch import Tensor
from training_reference import token_order

import sparse24

#: Tokens, D, F: no tokens, tails of groups, of tiles and of the padding, tokens in multiples of 32, no D, no features.
SHAPES = [
    (0, 64, 96),
    (1, 64, 32),
    (2, 16, 64),
    (127, 80, 160),
    (129, 64, 1888),
    (7, 208, 96),
    (32, 32, 192),
    (160, 144, 416),
    (300, 0, 64),
    (33, 16, 0),
]
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["natural", "interleaved"])
NAMES = (
    *("dh_values", "dh_tokens", "dh_tokens_meta", "y_tokens", "y_tokens_meta", "y_hot", "dh_hot"),
    *("amax", "saturated"),
)


@dataclass
class Problem:
    """Operands whose products and sums are exact in float32, and scales that are no powers of two."""

    grad: Tensor
    w: Tensor
    values: Tensor
    meta: Tensor
    scales: tuple[Tensor, ...]
    interleaved: bool = False
    hot: Tensor | None = None

    def run(self, op=sparse24.linear_gradient_fp8) -> tuple[Tensor, ...]:
        return op(self.grad, self.w, self.values, self.meta, *self.scales, self.interleaved, self.hot)


def problem(tokens, depth, features, device, *, seed=0, specials=False, interleaved=False, hot=None) -> Problem:
    grad = integers(tokens, depth, dtype=FP8, limit=3, seed=seed)
    w = integers(features, depth, dtype=FP8, limit=3, seed=seed + 1)
    if specials and depth:
        grad[::5, 0] = w[::7, 0] = torch.nan
    h = activations(tokens, features, torch.bfloat16, seed=seed + 2, specials=specials)
    scale_y = torch.tensor([0.3])
    values, meta, _ = oracle.compress_fp8(h, scale_y, "relu2", -1, "tensor")
    scales = (torch.tensor([0.75]), torch.tensor([1.25]), scale_y, torch.tensor([0.02]))
    operands = (t.to(device) for t in (grad, w, values, meta))
    hot = None if hot is None else torch.tensor(hot, dtype=torch.int64, device=device)
    return Problem(*operands, tuple(s.to(device) for s in scales), interleaved, hot)


def reference(p: Problem) -> tuple[Tensor, ...]:
    """From the definition."""
    (tokens, _), features = p.grad.shape, p.w.shape[0]
    pattern = Pattern.of_meta(p.meta, tokens, features, FP8, -1)
    grad, w, values = (t.cpu().float() for t in (p.grad, p.w, p.values))
    scale_grad, scale_w, scale_y, scale_dh = (s.cpu() for s in p.scales)
    dy = round_to(grad @ w.t() + 0.0, torch.bfloat16)
    product = pattern.gather(dy).float() * (2 * values.sqrt())
    to_dh = scale_grad * scale_w * scale_y.sqrt()
    scaled = product * (to_dh * scale_dh.reciprocal())
    one = torch.ones(1)
    dh = oracle.quantize_fp8(scaled, one, "tensor")[0]
    found = product.abs().nan_to_num(nan=0.0)
    amax = (found.max().reshape(1) if found.numel() else torch.zeros(1)) * to_dh
    saturated = (scaled.abs() > 448).sum().to(torch.int32).reshape(1)

    order = token_order(tokens, p.interleaved)
    hot = torch.empty(0, dtype=torch.int64) if p.hot is None else p.hot.cpu()
    along_tokens, whole = [], []
    for codes in (dh, p.values.cpu()):
        dense = pattern.scatter(codes).float()[order]
        along_tokens += oracle.compress_fp8(dense, one, "none", -2, "tensor")[:2]
        rows = torch.zeros(len(hot), oracle.round_up(tokens, 32))
        highest = -1
        for i, feature in enumerate(hot.tolist()):
            rows[i, :tokens] = dense[:, feature] if highest < feature < features else torch.nan
            highest = max(highest, feature)
        whole.append(oracle.quantize_fp8(rows, one, "tensor")[0])
    return dh, *along_tokens, whole[1], whole[0], amax, saturated


def check(p: Problem) -> None:
    results = p.run()
    for name, result, expected in zip(NAMES, results, reference(p), strict=True):
        assert_same_bits(result, expected, name)
        assert result.device == p.grad.device and result.is_contiguous()


@INTERLEAVED
@pytest.mark.parametrize("specials", [True, False], ids=["specials", "finite"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(poisoned_memory, device, shape, specials, interleaved):
    check(problem(*shape, device, specials=specials, interleaved=interleaved))


@INTERLEAVED
@pytest.mark.parametrize("tokens", [1, 30, 128, 261])
def test_dense_features(poisoned_memory, device, tokens, interleaved):
    for hot in ([], [0], [3, 4, 66, 127, 159], list(range(160)), [5, 5, -1, 160, 9, 2**40]):
        check(problem(tokens, 32, 160, device, seed=3, interleaved=interleaved, hot=hot))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    p = problem(21, 96, 96, device, seed=4, interleaved=True)
    expected = p.run()
    if layout != "expanded":
        p.grad, p.w, p.values = (relayout(t, layout) for t in (p.grad, p.w, p.values))
        for name, a, b in zip(NAMES, p.run(), expected, strict=True):
            assert_same_bits(a, b, name)


def test_many_tiles(cuda):
    """More tiles than multiprocessors, clusters that are not full, metadata beyond the last feature."""
    for tokens, features in ((2048, 4128), (4100, 1664)):
        check(problem(tokens, 128, features, cuda, seed=5, interleaved=True, hot=[1, 77, features - 1]))


def test_what_saturates_is_counted(device):
    p = problem(64, 32, 64, device, seed=6)
    *_, amax, saturated = p.run()
    assert saturated.item() > 0
    p.scales = (*p.scales[:3], amax * (1.01 / 448))
    *_, again, saturated = p.run()
    assert saturated.item() == 0 and torch.equal(again, amax)
    p.scales = (*p.scales[:3], amax * (0.9 / 448))
    *_, again, saturated = p.run()
    assert saturated.item() > 0 and torch.equal(again, amax)


def test_the_products_along_tokens_are_those_of_what_is_kept(device):
    """mm of the results with transposed operands: both weight gradients, without a copy of any operand."""
    p = problem(257, 48, 96, device, seed=7, interleaved=True)
    x = integers(257, 64, dtype=torch.bfloat16, seed=8).to(device)
    one = torch.ones(1, device=device)
    _, x_t, *_ = sparse24.quantize_fp8_both(x, one, interleaved=True)
    dh_values, dh_tokens, dh_meta, *_ = p.run()
    dense = sparse24.decompress(dh_tokens, dh_meta, x_t.shape[1], 96, -2).float()
    expected = dense.t() @ x_t.t().float()
    product = sparse24.mm(dh_tokens, dh_meta, x_t.t(), dim=-2, out_dtype=torch.float32)
    assert (product - expected).abs().max() <= 2e-3 * expected.abs().max()
    kept = sparse24.decompress(dh_values, p.meta, 257, 96).float()[token_order(257, True)]
    assert ((dense[:257] == kept) | (dense[:257] == 0)).all()


def test_errors(checked_device):
    def made(*shape, dtype=FP8):
        return torch.ones(*shape, device=checked_device).to(dtype)

    one = made(1, dtype=torch.float32)
    meta = torch.zeros(oracle.meta_bytes(4, 64, FP8, -1), dtype=torch.uint8, device=checked_device)
    good = [made(4, 16), made(64, 16), made(4, 32), meta, one, one, one, one]
    wrong = {
        "grad to be float8_e4m3fn, got bfloat16": (0, made(4, 16, dtype=torch.bfloat16)),
        "grad to have a multiple of 16 columns, got 24": (0, made(4, 24)),
        "w to have 16 columns .columns of grad., got 32": (1, made(64, 32)),
        "w to have a multiple of 32 rows, got 48": (1, made(48, 16)),
        "values to have 4 rows .rows of grad., got 5": (2, made(5, 32)),
        "values to have 32 columns .half the rows of w., got 16": (2, made(4, 16)),
        "values to be float8_e4m3fn, got float32": (2, made(4, 32, dtype=torch.float32)),
        "meta to have 2048 elements": (3, meta[:-1]),
        "scale_y to be float32, got bfloat16": (6, made(1, dtype=torch.bfloat16)),
        "scale_dh to have 1 element .one scale., got 4": (7, made(4, dtype=torch.float32)),
    }
    for rule, (place, value) in wrong.items():
        args = [*good]
        args[place] = value
        with pytest.raises(RuntimeError, match=rf"sparse24\.linear_gradient_fp8: expected {rule}"):
            sparse24.linear_gradient_fp8(*args)
    hot = torch.zeros(65, dtype=torch.int64, device=checked_device)
    with pytest.raises(RuntimeError, match="expected hot to have at most 64 elements .rows of w., got 65"):
        sparse24.linear_gradient_fp8(*good, False, hot)
