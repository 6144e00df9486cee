"""Gradients of the network with 2:4 activations, for every recipe, and what is refused."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_reference as reference
from compare import assert_accurate, assert_same_bits
from oracle import Pattern
from training_reference import HIDDEN, NAMES, OUT, D, exact_operands, operands, run

import sparse24
from sparse24 import Recipe, Schedule

DENSE_DW = Recipe(weight_gradients="dense")
RECIPES = {
    "default": None,
    "natural": Recipe(permute_tokens=False),
    "no split": Recipe(dense_features=0.0),
    "all features": Recipe(dense_features=1.0),
    "residual": Recipe(residual=True),
    "natural residual": Recipe(permute_tokens=False, dense_features=0.0, residual=True),
    "dense": DENSE_DW,
    "no reuse": Recipe(reuse_mask=False),
    "no reuse, dense": Recipe(reuse_mask=False, weight_gradients="dense"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("tokens", [1, 7, 64, 511])
def test_every_recipe_exactly(device, dtype, tokens, recipe):
    *leaves, grad = exact_operands(tokens, dtype, device)
    expected = reference.step(*leaves, grad, recipe or Recipe())
    for fused in (True, False):
        out, *grads = run(leaves, grad, recipe=recipe, fused=fused)
        assert_same_bits(out + 0.0, expected.out.to(dtype) + 0.0)
        for name, actual, exact in zip(NAMES, grads, expected.grads, strict=True):
            assert_same_bits(actual + 0.0, exact.float().to(dtype) + 0.0, name)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("features", [HIDDEN, 24, 20, 7])
def test_dense_exactly(device, dtype, features, fused):
    """With a backward pass of its own, also where linear_relu2_gradient takes no such number of features."""
    x, w1, w2, b1, b2, grad = exact_operands(65, dtype, device)
    leaves = x, w1[:features], w2[:, :features], b1[:features], b2
    x, w1, w2, b1, b2 = (t.double() for t in leaves)
    h = torch.relu(F.linear(x, w1, b1))
    g, y = grad.double(), h.square()
    dh = ((g @ w2) * (2 * h)).to(dtype).double()
    expected = F.linear(y, w2, b2), dh @ w1, dh.t() @ x, g.t() @ y, dh.sum(0), g.sum(0)
    actual = run(leaves, grad, sparse=False, recompute=True, fused=fused)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        assert_same_bits(a + 0.0, e.float().to(dtype) + 0.0, name)


def test_recipes_are_immutable_values():
    recipe = Recipe(dense_features=0.1)
    for change in (lambda: setattr(recipe, "residual", True), lambda: delattr(recipe, "residual")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    other = dataclasses.replace(Recipe(), dense_features=0.1)
    for same in (other, copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert same == recipe and hash(same) == hash(recipe) and same.hot_features(6400) == 640
    assert recipe != Recipe()


def test_recipes_from_dictionaries():
    """Of dataclasses.asdict and JSON, with numbers of NumPy; also inside of a ConvertConfig."""
    recipe = Recipe(dense_features=np.float32(0.25), residual=np.True_, weight_gradients="sparse")
    stored = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert set(stored) == {field.name for field in dataclasses.fields(Recipe)}
    again = Recipe(**stored)
    assert again == recipe and hash(again) == hash(recipe) and again.hot_features(6400) == 1600
    assert type(recipe.residual) is bool and type(recipe.dense_features) is float
    config = sparse24.ConvertConfig(dtype="fp8", recipe=recipe, min_tokens=3, decisions={"a.b": False, "c": "bf16"})
    assert sparse24.ConvertConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    plain = sparse24.ConvertConfig()
    assert sparse24.ConvertConfig(**dataclasses.asdict(plain)) == plain
    schedule = Schedule(2000, dense_final_steps=5)
    assert Schedule(**json.loads(json.dumps(dataclasses.asdict(schedule)))) == schedule


def test_recipes_differ(device):
    """The masks matter for these numbers; without a mask along tokens neither groups nor features do."""
    *leaves, grad = exact_operands(511, torch.bfloat16, device)
    grads = {name: run(leaves, grad, recipe=recipe)[1:] for name, recipe in RECIPES.items()}
    for name in ("default", "natural", "no split", "no reuse"):
        for other in ("default", "natural", "no split", "no reuse", "dense"):
            assert name == other or not torch.equal(grads[name][1], grads[other][1]), f"{name} is {other}"
    for name in ("residual", "natural residual", "all features"):
        for actual, exact in zip(grads[name], grads["dense"], strict=True):
            assert_same_bits(actual + 0.0, exact + 0.0, name)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("recipe", ["default", "residual", "dense"])
@pytest.mark.parametrize("tokens", [1, 7, 257])
def test_accuracy(device, dtype, recipe, tokens, fused):
    """Twice the error of torch in the same dtype, against float64, all with the same masks."""
    recipe = RECIPES[recipe] or Recipe()
    *leaves, grad = operands(tokens, dtype, device)
    x, w1, w2, b1, _ = leaves
    if fused:
        values, meta, *_ = sparse24.linear_compress(x, w1, bias=b1)
    else:
        values, meta = sparse24.compress(F.linear(x, w1, b1), "relu2")
    mask = Pattern.of_meta(meta, tokens, HIDDEN, dtype, -1).mask().to(device)
    y = sparse24.decompress(values, meta, tokens, HIDDEN)
    dh = ((grad @ w2).float() * 2 * y.float().sqrt()).to(dtype)
    hot = reference.hot_features(y, recipe.hot_features(HIDDEN))
    kept = [(reference.operand_over_tokens(a, recipe, hot) == a) for a in (y, dh)]

    def dense(to):
        x, w1, w2, b1, b2, g = (t.to(to) for t in (*leaves, grad))
        h = F.linear(x, w1, b1).relu()
        y = h.square() * mask
        dh = (g @ w2) * (2 * h) * mask
        dw1, dw2 = (dh * kept[1]).t() @ x, g.t() @ (y * kept[0])
        return F.linear(y, w2, b2), dh @ w1, dw1, dw2, dh.sum(0), g.sum(0)

    actual = run(leaves, grad, recipe=recipe, fused=fused)
    for name, a, t, e in zip(("out", *NAMES), actual, dense(dtype), dense(torch.float64), strict=True):
        assert_accurate(a, t, e, 4 * e.abs().max().float(), name)


def test_dropped_entries_get_no_gradient(device):
    """One token, equal features: of four the first two carry the gradient."""
    x, w1 = torch.ones(1, 16, device=device), torch.full((32, 16), 0.25, device=device)
    x, w1, w2 = (t.to(torch.bfloat16).requires_grad_() for t in (x, w1, torch.ones(8, 32, device=device)))
    sparse24.relu2_mlp(x, w1, w2, min_tokens=0).sum().backward()
    kept = torch.tensor([True, True, False, False] * 8, device=device)
    assert torch.equal(w1.grad.abs().sum(1) > 0, kept) and torch.equal(w2.grad.abs().sum(0) > 0, kept)
    assert (x.grad == 16 * 8 * 8 * 0.25).all()  # 16 features, dy2 = 8, 2 h = 8, w1 = 0.25


@pytest.mark.parametrize("recipe", ["default", "natural", "residual", "no reuse"])
def test_hot_features_are_chosen_from_a_sample(device, recipe):
    """Of more than 1,024 tokens, on every path; without the mask of all tokens, dense as they are."""
    *leaves, grad = exact_operands(2051, torch.bfloat16, device)
    recipe = RECIPES[recipe] or Recipe()
    expected = reference.step(*leaves, grad, recipe)
    chosen = [reference.hot_features(expected.y, 64, sampled) for sampled in (True, False)]
    assert chosen[0] != chosen[1], "the sample would not matter"
    for options in ({"fused": True}, {"fused": False}, {"recompute": True}):
        everything = run(leaves, grad, recipe=recipe, **options)
        for name, actual, exact in zip(NAMES, everything[1:], expected.grads, strict=True):
            assert_same_bits(actual + 0.0, exact.float().to(torch.bfloat16) + 0.0, name)
        for name in ("w1", "w2"):  # one alone is composed of separate ops
            alone = run(leaves, grad, needed=(name,), recipe=recipe, **options)
            assert_same_bits(alone[1 + NAMES.index(name)], everything[1 + NAMES.index(name)], name)


def test_given_hot_features(device):
    """They need not be the densest ones nor ascend, as long as their number is right."""
    *leaves, grad = exact_operands(511, torch.bfloat16, device)
    hot = list(range(HIDDEN - 1, HIDDEN - 65, -1))
    expected = reference.step(*leaves, grad, Recipe(), hot).grads
    given = torch.tensor(hot, device=device)
    for name, actual, exact in zip(NAMES, run(leaves, grad, hot_features=given)[1:], expected, strict=True):
        assert_same_bits(actual + 0.0, exact.float().to(torch.bfloat16) + 0.0, name)


@pytest.mark.parametrize("recipe", ["default", "residual", "no reuse", "dense"])
@pytest.mark.parametrize("wrong", ["repeated", "beyond", "negative"])
def test_hot_features_that_are_none(device, wrong, recipe, poisoned_memory):
    """Repeated indices and those outside give their places to the lowest features that are not given."""
    *leaves, grad = exact_operands(65, torch.bfloat16, device)
    recipe = RECIPES[recipe] or Recipe()
    hot = torch.arange(64, 128)
    if wrong == "repeated":
        hot[10:30] = hot[9]
    else:
        hot[10:30] = (
            torch.tensor([HIDDEN, 2**62]).repeat(10) if wrong == "beyond" else torch.tensor([-1, -(2**63)] * 10)
        )
    expected = sorted({*range(64, 74), *range(94, 128), *range(20)})
    step = reference.step(*leaves, grad, recipe, expected)
    for name, actual, exact in zip(
        NAMES, run(leaves, grad, recipe=recipe, hot_features=hot.to(device))[1:], step.grads, strict=True
    ):
        assert_same_bits(actual + 0.0, exact.float().to(torch.bfloat16) + 0.0, name)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize(
    "needed", [("x",), ("w1",), ("w2",), ("b1",), ("b2",), ("x", "w2", "b2"), ("w1", "b1")], ids=str
)
def test_only_what_is_needed(device, needed, precision):
    *leaves, grad = operands(65, torch.bfloat16, device)
    everything = run(leaves, grad, precision=precision)
    for name, actual, expected in zip(
        ("out", *NAMES), run(leaves, grad, needed=needed, precision=precision), everything, strict=True
    ):
        if name == "out" or name in needed:
            assert_same_bits(actual, expected, name)
        else:
            assert actual is None


@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}, {"recompute": True}], ids=str)
def test_no_tokens(device, options):
    *leaves, grad = operands(0, torch.bfloat16, device)
    _, dx, *others = run(leaves, grad, **options)
    assert dx.shape == (0, D) and all((g == 0).all() for g in others)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_expanded_gradients(device, precision):
    """The gradient of a sum is one number with strides of zero; that of a slice is not contiguous."""
    *leaves, grad = operands(65, torch.bfloat16, device)
    ones = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    wide = torch.zeros(65, 2 * OUT, dtype=torch.bfloat16, device=device)
    wide[:, ::2] = grad
    for odd, plain in ((ones.expand(65, OUT), ones.repeat(65, OUT)), (wide[:, ::2], grad)):
        for actual, expected in zip(*(run(leaves, g, precision=precision) for g in (odd, plain)), strict=True):
            assert_same_bits(actual, expected)


def test_shapes_and_layouts(device):
    """x [2, 3, 5, D] and a transposed one get gradients of their shape."""
    *leaves, grad = operands(30, torch.bfloat16, device)
    _, dx, dw1, *_ = run(leaves, grad)
    x, grad = leaves[0].reshape(2, 3, 5, D), grad.reshape(2, 3, 5, OUT)
    for change in (lambda t: t, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)):
        _, moved, dw1_moved, *_ = run([change(x), *leaves[1:]], change(grad))
        assert_same_bits(moved.reshape(30, D), dx)
        assert_same_bits(dw1_moved, dw1)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_float32_weights(device, precision):
    """Master weights get the gradients of their casts, in float32."""
    *leaves, grad = operands(65, torch.float32, device)
    x, grad = leaves[0].to(torch.bfloat16), grad.to(torch.bfloat16)
    half = run([t.to(torch.bfloat16) for t in leaves], grad, precision=precision)
    master = run([x, *leaves[1:]], grad, precision=precision)
    assert [t.dtype for t in master] == [torch.bfloat16] * 2 + [torch.float32] * 4
    for actual, expected in zip(master, half, strict=True):
        assert_same_bits(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_autocast(device, precision):
    """As if cast by hand, wherever the backward pass runs."""
    *leaves, grad = operands(65, torch.float32, device)
    half = [t.to(torch.bfloat16) for t in leaves]
    expected = run(half, grad.to(torch.bfloat16), precision=precision)
    for inside in (False, True):
        inputs = [t.clone().requires_grad_() for t in leaves]
        with torch.autocast(device, torch.bfloat16):
            out = sparse24.relu2_mlp(*inputs, min_tokens=0, precision=precision)
        with torch.autocast(device, torch.float16, enabled=inside):
            out.backward(grad.to(torch.bfloat16))
        assert_same_bits(out, expected[0])
        for t, g in zip(inputs, expected[1:], strict=True):
            assert_same_bits(t.grad, g.float())


def test_reruns_have_the_same_bits(device, poisoned_memory):
    *leaves, grad = operands(257, torch.bfloat16, device)
    for options in ({}, {"recipe": RECIPES["residual"]}, {"precision": "fp8"}):
        first, *others = (run(leaves, grad, **options) for _ in range(3))
        assert all(t.isfinite().all() for t in first)
        for other in others:
            for actual, expected in zip(other, first, strict=True):
                assert_same_bits(actual, expected)


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSALS = {
    "recipe": ({"recipe": {"residual": True}}, "recipe to be a sparse24.Recipe, got dict"),
    "fp8": (
        {"precision": "fp8", "recipe": Recipe(reuse_mask=False)},
        "recipe to reuse the mask in fp8 precision, got reuse_mask=False",
    ),
    "dtype": ({"hot_features": torch.zeros(64)}, "hot_features to be int64, got float32"),
    "count": (
        {"hot_features": torch.zeros(16, dtype=torch.int64)},
        r"hot_features to have shape \[64\] .*, got \[16\]",
    ),
    "rank": (
        {"hot_features": torch.zeros(1, 64, dtype=torch.int64)},
        r"hot_features to have shape \[64\] .*, got \[1, 64\]",
    ),
    "rank of a column": (
        {"hot_features": torch.zeros(64, 1, dtype=torch.int64)},
        r"hot_features to have shape \[64\] .*, got \[64, 1\]",
    ),
    "device": (
        {"hot_features": torch.zeros(64, dtype=torch.int64, device="meta")},
        "hot_features to be on .* as w1 is, got meta",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(device, name):
    options, sentence = REFUSALS[name]
    *leaves, _ = operands(8, torch.bfloat16, device)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {sentence}"):
        sparse24.relu2_mlp(*leaves, **options)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Recipe(weight_gradients="exact"), 'Recipe: expected weight_gradients to be .*, got "exact"'),
        (lambda: Recipe(dense_features=1.5), "Recipe: expected dense_features to be from 0 to 1, got 1.5"),
        (lambda: Recipe(dense_features=-0.1), "Recipe: expected dense_features to be from 0 to 1, got -0.1"),
        (lambda: Recipe(dense_features="all"), "Recipe: expected dense_features to be from 0 to 1, got all"),
        (lambda: Recipe(residual=torch.ones(2)), r"Recipe: expected residual to be True or False, got tensor.*"),
        (lambda: Recipe(residual="no"), "Recipe: expected residual to be True or False, got no"),
        (lambda: Schedule(1.5), "Schedule: expected total_steps to be a whole number, got 1.5"),
        (lambda: Schedule("10"), "Schedule: expected total_steps to be a whole number, got 10"),
        (lambda: Schedule(None), "Schedule: expected total_steps to be a whole number, got None"),
        (lambda: Schedule(9, 0).is_sparse("1"), "Schedule: expected step to be a whole number, got 1"),
        (lambda: Schedule(9, 0).is_sparse(-1), "Schedule: expected step to be at least 0, got -1"),
        (lambda: Schedule(9, 0).apply(None, 0), "Schedule: expected model to be a torch.nn.Module, got None"),
        (lambda: Schedule(float("nan")), "Schedule: expected total_steps to be a whole number, got nan"),
        (lambda: Schedule(float("inf")), "Schedule: expected total_steps to be a whole number, got inf"),
        (lambda: Schedule(-1), "Schedule: expected total_steps to be at least 0, got -1"),
        (lambda: Schedule(1, -2), "Schedule: expected dense_warmup_steps to be at least 0, got -2"),
        (lambda: Schedule(1, 0, -3), "Schedule: expected dense_final_steps to be at least 0, got -3"),
        (
            lambda: Schedule(1, 0).apply(torch.nn.Linear(2, 2), 0),
            "Schedule: expected model to have ReLU2MLP or converted modules, got Linear",
        ),
    ],
)
def test_refusals_of_options(make, sentence):
    with pytest.raises(RuntimeError, match=rf"^sparse24\.{sentence}$"):
        make()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: sparse24.nn.ReLU2MLP(16, 16, recipe="both"), "nn.ReLU2MLP: expected recipe .*Recipe, got str"),
        (lambda: sparse24.nn.ReLU2MLP(16, 16, min_tokens="1"), "nn.ReLU2MLP: expected min_tokens .* number, got 1"),
        (
            lambda: sparse24.nn.ReLU2Experts(2, 16, 16, recipe={}),
            "nn.ReLU2Experts: expected recipe .*Recipe, got dict",
        ),
        (lambda: sparse24.nn.ReLU2Experts("2", 16, 16), "nn.ReLU2Experts: expected num_experts .* number, got 2"),
        (lambda: sparse24.ConvertConfig(recipe=3), "ConvertConfig: expected recipe .*Recipe, got int"),
        (lambda: sparse24.ConvertConfig(adapters="8"), "ConvertConfig: expected adapters .* number, got 8"),
        (lambda: sparse24.ConvertConfig(decisions=["a"]), "ConvertConfig: expected decisions .* mapping .*, got list"),
        (lambda: sparse24.WeightPruning(None), "WeightPruning: expected model to be a torch.nn.Module, got None"),
        (
            lambda: sparse24.WeightPruning(torch.nn.Linear(2, 2), decay="much"),
            "WeightPruning: expected decay to be a finite number from 0, got much",
        ),
        (lambda: sparse24.activation_stats([1.0]), "activation_stats: expected y1 to be a Tensor, got list"),
    ],
)
def test_refusals_of_types(make, sentence):
    """Of what takes options: what is of another type is named as a wrong value is."""
    with pytest.raises(RuntimeError, match=rf"^sparse24\.{sentence}$"):
        make()


@pytest.mark.parametrize(
    ("share", "features", "count"),
    [
        (0.05, 3072, 192),
        (0.05, 160, 64),
        (0.05, 32, 32),
        (0.0, 4096, 0),
        (1.0, 100, 100),
        (0.02, 3200, 64),
        (0.02, 3201, 128),
    ],
)
def test_number_of_dense_features(share, features, count):
    assert Recipe(dense_features=share).hot_features(features) == count
