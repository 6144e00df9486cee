"""relu2_mlp_fp8 and its gradients: the bits of their ops one after another, whatever the operands; errors."""

import math

import pytest
import torch
from compare import assert_same_bits
from data import DTYPES, normal, relayout
from oracle import FP8
from step_fp8_ops import backward, forward

import sparse24

D, F, OUT = 48, 96, 80
NAMES = ("out", "x_transposed", "w1_transposed", "w2_transposed", "values", "meta")
GRADIENTS = ("dx", "dw1", "dw2", "dh")


def one(value, device):
    return torch.full((1,), value, device=device)


def operands(tokens, dtype, device, features=F, seed=0):
    shapes = (tokens, D), (features, D), (OUT, features), (tokens, OUT)
    x, w1, w2, grad = (normal(*s, dtype=torch.float32, seed=seed + i) for i, s in enumerate(shapes))
    x, w1, w2, grad = (t.to(dtype).to(device) for t in (x, w1 / 4, w2 / 4, grad))
    b1, b2 = normal(features, dtype=torch.bfloat16, seed=8), normal(OUT, dtype=dtype, seed=9)
    scales = torch.tensor([0.01, 0.02, 0.01, 0.04], device=device)
    return x, w1, w2, scales, b1.to(device), b2.to(device), grad


def check(device, x, w1, w2, scales, b1, b2, grad, s1=None, s2=None, *, options, threshold=0.0, hot=None, count=64):
    sparse, interleaved = options
    how = s1, s2, sparse, interleaved, threshold
    expected, used, seen = forward(x, w1, w2, scales, b1, b2, *how)
    *actual, places = sparse24.relu2_mlp_fp8(x, w1, w2, scales, b1, b2, *how)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        if e is None:
            assert a.numel() == 0, name
        else:
            assert_same_bits(a, e, name)
    assert_same_bits(places[:4, 0], scales)
    assert_same_bits(places[4:, 0], torch.cat((used[2].reshape(1), used[3].reshape(1), used[0])))
    assert_same_bits(places[:2, 1], torch.cat(seen))
    transposes = []
    for a, w, of in ((actual[2], w1, s1), (actual[3], w2, s2)):
        transposes.append(a if of is None else sparse24.transpose_fp8(w))
    saved = actual[0], actual[1], *transposes, *actual[4:]
    now = scales.clone()
    now[1] *= 64  # another step has been here
    wanted, next_wanted = backward(
        grad, (*saved[:5], expected[5]), used, seen, scales, now, hot, count if sparse else 0, sparse, interleaved
    )
    *found, next_found = sparse24.relu2_mlp_fp8_gradients(
        grad, *saved[1:], places, now, hot, count if sparse else 0, sparse, interleaved
    )
    for name, a, e in zip(GRADIENTS, found, wanted, strict=True):
        assert_same_bits(a, e, name)
    assert_same_bits(next_found, next_wanted)
    all_found = *found, next_found
    options = {"sparse": sparse, "interleaved": interleaved, "dense_features": count if sparse else 0, "hot": hot}
    for left_out, what in ((0, "need_x"), (3, "need_dh")):
        some = sparse24.relu2_mlp_fp8_gradients(grad, *saved[1:], places, now, **options, **{what: False})
        for i, (a, e) in enumerate(zip(some, all_found, strict=True)):
            assert_same_bits(a, e[:0] if i == left_out else e)


OPTIONS = {"sparse": (True, False), "interleaved": (True, True), "dense": (False, False)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 32, 67, 130, 256])
def test_it_has_the_bits_of_its_ops(device, tokens, dtype, options):
    if device != "cpu" and dtype == torch.float32:
        pytest.skip("float32 is for the CPU only")
    check(device, *operands(tokens, dtype, device), options=options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tokens", [1, 67, 130])
def test_all_of_it_is_written(poisoned_memory, tokens, options):
    """Padding too, which the bits of the ops are compared in."""
    check("cpu", *operands(tokens, torch.bfloat16, "cpu"), options=options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_biases_and_with_a_threshold(device, options):
    x, w1, w2, scales, _, _, grad = operands(70, torch.bfloat16, device)
    check(device, x, w1, w2, scales, None, None, grad, options=options, threshold=0.25)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=["w1", "w2", "both"])
def test_weights_that_are_codes(device, which, options):
    x, w1, w2, *others = operands(70, torch.bfloat16, device)
    codes = [
        sparse24.quantize_fp8(w, None, "tensor") if codes else (w, None)
        for codes, w in zip(which, (w1, w2), strict=True)
    ]
    (w1, s1), (w2, s2) = codes
    check(device, x, w1, w2, *others, s1, s2, options=options)


def test_dense_features(device):
    some = operands(70, torch.bfloat16, device)
    check(device, *some, options=(True, True), hot=torch.arange(0, 96, 6, device=device))
    check(device, *some, options=(True, True), count=0)
    check(device, *some, options=(True, True), count=F)


def test_features_that_only_dense_products_take(device):
    check(device, *operands(70, torch.bfloat16, device, features=112), options=(False, False))


def test_magnitudes_that_do_not_count(device):
    """Nothing, and what is not finite, leave scales as they are; what exceeds a scale saturates and is seen."""
    x, w1, w2, scales, b1, b2, grad = operands(32, torch.bfloat16, device)
    places = sparse24.relu2_mlp_fp8(x * 100, w1, w2, scales)[-1]
    assert places[0, 1] == (x * 100).abs().max().float()
    for bad in (torch.zeros_like(grad), torch.full_like(grad, math.inf)):
        _, *saved = sparse24.relu2_mlp_fp8(torch.zeros_like(x), w1, w2, scales)
        found = sparse24.relu2_mlp_fp8_gradients(bad, *saved, scales)[-1]
        assert_same_bits(found[:3], scales[:3])
    _, *saved = sparse24.relu2_mlp_fp8(x, w1, w2, scales * 100)
    found = sparse24.relu2_mlp_fp8_gradients(grad, *saved, scales * 100)[-1]
    assert_same_bits(found, scales * 50)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_any_layout(device, layout):
    x, w1, w2, scales, b1, b2, grad = operands(64, torch.bfloat16, device)
    strange = [relayout(t, layout) for t in (x, w1, w2)]
    expected = sparse24.relu2_mlp_fp8(x, w1, w2, scales, b1, b2)
    actual = sparse24.relu2_mlp_fp8(*strange, relayout(scales.repeat(8).view(8, 4), layout)[0], b1, b2)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    grads = sparse24.relu2_mlp_fp8_gradients(grad, *expected[1:], scales)
    saved = [*(relayout(t, layout) for t in expected[1:5]), expected[5], relayout(expected[6], layout)]
    for a, e in zip(sparse24.relu2_mlp_fp8_gradients(relayout(grad, layout), *saved, scales), grads, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_no_tokens(device, sparse):
    x, w1, w2, scales, b1, b2, grad = operands(0, torch.bfloat16, device)
    out, *saved = sparse24.relu2_mlp_fp8(x, w1, w2, scales, b1, b2, sparse=sparse)
    assert out.shape == (0, OUT)
    dx, dw1, dw2, _, found = sparse24.relu2_mlp_fp8_gradients(
        grad, *saved, scales, dense_features=64 if sparse else 0, sparse=sparse
    )
    assert dx.shape == (0, D) and dw1.count_nonzero() == 0 and dw2.count_nonzero() == 0
    assert_same_bits(found, scales)


WRONG = [
    (lambda a: a | {"x": a["x"][:, :40]}, "x to have a multiple of 16 columns above 0, got 40"),
    (lambda a: a | {"x": a["x"][:, :0], "w1": a["w1"][:, :0]}, "x to have a multiple of 16 columns above 0, got 0"),
    (lambda a: a | {"x": a["x"][0]}, "x to have 2 dimensions, got 1"),
    (lambda a: a | {"w1": a["w1"][:80]}, "w1 to have a multiple of 32 rows above 0, got 80"),
    (lambda a: a | {"w1": a["w1"].float()}, "w1 to be bfloat16 (the dtype of x) or float8_e4m3fn, got float32"),
    (lambda a: a | {"w1": a["w1"].to(FP8)}, "w1_scale to be a tensor (w1 is float8_e4m3fn), got None"),
    (lambda a: a | {"w2_scale": a["scales"][:1]}, "w2_scale to be None (w2 is not float8_e4m3fn), got a tensor"),
    (lambda a: a | {"w2": a["w2"][:, :64]}, "w2 to have 96 columns (rows of w1), got 64"),
    (lambda a: a | {"w2": a["w2"][:40]}, "w2 to have a multiple of 16 rows above 0, got 40"),
    (lambda a: a | {"scales": a["scales"][:3]}, "scales to have 4 elements (of x, y, grad and dh), got 3"),
    (lambda a: a | {"scales": a["scales"].double()}, "scales to be float32, got float64"),
    (lambda a: a | {"b1": a["b1"].float()}, "b1 to be bfloat16, got float32"),
    (lambda a: a | {"b2": a["b2"][1:]}, "b2 to have 80 elements (rows of w2), got 79"),
]


@pytest.mark.parametrize("change, sentence", WRONG, ids=[sentence for _, sentence in WRONG])
def test_what_does_not_fit(device, change, sentence):
    """The same sentence where it runs and where it is traced."""
    x, w1, w2, scales, b1, b2, _ = operands(32, torch.bfloat16, device)
    arguments = change({"x": x, "w1": w1, "w2": w2, "scales": scales, "b1": b1, "b2": b2})
    for there in (arguments, {name: t.to("meta") for name, t in arguments.items()}):
        if there["x"].is_meta and "w1_scale" in sentence:
            continue
        with pytest.raises(RuntimeError) as info:
            sparse24.relu2_mlp_fp8(**there)
        assert f"sparse24.relu2_mlp_fp8: expected {sentence}" in str(info.value)


WRONG_GRADIENTS = [
    ("grad", lambda t: t[:, :40], "grad to have a multiple of 16 columns above 0, got 40"),
    ("grad", lambda t: t[:20], "x_transposed to have shape [D, T] with T padded to a multiple of 32, got (48, 64)"),
    ("x_transposed", lambda t: t[:32], "w1_transposed to have shape [D, F] with F padded, got (48, 96)"),
    ("x_transposed", lambda t: t[:40], "x_transposed to have a multiple of 16 rows above 0, got 40"),
    ("x_transposed", lambda t: t.float(), "x_transposed to be float8_e4m3fn, got float32"),
    ("w1_transposed", lambda t: t[:, :64], "w1_transposed to have shape [D, F] with F padded, got (48, 64)"),
    ("w2_transposed", lambda t: t[:, :64], "w2_transposed to have shape [F, columns of grad, padded], got (96, 64)"),
    ("values", lambda t: t[:, :16], "values to have shape [T, F / 2], got (40, 16)"),
    ("meta", lambda t: t[1:], "meta to have 2048 elements"),
    ("places", lambda t: t[:6], "places to have 28 elements (of relu2_mlp_fp8), got 24"),
    ("places", lambda t: t.flatten(), "places to have 2 dimensions, got 1"),
    ("scales", lambda t: t[:2], "scales to have 4 elements (of x, y, grad and dh), got 2"),
    ("hot", lambda _: torch.zeros(97, dtype=torch.int64), "hot to have at most 96 elements"),
    ("hot", lambda _: torch.zeros(9, dtype=torch.int64), "hot to be a multiple of 16 elements up to 96"),
    ("dense_features", lambda _: 112, "dense_features to be a multiple of 16 in number up to 96"),
    ("dense_features", lambda _: 9, "dense_features to be a multiple of 16 in number up to 96"),
]


@pytest.mark.parametrize("name, change, sentence", WRONG_GRADIENTS, ids=[case[-1] for case in WRONG_GRADIENTS])
def test_what_does_not_fit_backwards(device, name, change, sentence):
    x, w1, w2, scales, _, _, grad = operands(40, torch.bfloat16, device)
    _, *saved = sparse24.relu2_mlp_fp8(x, w1, w2, scales)
    names = "x_transposed", "w1_transposed", "w2_transposed", "values", "meta", "places"
    arguments = {
        "grad": grad,
        **dict(zip(names, saved, strict=True)),
        "scales": scales,
        "hot": None,
        "dense_features": 0,
    }
    arguments[name] = change(arguments[name])
    if name == "hot":
        arguments["hot"] = arguments["hot"].to(device)
    meta = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    for there in (arguments, meta):
        with pytest.raises(RuntimeError) as info:
            sparse24.relu2_mlp_fp8_gradients(**there)
        assert f"sparse24.relu2_mlp_fp8_gradients: expected {sentence}" in str(info.value)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_nothing_is_copied_that_does_not_fit(sparse):
    """An expanded matrix that no memory holds is refused by its shape, and what it is asked for names the op."""
    x, w1, w2, scales, _, _, grad = operands(40, torch.bfloat16, "cpu")
    _, *saved = sparse24.relu2_mlp_fp8(x, w1, w2, scales, sparse=sparse)
    huge = [*saved[:4], torch.zeros((), dtype=torch.uint8).expand(2**62), saved[5]]
    with pytest.raises(RuntimeError, match="sparse24.relu2_mlp_fp8_gradients: expected meta to have (2048|0) elements"):
        sparse24.relu2_mlp_fp8_gradients(grad, *huge, scales, sparse=sparse)


def test_no_backward(device):
    x, w1, w2, scales, *_ = operands(32, torch.bfloat16, device)
    with pytest.raises(RuntimeError, match="no backward pass"):
        sparse24.relu2_mlp_fp8(x.requires_grad_(), w1, w2, scales)[0].sum().backward()
