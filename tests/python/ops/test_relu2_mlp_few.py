"""relu2_mlp_few: its two steps, bit for bit up to eight tokens where the first one is exact; rows that do not depend
on others; errors.
"""

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
    # More than eight tokens: parts of the neurons, strips of columns of which the last is narrow, a last step of one.
    (9, 64, 4097, 528),
    (24, 96, 1000, 784),
    (33, 48, 6000, 272),
    (64, 160, 2600, 1040),
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


def adds_by_chains(x: Tensor, w2_rows: Tensor) -> bool:
    """Whether sums are those of mm_active: on a GPU, more than eight tokens have others if rows are whole pieces."""
    tokens, row = x.numel() // x.shape[-1], w2_rows.shape[1] * w2_rows.element_size()
    return not x.is_cuda or tokens <= 8 or row % 16 != 0


def activation(x, w1, b1, w1_scale, threshold: float = 0.0) -> Tensor:
    h = x.cpu().double() @ w1.cpu().double().t()
    h = h if w1_scale is None else h * w1_scale.cpu()
    h = (h if b1 is None else h + b1.cpu().double()).float().to(x.dtype).float()
    return torch.where(h <= threshold, 0, h).square().to(x.dtype)


def steps(x, w1, w2_rows, b1, b2, w1_scale, w2_scale, threshold: float = 0.0) -> Tensor:
    cpu = [None if t is None else t.cpu() for t in (w2_rows, w2_scale, b2)]
    return sparse24.mm_active(activation(x, w1, b1, w1_scale, threshold), *cpu)


def assert_is_its_two_steps(got: Tensor, operands, threshold: float = 0.0) -> None:
    """Bit for bit; where sums are added in another order, within the rounding of float32 and one of the result."""
    x, w1, w2_rows, b1, b2, w1_scale, w2_scale = operands
    expected = steps(*operands, threshold)
    if adds_by_chains(x, w2_rows):
        return assert_same_bits(got, expected)
    y = activation(x, w1, b1, w1_scale, threshold).double()
    w = w2_rows.cpu().double() * (1 if w2_scale is None else w2_scale.cpu().double())
    added = 0 if b2 is None else b2.cpu().double()
    exact, magnitude = y @ w + added, y @ w.abs() + abs(added)
    rounding = torch.finfo(got.dtype)
    bound = 2.0**-18 * magnitude + 0.51 * rounding.eps * exact.abs() + rounding.smallest_normal * rounding.eps
    # Infinity, where a result is beyond the type, and NaN, where infinities of y meet: chains add these sums again.
    same = got.cpu().isclose(expected, rtol=0, atol=0, equal_nan=True)
    assert got.dtype == x.dtype and got.shape == expected.shape
    assert (same | ((got.cpu().double() - exact).abs() <= bound)).all()


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("shape", SHAPES + ODD_DEPTHS, ids=str)
def test_is_its_two_steps(poisoned_memory, device, dtype, shape, fp8, threshold):
    operands = network(shape, dtype, FP8 if fp8 else dtype, device)
    got = sparse24.relu2_mlp_few(*operands, threshold)
    assert got.is_contiguous()
    assert_is_its_two_steps(got, operands, threshold)
    assert_same_bits(sparse24.relu2_mlp_few(*operands, threshold), got)


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


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("columns", [136, 272])
def test_rows_are_independent(device, dtype, columns, fp8):
    """Of other tokens, and of their number among up to eight and among more."""
    shapes = (64, 528), (600, 528), (600, columns)
    x, w1, w2 = (normal(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes))
    if fp8:
        w1, w2 = w1.to(FP8), w2.to(FP8)
    b1 = torch.full((600,), -30, dtype=dtype, device=device)
    got = sparse24.relu2_mlp_few(x, w1, w2, b1)
    assert got.any(1).all()
    few = torch.cat([sparse24.relu2_mlp_few(rows, w1, w2, b1) for rows in x.split(8)])
    for first, count in ((0, 1), (63, 1), (7, 2), (11, 8), (5, 16), (21, 9), (17, 33), (0, 63)):
        rows = x[first : first + count].clone()
        expected = few if count <= 8 else got
        assert_same_bits(sparse24.relu2_mlp_few(rows, w1, w2, b1), expected[first : first + count])
    if adds_by_chains(x, w2):
        assert_same_bits(few, got)


@pytest.mark.parametrize("tokens", [5, 9, 64])
def test_no_active_neuron(poisoned_memory, device, dtype, tokens):
    x, w1, w2_rows, _, b2, *_ = network((tokens, 64, 96, 40), dtype, dtype, device)
    b1 = torch.full((96,), -3000, dtype=dtype, device=device)
    w2_rows = torch.full_like(w2_rows, torch.nan)
    assert_same_bits(sparse24.relu2_mlp_few(x, w1, w2_rows, b1, b2), b2.to(dtype).expand(tokens, 40).contiguous())


@pytest.mark.parametrize("tokens", [4, 20, 40])
def test_nan_and_infinity(device, dtype, tokens):
    x, w1, w2_rows, *_ = network((tokens, 64, 96, 40), dtype, dtype, device)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    got = sparse24.relu2_mlp_few(x, w1, w2_rows)
    assert got[1].isnan().all() and not got[2].isfinite().all()
    others = [t for t in range(tokens) if t not in (1, 2)]
    x[[1, 2]] = 0
    assert_same_bits(sparse24.relu2_mlp_few(x, w1, w2_rows)[others], got[others])
    assert_is_its_two_steps(got[others], (x[others], w1, w2_rows, None, None, None, None))


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("tokens", [3, 16, 64])
def test_zeros_meet_no_weight(device, dtype, tokens, fp8):
    """Neither where no token uses a row, nor where another one does."""
    w_dtype = FP8 if fp8 else dtype
    x, w1, w2_rows, _, b2, *_ = network((tokens, 16, 96, 48), dtype, w_dtype, device)
    x, w1 = (x.abs() + 1) / 8, w1.float().abs().add(1).to(w_dtype)
    x[0] = -x[0]  # uses no other neuron
    w1[7] = w1[7].float().neg().to(w_dtype)  # only the first one does
    w2_rows[7] = torch.nan
    b1 = torch.zeros(96, dtype=dtype, device=device)
    got = sparse24.relu2_mlp_few(x, w1, w2_rows, b1, b2)
    assert got[0].isnan().all() and got[1:].isfinite().all()
    assert_is_its_two_steps(got[1:], (x[1:], w1, w2_rows.float().nan_to_num(0).to(w_dtype), b1, b2, None, None))


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


@pytest.mark.parametrize("tokens", [3, 20])
def test_cuda_graph_with_new_data(cuda, tokens):
    w1, w2 = (normal(1024, 512, dtype=torch.bfloat16, seed=i).to(cuda) for i in range(2))
    b1 = torch.full((1024,), -30, dtype=torch.bfloat16, device=cuda)
    x = torch.zeros(tokens, 512, dtype=torch.bfloat16, device=cuda)
    sparse24.relu2_mlp_few(x, w1, w2, b1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x
        for _ in range(3):  # dependent launches behind each other
            out = sparse24.relu2_mlp_few(out, w1, w2, b1)
            out = out / out.abs().amax().clamp(min=1)
    for seed in range(4):
        x.copy_(normal(tokens, 512, dtype=torch.bfloat16, seed=seed))
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
