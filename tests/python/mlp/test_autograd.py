"""Gradients against the masked dense computation in torch's autograd."""

import oracle
import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import k_major, normal, relu2_like
from oracle import Pattern
from torch.utils.checkpoint import checkpoint

import sparse24

ROWS, COLS, N = 37, 96, 20


def dense_activation(x, activation):
    return {"none": lambda t: t, "relu": torch.relu, "relu2": lambda t: torch.relu(t).square()}[activation](x)


def gradients(function, *inputs, dtype):
    """Gradients of `function` of copies of `inputs` in `dtype`."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def check_gradients(sparse, dense, *inputs, dtype, magnitude):
    """`sparse` in `dtype` is as near to `dense` in float64 as `dense` in `dtype` is, up to the factor two."""
    actual = gradients(sparse, *inputs, dtype=dtype)
    torchs = gradients(dense, *inputs, dtype=dtype)
    exact = gradients(dense, *inputs, dtype=torch.float64)
    for i, (a, t, e) in enumerate(zip(actual, torchs, exact, strict=True)):
        assert a.dtype == dtype
        assert_accurate(a, t, e, magnitude, f"gradient {i}")
        assert a.abs().max() > 0


def test_compress(device, dtype, activation, dim):
    x = relu2_like(ROWS, COLS, dtype, seed=1).to(device)
    values, meta = sparse24.compress(x, activation, dim)
    mask = Pattern.of_meta(meta, ROWS, COLS, dtype, dim).mask().to(device)
    weight = normal(ROWS, COLS, dtype=dtype, seed=2).to(device)
    like = sparse24.compress_like(weight, meta, dim)
    check_gradients(
        lambda x: (sparse24.compress(x, activation, dim)[0] * like).sum(),
        lambda x: (dense_activation(x, activation) * weight.to(x.dtype) * mask).sum(),
        x,
        dtype=dtype,
        magnitude=0.0,
    )


def test_dropped_entries_get_no_gradient(device, dtype, dim):
    """Also where the activation's derivative is not zero."""
    x = torch.ones(4, 16, device=device, dtype=dtype).requires_grad_()
    values, meta = sparse24.compress(x, "relu2", dim)
    values.sum().backward()
    mask = Pattern.of_meta(meta, 4, 16, dtype, dim).mask()
    assert mask.sum() == 32
    assert torch.equal(x.grad.cpu(), torch.where(mask, 2.0, 0.0).to(dtype))


def test_relu_has_no_gradient_at_zero_and_below(device, dtype):
    x = torch.tensor([[0.0, -0.0, -1.0, 0.0] * 4], device=device, dtype=dtype).requires_grad_()
    for activation in ("relu", "relu2"):
        (grad,) = torch.autograd.grad(sparse24.compress(x, activation)[0].sum(), x)
        assert (grad == 0).all()


def test_compress_like_and_decompress_are_transposes(device, dtype, dim):
    """Bit for bit: both only move numbers."""
    meta = sparse24.compress(relu2_like(ROWS, COLS, dtype, seed=3).to(device), dim=dim)[1]
    pattern = Pattern.of_meta(meta, ROWS, COLS, dtype, dim)
    x = normal(ROWS, COLS, dtype=dtype, seed=4).to(device).requires_grad_()
    values = sparse24.compress_like(x, meta, dim)
    grad_values = normal(*values.shape, dtype=dtype, seed=5).to(device)
    (grad_x,) = torch.autograd.grad(values, x, grad_values)
    assert_same_bits(grad_x, pattern.scatter(grad_values))

    leaf = values.detach().requires_grad_()
    dense = sparse24.decompress(leaf, meta, ROWS, COLS, dim)
    (grad_leaf,) = torch.autograd.grad(dense, leaf, x.detach())
    assert_same_bits(grad_leaf, pattern.gather(x.detach()))


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("majorness", ["n-major", "k-major"])
def test_mm(device, dtype, dim, transpose_out, scaled, majorness):
    x = relu2_like(ROWS, COLS, dtype, seed=6).to(device)
    m, k = (ROWS, COLS) if dim == -1 else (COLS, ROWS)
    b = normal(k, N, dtype=dtype, seed=7).to(device)
    b = k_major(b) if majorness == "k-major" else b
    bias = normal(N, dtype=dtype, seed=8).to(device)
    weight = normal(m, N, dtype=dtype, seed=9).to(device)
    scale_a = torch.exp2(normal(m, dtype=torch.float32, seed=10)).to(device) if scaled else None
    scale_b = torch.exp2(normal(N, dtype=torch.float32, seed=11)).to(device) if scaled else None
    meta = sparse24.compress(x, dim=dim)[1]
    mask = Pattern.of_meta(meta, ROWS, COLS, dtype, dim).mask().to(device)

    def sparse(x, b, bias):
        values = sparse24.compress_like(x, meta, dim)
        d = sparse24.mm(values, meta, b, scale_a, scale_b, bias, dim=dim, transpose_out=transpose_out)
        return (d * (weight.t() if transpose_out else weight)).sum()

    def dense(x, b, bias):
        a = x * mask
        d = (a if dim == -1 else a.t()) @ b
        if scaled:
            d = d * scale_a.to(x.dtype).unsqueeze(1) * scale_b.to(x.dtype)
        return ((d + bias) * weight.to(x.dtype)).sum()

    terms = weight.abs().float()
    if scaled:
        terms = terms * scale_a.unsqueeze(1) * scale_b
    largest = max(
        (terms @ b.abs().float().t()).max(), ((x * mask).abs().float().sum(0 if dim == -1 else 1).max() * terms.max())
    )
    check_gradients(sparse, dense, x, b, bias, dtype=dtype, magnitude=float(largest))


def test_mm_with_another_out_dtype(device):
    """The gradient arrives in out_dtype and leaves in the dtypes of the inputs."""
    x = relu2_like(ROWS, COLS, torch.bfloat16).to(device).requires_grad_()
    w = normal(N, COLS, dtype=torch.bfloat16, seed=1).to(device).requires_grad_()
    bias = normal(N, dtype=torch.float32, seed=2).to(device).requires_grad_()
    values, meta = sparse24.compress(x)
    d = sparse24.mm(values, meta, w.t(), bias=bias, out_dtype=torch.float32)
    g = torch.randint(-3, 4, d.shape, generator=torch.Generator().manual_seed(0)).float().to(device)
    grads = torch.autograd.grad(d, (x, w, bias), g)
    assert [t.dtype for t in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(grads[2], g.sum(0))
    a = sparse24.decompress(values, meta, ROWS, COLS).detach()
    exact = g.double().t() @ a.double()
    torchs = g.to(torch.bfloat16).t() @ a
    assert_accurate(grads[1], torchs, exact, (g.abs().double().t() @ a.abs().double()))


def test_a_whole_network(device, dtype):
    """compress(relu2) and mm, forward and backward, against the network with the same mask in float64."""
    x = normal(64, 48, dtype=dtype, seed=1).to(device)
    w1, w2 = (normal(*s, dtype=dtype, seed=i).div(7).to(device) for i, s in enumerate(((96, 48), (32, 96)), start=2))

    def sparse(x, w1, w2):
        values, meta = sparse24.compress(x @ w1.t(), "relu2")
        return sparse24.mm(values, meta, w2.t()).square().sum()

    def mask_of(x, w1):
        h = (x.to(dtype) @ w1.to(dtype).t()).detach()
        return Pattern.of_meta(sparse24.compress(h, "relu2")[1], 64, 96, dtype, -1).mask().to(device)

    def dense(x, w1, w2):
        y = torch.relu(x @ w1.t()).square() * mask_of(x, w1)
        return (y @ w2.t()).square().sum()

    actual = gradients(sparse, x, w1, w2, dtype=dtype)
    torchs = gradients(dense, x, w1, w2, dtype=dtype)
    exact = gradients(dense, x, w1, w2, dtype=torch.float64)
    for a, t, e in zip(actual, torchs, exact, strict=True):
        assert_accurate(a, t, e, e.abs().max().float())


def test_second_derivatives(dim):
    """The network is a polynomial of its inputs where the pattern does not change."""
    x = relu2_like(8, 32, torch.float32, seed=3)
    b = normal(32 if dim == -1 else 8, 6, dtype=torch.float32, seed=4)
    mask = Pattern.of_meta(sparse24.compress(x, "relu2", dim)[1], 8, 32, torch.float32, dim).mask()

    def sparse(x, b):
        values, meta = sparse24.compress(x, "relu2", dim)
        return sparse24.mm(values, meta, b, dim=dim).square().sum()

    def dense(x, b):
        y = torch.relu(x).square() * mask
        return ((y if dim == -1 else y.t()) @ b).square().sum()

    def second(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, b)]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, t, e in zip(
        second(sparse, torch.float32), second(dense, torch.float32), second(dense, torch.float64), strict=True
    ):
        assert_accurate(a, t, e, e.abs().max().float())


def test_integers_have_no_gradient(device, dtype):
    values, meta = sparse24.compress(torch.ones(4, 16, device=device, dtype=dtype).requires_grad_())
    assert values.requires_grad and not meta.requires_grad


def test_compress_fp8_refuses(device):
    x = relu2_like(32, 32, torch.bfloat16).to(device).requires_grad_()
    scale = sparse24.compress_fp8(x)[2]
    with pytest.raises(RuntimeError, match=r"^sparse24\.compress_fp8: expected no backward pass .*, got one"):
        scale.sum().backward()


def test_quantize_fp8_refuses(device):
    x = relu2_like(32, 32, torch.bfloat16).to(device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"^sparse24\.quantize_fp8: expected no backward pass .*, got one"):
        sparse24.quantize_fp8(x)[1].sum().backward()


def test_fp8_mm_refuses(device):
    values, meta, scale = sparse24.compress_fp8(relu2_like(32, 32, torch.bfloat16).to(device))
    b = normal(8, 32, dtype=oracle.FP8).to(device).t()
    bias = torch.zeros(8, device=device).requires_grad_()
    d = sparse24.mm(values, meta, b, scale, bias=bias)
    with pytest.raises(
        RuntimeError, match=r"^sparse24\.mm: expected values to be .* for a backward pass, got float8_e4m3fn"
    ):
        d.sum().backward()


@pytest.mark.parametrize("op", ["linear_relu2", "linear_compress"])
def test_checkpoints_give_saved_tensors_once(device, dtype, op):
    x, w = normal(6, 32, dtype=dtype).to(device), normal(64, 32, dtype=dtype, seed=1).to(device)
    gradients = []
    for call in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=False)):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        call(lambda t, w=leaves[1]: getattr(sparse24, op)(t, w)[0], leaves[0]).sum().backward()
        gradients.append([t.grad for t in leaves])
    for got, expected in zip(*gradients, strict=True):
        assert_same_bits(got, expected)
