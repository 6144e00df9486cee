"""Training in fp8: gradients against float64, and against the same quantisation in plain torch."""

import pytest
import torch
import torch.nn.functional as F
import training_reference as reference
from compare import assert_accurate, assert_same_bits
from data import integers
from oracle import FP8, Pattern, quantize_fp8
from roots import times_root
from training_reference import HIDDEN, NAMES, OUT, exact_operands, operands, run

import sparse24
from sparse24 import Recipe


def dequantised(t):
    """t with the rounding of fp8 and one scale per row, in float32."""
    q, scale = quantize_fp8(t)
    return (q.float() * scale).to(t.device)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ["sparse", "dense", "scale_y"])
@pytest.mark.parametrize("tokens", [1, 129])
def test_fp8_accuracy(device, tokens, kind, fused):
    """Twice the error of the same quantisation in plain torch, against float64 with the same mask."""
    *leaves, grad = operands(tokens, torch.bfloat16, device)
    x, w1, w2, b1, b2 = leaves
    scale_y = torch.full((1,), 0.05, device=device) if kind == "scale_y" else None
    mask = torch.ones(tokens, HIDDEN, device=device)
    if kind != "dense":
        (q, s), (q1, s1) = sparse24.quantize_fp8(x), sparse24.quantize_fp8(w1)
        if fused:
            meta = sparse24.linear_compress(q, q1, s, s1, b1, scaling="row")[1]
        else:
            meta = sparse24.compress_fp8(sparse24.mlp.up_projection(x, w1, b1, fp8=True), None, "relu2")[1]
        mask = Pattern.of_meta(meta, tokens, HIDDEN, FP8, -1).mask().float().to(device)

    def plain():
        y1 = (dequantised(x) @ dequantised(w1).t() + b1.float()).to(torch.bfloat16).float()
        y = y1.relu().square() * mask
        y = dequantised(y) if scale_y is None else (y / scale_y).clamp(max=448).to(FP8).float() * scale_y
        out = y @ dequantised(w2).t() + b2.float()
        y = y.to(torch.bfloat16)
        dh = ((grad @ w2).float() * 2 * y.float().sqrt()).to(torch.bfloat16)
        dx = dequantised(dh) @ dequantised(w1.t()).t()
        return out, dx, dh.t() @ x, grad.t() @ y, dh.float().sum(0), grad.float().sum(0)

    def exact():
        x, w1, w2, b1, b2, g = (t.double() for t in (*leaves, grad))
        h = F.linear(x, w1, b1).relu()
        y, dh = h.square() * mask, (g @ w2) * (2 * h) * mask
        return F.linear(y, w2, b2), dh @ w1, dh.t() @ x, g.t() @ y, dh.sum(0), g.sum(0)

    options = {
        "precision": "fp8",
        "recipe": Recipe(weight_gradients="dense"),
        "fused": fused,
        "scale_y": scale_y,
        "sparse": kind != "dense",
    }
    actual = run(leaves, grad, **options)
    for name, a, t, e in zip(("out", *NAMES), actual, plain(), exact(), strict=True):
        assert a.dtype == torch.bfloat16
        assert_accurate(a, t.to(torch.bfloat16), e, 4 * e.abs().max().float(), name)


def test_fp8_weights_pass_gradients_on(device):
    """A frozen float8 network: x and the biases get the gradients of its dequantised weights."""
    *leaves, grad = operands(65, torch.bfloat16, device)
    x, w1, w2, b1, b2 = leaves
    (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    inputs = [t.clone().requires_grad_() for t in (x, b1, b2)]
    out = sparse24.relu2_mlp(inputs[0], q1, q2, *inputs[1:], w1_scale=s1, w2_scale=s2, min_tokens=0)
    out.backward(grad)
    # Quantising a dequantised weight again changes nothing but the last bits of its scale.
    wide = [(q.float() * s).to(torch.bfloat16) for q, s in ((q1, s1), (q2, s2))]
    expected = run([x, *wide, b1, b2], grad, precision="fp8")
    for t, e in zip(inputs, (expected[1], *expected[4:]), strict=True):
        assert (t.grad - e).abs().max() <= 0.05 * e.abs().max() and t.grad.abs().max() > 0


RECIPES = {
    "default": Recipe(),
    "natural": Recipe(permute_tokens=False),
    "no split": Recipe(dense_features=0.0),
    "residual": Recipe(residual=True),
    "dense": Recipe(weight_gradients="dense"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("tokens", [1, 7, 257, 2051])
def test_fp8_gradients_are_the_documented_ones(device, dtype, tokens, recipe):
    """Of small integers dy is exact: then dh, the masks along tokens and the quantised dh are known to the bit."""
    x, w1, _, b1, b2, _ = operands(tokens, dtype, device)
    w2, grad = (integers(*s, dtype=dtype, limit=2, seed=7).to(device) for s in ((OUT, HIDDEN), (tokens, OUT)))
    (q, s), (q1, s1) = sparse24.quantize_fp8(x), sparse24.quantize_fp8(w1)
    values, meta, scale, *_ = sparse24.linear_compress(q, q1, s, s1, b1.to(torch.bfloat16), scaling="row")
    y = (sparse24.decompress(values, meta, tokens, HIDDEN).float() * scale).to(dtype)
    dh = times_root((grad.float() @ w2.float()).to(dtype), y)
    hot = reference.hot_features(y, recipe.hot_features(HIDDEN))
    y_tokens, dh_tokens = (reference.operand_over_tokens(a, recipe, hot) for a in (y, dh))
    assert tokens < 8 or recipe.residual or recipe.weight_gradients == "dense" or not torch.equal(y_tokens, y)

    products = {
        "x": (dequantised(dh), dequantised(w1.t()).t()),
        "w1": (dh_tokens.t(), x),
        "w2": (grad.t(), y_tokens),
        "b1": (torch.ones(1, tokens, dtype=dtype, device=device), dh),
    }
    actual = dict(
        zip(NAMES, run([x, w1, w2, b1, b2], grad, precision="fp8", recipe=recipe, fused=True)[1:], strict=True)
    )
    for name, (a, b) in products.items():
        a, b = a.double(), b.double()
        assert actual[name].dtype == dtype
        # b1 is cast to bfloat16, and the tensor cores sum float8 products in fewer bits than float32 has.
        coarse = name == "b1" or (name == "x" and device == "cuda")
        torchs = (a.float() @ b.float()).to(torch.bfloat16 if coarse else dtype)
        got = actual[name].reshape(torchs.shape)
        assert_accurate(got, torchs, a @ b, a.abs() @ b.abs(), name)


def test_only_dx_differs_from_sixteen_bits(device):
    """Where float8 holds the activation, the other gradients are the same to the bit."""
    x, w1, w2, b1, b2, grad = exact_operands(511, torch.bfloat16, device)
    x[:, 3:] = 0  # |h| <= 4, whose squares e4m3 has
    x, w1, grad = (F.pad(t, (0, 8)) for t in (x, w1, grad))  # multiples of 16
    w2, b2 = F.pad(w2, (0, 0, 0, 8)), F.pad(b2, (0, 8))
    leaves = x, w1, w2, b1, b2
    options = {"scale_y": torch.ones(1, device=device)}
    eight, sixteen = run(leaves, grad, precision="fp8", **options), run(leaves, grad)
    for name, actual, expected in zip(("out", *NAMES), eight, sixteen, strict=True):
        if name not in ("out", "x"):
            assert_same_bits(actual, expected, name)
