"""quantize_fp8: values and scales bit for bit."""

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, relayout

import sparse24

#: The last rows are wider than registers hold on a GPU.
SHAPES = [(0, 32), (1, 16), (3, 48), (5, 1856), (127, 64), (2, 15680), (8191, 16), (4, 0), (3, 32784), (2, 70016)]
SCALING = pytest.mark.parametrize("scaling", ["row", "tensor"])


def check(x, scale, scaling):
    results, expected = sparse24.quantize_fp8(x, scale, scaling), oracle.quantize_fp8(x, scale, scaling)
    for name, result, reference in zip(("values", "scale"), results, expected, strict=True):
        assert_same_bits(result, reference, name)
        assert result.device == x.device and result.is_contiguous()


@SCALING
@pytest.mark.parametrize("specials", [True, False], ids=["specials", "finite"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computed_scale(poisoned_memory, device, dtype, shape, scaling, specials):
    check(activations(*shape, dtype, specials=specials).to(device), None, scaling)


@SCALING
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given_scale(device, dtype, shape, scaling):
    g = torch.Generator().manual_seed(1)
    scale = torch.exp2(4 * torch.randn(shape[0] if scaling == "row" else 1, generator=g)).to(device)
    check(activations(*shape, dtype, seed=1).to(device), scale, scaling)


@SCALING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, scaling, layout):
    check(relayout(activations(21, 96, dtype, seed=2).to(device), layout), None, scaling)


def test_every_number_of_sixteen_bits(device):
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).reshape(-1, 64)
    for dtype in (torch.bfloat16, torch.float16):
        for scale in (1.0, 0.37, 2.0**-100):
            check(codes.view(dtype).to(device), torch.tensor([scale], device=device), "tensor")


def test_small_example(device):
    """Ties go to the even code; 1000 saturates; -0 keeps its sign."""
    x = torch.tensor([[17, 19, 1000, -1000, -0.0, 2**-9, 2**-10, 18] * 2], device=device, dtype=torch.bfloat16)
    values, scale = sparse24.quantize_fp8(x, torch.ones(1, 1, device=device))
    assert values.float().tolist() == [[16, 20, 448, -448, 0, 2**-9, 0, 18] * 2]
    assert values.view(torch.uint8)[0, 4] == 0x80
    assert scale.tolist() == [[1]]


def test_a_row_does_not_see_the_others(device):
    x = activations(9, 64, torch.bfloat16, specials=False).to(device)
    other = x.clone()
    other[1:] = torch.nan
    assert_same_bits(sparse24.quantize_fp8(x)[0][0], sparse24.quantize_fp8(other)[0][0])


@SCALING
@pytest.mark.parametrize("shape", [(8192, 4096), (2047, 15680)], ids=str)
def test_cuda_equals_cpu(cuda, scaling, shape):
    x = activations(*shape, torch.bfloat16, seed=3)
    for a, b in zip(
        sparse24.quantize_fp8(x.to(cuda), None, scaling), sparse24.quantize_fp8(x, None, scaling), strict=True
    ):
        assert_same_bits(a, b)


@pytest.mark.parametrize("specials", [True, False], ids=["specials", "finite"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prediction(poisoned_memory, device, dtype, shape, specials):
    x = activations(*shape, dtype, specials=specials).to(device)
    factor = torch.tensor([0.37], device=device)
    values, scale, predicted = sparse24.quantize_fp8_predict(x, factor)
    for result, reference in zip((values, scale), oracle.quantize_fp8(x, None, "row"), strict=True):
        assert_same_bits(result, reference)
    # Multiples of 2^-18 below 2^53: float64 adds them exactly. NaN counts as 480.
    squares = values.double().nan_to_num(nan=480.0).square().sum(1, keepdim=True)
    expected = squares.float() * scale * scale * factor
    assert_same_bits(predicted, torch.where(squares == 0, torch.ones_like(expected), expected))


@pytest.mark.parametrize("cols", [16, 32784])  # also of a row that is wider than registers hold on a GPU
@pytest.mark.parametrize("factor", [0.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
def test_a_prediction_of_nan_has_one_code(device, cols, factor):
    """Infinity times zero is one NaN in a product on the CPU and another one on a GPU."""
    x = torch.ones(4, cols, dtype=torch.bfloat16)
    x[1, 3], x[2, 5], x[3] = torch.inf, torch.nan, 0
    factor = torch.tensor([factor])
    predicted = sparse24.quantize_fp8_predict(x.to(device), factor.to(device))[2].cpu()
    smallest = torch.finfo(torch.float32).tiny
    of_finite = {0.0: smallest, torch.inf: torch.inf, -torch.inf: smallest}.get(factor.item(), torch.nan)
    of_infinite = torch.nan if factor.item() == 0 else of_finite
    assert_same_bits(predicted, torch.tensor([[of_finite], [of_infinite], [of_finite], [1.0]]))


def test_the_bound_of_cauchy_and_schwarz_never_saturates(device):
    g = torch.Generator().manual_seed(4)
    x, w = torch.randn(65, 256, generator=g).bfloat16(), torch.randn(96, 256, generator=g).bfloat16()
    x[3], x[4] = 30 * w[7], 0.01 * w[8]  # rows that reach the bound
    xq, scale, _ = sparse24.quantize_fp8_predict(x.to(device), torch.ones(1, device=device))
    wq, w_scale = sparse24.quantize_fp8(w.to(device))
    factor = (wq.float() * w_scale).square().sum(1).max().reshape(1) / 448
    predicted = sparse24.quantize_fp8_predict(x.to(device), factor)[2]
    *_, saturated = sparse24.linear_compress(xq, wq, scale, w_scale, None, predicted * 1.01)  # bfloat16 rounds h
    assert saturated.item() == 0
    *_, saturated = sparse24.linear_compress(xq, wq, scale, w_scale, None, predicted / 2)
    assert saturated.item() > 0
