"""Wrong arguments of relu2_experts: the argument, the rule and the value in one sentence."""

import pytest
import torch
from mixture import float8, rows, weights
from oracle import FP8

import sparse24

BF16 = torch.bfloat16
ROWS = 50


def changed(name, change):
    """A call in which one of x, w1, w2, offsets is another."""
    return lambda t: {**t, name: change(t[name])}


def with_option(name, value):
    return lambda t: {**t, name: value}


REFUSALS = {
    "x type": (changed("x", lambda x: x.tolist()), "x to be a Tensor, got list"),
    "offsets type": (changed("offsets", lambda o: o.tolist()), "offsets to be a Tensor, got list"),
    "x layout": (changed("x", lambda x: x.to_sparse()), "x to be dense .*, got torch.sparse_coo"),
    "x dtype": (changed("x", lambda x: x.double()), "x to be .*, got float64"),
    "x rank": (changed("x", lambda x: x[None]), "x to have 2 dimensions, got 3"),
    "x features": (changed("x", lambda x: x[:, 1:]), r"x to have 32 features \(columns of w1\), got 31"),
    "w1 rank": (changed("w1", lambda w: w[0]), "w1 to have 3 dimensions, got 2"),
    "w1 dtype": (changed("w1", lambda w: w.double()), "w1 to be .*, got float64"),
    "no experts": (changed("w1", lambda w: w[:0]), "w1 to have at least 1 expert, got 0"),
    "w2 experts": (changed("w2", lambda w: w[1:]), r"w2 to have 5 experts \(those of w1\), got 4"),
    "w2 columns": (changed("w2", lambda w: w[..., 16:]), r"w2 to have 64 columns \(rows of w1\), got 48"),
    "offsets dtype": (changed("offsets", lambda o: o.long()), "offsets to be int32, got int64"),
    "offsets rank": (changed("offsets", lambda o: o[None]), "offsets to have 1 dimension, got 2"),
    "offsets size": (changed("offsets", lambda o: o[1:]), r"offsets to have 5 elements \(experts of w1\), got 4"),
    "w2 device": (changed("w2", lambda w: w.to("meta")), "w2 to be on .* as x is, got meta"),
    "offsets device": (changed("offsets", lambda w: w.to("meta")), "offsets to be on .* as x is, got meta"),
    "row_scale size": (
        with_option("row_scale", torch.ones(7)),
        r"row_scale to have shape \[50\] \(rows of x\), got \[7\]",
    ),
    "row_scale rank": (
        with_option("row_scale", torch.ones(ROWS, 1)),
        r"row_scale to have shape \[50\] \(rows of x\), got \[50, 1\]",
    ),
    "row_scale dtype": (
        with_option("row_scale", torch.ones(ROWS).double()),
        r"row_scale to be float32 or bfloat16 \(the dtype of x\), got float64",
    ),
    "row_scale device": (
        with_option("row_scale", torch.ones(ROWS, device="meta")),
        "row_scale to be on .* as x is, got meta",
    ),
    "precision": (with_option("precision", "int4"), 'precision to be .*, got "int4"'),
    "one fp8 weight": (changed("w1", lambda w: w.to(FP8)), "w2 to be float8_e4m3fn as w1 is, got bfloat16"),
    "scale of 16 bits": (
        with_option("w1_scale", torch.ones(5)),
        "w1_scale to be None for weights that are not float8_e4m3fn, got a tensor",
    ),
    "sparse": (with_option("sparse", "no"), "sparse to be True or False, got no"),
    "recipe type": (with_option("recipe", "dense"), "recipe to be a sparse24.Recipe, got str"),
    "mask": (
        with_option("recipe", sparse24.Recipe(reuse_mask=False)),
        "recipe to reuse the mask, got reuse_mask=False",
    ),
    "fp8 rows": (
        lambda t: {**t, "w2": t["w2"][:, :40], "precision": "fp8"},
        "w2 to have a multiple of 16 rows for fp8, got 40",
    ),
}


def arguments(device):
    x, offsets = rows(BF16, device)
    w1, w2 = weights(BF16, device)
    return {"x": x, "w1": w1, "w2": w2, "offsets": offsets}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(device, name):
    change, sentence = REFUSALS[name]
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_experts: expected {sentence}$"):
        sparse24.relu2_experts(**change(arguments(device)))


@pytest.mark.parametrize("owner", ["w1", "w2"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda scale: None, "to be a tensor for float8 weights, got None"),
        (lambda scale: scale.double(), "to be float32, got float64"),
        (lambda scale: scale[:, :7], r"to have shape \[5\] or \[5, \d+\] \(experts, and rows, of {}\), got \[5, 7\]"),
        (lambda scale: scale.to("meta"), "to be on .* as x is, got meta"),
    ],
    ids=["none", "dtype", "size", "device"],
)
def test_refused_scales_of_weights(device, owner, wrong, sentence):
    t = arguments(device)
    t["w1"], t["w2"], *scales = float8(t["w1"], t["w2"])
    t |= dict(zip(("w1_scale", "w2_scale"), scales, strict=True))
    t[f"{owner}_scale"] = wrong(t[f"{owner}_scale"])
    sentence = sentence.format(owner)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_experts: expected {owner}_scale {sentence}$"):
        sparse24.relu2_experts(**t)


@pytest.mark.parametrize("offsets", [(7, 6, 8, 38, 50), (-1, 7, 8, 38, 50), (7, 7, 8, 38, 51)], ids=str)
def test_offsets_that_the_host_can_see_are_checked(offsets):
    t = arguments("cpu")
    t["offsets"] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="sparse24.relu2_experts: expected offsets to ascend from 0 to at most 50"):
        sparse24.relu2_experts(**t)


def test_transforms_of_torch_func_are_refused(device):
    t = arguments(device)
    with pytest.raises(RuntimeError, match="expected no transform of torch.func"):
        torch.func.grad(lambda x: sparse24.relu2_experts(**{**t, "x": x}).sum())(t["x"])
    with pytest.raises(RuntimeError, match="no forward-mode derivative"), torch.autograd.forward_ad.dual_level():
        sparse24.relu2_experts(**{**t, "x": torch.autograd.forward_ad.make_dual(t["x"], t["x"])})


def test_sizes_that_cuda_refuses(cuda):
    t = arguments(cuda)
    with pytest.raises(RuntimeError, match="expected w2 to have a multiple of 8 rows on CUDA, got 44"):
        sparse24.relu2_experts(**{**t, "w2": t["w2"][:, :44]})
