"""compress: values, metadata and padding bit for bit."""

import numpy as np
import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, relayout
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse24

# Rows may be any number; columns end inside a metadata atom or at it.
SHAPES = {
    -1: [(0, 32), (1, 16), (3, 48), (5, 1856), (127, 64), (130, 80), (2, 15680), (8191, 16)],
    -2: [(0, 16), (1, 8), (3, 24), (5, 1856), (127, 72), (130, 136), (2, 15680), (8191, 8)],
}
ALL_SHAPES = [pytest.param(dim, s, id=f"{s[0]}x{s[1]}-dim{dim}") for dim, shapes in SHAPES.items() for s in shapes]


def check(x, activation, dim):
    values, meta = sparse24.compress(x, activation, dim)
    expected_values, expected_meta = oracle.compress(x, activation, dim)
    assert_same_bits(meta, expected_meta, "meta")
    assert_same_bits(values, expected_values, "values")
    assert values.is_contiguous() and values.device == x.device == meta.device


@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_equals_the_oracle(device, dtype, activation, dim, shape):
    check(activations(*shape, dtype).to(device), activation, dim)


@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_writes_everything(poisoned_memory, device, dim, shape):
    check(activations(*shape, torch.bfloat16, seed=1).to(device), "relu2", dim)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, dim, layout):
    check(relayout(activations(21, 96, dtype, seed=2).to(device), layout), "relu", dim)


def test_every_number_of_sixteen_bits(device, activation, dim):
    codes = torch.arange(65536, dtype=torch.int32)
    # Each code beside three others, in rows of 64: as often kept as not.
    others = torch.stack([(codes * 40503 + j * 10007) & 0xFFFF for j in range(1, 4)])
    x = torch.stack([codes, *others], 1).reshape(-1, 64).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        check(x.view(dtype).to(device), activation, dim)


def test_small_example(device):
    """One that a person can check."""
    row = [1, 2, 3, 4, -4, 3, -2, 1, 0, 0, 5, 0, 0, 0, 0, 0]
    values, meta = sparse24.compress(torch.tensor([row], dtype=torch.bfloat16, device=device))
    assert values.tolist() == [[3, 4, -4, 3, 0, 5, 0, 0]]
    # Pairs (2,3) (0,1) (0,2) (0,1) are nibbles E 4 8 4, low nibble first; all other rows are padding.
    expected = torch.full((128 * 64 // 8,), 0x44, dtype=torch.uint8)
    expected[:2] = torch.tensor([0x4E, 0x48])
    assert_same_bits(meta, expected, "meta")


def test_small_example_along_tokens(device):
    x = torch.tensor([[1, 0, 0, 9], [2, 0, 5, 8], [3, 0, 0, 7], [4, 1, 0, 6]] * 2).repeat(1, 2)[:4]
    values, _ = sparse24.compress(x.to(device, torch.float16), dim=-2)
    assert values.tolist() == [[3, 0, 0, 9] * 2, [4, 1, 5, 8] * 2]


def test_ties_keep_the_lower_index(device, dtype, dim):
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0])
    groups = torch.cartesian_prod(numbers, numbers, numbers, numbers)  # all 625
    groups = torch.cat([groups, groups[:15]]).to(device, dtype)
    check(groups.reshape(-1, 16) if dim == -1 else groups.reshape(-1, 8, 4).transpose(1, 2).reshape(-1, 8), "none", dim)


def test_groups_of_zeros_keep_the_first_two(device, dtype, activation, dim):
    x = -torch.rand(8, 64).to(device, dtype) if activation != "none" else torch.zeros(8, 64, device=device, dtype=dtype)
    values, meta = sparse24.compress(x, activation, dim)
    assert (oracle.bits(values) == 0).all()
    assert (meta == 0x44).all()


def test_negative_zero_keeps_its_bits(device, dtype):
    values, _ = sparse24.compress(torch.full((1, 16), -0.0, device=device, dtype=dtype))
    assert torch.signbit(values).all()
    values, _ = sparse24.compress(torch.full((1, 16), -0.0, device=device, dtype=dtype), "relu")
    assert not torch.signbit(values).any()


def test_nan_is_kept_and_propagates(device, dtype, activation):
    x = torch.tensor([torch.inf, 3, torch.nan, torch.inf] * 4, device=device, dtype=dtype).unsqueeze(0)
    values, _ = sparse24.compress(x, activation)
    assert values.isinf()[0, ::2].all() and values.isnan()[0, 1::2].all()


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_relu2_compares_before_it_squares(device, dim, unit):
    """The four squares underflow or overflow to one number; the pattern is that of their roots."""
    x = torch.tensor([[1, 1.25, 1.5, 1.75]]).mul(unit).to(device, torch.bfloat16).repeat(8, 4)
    x = x if dim == -1 else x.reshape(-1, 4).t().contiguous()
    meta = sparse24.compress(x, "relu2", dim)[1]
    assert_same_bits(meta, sparse24.compress(x, "relu", dim)[1])
    mask = oracle.Pattern.of_meta(meta, *x.shape, torch.bfloat16, dim).mask()
    assert torch.equal(mask, x.cpu() >= 1.5 * unit * (1 - 2**-9))


def test_is_deterministic(device, dtype, dim):
    x = activations(200, 512, dtype, seed=3).to(device)
    first, second = sparse24.compress(x, "relu2", dim), sparse24.compress(x, "relu2", dim)
    assert_same_bits(first[0], second[0], "values")
    assert_same_bits(first[1], second[1], "meta")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_keeps_the_two_largest(data):
    """Any bits at all: two of each four come back untouched, none that was dropped is larger, equal ones come later."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    dim = data.draw(st.sampled_from([-1, -2]))
    rows = data.draw(st.integers(1, 9))
    cols = data.draw(st.integers(1, 3)) * (16 if dim == -1 else 8)
    size = rows * cols * dtype.itemsize
    x = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size))), dtype=dtype).view(rows, cols)

    values, meta = sparse24.compress(x, "none", dim)
    y = sparse24.decompress(values, meta, rows, cols, dim)
    kept = oracle.Pattern.of_meta(meta, rows, cols, dtype, dim).mask()
    assert_same_bits(y[kept], x[kept], "kept")
    assert (oracle.bits(y)[~kept] == 0).all()

    groups = kept if dim == -1 else torch.cat([kept, torch.zeros(-rows % 4, cols, dtype=torch.bool)]).t()
    key = oracle.selection_key(x.float())
    key = key if dim == -1 else torch.cat([key, key.new_zeros(-rows % 4, cols)]).t()
    for group, magnitudes in zip(groups.reshape(-1, 4).tolist(), key.reshape(-1, 4).tolist(), strict=True):
        ranked = sorted(range(4), key=lambda i: (-magnitudes[i], i))
        # A token of the padding may be kept instead of nothing: it is not part of x.
        assert {i for i in range(4) if group[i]} <= set(ranked[:2])
        assert sum(group) == 2 or dim == -2 and rows % 4


@pytest.mark.parametrize("shape", [(8192, 4096), (2047, 15680), (65536, 64)], ids=str)
def test_cuda_equals_cpu(cuda, activation, dim, shape):
    for dtype in (torch.bfloat16, torch.float16):
        x = activations(*shape, dtype, seed=4)
        on_cpu, on_gpu = sparse24.compress(x, activation, dim), sparse24.compress(x.to(cuda), activation, dim)
        assert_same_bits(on_gpu[0], on_cpu[0], "values")
        assert_same_bits(on_gpu[1], on_cpu[1], "meta")


def test_metadata_of_the_padding_is_legal(device, values_dtype, dim):
    """Every nibble, of groups and of padding, is an ordered pair."""
    x = activations(37, 96, torch.bfloat16).to(device)
    fp8 = values_dtype == torch.float8_e4m3fn
    meta = sparse24.compress_fp8(x, dim=dim)[1] if fp8 else sparse24.compress(x, dim=dim)[1]
    nibbles = np.concatenate([meta.cpu().numpy() & 0xF, meta.cpu().numpy() >> 4])
    assert set(nibbles.tolist()) <= {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}
