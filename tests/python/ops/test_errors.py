"""Wrong arguments, one by one: a RuntimeError that names the argument, the rule and the value, on every device
and while tracing."""

import pytest
import torch
from oracle import FP8
from wrong_calls import BF16, FP16, FP32, FP64, Cases, good, meta_of, ones

import sparse24

CASES = Cases()
case = CASES.add

# ---- what several ops have in common ---------------------------------------------------------------------------------

CONVERSIONS = {
    "compress": lambda x, dim=-1, **kw: sparse24.compress(x, dim=dim, **kw),
    "compress_fp8": lambda x, dim=-1, **kw: sparse24.compress_fp8(x, dim=dim, **kw),
    "quantize_fp8": lambda x, **kw: sparse24.quantize_fp8(x, **kw),
}
for op, f in CONVERSIONS.items():
    for dtype, text in ((FP64, "float64"), (torch.int32, "int32"), (FP8, "float8_e4m3fn"), (torch.bool, "bool")):
        case(
            op,
            f"x {text}",
            lambda d, f=f, t=dtype: f(ones(d, 32, 64, dtype=t)),
            "x to be bfloat16(,| or) float16.*",
            text,
        )
    for shape in ((64,), (2, 32, 64), ()):
        rule = "x to have 2 dimensions"
        case(op, f"x rank {len(shape)}", lambda d, f=f, s=shape: f(ones(d, *s)), rule, rf"{len(shape)}\b.*")

for op, cols, multiple in (("compress", 24, 16), ("compress_fp8", 48, 32), ("quantize_fp8", 24, 16)):
    rule = f"x to have a multiple of {multiple} columns.*"
    case(op, "columns", lambda d, f=CONVERSIONS[op], c=cols: f(ones(d, 32, c)), rule, str(cols))
for op in ("compress", "compress_fp8"):
    f = CONVERSIONS[op]
    case(op, "columns along tokens", lambda d, f=f: f(ones(d, 32, 12), -2), "x to have a multiple of 8 columns.*", "12")
    for word in ("gelu", "", "ReLU"):
        rule = 'activation to be "none", "relu" or "relu2"'
        case(op, f"activation {word}", lambda d, f=f, w=word: f(ones(d, 32, 64), activation=w), rule, f'"{word}"')
    for dim in (0, 1, 2, -3):
        case(op, f"dim {dim}", lambda d, f=f, n=dim: f(ones(d, 32, 64), n), "dim to be -1 or -2", str(dim))

# ---- scales of the fp8 conversions -----------------------------------------------------------------------------------

for op in ("compress_fp8", "quantize_fp8"):
    f = CONVERSIONS[op]

    def scaled(device, scale, f=f, **kw):
        return f(ones(device, 32, 64), scale=scale, **kw)

    for word in ("block", "", "rows"):
        rule = 'scaling to be "row" or "tensor"'
        case(op, f"scaling {word}", lambda d, s=scaled, w=word: s(d, None, scaling=w), rule, f'"{word}"')
    for dtype, text in ((FP64, "float64"), (BF16, "bfloat16"), (torch.int32, "int32")):
        case(op, f"scale {text}", lambda d, s=scaled, t=dtype: s(d, ones(d, 32, dtype=t)), "scale to be float32", text)
    for n in (0, 1, 31, 33, 64):
        rule = "scale to have 32 elements.*"
        case(op, f"scale of {n}", lambda d, s=scaled, n=n: s(d, ones(d, n, dtype=FP32)), rule, str(n))
    for n in (0, 2, 32):
        rule = "scale to have 1 element .*"
        call = lambda d, s=scaled, n=n: s(d, ones(d, n, dtype=FP32), scaling="tensor")  # noqa: E731
        case(op, f"tensor scale of {n}", call, rule, str(n))
case(
    "compress_fp8",
    "scale along tokens",
    lambda d: sparse24.compress_fp8(ones(d, 32, 64), ones(d, 32, dtype=FP32), dim=-2),
    "scale to have 64 elements.*",
    "32",
)

# ---- compress_like ---------------------------------------------------------------------------------------------------

LIKE = "compress_like"
for dtype, text in ((FP64, "float64"), (torch.uint8, "uint8"), (torch.float8_e5m2, "float8_e5m2")):
    call = lambda d, t=dtype: sparse24.compress_like(ones(d, 48, 64, dtype=t), meta_of(d))  # noqa: E731
    case(LIKE, f"x {text}", call, "x to be bfloat16, float16.*", text)
case(LIKE, "x rank", lambda d: sparse24.compress_like(ones(d, 64), meta_of(d)), "x to have 2 dimensions", "1 .*")
case(
    LIKE,
    "columns",
    lambda d: sparse24.compress_like(ones(d, 48, 72), meta_of(d)),
    "x to have a multiple of 16 .*",
    "72",
)
case(
    LIKE,
    "columns of fp8",
    lambda d: sparse24.compress_like(ones(d, 48, 48, dtype=FP8), meta_of(d, FP8)),
    "x to have a multiple of 32 .*",
    "48",
)
case(LIKE, "dim", lambda d: sparse24.compress_like(ones(d, 48, 64), meta_of(d), 1), "dim to be -1 or -2", "1")
case(
    LIKE, "rows", lambda d: sparse24.compress_like(ones(d, 129, 64), meta_of(d)), "meta to have 2048 elements.*", "1024"
)
case(
    LIKE,
    "meta of fp8",
    lambda d: sparse24.compress_like(ones(d, 48, 64), meta_of(d, FP8)),
    "meta to have 1024 elements.*",
    "2048",
)
case(
    LIKE,
    "meta int8",
    lambda d: sparse24.compress_like(ones(d, 48, 64), meta_of(d).view(torch.int8)),
    "meta to be uint8",
    "int8",
)
case(
    LIKE,
    "meta rank",
    lambda d: sparse24.compress_like(ones(d, 48, 64), meta_of(d).view(2, -1)),
    "meta to have 1 dimension",
    r"2\b.*",
)

# ---- gather_features -------------------------------------------------------------------------------------------------

GATHER = "gather_features"


def gather(device, values=None, meta=None, features=None, dtype=BF16, **options):
    o = good(device, dtype)
    index = torch.tensor([3, 1], device=device) if features is None else features
    values, meta = o.values if values is None else values, o.meta if meta is None else meta
    return sparse24.gather_features(values, meta, index, **options)


case(GATHER, "values rank", lambda d: gather(d, values=ones(d, 48)), "values to have 2 dimensions", "1 .*")
case(GATHER, "values int32", lambda d: gather(d, values=ones(d, 48, 32).int()), "values to be bfloat16.*", "int32")
case(GATHER, "columns", lambda d: gather(d, values=ones(d, 48, 36)), "values to have a multiple of 8 columns.*", "36")
call = lambda d: gather(d, values=ones(d, 48, 24, dtype=FP8), dtype=FP8)  # noqa: E731
case(GATHER, "columns of fp8", call, "values to have a multiple of 16 columns.*", "24")
case(GATHER, "meta of fp8", lambda d: gather(d, meta=meta_of(d, FP8)), "meta to have 1024 elements.*", "2048")
call = lambda d: gather(d, values=ones(d, 48, 24), fp8_meta=True)  # noqa: E731
case(GATHER, "columns beside fp8 meta", call, r"values to have a multiple of 16 columns \(fp8_meta=True\)", "24")
rule = r"meta to have 2048 elements \(a sparse operand of 48 x 64 in float8_e4m3fn\)"
case(GATHER, "no meta of fp8", lambda d: gather(d, fp8_meta=True), rule, "1024")
case(GATHER, "meta int8", lambda d: gather(d, meta=meta_of(d).view(torch.int8)), "meta to be uint8", "int8")
call = lambda d: gather(d, features=torch.zeros(2, dtype=torch.int32, device=d))  # noqa: E731
case(GATHER, "features int32", call, "features to be int64", "int32")
call = lambda d: gather(d, features=torch.zeros(2, 1, dtype=torch.int64, device=d))  # noqa: E731
case(GATHER, "features rank", call, "features to have 1 dimension", r"2\b.*")

# ---- feature_counts --------------------------------------------------------------------------------------------------

COUNTS = "feature_counts"


def count(device, values=None, meta=None, dtype=BF16, **options):
    o = good(device, dtype)
    values, meta = o.values if values is None else values, o.meta if meta is None else meta
    return sparse24.feature_counts(values, meta, **options)


case(COUNTS, "values rank", lambda d: count(d, values=ones(d, 48)), "values to have 2 dimensions", "1 .*")
case(COUNTS, "values int32", lambda d: count(d, values=ones(d, 48, 32).int()), "values to be bfloat16.*", "int32")
case(COUNTS, "columns", lambda d: count(d, values=ones(d, 48, 36)), "values to have a multiple of 8 columns.*", "36")
call = lambda d: count(d, values=ones(d, 48, 24, dtype=FP8), dtype=FP8)  # noqa: E731
case(COUNTS, "columns of fp8", call, "values to have a multiple of 16 columns.*", "24")
call = lambda d: count(d, values=ones(d, 48, 24), fp8_meta=True)  # noqa: E731
case(COUNTS, "columns beside fp8 meta", call, r"values to have a multiple of 16 columns \(fp8_meta=True\)", "24")
case(COUNTS, "meta of fp8", lambda d: count(d, meta=meta_of(d, FP8)), "meta to have 1024 elements.*", "2048")
rule = r"meta to have 2048 elements \(a sparse operand of 48 x 64 in float8_e4m3fn\)"
case(COUNTS, "no meta of fp8", lambda d: count(d, fp8_meta=True), rule, "1024")
case(COUNTS, "meta int8", lambda d: count(d, meta=meta_of(d).view(torch.int8)), "meta to be uint8", "int8")
case(COUNTS, "meta rank", lambda d: count(d, meta=meta_of(d)[None]), "meta to have 1 dimension", r"2\b.*")
case(COUNTS, "no samples", lambda d: count(d, samples=0), "samples to be 1 or more", "0")
case(COUNTS, "negative samples", lambda d: count(d, samples=-1), "samples to be 1 or more", "-1")

# ---- decompress ------------------------------------------------------------------------------------------------------

BACK = "decompress"


def decompress(device, *args, dtype=BF16, dim=-1, values=None, meta=None):
    o = good(device, dtype, dim)
    return sparse24.decompress(o.values if values is None else values, o.meta if meta is None else meta, *args)


for rows, cols, dim in ((47, 64, -1), (48, 80, -1), (52, 64, -2), (44, 64, -2), (48, 72, -2)):
    call = lambda d, a=(rows, cols, dim): decompress(d, *a, dim=a[2])  # noqa: E731
    shape = r"\(48, 32\)" if dim == -1 else r"\(24, 64\)"
    case(BACK, f"shape {rows} {cols} dim {dim}", call, r"values to have shape \(\d+, \d+\).*", shape)
case(BACK, "rows", lambda d: decompress(d, -1, 64), "rows to be at least 0.*", "-1")
case(BACK, "cols", lambda d: decompress(d, 48, -16), "cols to be at least 0.*", "-16")
case(BACK, "unaligned cols", lambda d: decompress(d, 48, 66), "cols to be a multiple of 16.*", "66")
case(BACK, "unaligned cols of fp8", lambda d: decompress(d, 48, 48, dtype=FP8), "cols to be a multiple of 32.*", "48")
case(
    BACK,
    "unaligned cols along tokens",
    lambda d: decompress(d, 48, 60, -2, dim=-2),
    "cols to be a multiple of 8.*",
    "60",
)
case(BACK, "dim", lambda d: decompress(d, 48, 64, 0), "dim to be -1 or -2", "0")
case(BACK, "values rank", lambda d: decompress(d, 48, 64, values=ones(d, 48)), "values to have 2 dimensions", "1 .*")
for dtype, text in ((FP64, "float64"), (torch.uint8, "uint8")):
    call = lambda d, t=dtype: decompress(d, 48, 64, values=ones(d, 48, 32, dtype=t))  # noqa: E731
    case(BACK, f"values {text}", call, "values to be bfloat16, float16.*", text)
case(BACK, "meta of fp8", lambda d: decompress(d, 48, 64, meta=meta_of(d, FP8)), "meta to have 1024 elements.*", "2048")
case(BACK, "meta empty", lambda d: decompress(d, 48, 64, meta=meta_of(d)[:0]), "meta to have 1024 elements.*", "0")
case(BACK, "meta int32", lambda d: decompress(d, 48, 64, meta=meta_of(d).int()), "meta to be uint8", "int32")
case(BACK, "meta rank", lambda d: decompress(d, 48, 64, meta=meta_of(d)[None]), "meta to have 1 dimension", r"2\b.*")


@pytest.mark.parametrize("wrong", CASES, ids=str)
def test_one_sentence(checked_device, wrong):
    wrong.check(checked_device)


def test_the_operands_of_the_cases_are_good(device):
    """Otherwise they would test something else than they say."""
    for dtype in (BF16, FP16, FP8):
        for dim in (-1, -2):
            d = good(device, dtype, dim).mm()
            # Each group of four ones keeps two.
            assert (d.float() == (32 if dim == -1 else 24) * (448 if dtype == FP8 else 1)).all()
    assert (decompress(device, 48, 64).sum(1) == 32).all()
    assert count(device).tolist() == [48, 48, 0, 0] * 16


@pytest.mark.parametrize(
    "op",
    [
        "compress",
        "compress_fp8",
        "quantize_fp8",
        "compress_like",
        "decompress",
        "feature_counts",
        "gather_features",
        "mm",
    ],
)
def test_float32_is_refused_on_cuda(cuda, op):
    x = ones(cuda, 48, 64, dtype=FP32)
    calls = {
        "compress": lambda: sparse24.compress(x),
        "compress_fp8": lambda: sparse24.compress_fp8(x),
        "quantize_fp8": lambda: sparse24.quantize_fp8(x),
        "compress_like": lambda: sparse24.compress_like(x, meta_of(cuda)),
        "decompress": lambda: sparse24.decompress(x[:, :32], meta_of(cuda), 48, 64),
        "feature_counts": lambda: sparse24.feature_counts(x[:, :32], meta_of(cuda)),
        "gather_features": lambda: sparse24.gather_features(x[:, :32], meta_of(cuda), torch.ones(2).long().to(cuda)),
        "mm": lambda: sparse24.mm(x[:, :32], meta_of(cuda), x[:, :32].t()),
    }
    with pytest.raises(RuntimeError, match=rf"^sparse24\.{op}: expected \w+ to be .* on a CUDA device, got float32"):
        calls[op]()


def test_others_on_two_devices(cuda):
    x, scale = ones(cuda, 48, 64), ones("cpu", 48, dtype=FP32)
    o = good(cuda)
    for op, call in {
        "compress_fp8: expected scale": lambda: sparse24.compress_fp8(x, scale),
        "quantize_fp8: expected scale": lambda: sparse24.quantize_fp8(x, scale),
        "compress_like: expected meta": lambda: sparse24.compress_like(x, o.meta.cpu()),
        "decompress: expected meta": lambda: sparse24.decompress(o.values, o.meta.cpu(), 48, 64),
        "feature_counts: expected meta": lambda: sparse24.feature_counts(o.values, o.meta.cpu()),
    }.items():
        with pytest.raises(RuntimeError, match=rf"^sparse24\.{op} to be on cuda:0 .*, got cpu"):
            call()


def test_sizes_beyond_the_kernels(checked_device):
    """A number of rows that coordinates of 32 bits do not hold is refused before memory is asked for."""
    x = torch.ones(1, 16, dtype=BF16, device=checked_device).expand(2**31, 16)
    with pytest.raises(RuntimeError, match=r"^sparse24\.compress: expected x to have sizes below 2\^31, got "):
        sparse24.compress(x)
