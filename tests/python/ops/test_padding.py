"""Tokens of the padding: what stands beside the last token, or in the padding itself, is no part of a result."""

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import integers
from oracle import FP8, Pattern

import sparse24

TOKENS = (1, 2, 3, 4, 5, 6, 7, 9, 33, 61, 70, 129)
UNUSUAL = (torch.inf, -torch.inf, torch.nan)


def with_unusual_rows(x, rows):
    """x with an infinity or NaN in some rows, as far as its dtype has them."""
    x = x.clone()
    for i, row in enumerate(rows):
        x[row, (3 * i + 1) % x.shape[1]] = UNUSUAL[i % 3] if x.dtype != FP8 else torch.nan
    return x


def sums_of_kept(values, meta, b, tokens, features, dtype):
    """X.T @ b over what is kept of the tokens that there are: a zero that is kept multiplies, what is not does not."""
    kept = Pattern.of_meta(meta, tokens, features, dtype, -2).kept
    of_group = oracle.load_values(values.cpu(), -2).float().unflatten(1, (-1, 2))
    out = torch.zeros(features, b.shape[1])
    for g in range(kept.shape[1]):
        for slot in range(2):
            token = 4 * g + kept[:, g, slot]
            there = token < tokens
            products = of_group[there, g, slot, None] * b.float()[token[there]]
            out[there] += products
    return out


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("n", [8, 40])
def test_padding_of_values_is_never_read(device, values_dtype, tokens, n):
    """Infinities and NaN there, which the ops never leave, change nothing."""
    x_dtype = torch.bfloat16 if values_dtype == FP8 else values_dtype
    x = integers(tokens, 32, dtype=x_dtype)
    values, meta = (sparse24.compress if values_dtype != FP8 else fp8_of)(x, dim=-2)
    b = integers(n, tokens, dtype=values_dtype, seed=1).t()
    b = b if values_dtype == FP8 else b.contiguous()
    there = tokens // 4 * 2 + min(tokens % 4, 2)
    poisoned = values.clone()
    (poisoned if values_dtype != FP8 else poisoned.t())[there:] = torch.nan
    options = {"dim": -2, "out_dtype": torch.float32}
    expected = sparse24.mm(values, meta, b, **options)
    got = sparse24.mm(poisoned.to(device), meta.to(device), b.to(device), **options)
    assert_same_bits(got, expected)
    dense = sparse24.decompress(poisoned.to(device), meta.to(device), tokens, 32, -2)
    assert_same_bits(dense, sparse24.decompress(values, meta, tokens, 32, -2))


def fp8_of(x, dim):
    return sparse24.compress_fp8(x, torch.ones(1), dim=dim, scaling="tensor")[:2]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_infinite_rows_beside_the_padding(device, values_dtype, tokens, interleaved):
    """0 * infinity is NaN where a zero is kept, as on the CPU, and nowhere else."""
    x_dtype = torch.bfloat16 if values_dtype == FP8 else values_dtype
    x = integers(tokens, 32, dtype=x_dtype)
    values, meta = (sparse24.compress if values_dtype != FP8 else fp8_of)(x, dim=-2)
    b = with_unusual_rows(integers(tokens, 24, dtype=torch.float32, seed=1), {0, tokens - 1, tokens // 2})
    b = b.to(values_dtype).t().contiguous().t()
    order = torch.arange(tokens)
    if interleaved:
        quarter = tokens // 4
        order[: 4 * quarter] = torch.arange(4 * quarter).view(4, quarter).t().reshape(-1)
    expected = sums_of_kept(values, meta, b.float()[order], tokens, 32, values_dtype)
    for matrix in (b, b if values_dtype == FP8 else b.contiguous()):
        got = sparse24.mm(
            values.to(device),
            meta.to(device),
            matrix.to(device),
            dim=-2,
            out_dtype=torch.float32,
            interleaved=interleaved,
        )
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("d", [8, 13])
def test_infinite_rows_of_the_gradient(device, dtype, tokens, interleaved, d):
    """Infinities in grad and in w; where w has them, the padding's zeros times w are NaN."""
    features = 48
    values, meta = sparse24.compress(integers(tokens, features, dtype=dtype, limit=3).abs(), "none")
    pattern = Pattern.of_meta(meta, tokens, features, dtype, -1)
    for grad_rows, w_rows in (({tokens - 1, tokens // 2}, ()), ((), {2, d - 1}), ({0}, {0})):
        grad = with_unusual_rows(integers(tokens, d, dtype=dtype, seed=1), grad_rows)
        w = with_unusual_rows(integers(d, features, dtype=dtype, seed=2), w_rows)
        on_cpu = sparse24.linear_gradient(grad, w, values, meta, interleaved)
        dh = pattern.gather((grad.float() @ w.float()).to(dtype)).float() * (2 * values.float().sqrt())
        torch.testing.assert_close(on_cpu[0], dh.to(dtype), rtol=0, atol=0, equal_nan=True)
        got = sparse24.linear_gradient(*(t.to(device) for t in (grad, w, values, meta)), interleaved)
        for result, reference in zip(got, on_cpu, strict=True):
            assert_same_bits(result, reference)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("d", [16, 13])
def test_infinite_rows_of_the_first_product(device, dtype, tokens, d):
    for x_rows, w_rows in (({tokens - 1, tokens // 2}, ()), ((), {1, 47}), ({0}, {0})):
        x = with_unusual_rows(integers(tokens, d, dtype=dtype), x_rows)
        w = with_unusual_rows(integers(48, d, dtype=dtype, seed=1), w_rows)
        values, meta, *_ = sparse24.linear_compress(x.to(device), w.to(device))
        h = (x.float() @ w.float().t()).to(dtype)
        for result, expected in zip((values, meta), oracle.compress(h, "relu2"), strict=True):
            assert_same_bits(result, expected)
        y, amax, _ = sparse24.linear_relu2(x.to(device), w.to(device))
        assert_same_bits(y.isnan(), h.isnan())
        finite = h.float().relu().square()
        assert amax.item() == finite[~finite.isnan()].amax()
