"""Wrong arguments, one by one: a RuntimeError that names the argument, the rule and the value, on every device
and while tracing."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracle import FP8
from torch import Tensor

import sparse24

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def ones(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.ones(shape, device=device).to(dtype)


@dataclass
class Operands:
    """Arguments that fit each other: X [48, 64] along dim, b [K, 32]."""

    values: Tensor
    meta: Tensor
    b: Tensor
    dim: int

    def mm(self, *args, **changes) -> Tensor:
        parts = {"values": self.values, "meta": self.meta, "b": self.b, **changes}
        names = ("dim", "out_dtype", "transpose_out", "interleaved")
        options = {"dim": self.dim, **{k: parts.pop(k) for k in names if k in parts}}
        scales = {k: parts.pop(k, None) for k in ("scale_a", "scale_b", "bias")}
        return sparse24.mm(parts["values"], parts["meta"], parts["b"], *scales.values(), **options)


def good(device: str, dtype: torch.dtype = BF16, dim: int = -1) -> Operands:
    x = ones(device, 48, 64)
    values, meta = (sparse24.compress_fp8(x, dim=dim) if dtype == FP8 else sparse24.compress(x.to(dtype), dim=dim))[:2]
    k = 64 if dim == -1 else 48
    return Operands(values, meta, ones(device, 32, k, dtype=dtype).t(), dim)


def meta_of(device: str, dtype: torch.dtype = BF16, dim: int = -1) -> Tensor:
    return good(device, dtype, dim).meta


@dataclass
class Case:
    op: str
    name: str
    call: Callable[[str], object]
    rule: str  # after "expected "; a regular expression
    got: str  # likewise, to the end of the sentence

    def __str__(self) -> str:
        return f"{self.op}-{self.name.replace(' ', '_')}"


CASES: list[Case] = []


def case(op: str, name: str, call: Callable[[str], object], rule: str, got: str) -> None:
    CASES.append(Case(op, name, call, rule, got))


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

# ---- mm --------------------------------------------------------------------------------------------------------------

for dtype, text in ((FP64, "float64"), (torch.uint8, "uint8"), (torch.float8_e5m2, "float8_e5m2")):
    call = lambda d, t=dtype: good(d).mm(values=ones(d, 48, 32, dtype=t))  # noqa: E731
    case("mm", f"values {text}", call, "values to be .*float8_e4m3fn.*", text)
case("mm", "values rank", lambda d: good(d).mm(values=ones(d, 48)), "values to have 2 dimensions", "1 .*")
case(
    "mm",
    "values columns",
    lambda d: good(d).mm(values=ones(d, 48, 33)),
    "values to have a multiple of 8 columns.*",
    "33",
)
case(
    "mm",
    "values columns of fp8",
    lambda d: good(d, FP8).mm(values=ones(d, 48, 24, dtype=FP8)),
    "values to have a multiple of 16 columns.*",
    "24",
)
case(
    "mm",
    "values columns along tokens",
    lambda d: good(d, dim=-2).mm(values=ones(d, 24, 60)),
    "values to have a multiple of 8 columns.*",
    "60",
)
case(
    "mm",
    "values rows along tokens",
    lambda d: good(d, dim=-2).mm(values=ones(d, 25, 64)),
    "values to have a multiple of 2 rows.*",
    "25",
)
case(
    "mm",
    "values of fp8 along tokens",
    lambda d: good(d, FP8, -2).mm(values=ones(d, 64, 24, dtype=FP8)),
    "values to have a multiple of 16 columns.*",
    "24",
)
for rows in (0, 32, 63, 65, 128):
    rule = r"b to have 64 rows \(K of the sparse operand\)"
    case("mm", f"b of {rows} rows", lambda d, r=rows: good(d).mm(b=ones(d, 32, r).t()), rule, str(rows))
for rows in (0, 44, 49):
    rule = r"b to have 45 to 48 rows \(K of the sparse operand\)"
    case(
        "mm", f"b of {rows} rows along tokens", lambda d, r=rows: good(d, dim=-2).mm(b=ones(d, r, 32)), rule, str(rows)
    )
for rows in (32, 65):
    rule = r"b to have 33 to 64 rows \(K of the sparse operand\)"
    call = lambda d, r=rows: good(d, FP8, -2).mm(b=ones(d, 32, r, dtype=FP8).t())  # noqa: E731
    case("mm", f"b of {rows} rows along tokens in fp8", call, rule, str(rows))
case("mm", "b rank 1", lambda d: good(d).mm(b=ones(d, 64)), "b to have 2 dimensions", "1 .*")
case("mm", "b rank 3", lambda d: good(d).mm(b=ones(d, 1, 64, 32)), "b to have 2 dimensions", "3 .*")
for dtype, text in ((FP16, "float16"), (FP32, "float32"), (FP8, "float8_e4m3fn")):
    case("mm", f"b {text}", lambda d, t=dtype: good(d).mm(b=ones(d, 64, 32, dtype=t)), "b to be bfloat16.*", text)
for name, change in (("row-major", lambda b: b.contiguous()), ("strided", lambda b: b.repeat_interleave(2, 0)[::2])):
    rule = "b to be K-major.*"
    case("mm", f"b {name} in fp8", lambda d, c=change: good(d, FP8).mm(b=c(good(d, FP8).b)), rule, r"strides \(.*\)")
case("mm", "meta of fp8", lambda d: good(d).mm(meta=meta_of(d, FP8)), "meta to have 1024 elements.*", "2048")
case("mm", "meta of sixteen bits", lambda d: good(d, FP8).mm(meta=meta_of(d)), "meta to have 2048 elements.*", "1024")
case("mm", "meta empty", lambda d: good(d).mm(meta=meta_of(d)[:0]), "meta to have 1024 elements.*", "0")
case("mm", "meta too long", lambda d: good(d).mm(meta=meta_of(d).repeat(2)), "meta to have 1024 elements.*", "2048")
case("mm", "meta int32", lambda d: good(d).mm(meta=meta_of(d).int()), "meta to be uint8", "int32")
case("mm", "meta rank", lambda d: good(d).mm(meta=meta_of(d)[None]), "meta to have 1 dimension", r"2\b.*")
for dim in (0, 1, -3):
    case("mm", f"dim {dim}", lambda d, n=dim: good(d).mm(dim=n), "dim to be -1 or -2", str(dim))
case("mm", "interleaved features", lambda d: good(d).mm(interleaved=True), "dim to be -2 with interleaved=True", "-1")
for name, size in (("scale_a", 48), ("scale_b", 32)):
    for n in (0, 2, size - 1, size + 1):
        rule = f"{name} to have 1 or {size} elements.*"
        case("mm", f"{name} of {n}", lambda d, k=name, n=n: good(d).mm(**{k: ones(d, n, dtype=FP32)}), rule, str(n))
    for dtype, text in ((FP64, "float64"), (BF16, "bfloat16")):
        call = lambda d, k=name, t=dtype: good(d).mm(**{k: ones(d, 1, dtype=t)})  # noqa: E731
        case("mm", f"{name} {text}", call, f"{name} to be float32", text)
for n in (0, 1, 31, 33):
    case("mm", f"bias of {n}", lambda d, n=n: good(d).mm(bias=ones(d, n)), "bias to have 32 elements.*", str(n))
case("mm", "bias rank", lambda d: good(d).mm(bias=ones(d, 1, 32)), "bias to have 1 dimension", r"2\b.*")
case(
    "mm", "bias float16", lambda d: good(d).mm(bias=ones(d, 32, dtype=FP16)), "bias to be bfloat16 .*float32", "float16"
)
case(
    "mm",
    "bias of another out_dtype",
    lambda d: good(d).mm(bias=ones(d, 32), out_dtype=FP16),
    "bias to be float16 .*float32",
    "bfloat16",
)
for dtype, text in ((FP64, "float64"), (FP8, "float8_e4m3fn"), (torch.int32, "int32")):
    rule = "out_dtype to be bfloat16, float16 or float32"
    case("mm", f"out_dtype {text}", lambda d, t=dtype: good(d).mm(out_dtype=t), rule, text)


@pytest.mark.parametrize("wrong", CASES, ids=str)
def test_one_sentence(checked_device, wrong):
    sentence = rf"^sparse24\.{wrong.op}: expected {wrong.rule}, got {wrong.got}$"
    with pytest.raises(RuntimeError) as caught:
        wrong.call(checked_device)
    message = str(caught.value).splitlines()[0]
    assert re.search(sentence, message), f"{message!r} does not match {sentence!r}"


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


@pytest.mark.parametrize("argument", ["meta", "b", "scale_a", "scale_b", "bias"])
def test_mm_on_two_devices(cuda, argument):
    o = good(cuda)
    cpu = {
        "meta": o.meta.cpu(),
        "b": o.b.cpu(),
        "scale_a": ones("cpu", 1, dtype=FP32),
        "scale_b": ones("cpu", 1, dtype=FP32),
        "bias": ones("cpu", 32),
    }
    with pytest.raises(RuntimeError, match=rf"^sparse24\.mm: expected {argument} to be on cuda:0 .*, got cpu"):
        o.mm(**{argument: cpu[argument]})
    on_cpu = good("cpu")
    wrong = (
        ones(cuda, 32 if argument == "bias" else 1, dtype=FP32)
        if argument not in ("meta", "b")
        else getattr(o, argument)
    )
    with pytest.raises(RuntimeError, match=rf"^sparse24\.mm: expected {argument} to be on cpu .*, got cuda:0"):
        on_cpu.mm(**{argument: wrong})


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
