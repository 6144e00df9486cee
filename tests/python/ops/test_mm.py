"""mm: at most twice torch's error, exact where numbers are, and one row at a time."""

import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import integers, k_major, normal, relayout, relu2_like, unaligned
from oracle import FP8, round_up
from product import exact_product, random_problem, torch_product

import sparse24

# Rows of X, columns of X, N. Odd tokens, K off the tile (1856, 15680), odd N.
SHAPES = {
    -1: [(1, 1856, 1000), (63, 15680, 7), (129, 96, 4100), (193, 352, 264), (8191, 32, 24), (64, 128, 1)],
    -2: [(1, 64, 1000), (63, 1856, 7), (129, 72, 4100), (193, 352, 264), (8191, 32, 24), (1856, 8, 1)],
}
ALL_SHAPES = [
    pytest.param(dim, s, id=f"{s[0]}x{s[1]}-n{s[2]}-dim{dim}") for dim, shapes in SHAPES.items() for s in shapes
]
#: Layouts of b [K, N].
MAJORNESS = {
    "n-major": lambda b: b.contiguous(),
    "k-major": k_major,
    "n-sliced": lambda b: relayout(b, "sliced"),
    "k-sliced": lambda b: relayout(b.t(), "sliced").t(),
    "k-offset": lambda b: relayout(b.t(), "offset").t(),
    "strided": lambda b: relayout(b, "strided"),
    "expanded": lambda b: b[:, :1].expand(b.shape),
}


def check(problem, scale_a=None, scale_b=None, bias=None, out_dtype=None, transpose_out=False):
    d = problem(scale_a, scale_b, bias, out_dtype=out_dtype, transpose_out=transpose_out)
    assert d.is_contiguous() and d.device == problem.b.device
    if transpose_out:
        d = d.t()
    torchs = torch_product(problem, scale_a, scale_b, bias, out_dtype)
    assert d.dtype == torchs.dtype
    assert_accurate(d, torchs, *exact_product(problem, scale_a, scale_b, bias))
    return d


@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_accuracy(poisoned_memory, device, values_dtype, dim, shape):
    check(random_problem(*shape, values_dtype, dim, device))


@pytest.mark.parametrize(("dim", "shape"), ALL_SHAPES)
def test_exact_on_integers(poisoned_memory, device, values_dtype, dim, shape):
    """Sums of small integers have no rounding: every bit is known."""
    rows, cols, n = shape
    x = integers(rows, cols, dtype=torch.bfloat16 if values_dtype == FP8 else values_dtype).to(device)
    b = k_major(integers(cols if dim == -1 else rows, n, dtype=values_dtype, seed=1).to(device))
    if values_dtype == FP8:
        values, meta, _ = sparse24.compress_fp8(x, torch.ones(1, device=device), dim=dim, scaling="tensor")
    else:
        values, meta = sparse24.compress(x, dim=dim)
    dense = sparse24.decompress(values, meta, rows, cols, dim).cpu().double()
    expected = (dense if dim == -1 else dense.t()) @ b.cpu().double()
    d = sparse24.mm(values, meta, b, dim=dim, out_dtype=torch.float32)
    assert_same_bits(d + 0.0, expected.float() + 0.0)  # an empty sum may be -0


@pytest.mark.parametrize("majorness", MAJORNESS)
def test_layouts_of_b(device, values_dtype, dim, majorness):
    if values_dtype == FP8 and not majorness.startswith("k"):
        pytest.skip("fp8 is K-major only")
    check(random_problem(67, 160, 72, values_dtype, dim, device, columns=MAJORNESS[majorness]))
    check(random_problem(67, 160, 13, values_dtype, dim, device, columns=MAJORNESS[majorness]))


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_out_dtype_and_transpose(device, values_dtype, dim, out_dtype, transpose_out):
    for n in (40, 7):
        check(random_problem(65, 96, n, values_dtype, dim, device), out_dtype=out_dtype, transpose_out=transpose_out)


def test_default_out_dtype(device, values_dtype):
    d = random_problem(3, 32, 8, values_dtype, -1, device)()
    assert d.dtype == (torch.bfloat16 if values_dtype == FP8 else values_dtype)


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
@pytest.mark.parametrize("scale_b", ["none", "one", "column"])
@pytest.mark.parametrize("scale_a", ["none", "one", "row"])
def test_scales_and_bias(device, values_dtype, dim, scale_a, scale_b, transpose_out):
    problem = random_problem(66, 96, 23, values_dtype, dim, device)
    m, n = problem.a.shape[0], 23
    sizes = {"none": None, "one": 1, "row": m, "column": n}
    scales = [
        None if size is None else torch.exp2(normal(size, dtype=torch.float32, seed=size)).to(device)
        for size in (sizes[scale_a], sizes[scale_b])
    ]
    out_dtype = torch.bfloat16 if values_dtype == FP8 else values_dtype
    for bias in (None, normal(n, dtype=out_dtype).to(device), normal(n, dtype=torch.float32).to(device)):
        check(problem, *scales, bias, transpose_out=transpose_out)


def test_shapes_of_scales(device, values_dtype):
    """Any shape with the right number of elements, contiguous or not."""
    problem = random_problem(40, 96, 24, values_dtype, -1, device)
    scale_a = torch.exp2(normal(40, dtype=torch.float32)).to(device)
    scale_b = torch.exp2(normal(24, dtype=torch.float32, seed=1)).to(device)
    expected = problem(scale_a, scale_b)
    assert_same_bits(problem(scale_a.reshape(40, 1), scale_b.reshape(1, 24)), expected)
    assert_same_bits(problem(scale_a.repeat_interleave(2)[::2], scale_b.repeat_interleave(3)[::3]), expected)
    assert_same_bits(problem(unaligned(scale_a), unaligned(scale_b)), expected)
    one = torch.tensor(0.75, device=device)
    assert_same_bits(problem(one, one), problem(one.reshape(1, 1), one.reshape(1)))


def test_layouts_of_values_and_meta(device, values_dtype, dim):
    p = random_problem(64, 96, 16, values_dtype, dim, device)
    expected = p()
    for layout in ("transposed", "sliced", "strided", "offset"):
        values = relayout(p.values, layout)
        assert_same_bits(sparse24.mm(values, unaligned(p.meta), p.b, dim=dim), expected, layout)
        assert_same_bits(sparse24.mm(values, p.meta.repeat_interleave(2)[::2], p.b, dim=dim), expected, layout)


def test_small_example(device, dtype):
    """A [2, 16] keeps 3, 4 at columns 1, 3 and 5 at column 15; b has the columns k and 1."""
    x = torch.zeros(2, 16, device=device, dtype=dtype)
    x[0, [0, 1, 3]] = torch.tensor([1, 3, 4], device=device, dtype=dtype)
    x[1, 15] = 5
    b = torch.stack([torch.arange(16), torch.ones(16)], 1).to(device, dtype)
    values, meta = sparse24.compress(x)
    assert sparse24.mm(values, meta, b).tolist() == [[3 * 1 + 4 * 3, 7], [5 * 15, 5]]
    assert sparse24.mm(values, meta, b, transpose_out=True).tolist() == [[15, 75], [7, 5]]
    scales = torch.tensor([2.0, 3.0], device=device), torch.tensor([1.0, 10.0], device=device)
    bias = torch.tensor([0.5, -0.5], device=device)
    assert sparse24.mm(values, meta, b, *scales, bias, out_dtype=torch.float32).tolist() == [
        [30.5, 139.5],
        [225.5, 149.5],
    ]


def test_rounds_once(device):
    """256 + 1 - 255 is 2: bfloat16 has no 257."""
    x = torch.tensor([[256, 1] + [0] * 14], device=device, dtype=torch.bfloat16)
    values, meta = sparse24.compress(x)
    b = torch.ones(16, 1, device=device, dtype=torch.bfloat16)
    assert sparse24.mm(values, meta, b, bias=torch.tensor([-255.0], device=device)).item() == 2


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
def test_empty(poisoned_memory, device, values_dtype, dim, transpose_out):
    for rows, cols, n in ((0, 64, 8), (64, 0, 8), (64, 64, 0), (0, 0, 0), (0, 64, 0)):
        problem = random_problem(rows, cols, n, values_dtype, dim, device)
        m = problem.a.shape[0]
        for bias in (None, normal(n, dtype=torch.float32).to(device)):
            d = problem(None, None, bias, transpose_out=transpose_out)
            expected = torch.zeros(m, n) if bias is None else bias.cpu().expand(m, n)
            if 0 in (rows, cols) or n == 0:
                assert_same_bits(d, (expected.t() if transpose_out else expected).to(d.dtype))


def test_is_deterministic(device, values_dtype, dim):
    problem = random_problem(300, 1856, 264, values_dtype, dim, device)
    first = problem()
    for _ in range(3):
        assert_same_bits(problem(), first)


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
def test_a_row_does_not_see_the_others(device, values_dtype, dim, transpose_out):
    """Other rows of the sparse operand may hold anything, NaN too."""
    x = relu2_like(160, 160, torch.bfloat16 if values_dtype == FP8 else values_dtype).relu().to(device)
    b = k_major(normal(160, 24, dtype=values_dtype).to(device))
    other = x.clone()
    kept_row = 77
    lines = other if dim == -1 else other.t()
    keep = lines[kept_row].clone()
    lines[:] = torch.nan
    lines[kept_row] = keep
    # One scale for all rows would be the exception; the row's own is not.
    results = []
    for source in (x, other):
        if values_dtype == FP8:
            values, meta, scale = sparse24.compress_fp8(source, dim=dim)
        else:
            (values, meta), scale = sparse24.compress(source, dim=dim), None
        d = sparse24.mm(values, meta, b, scale, dim=dim, transpose_out=transpose_out)
        results.append((d.t() if transpose_out else d)[kept_row])
    assert not results[0].isnan().any()
    assert_same_bits(results[1], results[0])


def test_a_column_does_not_see_the_others(device, values_dtype, dim):
    problem = random_problem(65, 96, 33, values_dtype, dim, device)
    expected = problem()
    b = problem.b.clone()
    b[:, :16] = torch.nan
    b[:, 17:] = torch.nan
    problem.b = b if values_dtype != FP8 else k_major(b)
    assert_same_bits(problem()[:, 16], expected[:, 16])


def test_does_not_read_behind_b(device, values_dtype, dim):
    """NaN beside b in its storage: behind the last of an odd number of tokens, behind the last column."""
    rows, cols, n = 61, 96, 13
    expected = random_problem(rows, cols, n, values_dtype, dim, device)
    k = expected.b.shape[0]
    for transposed in (False, True):
        if values_dtype == FP8 and not transposed:
            continue
        storage = torch.full((round_up(n, 16) + 16, round_up(k, 16) + 32), torch.nan, device=device).to(values_dtype)
        storage = storage if transposed else storage.t().contiguous()
        view = (storage.t() if transposed else storage)[:k, :n]
        view.copy_(expected.b)
        assert_same_bits(sparse24.mm(expected.values, expected.meta, view, dim=dim), expected())


def test_nan_and_infinity_reach_the_result(device, values_dtype):
    """NaN of A makes its row NaN and no other; an infinity of b meets what A kept at its place."""
    x = torch.zeros(2, 32, device=device, dtype=torch.bfloat16 if values_dtype == FP8 else values_dtype)
    x[0, 5] = torch.nan
    x[1, 6] = 2
    b = torch.ones(32, 8, device=device).to(values_dtype)
    if values_dtype == FP8:
        values, meta, _ = sparse24.compress_fp8(x, torch.ones(1, device=device), scaling="tensor")
    else:
        values, meta = sparse24.compress(x)
        b[6, 3] = torch.inf
    d = sparse24.mm(values, meta, k_major(b))
    assert d[0].isnan().all()
    assert d[1].tolist() == [2, 2, 2, 2 if values_dtype == FP8 else torch.inf, 2, 2, 2, 2]


def test_large_result(cuda):
    """Offsets beyond 2^31: the last rows of a result of 2^31 + elements are right."""
    rows, n = 65536 + 64, 32768
    x = torch.zeros(rows, 64, device=cuda, dtype=torch.bfloat16)
    x[:, 0] = torch.arange(rows, device=cuda) % 64
    b = torch.zeros(64, n, device=cuda, dtype=torch.bfloat16)
    b[0] = torch.arange(n, device=cuda) % 4
    values, meta = sparse24.compress(x)
    d = sparse24.mm(values, meta, b)
    for at in (0, 40000, 65536 - 128, rows - 1):
        expected = x[at, :1].float() * b[0].float()
        assert_same_bits(d[at], expected.to(torch.bfloat16))


def test_nothing_is_k_major(device):
    """A b without columns has no majorness that float8 could ask for, whatever its strides say."""
    problem = random_problem(64, 64, 0, FP8, -1, device)
    problem.b = problem.b[:1].expand(64, 0)
    assert problem.b.stride(0) == 0 and problem().shape == (64, 0)
