"""2:4 weights: what is kept, what a soft threshold leaves, and gradients that pass straight through."""

import math

import pytest
import torch
from compare import assert_same_bits
from data import activations, integers, normal, relayout

import sparse24
from sparse24 import prune24, soft_threshold24
from sparse24.mlp.weights import soft_scale

FP8 = torch.float8_e4m3fn
FUNCTIONS = (prune24, soft_threshold24)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def pruned(w, dim):
    """By a stable sort of each group."""
    rows = w.float().movedim(dim, -1)
    groups = torch.where(rows.isnan(), torch.tensor(math.inf), rows.abs()).reshape(-1, 4)
    groups = torch.stack((rows.isnan().reshape(-1, 4).float(), groups), -1)
    keep = torch.zeros(len(groups), 4, dtype=torch.bool)
    for group, kept in zip(groups.tolist(), keep, strict=True):
        kept[sorted(range(4), key=lambda i: group[i], reverse=True)[:2]] = True
    return torch.where(keep.view(rows.shape).movedim(-1, dim), w.float(), 0.0).to(w.dtype)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_two_of_four(device, values_dtype, dim, layout):
    """With ties, zeros of both signs, NaN and infinities."""
    for make in (lambda: activations(48, 32, torch.bfloat16), lambda: integers(48, 32, dtype=torch.bfloat16)):
        w = make()
        w = torch.where(w.float().abs() > 448, torch.nan, w).to(values_dtype) if values_dtype == FP8 else w
        w = w.to(values_dtype)
        expected = pruned(w, dim)
        actual = prune24(relayout(w.to(device), layout), dim)
        assert actual.dtype == w.dtype and actual.shape == w.shape
        assert_same_bits(actual.cpu().float() + 0.0, expected.float() + 0.0)


def test_as_compress_keeps(device, dtype):
    """The rule is that of the activation, bit for bit."""
    w = activations(64, 32, dtype).to(device)
    values, meta = sparse24.compress(w)
    assert_same_bits(prune24(w), sparse24.decompress(values, meta, 64, 32))
    values, meta = sparse24.compress(w, dim=-2)
    assert_same_bits(prune24(w, 0), sparse24.decompress(values, meta, 64, 32, -2))


def test_any_rank_and_empty(device):
    w = normal(3, 4, 8, dtype=torch.float32).to(device)
    for dim in (1, 2):
        for f in FUNCTIONS:
            assert_same_bits(f(w, dim)[1], f(w[1], dim - 1))
    assert prune24(normal(8, dtype=torch.float64).to(device)).count_nonzero() == 4
    for f in FUNCTIONS:
        assert f(w[:0]).shape == (0, 4, 8) and f(w[..., :0]).shape == (3, 4, 0)


@pytest.mark.parametrize("dim", [0, -1])
def test_soft_threshold(device, dtype, dim):
    w = normal(32, 48, dtype=dtype).to(device)
    rows = w.float().movedim(dim, -1).reshape(-1, 4)
    second = rows.abs().sort(dim=1).values[:, 1:2]
    exact = rows.sign() * (rows.abs() - second).clamp(min=0) * 1.5
    exact = exact.view(w.movedim(dim, -1).shape).movedim(-1, dim)
    soft = soft_threshold24(w, dim, 1.5)
    assert_same_bits(soft + 0.0, exact.to(dtype) + 0.0)
    assert_same_bits(prune24(soft, dim), soft)
    for shape in ([1], [], [1, 1, 1]):
        assert_same_bits(soft_threshold24(w, dim, torch.full(shape, 1.5, device=device)), soft)


def test_soft_threshold_of_what_is_not_finite(device):
    nan, inf = math.nan, math.inf
    w = torch.tensor([[nan, 1.0, nan, nan], [inf, 3.0, -1.0, 2.0], [0.0, 0.0, 0.0, -1.0]], device=device)
    expected = torch.tensor([[nan, 0, nan, 0], [inf, 1, 0, 0], [0, 0, 0, -1]], device=device)
    torch.testing.assert_close(soft_threshold24(w), expected, equal_nan=True)


def test_soft_scale(device):
    """No other scale brings the soft weight nearer; of zeros it is 1."""
    w = normal(64, 32, dtype=torch.float32).to(device)
    best = soft_scale(w, 0)
    errors = [(soft_threshold24(w, 0, best.item() * f) - w).norm().item() for f in (0.98, 1.0, 1.02)]
    assert best.shape == (1,) and errors[1] == min(errors)
    assert soft_scale(torch.zeros_like(w)).item() == 1


@pytest.mark.parametrize("f", FUNCTIONS)
def test_gradients_pass_straight_through(device, f):
    w = normal(16, 8, dtype=torch.float32).to(device).requires_grad_()
    factor = normal(16, 8, dtype=torch.float32, seed=1).to(device)
    (f(w, 0) * factor).sum().backward()
    assert_same_bits(w.grad, factor)

    def loss(w):
        return (f(w).square() * factor).sum()

    expected = torch.autograd.grad(loss(w), w)[0]
    assert_same_bits(torch.func.grad(loss)(w.detach()), expected)
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack((w, w)))[1], loss(w))


@pytest.mark.parametrize("f", FUNCTIONS)
def test_compiled_and_exported(f):
    torch._dynamo.reset()
    w = normal(16, 8, dtype=torch.bfloat16).requires_grad_()
    compiled = torch.compile(lambda w: f(w, 0) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(w)
    assert_same_bits(out, f(w, 0) * 2)
    assert_same_bits(torch.autograd.grad(out.sum(), w)[0], torch.full_like(w, 2))
    torch._dynamo.reset()

    class Module(torch.nn.Module):
        def forward(self, w):
            return f(w, 0)

    program = torch.export.export(Module(), (w.detach(),))
    assert_same_bits(program.module()(w.detach()), f(w.detach(), 0))


@pytest.mark.parametrize("f", FUNCTIONS)
def test_refusals(checked_device, f):
    w = torch.zeros(8, 6, device=checked_device)
    for args, words in (
        ((w,), "w to have a multiple of 4 entries along dimension -1, got 6"),
        ((w, True), "dim to be from -2 to 1, got True"),
        ((w[0, 0], 0), "w to have at least 1 dimension, got 0"),
        ((torch.eye(4).to_sparse(), 0), r"w to be dense \(torch.strided\), got torch.sparse_coo"),
        ((w, 2), "dim to be from -2 to 1, got 2"),
        ((w.int(), 0), "w to be of a floating dtype, got int32"),
        (([1.0],), "w to be a Tensor, got list"),
    ):
        with pytest.raises(RuntimeError, match=f"^sparse24.{f.__name__}: expected {words}$"):
            f(*args)
    for scale in (math.nan, math.inf, -1.0, "1"):
        with pytest.raises(RuntimeError, match="sparse24.soft_threshold24: expected scale to be a finite number from"):
            soft_threshold24(w, 0, scale)
    with pytest.raises(RuntimeError, match="sparse24.soft_threshold24: expected scale to have 1 element, got 2"):
        soft_threshold24(w, 0, torch.ones(2, device=checked_device))
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        rule = f"scale to be float32, float64, bfloat16 or float16, got {str(dtype)[6:]}"
        with pytest.raises(RuntimeError, match=f"sparse24.soft_threshold24: expected {rule}"):
            soft_threshold24(w, 0, torch.ones(1, device=checked_device).to(dtype))
    other = "cpu" if checked_device == "meta" else "meta"
    with pytest.raises(RuntimeError, match=f"expected scale to be on {w.device} as w is, got {other}"):
        soft_threshold24(w, 0, torch.ones(1, device=other))


@pytest.mark.parametrize("f", FUNCTIONS)
def test_other_float8(device, f):
    """What e5m2 keeps is what its numbers keep in float32."""
    codes = normal(16, 32, dtype=torch.float32).to(device).to(torch.float8_e5m2)
    assert_same_bits(f(codes).float() + 0.0, f(codes.float()).to(torch.float8_e5m2).float() + 0.0)
