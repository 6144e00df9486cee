"""Activations with a threshold: bit for bit those of x without what does not exceed it, and their derivatives."""

import math

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import activations, integers, normal
from oracle import FP8, Pattern, above
from roots import round_to
from torch import Tensor

import sparse24

#: None; an integer, which is a number of every type; between two numbers of 16 bits; tiny, and beyond all of them.
THRESHOLDS = [0.0, 1.0, 0.3, 1e-45, 1e-30, 65503.0, 1e300]
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "relu2"])


def samples(dtype: torch.dtype) -> Tensor:
    x = activations(39, 96, dtype, seed=3)
    x[0, :9] = torch.tensor([1.0, -1.0, 0.3, 0.3004, 65504.0, math.inf, -math.inf, math.nan, -0.0])
    x[1, :32] = integers(32, dtype=dtype, seed=4)
    return x


@ACTIVATIONS
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_compress(device, dtype, activation, dim, threshold):
    x = samples(dtype)
    actual = sparse24.compress(x.to(device), activation, dim, threshold=threshold)
    for a, e in zip(actual, oracle.compress(above(x, threshold), activation, dim), strict=True):
        assert_same_bits(a, e)


@ACTIVATIONS
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_compress_fp8(device, dtype, activation, dim, scaling, given):
    x = samples(dtype)
    elements = 1 if scaling == "tensor" else x.shape[0] if dim == -1 else x.shape[1]
    scale = torch.linspace(0.01, 2, elements).reshape(-1, 1) if given else None
    for threshold in (0.0, 0.3, 1.0, 1e9):
        actual = sparse24.compress_fp8(
            x.to(device), None if scale is None else scale.to(device), activation, dim, scaling, threshold=threshold
        )
        expected = oracle.compress_fp8(above(x, threshold), scale, activation, dim, scaling)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("rows, cols", [(1, 16), (130, 1888), (300, 16384)])
def test_wide_rows(device, rows, cols):
    """The kernels with a row in registers, and those for wider ones."""
    x = normal(rows, cols, dtype=torch.bfloat16)
    for a, e in zip(
        sparse24.compress(x.to(device), "relu2", threshold=0.7), oracle.compress(above(x, 0.7), "relu2"), strict=True
    ):
        assert_same_bits(a, e)
    if cols % 32 == 0:
        actual = sparse24.compress_fp8(x.to(device), activation="relu2", threshold=0.7)
        for a, e in zip(actual, oracle.compress_fp8(above(x, 0.7), None, "relu2"), strict=True):
            assert_same_bits(a, e)


def of_linear(device: str, dtype: torch.dtype, specials: bool = False) -> tuple[list[Tensor], Tensor]:
    """x, w, scales and bias whose h are exact, and h as it is rounded."""
    hidden = torch.bfloat16 if dtype == FP8 else dtype
    x, w = integers(133, 64, dtype=dtype, seed=1), integers(288, 64, dtype=dtype, seed=2)
    scales = torch.full((133, 1), 0.25), torch.full((288,), 0.125)
    bias = integers(288, dtype=hidden, seed=5)
    if specials:
        bias[3], bias[40], bias[41] = math.nan, math.inf, -math.inf
    h = x.double() @ w.double().t() / 32 + bias.double()
    return [t.to(device) for t in (x, w, *scales, bias)], round_to(h, hidden)


LINEAR_DTYPES = pytest.mark.parametrize("values_dtype", [torch.bfloat16, torch.float16, FP8], ids=str)


@LINEAR_DTYPES
@pytest.mark.parametrize("specials", [False, True], ids=["finite", "specials"])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.7, 1e300])
def test_linear_is_the_two_steps(device, values_dtype, threshold, specials):
    args, h = of_linear(device, values_dtype, specials)
    for kind in ("relu2", "relu"):
        how = {"activation": kind, "threshold": threshold}
        y = oracle.activate(above(h, threshold), kind)
        dense, amax, _ = sparse24.linear_relu2(*args, None, out_dtype=h.dtype, **how)
        assert_same_bits(dense, round_to(y, h.dtype))
        finite = y[~y.isnan()]
        assert amax.item() == (finite.max().item() if finite.numel() else 0)
        *actual, _, amax, _ = sparse24.linear_compress(*args, None, out_dtype=h.dtype, **how)
        for a, e in zip(actual, oracle.compress(above(h, threshold), kind), strict=True):
            assert_same_bits(a, e)
        for a, e in zip(actual, sparse24.compress(h.to(device), kind, threshold=threshold), strict=True):
            assert_same_bits(a, e)


@LINEAR_DTYPES
@pytest.mark.parametrize("scaling", ["given", "row"])
def test_linear_to_float8_is_the_two_steps(device, values_dtype, scaling):
    args, h = of_linear(device, values_dtype)
    scale = torch.linspace(0.1, 3, 133).reshape(-1, 1)
    for threshold in (1.0, 2.7):
        left = above(h, threshold)
        given = scale.to(device) if scaling == "given" else None
        values, meta, used, *_ = sparse24.linear_compress(
            *args, given, scaling=scaling, out_dtype=FP8, threshold=threshold
        )
        if scaling == "given":
            expected = oracle.compress_fp8(left, scale, "relu2")
        else:
            q, computed = oracle.quantize_fp8(oracle.compress(left, "relu2")[0])
            expected = q, oracle.compress_fp8(left, computed, "relu2")[1], computed
        for a, e in zip((values, meta, used), expected, strict=True):
            assert_same_bits(a, e)
    dense, _, saturated = sparse24.linear_relu2(*args, scale.to(device), out_dtype=FP8, threshold=2.7)
    y = oracle.activate(above(h, 2.7), "relu2") * oracle.used_scale(scale, "row").reciprocal()
    assert_same_bits(dense, oracle.to_e4m3(y))
    assert saturated.item() == int((y > 448).sum())


REFUSED = [-1.0, -1e-30, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("threshold", REFUSED)
def test_refusals(checked_device, threshold):
    x, w = (torch.zeros(32, 32, dtype=torch.bfloat16, device=checked_device) for _ in range(2))
    rule = f"expected threshold to be finite and at least 0, got {threshold:g}"
    for op, call in (
        ("compress", lambda: sparse24.compress(x, "relu2", threshold=threshold)),
        ("compress_fp8", lambda: sparse24.compress_fp8(x, activation="relu", threshold=threshold)),
        ("linear_relu2", lambda: sparse24.linear_relu2(x, w, threshold=threshold)),
        ("linear_compress", lambda: sparse24.linear_compress(x, w, threshold=threshold)),
    ):
        with pytest.raises(RuntimeError, match=f"^sparse24.{op}: {rule}"):
            call()


def test_no_threshold_without_an_activation(checked_device):
    x = torch.zeros(32, 32, dtype=torch.bfloat16, device=checked_device)
    for op in (sparse24.compress, sparse24.compress_fp8):
        op(x, threshold=0.0)
        with pytest.raises(RuntimeError, match=r'threshold to be 0 \(activation "none"\), got 0.5'):
            op(x, threshold=0.5)


@ACTIVATIONS
@pytest.mark.parametrize("dim", [-1, -2])
def test_gradient_of_compress(device, dtype, activation, dim):
    """Of kept entries that exceed the threshold, against autograd in float64."""
    x = samples(dtype).nan_to_num(0, 100, -100).clamp(-100, 100)
    leaf = x.clone().to(device).requires_grad_()
    values, meta = sparse24.compress(leaf, activation, dim, threshold=0.3)
    grad = integers(*values.shape, dtype=dtype, seed=9)
    values.backward(grad.to(device))
    pattern = Pattern.of_meta(meta.cpu(), *x.shape, dtype, dim)
    exact = x.double().requires_grad_()
    y = torch.where(exact > torch.tensor(0.3).double().float().double(), exact, 0.0)
    (y if activation == "relu" else y.square()).backward(pattern.scatter(grad).double())
    torch.testing.assert_close(leaf.grad.cpu(), exact.grad.to(dtype), atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", ["linear_relu2", "linear_compress"])
@pytest.mark.parametrize("kind", ["relu2", "relu"])
def test_gradient_of_linear(device, dtype, op, kind):
    """In float16 the roots are computed again, with the threshold."""
    x, w, bias = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(37, 16), (96, 16), (96,)]))
    leaves = [t.clone().to(device).requires_grad_() for t in (x, w, bias)]
    stored, *rest = getattr(sparse24, op)(*leaves[:2], bias=leaves[2], activation=kind, threshold=2.5)
    grad = integers(*stored.shape, dtype=dtype, limit=1, seed=9)
    stored.backward(grad.to(device))
    exact = [t.double().requires_grad_() for t in (x, w, bias)]
    h = exact[0] @ exact[1].t() + exact[2]
    y = torch.where(h > 2.5, h, 0.0)
    y = y if kind == "relu" else y.square()
    assert 0 < y.count_nonzero() < (h > 0).count_nonzero()
    dense = Pattern.of_meta(rest[0].cpu(), *h.shape, dtype, -1).scatter(grad) if op == "linear_compress" else grad
    y.backward(dense.double())
    for actual, e in zip(leaves, exact, strict=True):
        assert_same_bits(actual.grad + 0.0, e.grad.float().to(dtype) + 0.0)
