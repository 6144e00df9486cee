"""relu2_mlp_few: bit for bit its two steps where the first one is exact; rows that do not depend on others; errors."""

import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import LAYOUTS, integers, normal, relayout
from oracle import FP8
from torch import Tensor

import sparse24

#: T, D, F, D_out.
SHAPES = [
    (1, 64, 40, 24),
    (2, 16, 5, 3),
    (8, 416, 520, 136),
    (9, 80, 300, 77),
    (16, 1024, 260, 64),
    (17, 160, 133, 40),
    (33, 208, 300, 8),
    (63, 2080, 150, 16),
    (64, 528, 700, 104),
    # On a GPU: two and three passes, with one to eight tokens; two strips of columns; x and rings that fill a block.
    (1, 64, 17000, 40),
    (4, 32, 9000, 136),
    (7, 272, 8500, 24),
    (2, 16, 200, 4200),
    (2, 9000, 80, 8),
    (8, 5008, 70, 16),
    # Two passes with x in the ring, and the ring around more than once.
    (12, 2080, 9000, 24),
    (40, 1600, 8600, 16),
]
ODD_DEPTHS = [(3, 1, 40, 8), (9, 36, 64, 24), (20, 99, 72, 5)]


def network(shape, dtype: torch.dtype, w_dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor | None, ...]:
    """Small integers, scales that are powers of two: every sum of the first product is exact."""
    tokens, depth, features, out = shape
    limit = 2 if depth < 4000 else 1  # few squares exceed float16
    x = integers(tokens, depth, dtype=dtype, limit=limit, seed=seed)
    w1 = integers(features, depth, dtype=w_dtype, limit=limit, seed=seed + 1)
    w2_rows = normal(features, out, dtype=torch.float32, seed=seed + 2).to(w_dtype)
    b1 = integers(features, dtype=dtype, limit=9, seed=seed + 3) - 6
    b2 = normal(out, dtype=torch.float32 if out % 2 else dtype, seed=seed + 4)
    scales: list[Tensor | None] = [None, None]
    if w_dtype == FP8:
        scales[0] = torch.exp2(torch.randint(-2, 2, (features,), generator=torch.Generator().manual_seed(seed)).float())
        scales[1] = torch.rand(out, generator=torch.Generator().manual_seed(seed)) + 0.5
    return tuple(None if t is None else t.to(device) for t in (x, w1, w2_rows, b1, b2, *scales))


def steps(x, w1, w2_rows, b1, b2, w1_scale, w2_scale, threshold: float = 0.0) -> Tensor:
    h = x.cpu().double() @ w1.cpu().double().t()
    h = h if w1_scale is None else h * w1_scale.cpu()
    h = (h if b1 is None else h + b1.cpu().double()).float().to(x.dtype).float()
    y = torch.where(h <= threshold, 0, h).square().to(x.dtype)
    cpu = [None if t is None else t.cpu() for t in (w2_rows, w2_scale, b2)]
    return sparse24.mm_active(y, *cpu)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("shape", SHAPES + ODD_DEPTHS, ids=str)
def test_is_its_two_steps(poisoned_memory, device, dtype, shape, fp8, threshold):
    operands = network(shape, dtype, FP8 if fp8 else dtype, device)
    got = sparse24.relu2_mlp_few(*operands, threshold)
    assert got.is_contiguous()
    assert_same_bits(got, steps(*operands, threshold))


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
def test_is_accurate(device, dtype, fp8):
    x, w1, w2 = (normal(*s, dtype=torch.float32, seed=i) for i, s in enumerate(((64, 512), (1024, 512), (1024, 256))))
    w_dtype = FP8 if fp8 else dtype
    x, w1, w2 = x.to(dtype), (w1 * 0.05).to(w_dtype), (w2 * 0.05).to(w_dtype)
    got = sparse24.relu2_mlp_few(x.to(device), w1.to(device), w2.to(device))
    wide1, wide2 = w1.to(dtype), w2.to(dtype)
    torchs = torch.relu(x @ wide1.t()).square() @ wide2
    y = torch.relu(x.double() @ w1.double().t()).square()
    assert_accurate(got, torchs, y @ w2.double(), y @ w2.double().abs())


def test_rows_are_independent(device, dtype):
    x, w1, w2 = (normal(*s, dtype=dtype, seed=i).to(device) for i, s in enumerate(((64, 520), (600, 520), (600, 136))))
    b1 = torch.full((600,), -30, dtype=dtype, device=device)
    got = sparse24.relu2_mlp_few(x, w1, w2, b1)
    assert (got == 0).any(1).all() or got.any()
    for first, count in ((0, 1), (63, 1), (7, 2), (11, 8), (5, 16), (17, 33), (0, 63)):
        rows = x[first : first + count].clone()
        assert_same_bits(sparse24.relu2_mlp_few(rows, w1, w2, b1), got[first : first + count])


def test_no_active_neuron(poisoned_memory, device, dtype):
    x, w1, w2_rows, _, b2, *_ = network((5, 64, 96, 40), dtype, dtype, device)
    b1 = torch.full((96,), -3000, dtype=dtype, device=device)
    w2_rows = torch.full_like(w2_rows, torch.nan)
    assert_same_bits(sparse24.relu2_mlp_few(x, w1, w2_rows, b1, b2), b2.to(dtype).expand(5, 40).contiguous())


def test_nan_and_infinity(device, dtype):
    x, w1, w2_rows, *_ = network((4, 64, 96, 40), dtype, dtype, device)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    got = sparse24.relu2_mlp_few(x, w1, w2_rows)
    assert got[1].isnan().all() and not got[2].isfinite().all()
    assert_same_bits(got[[0, 3]], steps(x[[0, 3]], w1, w2_rows, None, None, None, None))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 2, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(device, shape):
    x = normal(*shape, dtype=torch.bfloat16).to(device)
    w1, w2 = normal(96, 64, dtype=torch.bfloat16, seed=1).to(device), normal(96, 40, dtype=torch.bfloat16).to(device)
    got = sparse24.relu2_mlp_few(x, w1, w2)
    assert got.shape == (*shape[:-1], 40)
    assert_same_bits(got.reshape(-1, 40), sparse24.relu2_mlp_few(x.reshape(-1, 64), w1, w2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    x, w1, w2_rows, *_ = network((6, 48, 64, 40), torch.bfloat16, torch.bfloat16, "cpu")
    operands = [relayout(t, layout) for t in (x, w1, w2_rows)]
    on_device = [relayout(t.contiguous().to(device), layout) for t in operands]
    assert_same_bits(sparse24.relu2_mlp_few(*on_device), steps(*operands, None, None, None, None))


def test_cuda_graph_with_new_data(cuda):
    w1, w2 = (normal(1024, 512, dtype=torch.bfloat16, seed=i).to(cuda) for i in range(2))
    b1 = torch.full((1024,), -30, dtype=torch.bfloat16, device=cuda)
    x = torch.zeros(3, 512, dtype=torch.bfloat16, device=cuda)
    sparse24.relu2_mlp_few(x, w1, w2, b1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x
        for _ in range(3):  # dependent launches behind each other
            out = sparse24.relu2_mlp_few(out, w1, w2, b1)
            out = out / out.abs().amax().clamp(min=1)
    for seed in range(4):
        x.copy_(normal(3, 512, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        expected = x
        for _ in range(3):
            expected = sparse24.relu2_mlp_few(expected, w1, w2, b1)
            expected = expected / expected.abs().amax().clamp(min=1)
        assert_same_bits(out, expected)


def test_refuses_a_backward_pass(device):
    x = torch.ones(2, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    w = torch.ones(8, 16, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match=r"^sparse24\.relu2_mlp_few: expected no backward pass"):
        sparse24.relu2_mlp_few(x, w, w).sum().backward()


BF16 = torch.bfloat16


def ones(*shape: int, like: Tensor, dtype: torch.dtype = BF16) -> Tensor:
    return torch.ones(*shape, dtype=dtype, device=like.device)


ERRORS = {
    "scalar x": (lambda x, w1, w2: (x[0, 0], w1, w2), r"x to have at least 1 dimension, got 0 with shape \(\)"),
    "type of x": (lambda x, w1, w2: (x.long(), w1, w2), r"x to be bfloat16(,| or) float16.*, got int64"),
    "type of w1": (
        lambda x, w1, w2: (x, w1.half(), w2),
        r"w1 to be bfloat16 \(the dtype of x\) or float8_e4m3fn, got float16",
    ),
    "columns of w1": (lambda x, w1, w2: (x, w1[:, 1:], w2), r"w1 to have 16 columns \(columns of x\), got 15"),
    "rank of w1": (lambda x, w1, w2: (x, w1[0], w2), r"w1 to have 2 dimensions, got 1 with shape \(16\)"),
    "rows of w2": (lambda x, w1, w2: (x, w1, w2[1:]), r"w2_rows to have 24 rows \(rows of w1\), got 23"),
    "type of w2": (
        lambda x, w1, w2: (x, w1, w2.float()),
        r"w2_rows to be bfloat16 \(the dtype of x\) or float8_e4m3fn, got float32",
    ),
    "type of b1": (
        lambda x, w1, w2: (x, w1, w2, ones(24, like=x, dtype=torch.float32)),
        r"b1 to be bfloat16 \(the dtype of x\), got float32",
    ),
    "size of b1": (lambda x, w1, w2: (x, w1, w2, ones(8, like=x)), r"b1 to have 24 elements \(rows of w1\), got 8"),
    "type of b2": (
        lambda x, w1, w2: (x, w1, w2, None, ones(8, like=x).half()),
        r"b2 to be bfloat16 or float32, got float16",
    ),
    "size of b2": (
        lambda x, w1, w2: (x, w1, w2, None, ones(24, like=x)),
        r"b2 to have 8 elements \(columns of w2_rows\), got 24",
    ),
    "w1_scale": (
        lambda x, w1, w2: (x, w1, w2, None, None, ones(24, like=x, dtype=torch.float32)),
        r"w1_scale to be None \(bfloat16 weights have no scale\), got a tensor",
    ),
    "size of w1_scale": (
        lambda x, w1, w2: (x, w1.to(FP8), w2, None, None, ones(8, like=x, dtype=torch.float32)),
        r"w1_scale to have 1 or 24 elements \(rows of w1\), got 8",
    ),
    "size of w2_scale": (
        lambda x, w1, w2: (x, w1, w2.to(FP8), None, None, None, ones(24, like=x, dtype=torch.float32)),
        r"w2_scale to have 1 or 8 elements \(columns of w2_rows\), got 24",
    ),
    "negative threshold": (
        lambda x, w1, w2: (x, w1, w2, None, None, None, None, -0.5),
        r"threshold to be finite and at least 0, got -0.5",
    ),
    "infinite threshold": (
        lambda x, w1, w2: (x, w1, w2, None, None, None, None, float("inf")),
        r"threshold to be finite and at least 0, got inf",
    ),
    "no threshold": (
        lambda x, w1, w2: (x, w1, w2, None, None, None, None, float("nan")),
        r"threshold to be finite and at least 0, got nan",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(checked_device, name):
    make, sentence = ERRORS[name]
    shapes = (3, 16), (24, 16), (24, 8)
    args = make(*(torch.ones(*shape, dtype=BF16, device=checked_device) for shape in shapes))
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp_few: expected {sentence}"):
        sparse24.relu2_mlp_few(*args)


def test_too_many_tokens(cuda):
    x, w = torch.ones(5, 13, 16, dtype=BF16, device=cuda), torch.ones(8, 16, dtype=BF16, device=cuda)
    sentence = "x to have at most 64 rows on a CUDA device, got 65"
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp_few: expected {sentence}"):
        sparse24.relu2_mlp_few(x, w, w)
