"""The products over tokens of the weight gradients, and what they do about entries that 2:4 drops."""

import pytest
import torch
import training_reference as reference
from compare import assert_same_bits
from data import integers, normal

from sparse24 import Recipe, densest_features
from sparse24.mlp.tokens import _parts, put_product, weight_gradient
from sparse24.ops.token_order import deinterleave, interleave

F, N = 72, 40
RECIPES = {
    "default": Recipe(),
    "natural": Recipe(permute_tokens=False, dense_features=0.0),
    "permuted": Recipe(dense_features=0.0),
    "all dense features": Recipe(dense_features=1.0),
    "residual": Recipe(residual=True, dense_features=0.0),
    "natural residual": Recipe(permute_tokens=False, residual=True),
    "dense": Recipe(weight_gradients="dense"),
}


def operands(tokens, dtype, device, zeros=0.6):
    a = integers(tokens, F, dtype=dtype, limit=3)
    used = torch.rand(tokens, F, generator=torch.Generator().manual_seed(1)) > zeros
    return (a * used).to(device), integers(tokens, N, dtype=dtype, seed=2).to(device)


def test_groups_are_a_quarter_apart(device):
    rows = torch.arange(10.0, device=device).reshape(10, 1)
    assert interleave(rows).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 9]
    assert interleave(rows[:8]).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert interleave(rows[:3]).flatten().tolist() == [0, 1, 2]
    assert interleave(rows[:0]).shape == (0, 1)


def test_the_order_can_be_undone(device):
    for tokens in (0, 1, 3, 4, 10, 64, 67):
        rows = normal(tokens, 3, dtype=torch.float32).to(device)
        assert torch.equal(deinterleave(interleave(rows)), rows)


@pytest.mark.parametrize("count", [1, 20, F])
def test_densest_features(device, count):
    """Few tokens: many features are equal, and the lower ones come first."""
    a, _ = operands(6, torch.bfloat16, device)
    assert densest_features(a.count_nonzero(0).int(), count).tolist() == reference.hot_features(a, count, sampled=False)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 257])
def test_products(device, dtype, recipe, tokens):
    """Bit for bit: sums of products of small integers are exact."""
    a, b = operands(tokens, dtype, device)
    hot = reference.hot_features(a, 8)
    if recipe.dense_features == 1:
        hot = list(range(F))
    given = None if recipe.dense_features == 0 else torch.tensor(hot, device=device)
    left = reference.operand_over_tokens(a, recipe, hot if given is not None else [])
    if recipe in (RECIPES["default"], RECIPES["natural"], RECIPES["permuted"]):
        assert tokens < 64 or not torch.equal(left, a), "nothing was pruned: the mask would not matter"
    else:
        assert torch.equal(left, a)
    exact = (left.double().t() @ b.double()).float().to(dtype)
    assert_same_bits(weight_gradient(a, b, recipe, given) + 0.0, exact + 0.0)
    assert_same_bits(weight_gradient(a, b, recipe, given, transpose=True) + 0.0, exact.t() + 0.0)


def test_residual_keeps_to_its_rows(device):
    """What is infinite or NaN in one feature stays there: the difference of both operands is not taken."""
    a, b = operands(64, torch.bfloat16, device)
    b[0] = 1
    clean = weight_gradient(a, b, Recipe(residual=True), None)
    a[0, 3], a[0, 5] = torch.inf, torch.nan
    dirty = weight_gradient(a, b, Recipe(residual=True), None)
    assert torch.isinf(dirty[3]).all() and torch.isnan(dirty[5]).all()
    others = [f for f in range(F) if f not in (3, 5)]
    assert_same_bits(dirty[others], clean[others])


def test_residual_rounds_once(device):
    """bfloat16 sums of two rounded products would be off by more than the rounding of the exact sum."""
    a, b = normal(256, F, dtype=torch.bfloat16).to(device), normal(256, N, dtype=torch.bfloat16, seed=1).to(device)
    out = weight_gradient(a, b, Recipe(residual=True, dense_features=0.0), None).double()
    exact = a.double().t() @ b.double()
    half_unit = torch.exp2(exact.abs().log2().floor() - 8)
    assert ((out - exact).abs() <= 1.01 * half_unit + 1e-4).all()


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "parts"),
    [
        (384, 4096, 16384, 2),
        (192, 1664, 32768, 8),
        (384, 2560, 16384, 4),
        (64, 64, 1024, 1),  # parts of fewer tokens cost more than they gain
        (64, 64, 4096, 4),
        (64, 64, 8191, 1),
        (8192, 8192, 65536, 1),  # tiles enough
    ],
)
def test_parts_of_the_tokens(rows, columns, tokens, parts):
    assert _parts(rows * columns, tokens) == parts


@pytest.mark.parametrize("tokens", [1, 13, 300, 8191, 8192])
def test_put_product(device, tokens):
    a, b = normal(24, tokens, dtype=torch.bfloat16).to(device), normal(tokens, 40, dtype=torch.bfloat16).to(device)
    hot = torch.arange(1, 97, 4, device=device)
    exact = a.double() @ b.double()
    own = (a @ b).double() - exact
    for transpose in (False, True):
        out = torch.full((40, 100) if transpose else (100, 40), 7.0, device=device, dtype=torch.bfloat16)
        put_product(out, hot, a, b, transpose=transpose)
        rows = out.t() if transpose else out
        assert (rows[hot].double() - exact).norm() <= 2 * own.norm() + 1e-6
        others = torch.ones(100, dtype=torch.bool, device=device).index_fill(0, hot, False)
        assert (rows[others] == 7).all()
