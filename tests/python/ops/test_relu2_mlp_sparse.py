"""relu2_mlp_sparse: the bits of its ops one after another, whatever the layouts; errors."""

import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, normal, relayout
from fuzzing.whole import one_after_another
from oracle import FP8

import sparse24

#: T, D, F, D_out: whole tiles and others, columns that are no multiple of 16 bytes.
SHAPES = [(1, 64, 32, 24), (33, 208, 160, 40), (130, 99, 288, 77), (300, 128, 512, 128)]
SCALES = ("row", "one", "each", "factor")


def network(shape, dtype, device, *, fp8=False, scale="row", seed=0):
    """Arguments; float8 weights with scales of rows, and a scale of y by name."""
    tokens, depth, features, out = shape
    depth = depth if not fp8 else -(-depth // 16) * 16
    x = normal(tokens, depth, dtype=dtype, seed=seed).to(device)
    w1 = normal(features, depth, dtype=torch.float32, seed=seed + 1) * depth**-0.5
    w2 = normal(out, features, dtype=torch.float32, seed=seed + 2)
    b1 = normal(features, dtype=torch.bfloat16 if fp8 else dtype, seed=seed + 3).to(device)
    b2 = normal(out, dtype=torch.float32 if out % 2 else dtype, seed=seed + 4).to(device)
    if not fp8:
        return x, w1.to(dtype).to(device), w2.to(dtype).to(device), b1, b2, None, None, None, None
    q1, s1 = sparse24.quantize_fp8(w1.to(device, torch.bfloat16))
    q2, s2 = sparse24.quantize_fp8(w2.to(device, torch.bfloat16))
    scale_y = {"one": torch.full((1,), 0.02), "each": torch.rand(tokens) + 0.01}.get(scale)
    factor = torch.full((1,), 1e-3, device=device) if scale == "factor" else None
    return x, q1, q2, b1, b2, s1, s2, None if scale_y is None else scale_y.to(device), factor


@pytest.mark.parametrize("threshold", [0.0, 0.75])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bits(shape, threshold, dtype, device):
    arguments = network(shape, dtype, device)
    expected = one_after_another(*arguments, threshold)
    assert_same_bits(sparse24.relu2_mlp_sparse(*arguments, threshold), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float8(shape, scale, dtype, device):
    arguments = network(shape, dtype, device, fp8=True, scale=scale)
    assert_same_bits(sparse24.relu2_mlp_sparse(*arguments, 0.25), one_after_another(*arguments, 0.25))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "float8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, fp8, device):
    arguments = network((33, 208, 160, 40), torch.bfloat16, device, fp8=fp8, scale="each")
    strange = [relayout(t, layout) if t is not None and t.dim() == 2 else t for t in arguments]
    plain = [None if t is None else t.contiguous() for t in strange]
    assert_same_bits(sparse24.relu2_mlp_sparse(*strange), sparse24.relu2_mlp_sparse(*plain))


def test_ranks_and_rows_alone(device):
    x, *others = network((24, 64, 64, 16), torch.bfloat16, device)
    out = sparse24.relu2_mlp_sparse(x, *others)
    assert_same_bits(sparse24.relu2_mlp_sparse(x.view(2, 3, 4, 64), *others), out.view(2, 3, 4, 16))
    assert_same_bits(sparse24.relu2_mlp_sparse(x[0], *others), sparse24.relu2_mlp_sparse(x[:1], *others)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "float8"])
def test_captured(fp8):
    arguments = network((300, 128, 512, 128), torch.bfloat16, "cuda", fp8=fp8)
    sparse24.relu2_mlp_sparse(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse24.relu2_mlp_sparse(*arguments)
    arguments[0].copy_(normal(300, 128, dtype=torch.bfloat16, seed=9))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(out, sparse24.relu2_mlp_sparse(*arguments))


def wrong(name, value):
    names = ("x", "w1", "w2", "b1", "b2", "w1_scale", "w2_scale", "scale_y", "scale_y_factor")
    return lambda arguments: [value(t) if n == name else t for n, t in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(
    ("fp8", "change", "sentence"),
    [
        (False, wrong("x", lambda t: t[0, 0]), "x to have at least 1 dimension, got 0 with shape ()"),
        (False, wrong("x", lambda t: t.double()), "x to be bfloat16, float16 or float32, got float64"),
        (False, wrong("w1", lambda t: t.half()), "w1 to be bfloat16 (the dtype of x) or float8_e4m3fn, got float16"),
        (False, wrong("w1", lambda t: t[:, 1:]), "w1 to have 64 columns (columns of x), got 63"),
        (False, wrong("w2", lambda t: t.to(FP8)), "w2 to be bfloat16 (the dtype of w1), got float8_e4m3fn"),
        (False, wrong("w2", lambda t: t[:, 16:]), "w2 to have 64 columns (rows of w1), got 48"),
        (False, wrong("b1", lambda t: t.float()), "b1 to be bfloat16, got float32"),
        (False, wrong("b1", lambda t: t[1:]), "b1 to have 64 elements (rows of w1), got 63"),
        (False, wrong("b2", lambda t: t.half()), "b2 to be bfloat16 or float32, got float16"),
        (
            False,
            wrong("w1_scale", lambda t: torch.ones(1)),
            "w1_scale to be None (w1 is not float8_e4m3fn), got a tensor",
        ),
        (True, wrong("w1_scale", lambda t: None), "w1_scale to be a tensor (w1 is float8_e4m3fn), got None"),
        (True, wrong("w2_scale", lambda t: t[1:]), "w2_scale to have 1 or 16 elements (rows of w2), got 15"),
        (True, wrong("scale_y", lambda t: torch.ones(23)), "scale_y to have 1 or 24 elements (tokens of x), got 23"),
        (
            True,
            wrong("scale_y_factor", lambda t: torch.ones(2)),
            "scale_y_factor to have 1 element (one factor), got 2",
        ),
    ],
)
def test_refusals(fp8, change, sentence):
    """In the same words where it is traced."""
    arguments = change(network((24, 64, 64, 16), torch.bfloat16, "cpu", fp8=fp8))
    for there in (arguments, [None if t is None else t.to("meta") for t in arguments]):
        with pytest.raises(RuntimeError) as info:
            sparse24.relu2_mlp_sparse(*there)
        assert f"sparse24.relu2_mlp_sparse: expected {sentence}" in str(info.value)


def test_refused_features_and_both_scales():
    x, w1, w2, *_ = network((24, 64, 64, 16), torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match=r"expected w1 to have a multiple of 16 rows \(bfloat16\), got 63"):
        sparse24.relu2_mlp_sparse(x, w1[1:], w2[:, 1:])
    arguments = list(network((24, 64, 64, 16), torch.bfloat16, "cpu", fp8=True, scale="one"))
    arguments[-1] = torch.ones(1)
    with pytest.raises(RuntimeError, match="expected scale_y_factor to be None beside scale_y, got a tensor"):
        sparse24.relu2_mlp_sparse(*arguments)
    with pytest.raises(RuntimeError, match="expected threshold to be finite and at least 0"):
        sparse24.relu2_mlp_sparse(x, w1, w2, threshold=-1)


def test_no_backward():
    x, w1, w2, *_ = network((24, 64, 64, 16), torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="it is for inference"):
        sparse24.relu2_mlp_sparse(x.requires_grad_(), w1, w2).sum().backward()
