"""The usual float8 step, which `relu2_mlp` asks for little: what it does otherwise, and nothing else comes there."""

import pytest
import torch
from compare import assert_same_bits
from data import normal

import sparse24
from sparse24 import mlp
from sparse24.mlp import kept_weights

D, F, OUT = 64, 128, 48
RECIPE = sparse24.Recipe(fp8_weight_gradients=True)
SCALES = [0.01, 0.02, 0.01, 0.04]


def operands(device, shape=(67, D), dtype=torch.bfloat16, masters=None, bias=True, features=F):
    """x, w1, w2, b1, b2 and the gradient of the output."""
    shapes = shape, (features, D), (OUT, features), (features,), (OUT,)
    kinds = dtype, *(4 * (masters or dtype,))
    made = [normal(*s, dtype=torch.float32, seed=i) / 4 for i, s in enumerate(shapes)]
    leaves = [t.to(kind).to(device).requires_grad_() for t, kind in zip(made, kinds, strict=True)]
    return leaves[: 5 if bias else 3], normal(*shape[:-1], OUT, dtype=dtype, seed=9).to(device)


def step(leaves, grad, **options):
    """Output, gradients and the next scales."""
    scales = torch.tensor(SCALES, device=grad.device)
    how = {"precision": "fp8", "recipe": RECIPE, "min_tokens": 0, "delayed_scales": scales} | options
    out = sparse24.relu2_mlp(*leaves, **how)
    return out.detach(), *torch.autograd.grad(out, leaves, grad, allow_unused=True), scales


@pytest.fixture
def taken(monkeypatch):
    """How many calls took the short way, and a switch: with `off` none does."""
    real, seen = mlp.stepped, {"calls": 0, "taken": 0, "off": False}

    def counted(*arguments):
        seen["calls"] += 1
        out = None if seen["off"] else real(*arguments)
        seen["taken"] += out is not None
        return out

    monkeypatch.setattr(mlp, "stepped", counted)
    monkeypatch.setattr(kept_weights, "_accumulating", False)  # as another test may have left it
    return seen


USUAL = {
    "the usual one": ({}, {}),
    "without biases": ({"bias": False}, {}),
    "float16": ({"dtype": torch.float16}, {}),
    "float32 masters": ({"masters": torch.float32}, {}),
    "more dimensions": ({"shape": (3, 5, D)}, {}),
    "no tokens": ({"shape": (0, D)}, {}),
    "dense": ({}, {"sparse": False}),
    "dense by its size": ({}, {"min_tokens": 68}),
    "dense by its features": ({"features": 112}, {}),
    "by default": ({}, {"min_tokens": None}),
    "a threshold": ({}, {"threshold": 0.25}),
    "a threshold that is whole": ({}, {"threshold": 1}),
    "tokens in their own order": ({}, {"recipe": sparse24.Recipe(fp8_weight_gradients=True, permute_tokens=False)}),
}


@pytest.mark.parametrize("of_operands, options", USUAL.values(), ids=USUAL)
def test_the_usual_step_takes_it_and_has_the_same_bits(device, taken, of_operands, options):
    some = operands(device, **of_operands)
    actual = step(*some, **options)
    assert taken["taken"] == 1
    taken["off"] = True
    for a, e in zip(actual, step(*some, **options), strict=True):
        assert_same_bits(a, e)
        assert a.dtype == e.dtype and a.stride() == e.stride()
    assert taken["calls"] == 2


def changed(name, change):
    def apply(leaves, options):
        leaves = list(leaves)
        leaves[name] = change(leaves[name])
        return leaves, options

    return apply


def with_options(**more):
    return lambda leaves, options: (leaves, options | more)


OTHER = {
    "a frozen weight": changed(1, lambda t: t.detach()),
    "a subclass": changed(0, lambda t: torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), t.detach())),
    "one dimension": (lambda leaves, options: ([leaves[0][0].detach().requires_grad_(), *leaves[1:]], options)),
    "unknown scales": with_options(scales_known=False),
    "no scales": with_options(delayed_scales=None),
    "recomputation": with_options(recompute=True),
    "packed weights": with_options(recipe=sparse24.Recipe(fp8_weight_gradients=True, sparse_weights="up")),
    "16-bit weight gradients": with_options(recipe=sparse24.Recipe(fp8_weight_gradients=False)),
    "a residual": with_options(recipe=sparse24.Recipe(fp8_weight_gradients=True, residual=True)),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_others_run_as_before(device, taken, change):
    leaves, grad = operands(device, bias=False)
    leaves, options = change(leaves, {})
    leaves = [t if t.requires_grad else t for t in leaves]
    scales = torch.tensor(SCALES, device=grad.device)
    how = {"precision": "fp8", "recipe": RECIPE, "min_tokens": 0, "delayed_scales": scales} | options
    out = sparse24.relu2_mlp(*leaves, **how)
    assert taken["taken"] == 0 and out.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast(device, taken, kind):
    some = operands(device, dtype=kind, masters=torch.float32)
    leaves, grad = some[0], some[1].to(torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        actual = step(leaves, grad)
        assert taken["taken"] == 1
        taken["off"] = True
        expected = step(leaves, grad)
    assert actual[0].dtype == torch.bfloat16 and actual[2].dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


def test_not_without_gradients(device, taken):
    leaves, _ = operands(device)
    with torch.no_grad():
        out = sparse24.relu2_mlp(
            *leaves, precision="fp8", recipe=RECIPE, delayed_scales=torch.tensor(SCALES, device=device)
        )
    assert taken["taken"] == 0 and not out.requires_grad


def test_not_where_weights_accumulate(device, taken):
    """Their codes are kept for the micro-batches of a step."""
    leaves, grad = operands(device)
    leaves[1].grad = torch.zeros_like(leaves[1])
    first = step(leaves, grad)
    leaves[1].grad = None
    kept_weights.forget(leaves[1])
    assert taken["taken"] == 0
    taken["off"] = True
    for a, e in zip(first, step(leaves, grad), strict=True):
        assert_same_bits(a, e)


WRONG = {
    "x to have 64 features": changed(0, lambda t: t[:, :32]),
    "w2 to have 128 columns": changed(2, lambda t: t[:, :64]),
    "w1 to have 2 dimensions": changed(1, lambda t: t[None]),
    "w1 to have a multiple of 16 rows": lambda leaves, options: (
        [leaves[0], leaves[1][:120], leaves[2][:, :120]],
        options,
    ),
    "delayed_scales to have shape": with_options(delayed_scales=torch.ones(3)),
    "delayed_scales to be float32": with_options(delayed_scales=torch.ones(4).double()),
    "delayed_scales to have four elements in memory": with_options(delayed_scales=torch.ones(1).expand(4)),
    "threshold to be": with_options(threshold=-1.0),
    "min_tokens to be": with_options(min_tokens=-1),
    "sparse to be": with_options(sparse="yes"),
    "recompute to be": with_options(recompute="no"),
    "recipe to be": with_options(recipe=7),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_refuses_as_before(sentence):
    leaves, _ = operands("cpu", bias=False)
    leaves, options = WRONG[sentence](leaves, {})
    how = {"precision": "fp8", "recipe": RECIPE, "min_tokens": 0, "delayed_scales": torch.tensor(SCALES)} | options
    with pytest.raises(RuntimeError, match=sentence):
        sparse24.relu2_mlp(*leaves, **how)
