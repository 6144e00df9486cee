"""Metadata that no op made, and indices that are no features: one rule for all that decode, no memory but their own.

A selection for compute-sanitizer, with PYTORCH_NO_CUDA_MEMORY_CACHING=1: else what lies beside a tensor is another's.
"""

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import activations, generator, integers
from oracle import FP8, Pattern
from test_decompress import numbers

import sparse24

SHAPES = [(1, 32), (5, 96), (37, 160), (130, 1056)]
FEATURES = torch.tensor([0, 3, 3, 31, -1, 32 * 50, 2**40, -(2**63), 2**63 - 1, 1, 0])


def random_bytes(rows, cols, dtype, dim, seed=0):
    """Any nibbles, with those of the padding."""
    count = oracle.meta_bytes(rows, cols, dtype, dim)
    return torch.randint(0, 256, (count,), generator=generator(seed), dtype=torch.uint8)


def one_nibble(nibble):
    def fill(rows, cols, dtype, dim):
        return torch.full_like(random_bytes(rows, cols, dtype, dim), nibble * 0x11)

    return fill


#: i0 == i1, i0 > i1, and all of them.
METADATA = {"equal": one_nibble(0b1010), "zeros": one_nibble(0), "backwards": one_nibble(0b0111), "any": random_bytes}


@pytest.fixture(params=METADATA)
def metadata(request):
    return METADATA[request.param]


def problem(shape, values_dtype, layout, dim, metadata):
    """Values with special numbers, metadata and what it says."""
    meta = metadata(*shape, layout, dim)
    pattern = Pattern.of_meta(meta, *shape, layout, dim)
    dense = numbers(*shape, values_dtype, seed=7)
    return pattern.gather(dense), meta, pattern


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hostile_decompress_and_compress_like(poisoned_memory, device, values_dtype, dim, shape, metadata):
    values, meta, pattern = problem(shape, values_dtype, values_dtype, dim, metadata)
    got = sparse24.decompress(values.to(device), meta.to(device), *shape, dim)
    assert_same_bits(got, pattern.scatter(values))
    x = numbers(*shape, values_dtype, seed=8)
    assert_same_bits(sparse24.compress_like(x.to(device), meta.to(device), dim), pattern.gather(x))


@pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hostile_gather_and_counts(poisoned_memory, device, values_dtype, shape, fp8_meta, metadata):
    values, meta, pattern = problem(shape, values_dtype, FP8 if fp8_meta else values_dtype, -1, metadata)
    dense = oracle.bits(pattern.scatter(values))
    got = sparse24.gather_features(values.to(device), meta.to(device), FEATURES.to(device), fp8_meta)
    inside = (FEATURES >= 0) & (FEATURES < shape[1])
    assert_same_bits(oracle.bits(got.cpu())[:, inside], dense[:, FEATURES[inside]])
    assert got.cpu()[:, ~inside].float().isnan().all()
    counts = sparse24.feature_counts(values.to(device), meta.to(device), 2**40, fp8_meta)
    assert_same_bits(counts, (pattern.scatter(values).float() != 0).sum(0).int())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hostile_linear_gradient(poisoned_memory, device, dtype, shape, fp8_meta, interleaved, metadata):
    """The separate steps, which the oracle takes."""
    tokens, features = shape
    meta = metadata(*shape, FP8 if fp8_meta else dtype, -1)
    pattern = Pattern.of_meta(meta, *shape, FP8 if fp8_meta else dtype, -1)
    values = pattern.gather(integers(*shape, dtype=dtype, limit=3).abs())
    grad, w = integers(tokens, 24, dtype=dtype, seed=1), integers(24, features, dtype=dtype, seed=2)
    hot = torch.tensor([-7, 2, 2, 1, 7, features - 1, features, 2**40, 5])[:features]

    dy = (grad.float() @ w.float()).to(dtype)
    dh = (pattern.gather(dy).float() * (2 * values.float().sqrt())).to(dtype)
    order = tokens_of_rows(tokens, interleaved)
    dense = [pattern.scatter(kept) for kept in (dh, values)]
    along = [oracle.compress(matrix[order], dim=-2) for matrix in dense]

    operands = [t.to(device) for t in (grad, w, values, meta)]
    got = sparse24.linear_gradient(*operands, interleaved, True, fp8_meta)
    expected = (dh, *along[0], *along[1], (dense[1] != 0).sum(0).int())
    for result, reference in zip(got, expected, strict=False):
        assert_same_bits(result, reference)
    got = sparse24.linear_gradient(*operands, interleaved, True, fp8_meta, hot.to(device))
    for rows, matrix in zip(got[6:], reversed(dense), strict=True):
        highest = -1
        for row, feature in zip(rows.cpu(), hot.tolist(), strict=True):
            if highest < feature < features:
                assert_same_bits(row, matrix[:, feature])
            else:
                assert row.isnan().all()
            highest = max(highest, feature)


def tokens_of_rows(tokens, interleaved):
    """The token of each row (token_order.h)."""
    quarter = tokens // 4 if interleaved else 0
    grouped = torch.arange(4 * quarter).view(4, quarter).t().reshape(-1)
    return torch.cat([grouped, torch.arange(4 * quarter, tokens)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hostile_metadata_of_mm_stays_in_memory(device, values_dtype, dim, shape, metadata):
    """Of these numbers nothing is said."""
    values, meta, _ = problem(shape, values_dtype, values_dtype, dim, metadata)
    m, k = shape if dim == -1 else shape[::-1]
    for n in (1, 24):
        b = numbers(n, k, values_dtype, seed=9).t()
        out = sparse24.mm(values.to(device), meta.to(device), b.to(device), dim=dim)
        assert out.cpu().shape == (m, n)


def test_hostile_features_of_put_features(device, dim):
    """What is no feature is left out; of equal ones one wins."""
    features = torch.tensor([3, -1, 8, 2**40, -(2**63), 0, 5, 5])
    parts = integers(2, 8, 8, dtype=torch.bfloat16).to(device)
    out = torch.full((8, 8), 7, dtype=torch.bfloat16, device=device)
    sparse24.put_features(out, parts, features.to(device), dim)
    got, sums = (t.cpu() if dim == -2 else t.cpu().t() for t in (out, parts.float().sum(0).bfloat16()))
    assert_same_bits(got[3], sums[0])
    assert_same_bits(got[0], sums[5])
    assert ((got[5] == sums[6]) | (got[5] == sums[7])).all()
    assert (got[[1, 2, 4, 6, 7]] == 7).all()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_hostile_counts_of_densest_features(device, k):
    counts = torch.tensor([-(2**31), 2**31 - 1, -1, 0, 2**31 - 1, 5, -(2**31), 0], dtype=torch.int32)
    expected = sorted(sorted(range(8), key=lambda i: (-int(counts[i]), i))[:k])
    assert sparse24.densest_features(counts.to(device), k).tolist() == expected


def test_hostile_numbers(device, dim):
    """NaN and infinities everywhere move nothing out of its place."""
    ordinary = activations(37, 96, torch.bfloat16)
    for x in (torch.full_like(ordinary, torch.nan), torch.full_like(ordinary, torch.inf), ordinary):
        got, expected = sparse24.compress(x.to(device), "relu2", dim), oracle.compress(x, "relu2", dim)
        for result, reference in zip(got, expected, strict=True):
            assert_same_bits(result, reference)
