"""Derivatives of linear_relu2 and linear_compress, against those of the dense layer with the same pattern."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_accurate
from data import normal
from linear_problem import powers, problem
from oracle import FP8, Pattern

import sparse24


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("op", ["compress", "relu2"])
def test_gradients(device, dtype, op, scaled):
    x, w = normal(65, 48, dtype=dtype, seed=1).to(device), normal(96, 48, dtype=dtype, seed=2).div(7).to(device)
    bias = normal(96, dtype=dtype, seed=3).to(device)
    scale_x, scale_w = (powers(65, device, 4), powers(96, device, 5)) if scaled else (None, None)
    g = normal(65, 96, dtype=dtype, seed=6).to(device)
    meta = sparse24.linear_compress(x, w, scale_x, scale_w, bias)[1]
    mask = Pattern.of_meta(meta, 65, 96, dtype, -1).mask().to(device) if op == "compress" else None

    def fused(x, w, bias):
        if op == "relu2":
            return (sparse24.linear_relu2(x, w, scale_x, scale_w, bias)[0] * g).sum()
        return (sparse24.linear_compress(x, w, scale_x, scale_w, bias)[0] * sparse24.compress_like(g, meta)).sum()

    def dense(x, w, bias):
        h = F.linear(x, w)
        if scaled:
            h = h * scale_x.to(x.dtype).unsqueeze(1) * scale_w.to(x.dtype)
        y = torch.relu(h + bias).square()
        return ((y if mask is None else y * mask) * g.to(x.dtype)).sum()

    def grads(function, to):
        leaves = [t.to(to).detach().requires_grad_() for t in (x, w, bias)]
        return torch.autograd.grad(function(*leaves), leaves)

    for i, (a, t, e) in enumerate(
        zip(grads(fused, dtype), grads(dense, dtype), grads(dense, torch.float64), strict=True)
    ):
        assert a.dtype == dtype and a.abs().max() > 0
        assert_accurate(a, t, e, 4 * e.abs().max().float(), f"gradient {i}")


def test_dropped_and_negative_entries_get_no_gradient(device, dtype):
    x = torch.ones(1, 8, device=device, dtype=dtype)
    w = torch.zeros(32, 8, device=device, dtype=dtype)
    w[:4, 0] = torch.tensor([1.0, -2, 3, 4], dtype=dtype)
    w.requires_grad_()
    (grad,) = torch.autograd.grad(sparse24.linear_compress(x, w)[0].sum(), w)
    assert grad[:, 0].tolist() == [0, 0, 6, 8, *[0] * 28]
    (grad,) = torch.autograd.grad(sparse24.linear_relu2(x, w)[0].sum(), w)
    assert grad[:, 0].tolist() == [2, 0, 6, 8, *[0] * 28]


def test_second_derivatives():
    """The result is a polynomial of its inputs where the pattern does not change; zeros are no trap."""
    x, w = normal(8, 8, dtype=torch.float32, seed=3), normal(32, 8, dtype=torch.float32, seed=4)
    mask = Pattern.of_meta(sparse24.linear_compress(x, w)[1], 8, 32, torch.float32, -1).mask()

    def second(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def dense(x, w):
        return torch.relu(x @ w.t()).square() * mask

    for a, t, e in zip(
        second(lambda x, w: sparse24.linear_compress(x, w)[0], torch.float32),
        second(dense, torch.float32),
        second(dense, torch.float64),
        strict=True,
    ):
        assert_accurate(a, t, e, 4 * e.abs().max().float())


@pytest.mark.parametrize("op", ["linear_compress", "linear_relu2"])
def test_fp8_has_no_backward(device, op):
    p = problem(32, 32, 32, torch.bfloat16, device)
    p.w.requires_grad_()
    out = getattr(sparse24, op)(*p.args, torch.ones(1, device=device), out_dtype=FP8)
    assert not any(t.requires_grad for t in out[1:])
    sentence = rf"^sparse24\.{op}: expected out_dtype to be .* for a backward pass, got float8_e4m3fn"
    with pytest.raises(RuntimeError, match=sentence):
        out[0].float().sum().backward()
