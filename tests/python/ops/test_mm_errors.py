"""Wrong arguments of mm, one by one: the argument, the rule and the value in one sentence."""

import pytest
import torch
from oracle import FP8
from wrong_calls import BF16, FP16, FP32, FP64, Cases, good, meta_of, ones

CASES = Cases()
case = CASES.add

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
    wrong.check(checked_device)


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
