"""compress_fp8: values, metadata and scales bit for bit."""

import oracle
import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, relayout

import sparse24

SHAPES = {
    # The last rows are wider than registers hold on a GPU.
    -1: [(0, 32), (1, 32), (3, 96), (5, 1856), (127, 128), (130, 160), (2, 15680), (8191, 32), (3, 32800)],
    -2: [(0, 16), (1, 8), (3, 24), (33, 1856), (127, 72), (130, 136), (2, 15680), (8191, 8)],
}
ALL_SHAPES = [pytest.param(dim, s, id=f"{s[0]}x{s[1]}-dim{dim}") for dim, shapes in SHAPES.items() for s in shapes]
SCALING = pytest.mark.parametrize("scaling", ["row", "tensor"])


def check(x, scale, activation, dim, scaling):
    results = sparse24.compress_fp8(x, scale, activation, dim, scaling)
    expected = oracle.compress_fp8(x, scale, activation, dim, scaling)
    for name, result, reference in zip(("values", "meta", "scale"), results, expected, strict=True):
        assert_same_bits(result, reference, name)
        assert result.device == x.device and result.is_contiguous()


def scales(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.exp2(4 * torch.randn(count, 1, generator=g))


@SCALING
@pytest.mark.parametrize("specials", [True, False], ids=["specials", "finite"])
@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_computed_scale(device, activation, dim, shape, scaling, specials):
    for dtype in (torch.bfloat16, torch.float16):
        check(activations(*shape, dtype, specials=specials).to(device), None, activation, dim, scaling)


@SCALING
@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_given_scale(device, dtype, activation, dim, shape, scaling):
    m = shape[0] if dim == -1 else shape[1]
    scale = scales(m if scaling == "row" else 1)
    check(activations(*shape, dtype, seed=1).to(device), scale.to(device), activation, dim, scaling)


@SCALING
@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_writes_everything(poisoned_memory, device, dim, shape, scaling):
    check(activations(*shape, torch.bfloat16, seed=2, specials=False).to(device), None, "relu2", dim, scaling)


@SCALING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, dim, scaling, layout):
    check(relayout(activations(21, 96, dtype, seed=3).to(device), layout), None, "relu2", dim, scaling)


def test_shapes_of_a_given_scale(device, dim):
    """[M, 1] or [M], contiguous or not; what comes back is a copy."""
    x = activations(32, 32, torch.bfloat16).to(device)
    scale = scales(32).to(device)
    expected = sparse24.compress_fp8(x, scale, dim=dim)
    for other in (scale.reshape(-1), scale.expand(32, 2)[:, 1:], scale.reshape(-1).repeat_interleave(2)[::2]):
        results = sparse24.compress_fp8(x, other, dim=dim)
        for result, reference in zip(results, expected, strict=True):
            assert_same_bits(result, reference)
    assert expected[2].data_ptr() != scale.data_ptr()
    assert_same_bits(expected[2], scale)


def test_small_example(device):
    """Rows whose largest is 896, 0 and 14: scales 2, 1 and 1/32."""
    x = torch.zeros(3, 32, device=device, dtype=torch.bfloat16)
    x[0, :4] = torch.tensor([896, 1, -2, 3])
    x[2, 28:] = torch.tensor([0, -14, 7, 0])
    values, _, scale = sparse24.compress_fp8(x)
    assert scale.tolist() == [[2], [1], [1 / 32]]
    assert values.float()[0].tolist() == [448, 1.5] + [0] * 14
    assert values.float()[1].tolist() == [0] * 16
    assert values.float()[2].tolist() == [0] * 14 + [-448, 224]


def test_the_largest_of_a_row_becomes_448(device, activation, dim):
    x = activations(64, 96, torch.bfloat16, seed=4, specials=False).to(device)
    values, _, _ = sparse24.compress_fp8(x, None, activation, dim)
    largest = values.float().abs().amax(1)  # fp8 values always have one row per row of the sparse operand
    y = oracle.activate(x.cpu(), activation).abs().amax(1 if dim == -1 else 0)
    assert torch.equal(largest.cpu() == 448, y > 0)


def test_saturates(device, dtype):
    x = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, 449, 464, -480, 448] * 4, device=device).to(dtype).unsqueeze(0)
    values, _, _ = sparse24.compress_fp8(x, torch.ones(1, 1, device=device))
    assert (values.float().abs() == 448).all()


def test_nan_is_one_code_and_does_not_count(device, dtype, activation):
    x = torch.zeros(2, 32, device=device, dtype=dtype)
    x[:, 1::8] = torch.nan
    x[1, 0] = 448
    values, _, scale = sparse24.compress_fp8(x, None, activation)
    assert scale.tolist() == [[1], [448 if activation == "relu2" else 1]]
    codes = values.view(torch.uint8)
    assert (codes == 0x7F).sum() == 8 and codes[1, 0] == 0x7E


def test_scales_of_nothing_are_one(device, dim):
    for scaling in ("row", "tensor"):
        zeros = sparse24.compress_fp8(
            torch.zeros(32, 32, device=device, dtype=torch.bfloat16), None, "relu", dim, scaling
        )
        assert (zeros[2] == 1).all() and (zeros[0].view(torch.uint8) == 0).all()
        empty = sparse24.compress_fp8(
            torch.zeros(0, 32, device=device, dtype=torch.bfloat16), None, "relu", dim, scaling
        )
        assert (empty[2] == 1).all() and empty[2].numel() == (1 if scaling == "tensor" else 0 if dim == -1 else 32)


def test_tiny_numbers_use_the_smallest_normal_scale(device):
    smallest = torch.finfo(torch.float32).smallest_normal
    x = torch.full((1, 32), 2.0**-130, device=device, dtype=torch.bfloat16)
    values, _, scale = sparse24.compress_fp8(x)
    assert scale.item() == smallest
    assert (values.float() == 2.0**-4).all()


def test_selects_before_rounding(device):
    """1 and 1.0625 are one fp8 number at this scale: the pattern is that of the numbers before rounding."""
    x = torch.tensor([[1, 1, 1.0078125, 1.0078125] * 8], device=device, dtype=torch.bfloat16)
    values, meta, _ = sparse24.compress_fp8(x, torch.ones(1, device=device), scaling="tensor")
    assert (values.float() == 1).all()
    assert (oracle.unpack_meta(meta.cpu().numpy(), 1, 8, oracle.FP8) == 0b1110).all()


def test_is_deterministic(device, dim):
    x = activations(300, 512, torch.bfloat16, seed=5).to(device)
    for scaling in ("row", "tensor"):
        first, second = (sparse24.compress_fp8(x, None, "relu2", dim, scaling) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@SCALING
@pytest.mark.parametrize("shape", [(8192, 4096), (2047, 15680), (65536, 64)], ids=str)
def test_cuda_equals_cpu(cuda, activation, dim, scaling, shape):
    for specials in (False, True):
        x = activations(*shape, torch.bfloat16, seed=6, specials=specials)
        on_cpu = sparse24.compress_fp8(x, None, activation, dim, scaling)
        on_gpu = sparse24.compress_fp8(x.to(cuda), None, activation, dim, scaling)
        for name, a, b in zip(("values", "meta", "scale"), on_gpu, on_cpu, strict=True):
            assert_same_bits(a, b, name)
