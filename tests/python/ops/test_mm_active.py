"""mm_active: every bit, of chains of float32 additions, on both devices; zeros that meet anything; errors."""

import oracle
import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import LAYOUTS, generator, normal, relayout, unaligned
from oracle import FP8
from synchronisation import no_synchronisation
from torch import Tensor

import sparse24

BF16, F32 = torch.bfloat16, torch.float32
#: T, F, D_out: odd widths, fewer neurons than slices, every number of tokens at which a kernel changes, tails.
SHAPES = [
    (1, 64, 128),
    (2, 7, 3),
    (3, 1000, 264),
    (4, 40, 1),
    (5, 1001, 101),
    (8, 300, 264),
    (9, 513, 77),
    (16, 136, 128),
    (17, 2056, 24),
    (33, 520, 300),
    (63, 96, 80),
    (64, 1040, 144),
    (8, 6001, 24),  # lists of more neurons than a warp has lanes
    # On an H200 lanes have four, six and eight columns.
    (8, 300, 2048),
    (1, 130, 2064),
    (8, 260, 3072),
    (7, 200, 3088),
    (9, 140, 1552),
]


def activation(tokens: int, features: int, zeros: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = generator(seed)
    y = torch.rand(tokens, features, generator=g) + 0.01
    return (y * (torch.rand(tokens, features, generator=g) >= zeros)).to(dtype)


def weight(features: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return normal(features, columns, dtype=torch.float32, seed=seed).to(dtype)


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit(poisoned_memory, device, dtype, shape, fp8):
    tokens, features, columns = shape
    y, w = activation(tokens, features, 0.8, dtype), weight(features, columns, FP8 if fp8 else dtype)
    scale = torch.rand(columns, generator=generator(2)) + 0.5 if fp8 else None
    bias = normal(columns, dtype=dtype if columns % 2 else torch.float32, seed=3)
    for out_dtype in {None, torch.float32}:
        got = sparse24.mm_active(
            y.to(device),
            w.to(device),
            None if scale is None else scale.to(device),
            bias.to(device),
            out_dtype=out_dtype,
        )
        assert got.is_contiguous()
        assert_same_bits(got, oracle.mm_active(y, w, scale, bias).to(out_dtype or dtype))


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
def test_some_all_and_no_neuron(poisoned_memory, device, dtype, zeros):
    """As accurate as torch, and what a row is does not depend on the others, nor on how many there are."""
    y, w = activation(64, 3000, zeros, dtype), weight(3000, 136, dtype)
    got = sparse24.mm_active(y.to(device), w.to(device))
    exact = y.double() @ w.double()
    assert_accurate(got, y @ w, exact, y.double() @ w.double().abs())
    for first, count in ((0, 1), (63, 1), (7, 2), (3, 4), (11, 8), (5, 16), (17, 33), (0, 63)):
        rows = y[first : first + count].to(device)
        assert_same_bits(sparse24.mm_active(rows, w.to(device)), got[first : first + count])
    if zeros == 1.0:
        assert not got.any() and not torch.signbit(got).any()


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
def test_zeros_meet_anything(device, dtype, fp8):
    y, w = activation(64, 1000, 0.9, dtype), weight(1000, 72, FP8 if fp8 else dtype)
    y[::2, ::3] *= -1  # zeros of both signs
    expected = sparse24.mm_active(y[:5].to(device), w.to(device))
    unused = (y[:5] == 0).all(0)
    assert unused.any()
    special = w.float()
    special[unused] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: 1 if fp8 else 3].repeat(24 * (3 if fp8 else 1))
    special = special.to(w.dtype)
    assert special[unused].isnan().any() if not fp8 else special.float()[unused].isnan().all()
    assert_same_bits(sparse24.mm_active(y[:5].to(device), special.to(device)), expected)
    # The other tokens use some of these rows: the first five do not notice.
    assert_same_bits(sparse24.mm_active(y.to(device), special.to(device))[:5], expected)


def test_nan_and_infinity(device, dtype):
    y, w = activation(5, 200, 0.8, dtype), weight(200, 24, dtype)
    y[1, 7], y[2, 150] = torch.nan, torch.inf
    w[100, 3] = torch.nan
    y[3, 100], y[4, 100] = 1, 0
    got = sparse24.mm_active(y.to(device), w.to(device)).float().cpu()
    assert got[1].isnan().all()
    assert ((got[2] == torch.sign(w[150].float()) * torch.inf) | (torch.arange(24) == 3)).all()
    assert got[3].isnan().tolist() == [column == 3 for column in range(24)]
    assert got[0].isfinite().all() or y[0, 100] != 0
    assert got[4].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    y, w = (activation(6, 200, 0.7, dtype) * 16).round().to(dtype), weight(200, 48, dtype).round()
    y, w = relayout(y, layout), relayout(w, layout)
    bias = unaligned(normal(48, dtype=dtype))
    expected = oracle.mm_active(y, w, None, bias).to(dtype)
    assert_same_bits(sparse24.mm_active(y.to(device), w.to(device), None, bias.to(device)), expected)
    on_device = relayout(y.contiguous().to(device), layout), relayout(w.contiguous().to(device), layout)
    assert_same_bits(sparse24.mm_active(*on_device, None, bias.to(device)), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale(device, shape):
    y, w = (activation(3, 64, 0.5, BF16) * 16).round().to(BF16), weight(64, 32, torch.float32).round().to(FP8)
    scale = torch.full(shape, 0.25)
    got = sparse24.mm_active(y.to(device), w.to(device), scale.to(device))
    assert_same_bits(got, oracle.mm_active(y, w, torch.full((32,), 0.25)).bfloat16())


def test_any_number_of_tokens_on_the_cpu():
    y, w = activation(200, 64, 0.9, torch.float32), weight(64, 8, torch.float32)
    assert_same_bits(sparse24.mm_active(y, w), oracle.mm_active(y, w))


def test_cuda_graph_with_new_data(cuda):
    """What is active is data: the graph is captured with no active neuron, and replayed with some and with all."""
    w = weight(4096, 520, torch.bfloat16).to(cuda)
    y = torch.zeros(7, 4096, dtype=torch.bfloat16, device=cuda)
    sparse24.mm_active(y, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse24.mm_active(y, w)
    for seed, zeros in enumerate((0.9, 0.0, 1.0, 0.99)):
        y.copy_(activation(7, 4096, zeros, torch.bfloat16, seed))
        graph.replay()
        assert_same_bits(out, sparse24.mm_active(y.clone(), w))


def test_needs_no_synchronisation(cuda):
    y, w = activation(8, 1024, 0.9, torch.bfloat16).to(cuda), weight(1024, 256, torch.bfloat16).to(cuda)
    sparse24.mm_active(y, w)
    with no_synchronisation():
        sparse24.mm_active(y, w)


def test_refuses_a_backward_pass(device):
    y = activation(2, 64, 0.5, torch.bfloat16).to(device).requires_grad_()
    out = sparse24.mm_active(y, weight(64, 16, torch.bfloat16).to(device))
    with pytest.raises(RuntimeError, match=r"^sparse24\.mm_active: expected no backward pass"):
        out.sum().backward()


ERRORS = {
    "rank of y": (lambda y, w: ((y[0], w), {}), r"y to have 2 dimensions, got 1 with shape \(16\)"),
    "type of y": (lambda y, w: ((y.long(), w), {}), r"y to be bfloat16(,| or) float16.*, got int64"),
    "float8 y": (lambda y, w: ((y.to(FP8), w), {}), r"y to be bfloat16(,| or) float16.*, got float8_e4m3fn"),
    "type of w": (
        lambda y, w: ((y, w.half()), {}),
        r"w to be bfloat16 \(the dtype of y\) or float8_e4m3fn, got float16",
    ),
    "rows of w": (lambda y, w: ((y, w[1:]), {}), r"w to have 16 rows \(columns of y\), got 15"),
    "rank of w": (lambda y, w: ((y, w[0]), {}), r"w to have 2 dimensions, got 1 with shape \(8\)"),
    "scale of 16 bits": (
        lambda y, w: ((y, w, torch.ones(8, device=y.device)), {}),
        r"scale_w to be None \(bfloat16 weights have no scale\), got a tensor",
    ),
    "size of scale": (
        lambda y, w: ((y, w.to(FP8), torch.ones(7, device=y.device)), {}),
        r"scale_w to have 1 or 8 elements \(columns of w\), got 7",
    ),
    "type of scale": (
        lambda y, w: ((y, w.to(FP8), torch.ones(8, device=y.device, dtype=BF16)), {}),
        r"scale_w to be float32, got bfloat16",
    ),
    "type of bias": (
        lambda y, w: ((y, w, None, w[0].half()), {}),
        r"bias to be bfloat16 or float32, got float16",
    ),
    "size of bias": (
        lambda y, w: ((y, w, None, w[0, 1:]), {}),
        r"bias to have 8 elements \(columns of w\), got 7",
    ),
    "out_dtype": (
        lambda y, w: ((y, w), {"out_dtype": torch.float64}),
        r"out_dtype to be bfloat16, float16 or float32, got float64",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(checked_device, name):
    make, sentence = ERRORS[name]
    args, options = make(
        torch.ones(3, 16, dtype=BF16, device=checked_device), torch.ones(16, 8, dtype=BF16, device=checked_device)
    )
    with pytest.raises(RuntimeError, match=rf"^sparse24\.mm_active: expected {sentence}"):
        sparse24.mm_active(*args, **options)


def test_too_many_tokens(cuda):
    y, w = torch.ones(65, 16, dtype=BF16, device=cuda), torch.ones(16, 8, dtype=BF16, device=cuda)
    sentence = "y to have at most 64 rows on a CUDA device, got 65"
    with pytest.raises(RuntimeError, match=rf"^sparse24\.mm_active: expected {sentence}"):
        sparse24.mm_active(y, w)
