"""decompress and compress_like: gather and scatter at a pattern, bit for bit."""

import numpy as np
import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, relayout, unaligned
from oracle import FP8

import sparse24

SHAPES = {
    -1: [(0, 32), (1, 32), (3, 96), (5, 1856), (127, 160), (2, 15680), (8191, 32)],
    -2: [(0, 16), (1, 8), (3, 24), (33, 1856), (127, 72), (2, 15680), (8191, 8)],
}
ALL_SHAPES = [pytest.param(dim, s, id=f"{s[0]}x{s[1]}-dim{dim}") for dim, shapes in SHAPES.items() for s in shapes]
LEGAL = np.array([0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110], dtype=np.uint8)


def random_pattern(rows, cols, values_dtype, dim, seed=0):
    """Metadata with every legal pair equally likely: also positions that no selection would keep."""
    m, k = (rows, cols) if dim == -1 else (cols, oracle.round_up(rows, oracle.token_padding(values_dtype)))
    nibbles = LEGAL[np.random.default_rng(seed).integers(0, 6, (m, k // 4))]
    meta = torch.from_numpy(oracle.pack_meta(nibbles, values_dtype))
    return meta, oracle.Pattern.of_meta(meta, rows, cols, values_dtype, dim)


def numbers(rows, cols, values_dtype, seed=0):
    """X of any values dtype; fp8 covers all codes."""
    if values_dtype != FP8:
        return activations(rows, cols, values_dtype, seed=seed)
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, cols), generator=g, dtype=torch.uint8).view(FP8)


@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_compress_like_equals_the_oracle(poisoned_memory, device, values_dtype, dim, shape):
    meta, pattern = random_pattern(*shape, values_dtype, dim)
    x = numbers(*shape, values_dtype)
    assert_same_bits(sparse24.compress_like(x.to(device), meta.to(device), dim), pattern.gather(x), "values")


@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_decompress_equals_the_oracle(poisoned_memory, device, values_dtype, dim, shape):
    meta, pattern = random_pattern(*shape, values_dtype, dim)
    # Also the values of padding tokens are numbers here: they must not come back.
    padded = oracle.operand(torch.zeros(shape), values_dtype, dim)
    values = oracle.store_values(numbers(padded.shape[0], padded.shape[1] // 2, values_dtype), dim)
    x = sparse24.decompress(values.to(device), meta.to(device), *shape, dim)
    assert_same_bits(x, pattern.scatter(values), "x")
    assert x.is_contiguous()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_layouts(device, values_dtype, dim, layout):
    shape = (64, 96)
    meta, pattern = random_pattern(*shape, values_dtype, dim)
    x = numbers(*shape, values_dtype)
    values = pattern.gather(x)
    meta = unaligned(meta.to(device))
    assert_same_bits(sparse24.compress_like(relayout(x.to(device), layout), meta, dim), values)
    dense = sparse24.decompress(relayout(values.to(device), layout), meta, *shape, dim)
    assert_same_bits(dense, pattern.scatter(values))


def test_strided_metadata(device, dim):
    meta, pattern = random_pattern(16, 32, torch.bfloat16, dim)
    x = activations(16, 32, torch.bfloat16)
    spread = meta.repeat_interleave(2).to(device)[::2]
    assert_same_bits(sparse24.compress_like(x.to(device), spread, dim), pattern.gather(x))
    assert_same_bits(
        sparse24.decompress(pattern.gather(x).to(device), spread, 16, 32, dim), pattern.scatter(pattern.gather(x))
    )


def test_there_and_back(device, values_dtype, dim):
    """compress_like of decompress is the identity on values."""
    shape = (64, 96)
    meta, pattern = random_pattern(*shape, values_dtype, dim, seed=1)
    values = pattern.gather(numbers(*shape, values_dtype)).to(device)
    meta = meta.to(device)
    assert_same_bits(sparse24.compress_like(sparse24.decompress(values, meta, *shape, dim), meta, dim), values)


def test_compress_then_decompress_masks(device, dtype, activation, dim):
    """Where compress kept an entry, it comes back as activated; elsewhere there is zero."""
    x = activations(37, 96, dtype, seed=2, specials=False).to(device)
    values, meta = sparse24.compress(x, activation, dim)
    y = sparse24.decompress(values, meta, 37, 96, dim).cpu()
    mask = oracle.Pattern.of_meta(meta, 37, 96, dtype, dim).mask()
    activated = oracle.activate(x.cpu(), activation).to(dtype)
    assert torch.equal(y, torch.where(mask, activated, torch.zeros((), dtype=dtype)))


def test_padding_tokens_do_not_leak(device):
    """One token in a group of four, at a pattern that keeps the two last: nothing of x is kept."""
    meta = torch.from_numpy(oracle.pack_meta(np.full((8, 1), 0b1110, dtype=np.uint8), torch.bfloat16)).to(device)
    x = torch.ones(1, 8, device=device, dtype=torch.bfloat16)
    values = sparse24.compress_like(x, meta, -2)
    assert values.shape == (2, 8) and (values == 0).all()
    assert (sparse24.decompress(torch.ones_like(values), meta, 1, 8, -2) == 0).all()


@pytest.mark.parametrize("shape", [(4096, 4096), (8191, 1856)], ids=str)
def test_cuda_equals_cpu(cuda, dim, shape):
    for dtype in (torch.bfloat16, torch.float16, FP8):
        meta, _ = random_pattern(*shape, dtype, dim)
        x = numbers(*shape, dtype, seed=3)
        values = sparse24.compress_like(x, meta, dim)
        assert_same_bits(sparse24.compress_like(x.to(cuda), meta.to(cuda), dim), values, "values")
        dense = sparse24.decompress(values, meta, *shape, dim)
        assert_same_bits(sparse24.decompress(values.to(cuda), meta.to(cuda), *shape, dim), dense, "x")
