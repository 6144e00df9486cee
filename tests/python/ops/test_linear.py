"""linear_relu2 and linear_compress: bit for bit the separate steps, wherever the sums of the product are exact."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from compare import assert_accurate, assert_same_bits
from data import LAYOUTS, normal, relayout
from linear_problem import Problem, check_compress, check_relu2, check_statistics, hidden_of, output_scale, problem
from oracle import FP8, Pattern

import sparse24

#: Tokens, D, F: no tokens, tails of the tiles in both directions, D that is padded, no D at all, no features.
SHAPES = [(0, 64, 96), (1, 64, 32), (127, 80, 160), (129, 64, 1888), (5, 208, 64), (300, 0, 64), (33, 16, 0)]
ODD_DEPTHS = [(9, 1, 64), (130, 36, 96), (3, 99, 32)]
CHECKS = pytest.mark.parametrize("check", [check_compress, check_relu2], ids=["compress", "relu2"])
EXTRAS = pytest.mark.parametrize("extras", ["none", "rows", "one"])


@CHECKS
@EXTRAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_of_sixteen_bits(poisoned_memory, device, values_dtype, shape, extras, check):
    check(problem(*shape, values_dtype, device, extras=extras), out_dtype=hidden_of(values_dtype))


@CHECKS
@EXTRAS
@pytest.mark.parametrize("kind", ["rows", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_of_fp8(poisoned_memory, device, values_dtype, shape, extras, kind, check):
    p = problem(*shape, values_dtype, device, extras=extras, seed=3)
    check(p, output_scale(shape[0], kind, device), out_dtype=FP8)


@CHECKS
@EXTRAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu(poisoned_memory, device, values_dtype, shape, extras, check):
    """The plain one: also what training in float16 stores instead of squares."""
    p = problem(*shape, values_dtype, device, extras=extras, seed=4)
    check(p, out_dtype=hidden_of(values_dtype), activation="relu")
    check(p, output_scale(shape[0], "rows", device), out_dtype=FP8, activation="relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_relu_without_statistics(device, dtype):
    """Kernels that count nothing have another form of what they store."""
    p = problem(129, 64, 288, dtype, device, seed=4)
    for options, expected in (
        ({}, oracle.compress(p.h(), "relu")),
        ({"activation": "relu2"}, oracle.compress(p.h(), "relu2")),
    ):
        options = {"activation": "relu", "statistics": False} | options
        values, meta, *_ = sparse24.linear_compress(*p.args, **options)
        for a, e in zip((values, meta), expected, strict=True):
            assert_same_bits(a, e)
        y = sparse24.linear_relu2(*p.args, **options)[0]
        assert_same_bits(y, p.y(options["activation"]).to(dtype))


def test_roots_and_squares_have_one_pattern(device):
    """Every number of float16, most of whose squares underflow or overflow."""
    codes = torch.arange(0x7C00)[torch.randperm(0x7C00, generator=torch.Generator().manual_seed(1))]
    w = oracle.from_bits(codes, torch.float16).reshape(-1, 1).to(device)
    x = torch.ones(1, 1, dtype=torch.float16, device=device)
    (roots, meta, *_), (squares, expected, *_) = (
        sparse24.linear_compress(x, w, activation=activation) for activation in ("relu", "relu2")
    )
    assert_same_bits(meta, expected)
    assert_same_bits(roots.square(), squares)
    assert_same_bits(roots, sparse24.compress_like(w.t().contiguous(), meta))


@EXTRAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_row_scale(poisoned_memory, device, values_dtype, shape, extras):
    """compress, then quantize_fp8 of its values; the metadata in the order of fp8."""
    p = problem(*shape, values_dtype, device, extras=extras, seed=5)
    actual = sparse24.linear_compress(*p.args, scaling="row", out_dtype=FP8)
    h = p.h()
    values, scale = oracle.quantize_fp8(oracle.compress(h, "relu2")[0])
    meta = oracle.compress_fp8(h, None, "relu2")[1]
    for name, a, e in zip(("values", "meta", "scale"), actual[:3], (values, meta, scale), strict=True):
        assert_same_bits(a, e, name)
    check_statistics(*actual[3:], p.y(), 0)
    finite = scale.isfinite().reshape(-1) & (h > 0).any(1)  # float16 values overflow
    largest = actual[0].float().cpu()[finite]
    assert 0 in largest.shape or (largest.amax(1) == 448).all(), "a row's largest value becomes the largest number"


@CHECKS
@pytest.mark.parametrize("shape", ODD_DEPTHS, ids=str)
def test_any_depth_in_sixteen_bits(device, dtype, shape, check):
    check(problem(*shape, dtype, device, extras="rows", seed=7))


@CHECKS
def test_many_columns_of_output(device, check):
    """F that is no multiple of a tile of 128."""
    for features in (1856, 16, 48):
        check(problem(65, 64, features, torch.bfloat16, device, seed=8))


def test_few_features_of_relu2(device, dtype):
    check_relu2(problem(17, 24, 40, dtype, device, extras="rows"))
    check_relu2(problem(17, 24, 48, dtype, device), torch.ones(1, device=device), out_dtype=FP8)


@CHECKS
def test_default_out_dtype(device, values_dtype, check):
    p = problem(33, 32, 64, values_dtype, device)
    check(p, output_scale(33, "rows", device) if values_dtype == FP8 else None)


@CHECKS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, values_dtype, layout, check):
    p = problem(37, 64, 96, values_dtype, device, extras="rows", seed=9)
    p.x, p.w = relayout(p.x, layout), relayout(p.w, layout)
    p.bias = relayout(p.bias.repeat(2, 1), "strided")[1]
    scale = relayout(output_scale(37, "rows", device).repeat(1, 2), "strided")[:, :1]
    check(p, scale, out_dtype=FP8)
    check(p, out_dtype=hidden_of(values_dtype))


@CHECKS
def test_nan_is_kept_and_not_counted(device, values_dtype, check):
    """A token with NaN is NaN everywhere; it changes neither amax nor the count."""
    p = problem(40, 64, 96, values_dtype, device, seed=11)
    p.x[3, 5] = torch.nan
    check(p, out_dtype=hidden_of(values_dtype))
    check(p, torch.full((1,), 0.5, device=device), out_dtype=FP8)


@CHECKS
def test_every_pattern_of_sixteen_bits(device, values_dtype, check):
    """h is a bias with all of them, subnormal numbers, infinities and NaN included."""
    dtype = hidden_of(values_dtype)
    patterns = torch.arange(1 << 16, dtype=torch.int32)[
        torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))
    ]
    bias = oracle.from_bits(patterns.to(torch.int64), dtype).to(device)
    x, w = (torch.zeros(rows, 16, device=device).to(values_dtype) for rows in (2, 1 << 16))
    check(Problem(x, w, bias=bias), out_dtype=dtype)
    check(Problem(x, w, bias=bias), torch.full((1,), 2.0**-9, device=device), out_dtype=FP8)


def test_overflow(device):
    """h beyond float16 is infinite; its square saturates."""
    x = torch.full((2, 16), 128.0, device=device, dtype=torch.float16)
    x[1] = 1
    w = torch.full((32, 16), 128.0, device=device, dtype=torch.float16)
    for check in (check_compress, check_relu2):
        check(Problem(x, w))
        check(Problem(x, w), torch.ones(1, device=device), out_dtype=FP8)
    amax, saturated = sparse24.linear_compress(x, w, scale_out=torch.ones(1, device=device), out_dtype=FP8)[3:]
    assert amax.item() == torch.inf and saturated.item() == 32


def test_small_example(device):
    """One token: h = 1, -2, 3, 4 and zeros; 4 and 3 are kept, 16 and 9 stored."""
    x = torch.ones(1, 8, device=device, dtype=torch.bfloat16)
    w = torch.zeros(32, 8, device=device, dtype=torch.bfloat16)
    w[:4, 0] = torch.tensor([1.0, -2, 3, 4], dtype=torch.bfloat16)
    values, meta, scale, amax, saturated = sparse24.linear_compress(x, w)
    assert values[0].tolist() == [9, 16, *[0] * 14]
    assert meta.cpu()[0] == (2 | 3 << 2 | 4 << 4) and scale.numel() == 0
    assert amax.tolist() == [16] and saturated.tolist() == [0]
    # With scale 1/32 only 16 * 32 = 512 is beyond 448.
    values, _, scale, _, saturated = sparse24.linear_compress(
        x, w, scale_out=torch.full((1,), 1 / 32, device=device), out_dtype=FP8
    )
    assert values[0].float().tolist()[:2] == [288, 448] and scale.tolist() == [1 / 32] and saturated.tolist() == [1]
    values, _, scale, _, saturated = sparse24.linear_compress(x, w, scaling="row", out_dtype=FP8)
    assert values[0].float().tolist()[:2] == [256, 448] and saturated.tolist() == [0]
    assert_same_bits(scale, torch.tensor([[16.0]]) / 448)
    y = sparse24.linear_relu2(x, w)[0]
    assert y[0].tolist() == [1, 0, 9, 16, *[0] * 28]


def test_statistics_are_optional(device):
    x, w = (
        torch.ones(3, 16, device=device, dtype=torch.bfloat16),
        torch.ones(32, 16, device=device, dtype=torch.bfloat16),
    )
    with_them, without = sparse24.linear_compress(x, w), sparse24.linear_compress(x, w, statistics=False)
    for a, b in zip(with_them[:3], without[:3], strict=True):
        assert_same_bits(a, b)
    assert with_them[3].tolist() == [256] and without[3].numel() == without[4].numel() == 0
    assert sparse24.linear_relu2(x, w, statistics=False)[1].numel() == 0


def test_a_delayed_scale_does_not_saturate(device):
    """The amax of one call, with a margin for roundings, makes the scale of the next."""
    p = problem(65, 64, 96, torch.bfloat16, device, seed=12)
    amax = sparse24.linear_compress(*p.args)[3]
    values, _, _, again, saturated = sparse24.linear_compress(*p.args, amax / 440, out_dtype=FP8)
    assert saturated.item() == 0 and values.float().max().item() == 448
    assert_same_bits(again, amax)


def test_a_token_does_not_see_the_others(device, values_dtype):
    p = problem(66, 64, 96, values_dtype, device, seed=13)
    other = p.x.clone()
    other[:40] = torch.nan
    other[41:] = torch.nan
    for scaling, out_dtype in (("given", hidden_of(values_dtype)), ("row", FP8)):
        run = lambda x, s=scaling, o=out_dtype: sparse24.linear_compress(x, p.w, scaling=s, out_dtype=o)  # noqa: E731
        actual, expected = run(other), run(p.x)
        assert_same_bits(actual[0][40], expected[0][40])
        assert_same_bits(actual[3], p.y()[40].max().reshape(1))


@pytest.mark.parametrize("depth", [64, 1000])
def test_accuracy(device, values_dtype, depth):
    """Real numbers: as near to float64 as twice torch's error in the same precision."""
    depth = 1008 if values_dtype == FP8 and depth == 1000 else depth
    x = normal(129, depth, dtype=values_dtype, seed=14).to(device)
    w = normal(96, depth, dtype=torch.float32, seed=15).div(depth**0.5).to(values_dtype).to(device)
    bias = normal(96, dtype=hidden_of(values_dtype), seed=16).to(device)
    hidden = hidden_of(values_dtype)
    if values_dtype == FP8:
        h = x.float() @ w.float().t() + bias.float()
    else:
        h = F.linear(x, w, bias)
    torchs = torch.relu(h.to(hidden)).square()
    exact = torch.relu(F.linear(x.double(), w.double(), bias.double())).square()
    magnitude = F.linear(x.double().abs(), w.double().abs(), bias.double().abs()).square()
    # The tensor cores' fp8 sums keep 13 bits below the largest product: torch's do on the GPU, the float ones here not.
    slack = 2.0**-10 if values_dtype == FP8 and device == "cuda" else 0.0
    magnitude = magnitude * (1 + slack / torch.finfo(torch.float32).eps)
    y = sparse24.linear_relu2(x, w, bias=bias, out_dtype=hidden)[0]
    assert_accurate(y, torchs, exact, magnitude)
    values, meta, *_ = sparse24.linear_compress(x, w, bias=bias, out_dtype=hidden)
    mask = Pattern.of_meta(meta, 129, 96, hidden, -1).mask().to(device)
    dense = sparse24.decompress(values, meta, 129, 96)
    assert_accurate(dense, torchs * mask, exact * mask, magnitude)
    if device == "cpu":  # where both ops certainly add up in the same order
        assert_same_bits(dense, torch.where(mask, y, 0))
        groups = lambda t: t.float().unflatten(1, (-1, 4))  # noqa: E731
        assert (groups(y).topk(2).values.sum(2) == groups(dense).sum(2)).all(), "the two largest are kept"


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["sixteen_bit", "fp8"])
def test_one_dynamic_graph_for_all_sizes(device, dtype):
    from torch._dynamo.testing import CompileCounterWithBackend

    def function(x, w, scale):
        out = (
            *sparse24.linear_relu2(x, w, out_dtype=torch.bfloat16),
            *sparse24.linear_relu2(x, w, None, None, None, scale, out_dtype=FP8),
        )
        out += (
            *sparse24.linear_compress(x, w, out_dtype=torch.bfloat16),
            *sparse24.linear_compress(x, w, scaling="row", out_dtype=FP8),
        )
        return (*out, *sparse24.linear_compress(x, w, None, None, None, scale, out_dtype=FP8))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (64, 127, 193, 8):
        p = problem(tokens, 48, 96, dtype, device, seed=tokens)
        scale = output_scale(tokens, "rows", device)
        for actual, expected in zip(compiled(p.x, p.w, scale), function(p.x, p.w, scale), strict=True):
            assert_same_bits(actual, expected)
            assert actual.stride() == expected.stride()
    assert counter.frame_count == 1
    torch._dynamo.reset()


# ---- the device only -------------------------------------------------------------------------------------------------


@CHECKS
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_many_tiles(cuda, x_dtype, check):
    """More tiles than one wave has, with tails in both directions."""
    p = problem(2047, 512, 4192, x_dtype, cuda, extras="rows", seed=21)
    check(p, out_dtype=hidden_of(x_dtype))
    check(p, output_scale(2047, "rows", cuda), out_dtype=FP8)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, FP8], ids=str)
def test_is_deterministic(cuda, x_dtype):
    x = normal(2047, 1024, dtype=x_dtype, seed=22).to(cuda)
    w = normal(4096, 1024, dtype=x_dtype, seed=23).to(cuda)
    first = sparse24.linear_compress(x, w, scaling="row", out_dtype=FP8)
    for _ in range(3):
        for a, e in zip(sparse24.linear_compress(x, w, scaling="row", out_dtype=FP8), first, strict=True):
            assert_same_bits(a, e)
