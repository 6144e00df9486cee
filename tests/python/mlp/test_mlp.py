"""relu2_mlp: the ops put together, and near the masked dense network."""

import re

import oracle
import pytest
import torch
import torch.nn.functional as F
from compare import assert_accurate, assert_same_bits
from data import integers, normal
from oracle import FP8, Pattern
from small_network import HIDDEN, OUT, D, tokens, weights

import sparse24


def fused_fp8(x, w1, w2, b1, b2, scale_y=None):
    """The fp8 network out of quantize_fp8, linear_compress and mm."""
    (w1, w1_scale), (w2, w2_scale) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    q, scale = sparse24.quantize_fp8(x)
    b1 = None if b1 is None else b1.to(torch.bfloat16)
    scaling = "row" if scale_y is None else "given"
    values, meta, scale, _, _ = sparse24.linear_compress(q, w1, scale, w1_scale, b1, scale_y, scaling=scaling)
    return sparse24.mm(values, meta, w2.t(), scale, w2_scale, b2, out_dtype=x.dtype)


def composed_fp8(x, w1, w2, b1, b2, scale_y=None):
    """The fp8 network out of quantize_fp8, torch's product, compress_fp8 and mm."""
    (w1, w1_scale), (w2, w2_scale) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    q, scale = sparse24.quantize_fp8(x)
    if x.is_cuda:
        bias = None if b1 is None else b1.to(torch.bfloat16)
        w1_scale = w1_scale.reshape(1, -1)
        y1 = torch._scaled_mm(
            q, w1.t(), scale_a=scale, scale_b=w1_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        y1 = (q.float() @ w1.float().t()) * scale * w1_scale.reshape(1, -1)
        y1 = (y1 if b1 is None else y1 + b1.float()).to(torch.bfloat16)
    scaling = "row" if scale_y is None or scale_y.numel() > 1 else "tensor"
    values, meta, scale = sparse24.compress_fp8(y1, scale_y, "relu2", scaling=scaling)
    return sparse24.mm(values, meta, w2.t(), scale, w2_scale, b2, out_dtype=x.dtype)


def pattern_16bit(x, w1, b1):
    """The mask of linear_compress: from another product a rounding could swap two nearly equal entries."""
    meta = sparse24.linear_compress(x, w1, bias=b1)[1]
    return Pattern.of_meta(meta, x.shape[0], w1.shape[0], x.dtype, -1).mask().to(x.device)


def dequantised(t):
    """t with the rounding of fp8 and one scale per row, in float32."""
    q, scale = oracle.quantize_fp8(t)
    return (q.float() * scale).to(t.device)


def masked_exact(x, w1, w2, b1, b2, mask):
    """The network in float64 with the activation pruned as `mask` says."""
    x, w1, w2 = (t.double() for t in (x, w1, w2))
    y = torch.relu(F.linear(x, w1, None if b1 is None else b1.double())).square() * mask
    return F.linear(y, w2, None if b2 is None else b2.double()), F.linear(y, w2.abs()).abs().max().float()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("count", [1, 63, 129])
def test_sixteen_bit_is_the_ops(device, dtype, count, bias):
    x, (w1, w2, b1, b2) = tokens(count, dtype, device), weights(dtype, device, bias=bias)
    values, meta, *_ = sparse24.linear_compress(x, w1, bias=b1)
    expected = sparse24.mm(values, meta, w2.t(), bias=b2)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0), expected)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0, precision="16bit"), expected)
    values, meta = sparse24.compress(F.linear(x, w1, b1), "relu2")
    expected = sparse24.mm(values, meta, w2.t(), bias=b2)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0, fused=False), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_sixteen_bit_is_near_the_masked_network(device, dtype, bias):
    x, (w1, w2, b1, b2) = tokens(129, dtype, device), weights(dtype, device, bias=bias)
    y1 = F.linear(x, w1, b1)
    mask = pattern_16bit(x, w1, b1)
    assert 0 < (torch.relu(y1) * ~mask).count_nonzero(), "nothing was pruned: the mask would not matter"
    torchs = F.linear(torch.relu(y1).square() * mask, w2, b2)
    exact, magnitude = masked_exact(x, w1, w2, b1, b2, mask)
    assert_accurate(sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0), torchs, exact, magnitude)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("count", [1, 63, 129])
def test_fp8_is_the_ops(device, count, bias):
    x, (w1, w2, b1, b2) = tokens(count, torch.bfloat16, device), weights(torch.bfloat16, device, bias=bias)
    (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    for fused, reference in ((True, fused_fp8), (False, composed_fp8)):
        expected = reference(x, w1, w2, b1, b2)
        options = {"min_tokens": 0, "fused": fused}
        assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, precision="fp8", **options), expected)
        quantised = sparse24.relu2_mlp(x, q1, q2, b1, b2, w1_scale=s1, w2_scale=s2, **options)
        assert_same_bits(quantised, expected)


@pytest.mark.parametrize("kind", ["tokens", "one"])
def test_given_scale_of_the_activation(device, kind):
    x, (w1, w2, b1, b2) = tokens(65, torch.bfloat16, device), weights(torch.bfloat16, device, bias=True)
    scale_y = torch.full((1,), 0.03, device=device)
    if kind == "tokens":
        scale_y = 0.01 * (1 + torch.arange(65, device=device) % 7)
    options = {"precision": "fp8", "scale_y": scale_y, "min_tokens": 0}
    expected = fused_fp8(x, w1, w2, b1, b2, scale_y)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, **options, fused=True), expected)
    assert_same_bits(
        sparse24.relu2_mlp(x, w1, w2, b1, b2, **options, fused=False), composed_fp8(x, w1, w2, b1, b2, scale_y)
    )
    # Dense: the scale is used there, too.
    dense = sparse24.relu2_mlp(x, w1, w2, b1, b2, precision="fp8", scale_y=scale_y, min_tokens=66)
    exact, magnitude = masked_exact(x, w1, w2, b1, b2, torch.ones((), device=device))
    y = torch.relu(dequantised(x) @ dequantised(w1).t() + b1.float()).square()
    y = (y / scale_y.reshape(-1, 1)).clamp(max=448).to(FP8).float() * scale_y.reshape(-1, 1)
    assert_accurate(dense, (y @ dequantised(w2).t() + b2.float()).to(torch.bfloat16), exact, magnitude)


@pytest.mark.parametrize("scale_y", [None, 0.03], ids=["exact", "one_scale"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_one_scale_of_the_weights_is_that_of_every_row(device, sparse, scale_y):
    """Dense with one scale of the activation too it is another kernel on CUDA: near, not the same bits."""
    x, (w1, w2, b1, b2) = tokens(65, torch.bfloat16, device), weights(torch.bfloat16, device, bias=True)
    one = torch.full((1,), 2.0**-8, device=device)
    q1, q2 = ((w.float() / one).to(FP8) for w in (w1, w2))
    given = None if scale_y is None else torch.full((1,), scale_y, device=device)

    def run(s1, s2):
        scales = {"w1_scale": s1, "w2_scale": s2, "scale_y": given}
        return sparse24.relu2_mlp(x, q1, q2, b1, b2, **scales, min_tokens=0, sparse=sparse)

    of_rows, of_all = run(one.expand(HIDDEN), one.expand(OUT)), run(one, one)
    if given is None or sparse:
        assert_same_bits(of_all, of_rows)
    torch.testing.assert_close(of_all, of_rows, rtol=2**-7, atol=2**-7)
    assert of_rows.abs().max() > 0.5


@pytest.mark.parametrize("count", [1, 63, 129])
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_fused_is_unfused(device, precision, count):
    """Bit for bit where the first product is exact: small integers, whose squares bfloat16 holds."""
    x = integers(count, 16, dtype=torch.bfloat16, limit=1).to(device)
    w1, w2 = (
        integers(*s, dtype=torch.bfloat16, limit=1, seed=i).to(device) for i, s in ((1, (160, 16)), (2, (48, 160)))
    )
    x[:, 0], w1[:, 1] = 1, 1  # so that no row is zero
    b1 = integers(160, dtype=torch.bfloat16, limit=2, seed=3).to(device)
    for scale_y in (None, torch.full((1,), 0.25, device=device)) if precision == "fp8" else (None,):
        for min_tokens in (0, count + 1):
            options = {"precision": precision, "scale_y": scale_y, "min_tokens": min_tokens}
            fused, unfused = (sparse24.relu2_mlp(x, w1, w2, b1, **options, fused=f) for f in (True, False))
            assert_same_bits(fused, unfused, f"{options}")
            assert fused.abs().max() > 0


def test_fp8_is_near_the_masked_network(device):
    """Twice the error of the dense network with the same quantisation of its operands."""
    x, (w1, w2, b1, b2) = tokens(129, torch.bfloat16, device), weights(torch.bfloat16, device, bias=True)
    out = sparse24.relu2_mlp(x, w1, w2, b1, b2, precision="fp8", min_tokens=0, fused=True)

    y1 = (dequantised(x) @ dequantised(w1).t() + b1.float()).to(torch.bfloat16)
    (q, s), (q1, s1) = sparse24.quantize_fp8(x), sparse24.quantize_fp8(w1)
    meta = sparse24.linear_compress(q, q1, s, s1, b1, scaling="row")[1]
    mask = Pattern.of_meta(meta, 129, HIDDEN, FP8, -1).mask().to(device)
    torchs = (dequantised(torch.relu(y1.float()).square() * mask) @ dequantised(w2).t() + b2.float()).to(torch.bfloat16)
    exact, magnitude = masked_exact(x, w1, w2, b1, b2, mask)
    assert_accurate(out, torchs, exact, magnitude)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_dense_below_the_threshold(device, precision):
    """One token fewer than min_tokens: nothing is pruned. As many: it is."""
    x, (w1, w2, _, _) = tokens(33, torch.bfloat16, device), weights(torch.bfloat16, device)
    always = sparse24.relu2_mlp(x, w1, w2, precision=precision, min_tokens=0)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, precision=precision, min_tokens=33), always)
    dense = sparse24.relu2_mlp(x, w1, w2, precision=precision, min_tokens=34)
    exact, magnitude = masked_exact(x, w1, w2, None, None, torch.ones((), device=device))
    if precision == "16bit":
        torchs = F.linear(torch.relu(F.linear(x, w1)).square(), w2)
        assert_same_bits(dense, F.linear(sparse24.linear_relu2(x, w1)[0], w2))
        unfused = sparse24.relu2_mlp(x, w1, w2, precision=precision, min_tokens=34, fused=False)
        assert_same_bits(unfused, torchs)
    else:
        y = torch.relu((dequantised(x) @ dequantised(w1).t()).to(torch.bfloat16)).square()
        torchs = (dequantised(y) @ dequantised(w2).t()).to(torch.bfloat16)
    assert_accurate(dense, torchs, exact, magnitude)
    # The bound tells them apart: random weights drop a fifth of the non-zeros.
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(always, torchs, exact, magnitude)


@pytest.mark.parametrize("count", [2083, 2084])
def test_the_default_threshold_counts_products(device, count):
    """20e9 multiply-adds of 3000 x 3200: from 2,084 tokens on. Below it is dense on CUDA; the CPU is always sparse."""
    x, w1 = integers(count, 16, dtype=torch.bfloat16, limit=2), integers(3200, 16, dtype=torch.bfloat16, limit=2)
    w2 = integers(3000, 3200, dtype=torch.bfloat16, limit=1, seed=1)
    if device == "cpu":
        x, w2 = x[:20], w2[:16]  # the reference is slow
    x, w1, w2 = (t.to(device) for t in (x, w1, w2))
    expected = sparse24.relu2_mlp(x, w1, w2, sparse=device == "cpu" or count == 2084, min_tokens=0)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2), expected)
    other = sparse24.relu2_mlp(x, w1, w2, sparse=device != "cpu" and count == 2083, min_tokens=0)
    assert not torch.equal(other, expected)


def test_where_sparse_pays():
    """What was measured on an H200: test_bench_regret.py compares it with the records."""
    from sparse24.mlp import pays

    def where(d_model, d_ff, **how):
        return [t for t in (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if pays(t, d_ff, d_model, **how)]

    everywhere = [128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert where(4096, 16384) == everywhere[2:]
    assert where(1664, 6656) == everywhere[4:]
    assert where(768, 3072) == [16384]
    assert where(4096, 16384, fp8=True) == where(1664, 6656, fp8=True) == everywhere
    assert where(768, 3072, fp8=True) == [128, 256, 512, 8192, 16384]
    assert where(4096, 16384, fp8=True, one_scale=True) == everywhere[2:]
    assert where(1664, 6656, fp8=True, one_scale=True) == everywhere[4:]
    assert where(1024, 3584, fp8=True, one_scale=True) == [8192, 16384]
    assert where(4096, 16384, fp8=True, step=True) == everywhere[4:]
    assert where(1024, 4096, fp8=True, step=True) == []
    documentation = sparse24.relu2_mlp.__doc__
    assert "DEFAULT_MIN_PRODUCTS" in documentation
    first = int(re.search(r"such as (\d+) tokens in 16 bits for D = 4096 and F = 16384", documentation)[1])
    assert pays(first, 16384, 4096) and not pays(first - 1, 16384, 4096)


@pytest.mark.parametrize(("precision", "hidden"), [("16bit", 24), ("fp8", 48)])
def test_features_that_do_not_fit_run_dense(device, precision, hidden):
    """F that is no multiple of 16, in fp8 of 32."""
    x, (w1, w2, _, _) = tokens(20, torch.bfloat16, device), weights(torch.bfloat16, device, hidden=hidden)
    out, dense = (sparse24.relu2_mlp(x, w1, w2, precision=precision, min_tokens=0, sparse=s) for s in (True, False))
    assert_same_bits(out, dense)


def test_unaligned_features_run_dense(device):
    """F that is no multiple of 8 either."""
    x, (w1, w2, _, _) = tokens(20, torch.bfloat16, device), weights(torch.bfloat16, device, hidden=100)
    expected = F.linear(torch.relu(F.linear(x, w1)).square(), w2)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, min_tokens=0), expected)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (2, 3, 5), (0,), (2, 0)], ids=str)
def test_shapes_of_x(device, shape, precision):
    w1, w2, b1, b2 = weights(torch.bfloat16, device, bias=True)
    x = normal(*shape, D, dtype=torch.bfloat16).to(device)
    out = sparse24.relu2_mlp(x, w1, w2, b1, b2, precision=precision, min_tokens=0)
    flat = sparse24.relu2_mlp(x.reshape(-1, D), w1, w2, b1, b2, precision=precision, min_tokens=0)
    assert out.shape == (*shape, OUT)
    assert_same_bits(out.reshape(-1, OUT), flat)
    moved = x.unsqueeze(0).movedim(0, -2).squeeze(-2) if shape else x
    assert_same_bits(sparse24.relu2_mlp(moved, w1, w2, b1, b2, precision=precision, min_tokens=0), out)


def test_non_contiguous_x(device, dtype):
    w1, w2, _, _ = weights(dtype, device)
    x = normal(5, 9, D, dtype=dtype).to(device)
    expected = sparse24.relu2_mlp(x, w1, w2, min_tokens=0).transpose(0, 1)
    assert_same_bits(sparse24.relu2_mlp(x.transpose(0, 1), w1, w2, min_tokens=0).contiguous(), expected.contiguous())


@pytest.mark.parametrize("kind", ["fused", "unfused", "dense"])
def test_gradients(device, dtype, kind):
    """Against the network with the same mask, parameters and input; without a mask along tokens (test_training.py)."""
    x, (w1, w2, b1, b2) = tokens(65, dtype, device), weights(dtype, device, bias=True)
    mask = 1
    if kind == "fused":
        mask = pattern_16bit(x, w1, b1)
    elif kind == "unfused":
        meta = sparse24.compress(F.linear(x, w1, b1), "relu2")[1]
        mask = Pattern.of_meta(meta, 65, HIDDEN, dtype, -1).mask().to(device)
    g = normal(65, OUT, dtype=dtype, seed=9).to(device)

    def grads(function, to):
        leaves = [t.to(to).detach().requires_grad_() for t in (x, w1, w2, b1, b2)]
        return torch.autograd.grad(function(*leaves), leaves, g.to(to))

    def dense(x, w1, w2, b1, b2):
        return F.linear(torch.relu(F.linear(x, w1, b1)).square() * mask, w2, b2)

    def sparse(*t):
        recipe = sparse24.Recipe(weight_gradients="dense")
        return sparse24.relu2_mlp(*t, min_tokens=66 if kind == "dense" else 0, fused=kind != "unfused", recipe=recipe)

    for i, (a, t, e) in enumerate(
        zip(grads(sparse, dtype), grads(dense, dtype), grads(dense, torch.float64), strict=True)
    ):
        assert a.dtype == dtype
        assert_accurate(a, t, e, 4 * e.abs().max().float(), f"gradient {i}")


def test_float32_weights(device):
    """Master weights: the result of casting them, and gradients in float32."""
    x, (w1, w2, b1, b2) = tokens(40, torch.bfloat16, device), weights(torch.float32, device, bias=True)
    half = [t.to(torch.bfloat16) for t in (w1, w2, b1, b2)]
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0), sparse24.relu2_mlp(x, *half, min_tokens=0))
    w1.requires_grad_()
    sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0).sum().backward()
    assert w1.grad.dtype == torch.float32 and w1.grad.abs().max() > 0


def test_autocast(device):
    """float32 in, the autocast dtype out, as if cast by hand."""
    x, (w1, w2, b1, b2) = tokens(40, torch.float32, device), weights(torch.float32, device, bias=True)
    expected = sparse24.relu2_mlp(*(t.to(torch.bfloat16) for t in (x, w1, w2, b1, b2)), min_tokens=0)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(sparse24.relu2_mlp(x, w1, w2, b1, b2, min_tokens=0), expected)


def test_compiles_to_one_graph(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    w1, w2, b1, b2 = weights(torch.bfloat16, device, bias=True)
    compiled = torch.compile(sparse24.relu2_mlp, backend=counter, fullgraph=True, dynamic=True)
    for precision, graphs in (("16bit", 1), ("fp8", 2)):
        for count in (80, 127, 193):  # none of the other sizes: torch takes equal sizes for one symbol
            x = tokens(count, torch.bfloat16, device, seed=count)
            expected = sparse24.relu2_mlp(x, w1, w2, b1, b2, precision=precision, min_tokens=16)
            actual = compiled(x, w1, w2, b1, b2, precision=precision, min_tokens=16)
            assert_same_bits(actual, expected)
        assert counter.frame_count == graphs
    torch._dynamo.reset()
