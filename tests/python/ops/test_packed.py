"""2:4 weights: packing, and linear_compress_packed, bit for bit linear_compress of the pruned weight on exact sums."""

import re

import pytest
import torch
from compare import assert_same_bits
from data import activations, integers
from linear_problem import Problem, output_scale, problem
from oracle import FP8

import sparse24
from sparse24.mlp.choice import weights_fit, weights_pay

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Tokens, D, F: no tokens, tails of the tiles in both directions, few columns to multiply, none, no features.
SHAPES = [(0, 64, 96), (1, 64, 32), (127, 96, 160), (257, 64, 1888), (5, 1056, 64), (300, 0, 64), (33, 32, 0)]


def features_of(rows: int) -> torch.Tensor:
    """The feature that each row of the operand is."""
    m = torch.arange(rows)
    return m // 16 * 16 + m % 8 * 2 + m % 16 // 8


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(48, 80), (16, 32), (0, 32), (32, 0)], ids=str)
def test_packs_as_compress_does(poisoned_memory, device, dtype, dim, shape):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is for the CPU only")
    operand = activations(*shape, dtype, seed=3).to(device)
    w = operand if dim == -1 else operand.t().contiguous()
    ordered = operand[features_of(shape[0]).to(device)] if dim == -1 else operand
    values, meta = sparse24.pack24(w, dim)
    for actual, expected in zip((values, meta), sparse24.compress(ordered), strict=True):
        assert_same_bits(actual, expected)
    pruned = sparse24.decompress(*sparse24.compress(w, dim=dim), *w.shape, dim)
    assert_same_bits(sparse24.unpack24(values, meta, *w.shape, dim), pruned)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("given", [None, "row", "tensor"])
def test_packs_float8_as_compress_fp8_does(device, dim, given):
    w = activations(48, 64, torch.bfloat16, seed=4, specials=False).to(device)
    w = w if dim == -1 else w.t().contiguous()
    scaling = given or "row"
    scale = None if given is None else (0.01 + torch.rand(48 if given == "row" else 1)).to(device)
    values, meta, used = sparse24.pack24_fp8(w, scale, dim, scaling)
    kept, pattern, expected = sparse24.compress_fp8(w, scale, dim=dim, scaling=scaling)
    assert_same_bits(used, expected)
    pruned = sparse24.decompress(kept, pattern, *w.shape, dim)
    assert_same_bits(sparse24.unpack24(values, meta, *w.shape, dim), pruned)


def packed(p: Problem) -> tuple[Problem, tuple[torch.Tensor, torch.Tensor]]:
    """The problem with its weight pruned, and that packed."""
    shape = p.w.shape
    if p.w.dtype == FP8:
        values, meta, _ = sparse24.pack24_fp8(p.w.bfloat16(), torch.ones(1, device=p.w.device), scaling="tensor")
    else:
        values, meta = sparse24.pack24(p.w)
    return Problem(p.x, sparse24.unpack24(values, meta, *shape), p.scale_x, p.scale_w, p.bias), (values, meta)


def check(p: Problem, scale_out=None, **options) -> None:
    pruned, operand = packed(p)
    expected = sparse24.linear_compress(*pruned.args, scale_out, **options)
    x, _, *others = pruned.args
    actual = sparse24.linear_compress_packed(x, *operand, *others, scale_out, **options)
    for name, a, e in zip(("values", "meta", "scale", "amax", "saturated"), actual, expected, strict=True):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("extras", ["none", "rows", "one"])
@pytest.mark.parametrize("shape", [*SHAPES, (261, 1056, 176)], ids=str)
def test_sixteen_bits(poisoned_memory, device, values_dtype, shape, extras):
    if values_dtype == FP8:
        pytest.skip("its outputs are below")
    check(problem(*shape, values_dtype, device, extras=extras))


@pytest.mark.parametrize("extras", ["none", "rows", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float8(poisoned_memory, device, shape, extras):
    p = problem(*shape, FP8, device, extras=extras, seed=3)
    for kind in ("rows", "one"):
        check(p, output_scale(shape[0], kind, device))
    check(p, scaling="row")


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"threshold": 2.3}, {"statistics": False}], ids=str)
def test_options(device, values_dtype, options):
    p = problem(130, 64, 96, values_dtype, device, extras="rows", seed=5)
    check(p, output_scale(130, "rows", device) if values_dtype == FP8 else None, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pruned_weights_multiply_nothing(device, value):
    """What is not finite in x reaches the features whose weight for it was kept, and no others."""
    p = problem(130, 64, 96, torch.bfloat16, device, seed=6)
    pruned, (values, meta) = packed(p)
    x = p.x.clone()
    x[7, 3] = value
    keeps = sparse24.unpack24(torch.ones_like(values), meta, 96, 64)[:, 3] != 0
    assert 0 < keeps.sum() < 96
    h = p.x.float() @ pruned.w.float().t() - p.x[:, 3:4].float() * pruned.w[:, 3].float()
    h[:7] = p.x[:7].float() @ pruned.w.float().t()
    h[8:] = p.x[8:].float() @ pruned.w.float().t()
    h[7, keeps] += value * pruned.w[keeps, 3].float()
    expected = sparse24.compress(h.to(torch.bfloat16), "relu2")
    for a, e in zip(sparse24.linear_compress_packed(x, values, meta)[:2], expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", [*FLOATS, FP8], ids=str)
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(48, 96), (16, 32), (272, 1184), (1888, 32), (0, 32), (32, 0)], ids=str)
def test_prunes_and_packs_in_one_pass(poisoned_memory, device, dtype, out, dim, shape):
    if dtype == FP8 and dim == -2 or out is not None and dtype != torch.float32:
        pytest.skip("not of these")
    if device == "cuda" and dtype == torch.float32 and out is None:
        pytest.skip("float32 is packed on the CPU only")
    w = activations(*shape, torch.bfloat16 if dtype == FP8 else dtype, seed=7, specials=dtype != FP8).to(device, dtype)
    w = w if dim == -1 else w.t().contiguous()
    pruned, values, meta = sparse24.prune_pack24(w, dim, dtype=out)
    expected = sparse24.prune24(w, dim)
    expected = expected if out is None else expected.to(out)
    assert_same_numbers(pruned, expected)
    assert_same_numbers(sparse24.unpack24(values, meta, *w.shape, dim), expected)
    if out is None and dtype != FP8:
        for a, e in zip((values, meta), sparse24.pack24(w, dim), strict=True):
            assert_same_bits(a, e)
    for a, e in zip((pruned, values, meta), sparse24.prune_pack24(w.cpu(), dim, dtype=out or dtype), strict=True):
        assert_same_bits(a.cpu(), e)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(48, 96), (4, 16), (260, 272), (132, 1904), (0, 32), (32, 0)], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_prunes_where_it_quantises(poisoned_memory, device, dtype, dim, shape, given):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is for the CPU only")
    w = activations(*shape, dtype, seed=8, specials=False).to(device)
    scale = torch.full((1,), 0.03, device=device) if given else None
    expected = sparse24.quantize_fp8_both(sparse24.prune24(w, dim), scale)
    for a, e in zip(sparse24.prune_quantize_fp8_both(w, scale, dim), expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(48, 96), (16, 32), (272, 1184), (1888, 32), (0, 32), (32, 0)], ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("given", [False, True])
def test_packs_where_it_quantises(poisoned_memory, device, dtype, shape, given, dim):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is for the CPU only")
    w = activations(*(shape if dim == -1 else shape[::-1]), dtype, seed=9, specials=False).to(device)
    scale = torch.full((1,), 0.03, device=device) if given else None
    values, meta, other, used, amax = sparse24.prune_pack_fp8_both(w, scale, dim)
    codes, transposed, *expected = sparse24.prune_quantize_fp8_both(w, scale, dim)
    for a, e in zip((other, used, amax), (transposed if dim == -1 else codes, *expected), strict=True):
        assert_same_bits(a, e)
    for a, e in zip((values, meta), sparse24.pack24_fp8(w, used, dim, scaling="tensor"), strict=False):
        assert_same_bits(a, e)
    assert torch.equal(sparse24.unpack24(values, meta, *w.shape, dim).float(), codes.float())


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_weight_that_is_2_4_is_packed_as_it_is(device, dim):
    w = sparse24.prune24(integers(64, 96, dtype=torch.bfloat16, seed=10), dim).to(device)
    made = sparse24.prune_pack_fp8_both(w, None, dim)
    codes, transposed, scale, _ = sparse24.quantize_fp8_both(w)
    assert torch.equal(sparse24.unpack24(*made[:2], 64, 96, dim).float(), codes.float())
    assert_same_bits(made[2], transposed if dim == -1 else codes)
    assert_same_bits(made[3], scale)


def test_packs_where_it_quantises_refuses(device):
    op = "^sparse24.prune_pack_fp8_both: expected "
    for shape, dim, sentence in (
        ((8, 32), -1, "w to have a multiple of 16 rows, got 8"),
        ((16, 48), -1, "w to have a multiple of 32 columns, got 48"),
        ((48, 32), -2, "w to have a multiple of 32 rows, got 48"),
        ((32, 40), -2, "w to have a multiple of 16 columns, got 40"),
        ((32, 32), 1, "dim to be -1 or -2, got 1"),
    ):
        with pytest.raises(RuntimeError, match=op + sentence):
            sparse24.prune_pack_fp8_both(torch.ones(*shape, dtype=torch.bfloat16, device=device), None, dim)


def test_prunes_where_it_quantises_refuses(device):
    w = torch.ones(6, 32, dtype=torch.bfloat16, device=device)
    op = "^sparse24.prune_quantize_fp8_both: expected "
    with pytest.raises(RuntimeError, match=op + "w to have a multiple of 4 rows, got 6"):
        sparse24.prune_quantize_fp8_both(w, None, -2)
    with pytest.raises(RuntimeError, match=op + "w to have a multiple of 16 columns, got 24"):
        sparse24.prune_quantize_fp8_both(w[:, :24])
    with pytest.raises(RuntimeError, match=op + "dim to be -1 or -2, got 1"):
        sparse24.prune_quantize_fp8_both(w, None, 1)


def assert_same_numbers(actual, expected):
    """Bit for bit, but for codes of NaN, which torch rounds to another one."""
    assert actual.dtype == expected.dtype
    actual, expected = actual.float(), expected.float()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((torch.ones(24, 32),), {}, "w to have a multiple of 16 rows, got 24"),
        ((torch.ones(32, 24), -2), {}, "w to have a multiple of 16 columns, got 24"),
        ((torch.ones(32, 24),), {}, r"w to have a multiple of 16 columns \(float32\), got 24"),
        ((torch.ones(32, 48).to(FP8),), {}, r"w to have a multiple of 32 columns \(float8_e4m3fn\), got 48"),
        ((torch.ones(32, 32).to(FP8), -2), {}, r"dim to be -1 \(float8_e4m3fn\), got -2"),
        ((torch.ones(32, 32), 1), {}, "dim to be -1 or -2, got 1"),
        (
            (torch.ones(32, 32).bfloat16(),),
            {"dtype": torch.float16},
            r"dtype to be bfloat16 \(w is bfloat16\), got float16",
        ),
        (
            (torch.ones(32, 32),),
            {"dtype": FP8},
            r"dtype to be bfloat16 or float16 or float32 \(w is float32\), got float8_e4m3fn",
        ),
        ((torch.ones(32, 32, dtype=torch.float64),), {}, "w to be .*, got float64"),
        ((None,), {}, "w to be a Tensor, got None"),
    ],
)  # fmt: skip
def test_packing_in_one_pass_refuses(arguments, options, sentence):
    with pytest.raises(RuntimeError, match=f"^sparse24.prune_pack24: expected {sentence}"):
        sparse24.prune_pack24(*arguments, **options)


def call(device, **changes):
    w = integers(64, 48, dtype=torch.bfloat16).to(device)
    values, meta = sparse24.pack24(w)
    x = integers(40, 48, dtype=torch.bfloat16).to(device)
    arguments = {"x": x, "w": values, "meta": meta} | changes
    return sparse24.linear_compress_packed(*arguments.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": (40, 40)}, r"x to have a multiple of 16 columns \(bfloat16\), got 40"),
        ({"x": (40, 64)}, r"w to have 32 columns \(half of those of x\), got 24"),
        ({"w": (60, 24)}, "w to have a multiple of 16 rows, got 60"),
        ({"w": (64,)}, r"w to have 2 dimensions, got 1 .*"),
    ],
    ids=str,
)
def test_wrong_sizes(device, changes, sentence):
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16, device=device) for name, shape in changes.items()}
    with pytest.raises(RuntimeError, match=f"^{re.escape('sparse24.linear_compress_packed')}: expected {sentence}"):
        call(device, **tensors)
    with pytest.raises(RuntimeError, match="expected meta to have"):
        call(device, meta=torch.zeros(3, dtype=torch.uint8, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("values_dtype", "out", "scaling"),
    [(torch.bfloat16, FP8, "given"), (torch.bfloat16, FP8, "row"), (FP8, torch.bfloat16, "given")],
    ids=str,
)
def test_pairs_of_types_have_no_kernel(values_dtype, out, scaling):
    p = problem(40, 64, 96, values_dtype, "cuda")
    scale_out = torch.ones(1, device="cuda") if out == FP8 and scaling == "given" else None
    given, asked = (re.escape(str(dtype).removeprefix("torch.")) for dtype in (values_dtype, out))
    sentence = rf"expected out_dtype to be {given} \(the dtype of x, on CUDA\), got {asked}"
    with pytest.raises(RuntimeError, match=f"^{re.escape('sparse24.linear_compress_packed')}: {sentence}$"):
        sparse24.linear_compress_packed(p.x, *packed(p)[1], scale_out=scale_out, scaling=scaling, out_dtype=out)


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        ("pack24", (torch.ones(24, 32),), "w to have a multiple of 16 rows, got 24"),
        ("pack24", (torch.ones(32, 24),), "w to have a multiple of 16 columns, got 24"),
        ("pack24", (torch.ones(32, 24), -2), "w to have a multiple of 16 columns, got 24"),
        ("pack24", (torch.ones(32),), r"w to have 2 dimensions, got 1 .*"),
        ("pack24", (torch.ones(32, 32), 1), "dim to be -1 or -2, got 1"),
        ("pack24", (torch.ones(32, 32, dtype=torch.float64),), "w to be .*, got float64"),
        ("pack24", (None,), "w to be a tensor, got NoneType"),
        ("pack24_fp8", (torch.ones(32, 48),), "w to have a multiple of 32 columns, got 48"),
        ("pack24_fp8", (torch.ones(32, 32), torch.ones(3)), r"scale to have 32 elements \(features of w\), got 3"),
        (
            "unpack24",
            (torch.ones(8, 16), torch.zeros(1, dtype=torch.uint8), 8, 32),
            "rows to be a multiple of 16, got 8",
        ),
    ],
)
def test_packing_refuses(function, arguments, sentence):
    with pytest.raises(RuntimeError, match=f"^sparse24.{function}: expected {sentence}"):
        getattr(sparse24, function)(*arguments)


def test_where_packed_weights_fit_and_pay():
    """Every size that was measured is faster; sizes that the kernel has no tails for do not fit."""
    large = (512, 16384, 4096), (1024, 16384, 4096), (8192, 9216, 3072), (16384, 18432, 2560)
    narrow = (32768, 6656, 1664), (32768, 5120, 1280), (32768, 4096, 1024), (32768, 3072, 768)
    for tokens, d_ff, d_model in (*large, *narrow):
        for fp8 in (False, True):
            assert weights_pay(tokens, d_ff, d_model, fp8=fp8)
    # In float8 products with fewer columns were not measured.
    assert weights_pay(65536, 2048, 512) and not weights_pay(65536, 2048, 512, fp8=True)
    assert not weights_pay(16, 16384, 4096)
    assert weights_fit(16, 48) and not weights_fit(16, 40) and not weights_fit(24, 48)
    assert weights_fit(32, 64, fp8=True) and not weights_fit(16, 64, fp8=True) and not weights_fit(32, 48, fp8=True)


def test_no_backward_pass(device):
    x = integers(40, 48, dtype=torch.bfloat16).to(device).requires_grad_()
    values, *_ = call(device, x=x)
    with pytest.raises(RuntimeError, match=r"sparse24\.linear_compress_packed: expected no backward pass"):
        values.float().sum().backward()
