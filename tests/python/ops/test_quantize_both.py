"""quantize_fp8_both: the codes of quantize_fp8 in both orders, bit for bit; and transpose_fp8 of one of them."""

import math

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, generator, relayout
from training_reference import token_order

import sparse24

#: No rows, tails of groups, of the padding and of tiles in both directions, no columns.
SHAPES = [(0, 32), (1, 16), (3, 48), (32, 128), (127, 144), (130, 304), (257, 64), (4, 0), (1030, 16)]
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["natural", "interleaved"])


def bytes_of(rows, cols):
    """Codes of any bits."""
    return torch.randint(256, (rows, cols), generator=generator(5), dtype=torch.uint8).view(oracle.FP8)


def check(x, scale, interleaved):
    values, transposed, used, amax = sparse24.quantize_fp8_both(x, scale, interleaved)
    rows, cols = x.shape
    expected, expected_scale = oracle.quantize_fp8(x, scale, "tensor")
    assert_same_bits(values, expected, "values")
    assert_same_bits(used, expected_scale, "scale")
    padded = torch.zeros(cols, oracle.round_up(rows, 32), dtype=torch.uint8)
    padded[:, :rows] = expected.cpu().view(torch.uint8)[token_order(rows, interleaved)].t()
    assert_same_bits(transposed, padded.view(oracle.FP8), "transposed")
    largest = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax().reshape(1) if x.numel() else torch.zeros(1)
    assert_same_bits(amax, largest, "amax")
    assert all(t.device == x.device and t.is_contiguous() for t in (values, transposed, used, amax))


@INTERLEAVED
@pytest.mark.parametrize("specials", [True, False], ids=["specials", "finite"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computed_scale(poisoned_memory, device, dtype, shape, interleaved, specials):
    check(activations(*shape, dtype, specials=specials).to(device), None, interleaved)


@INTERLEAVED
@pytest.mark.parametrize("scale", [0.37, 1.0, 0.0, 2.0**-100, -0.37, math.nan])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given_scale(poisoned_memory, device, dtype, shape, interleaved, scale):
    check(activations(*shape, dtype, seed=1).to(device), torch.tensor([scale], device=device), interleaved)


@INTERLEAVED
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("shape", [(3, 130, 304), (2, 32, 16), (5, 1, 48), (1, 7, 32), (0, 4, 16), (3, 0, 32)], ids=str)
def test_matrices_have_a_scale_each(poisoned_memory, device, dtype, shape, given, interleaved):
    x = torch.stack(
        [activations(*shape[1:], dtype, seed=i) * 2.0 ** (3 * i) for i in range(shape[0])] or [torch.ones(0)]
    )
    x = x.reshape(shape).to(dtype).to(device)
    scale = torch.tensor([0.37 * 2.0**i for i in range(shape[0])], device=device) if given else None
    results = sparse24.quantize_fp8_both(x, scale, interleaved)
    values, transposed, used, amax = results
    assert values.shape == shape and transposed.shape == (shape[0], shape[2], oracle.round_up(shape[1], 32))
    assert used.shape == amax.shape == shape[:1] and all(t.is_contiguous() for t in results)
    for i in range(shape[0]):
        one = sparse24.quantize_fp8_both(x[i], None if scale is None else scale[i : i + 1], interleaved)
        for actual, expected in zip((values[i], transposed[i], used[i : i + 1], amax[i : i + 1]), one, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    check(relayout(activations(21, 96, dtype, seed=2).to(device), layout), None, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transpose_fp8(poisoned_memory, device, shape, layout):
    """It is what is written beside codes, for codes of any bits."""
    codes = relayout(bytes_of(*shape).to(device), layout)
    padded = torch.zeros(shape[1], oracle.round_up(shape[0], 32), dtype=torch.uint8)
    padded[:, : shape[0]] = codes.cpu().view(torch.uint8).t()
    transposed = sparse24.transpose_fp8(codes)
    assert_same_bits(transposed, padded.view(oracle.FP8))
    assert transposed.device == codes.device and transposed.is_contiguous()


def test_transpose_fp8_of_many_rows(cuda):
    codes = bytes_of(8191, 1040).to(cuda)
    assert torch.equal(sparse24.transpose_fp8(codes)[:, :8191].view(torch.uint8), codes.view(torch.uint8).t())


def test_errors_of_transpose_fp8(checked_device):
    def refused(rule, values):
        with pytest.raises(RuntimeError, match=rf"sparse24\.transpose_fp8: expected values to {rule}"):
            sparse24.transpose_fp8(values.to(checked_device))

    refused("have a multiple of 16 columns, got 24", bytes_of(4, 24))
    refused("have 2 dimensions, got 1", bytes_of(1, 16)[0])
    refused("be float8_e4m3fn(?: on a CUDA device)?, got bfloat16", torch.ones(4, 16, dtype=torch.bfloat16))


def test_many_rows(cuda):
    """More blocks than run at once."""
    for interleaved in (False, True):
        check(activations(8191, 1040, torch.bfloat16, seed=3).to(cuda), None, interleaved)


def test_it_is_deterministic(device):
    x = activations(300, 128, torch.bfloat16, seed=4).to(device)
    first = sparse24.quantize_fp8_both(x, None, True)
    for _ in range(3):
        for a, b in zip(sparse24.quantize_fp8_both(x, None, True), first, strict=True):
            assert_same_bits(a, b)


def test_errors(checked_device):
    def refused(rule, *args):
        with pytest.raises(RuntimeError, match=rf"sparse24\.quantize_fp8_both: expected {rule}"):
            sparse24.quantize_fp8_both(*args)

    def ones(*shape, dtype=torch.bfloat16):
        return torch.ones(*shape, dtype=dtype, device=checked_device)

    refused("x to have a multiple of 16 columns, got 24", ones(4, 24))
    refused("x to have 2 dimensions, got 1", ones(16))
    refused("x to be bfloat16", ones(4, 16, dtype=torch.int32))
    refused("scale to be float32, got bfloat16", ones(4, 16), ones(1))
    refused("scale to have 1 element .one scale., got 4", ones(4, 16), ones(4, dtype=torch.float32))
    refused("scale to have 3 elements .matrices of x., got 1", ones(3, 4, 16), ones(1, dtype=torch.float32))
    refused("x to have at most 65535 matrices, got 65536", ones(65536, 0, 16))
