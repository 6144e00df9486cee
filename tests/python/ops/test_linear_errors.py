"""Wrong arguments of linear_relu2 and linear_compress: the argument, the rule and the value in one sentence."""

import re

import pytest
import torch
from oracle import FP8

import sparse24

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
T, D, FEATURES = 40, 48, 64
OPS = ("linear_relu2", "linear_compress")


def ones(device, *shape, dtype=BF16):
    return torch.ones(shape, device=device).to(dtype)


def call(op, device, *, x_dtype=BF16, **changes):
    """The op with operands that fit each other, but for `changes`: functions of the device, or plain values."""
    w_dtype = changes.pop("w_dtype", x_dtype)
    arguments = {"x": ones(device, T, D, dtype=x_dtype), "w": ones(device, FEATURES, D, dtype=w_dtype)}
    arguments |= {name: None for name in ("scale_x", "scale_w", "bias", "scale_out")}
    arguments |= {name: change(device) if callable(change) else change for name, change in changes.items()}
    tensors = [arguments.pop(name) for name in ("x", "w", "scale_x", "scale_w", "bias", "scale_out")]
    return getattr(torch.ops.sparse24, op)(*tensors, **arguments)


def of(*shape, dtype=FP32):
    return lambda device: ones(device, *shape, dtype=dtype)


#: name: (changes, the sentence behind "expected ").
BOTH = {
    "x_float64": ({"x_dtype": FP64}, "x to be bfloat16, float16.*, got float64"),
    "x_float8_e5m2": ({"x_dtype": torch.float8_e5m2}, "x to be bfloat16, float16.*, got float8_e5m2"),
    "x_rank": ({"x": of(D, dtype=BF16)}, "x to have 2 dimensions, got 1 .*"),
    "x_columns_of_fp8": (
        {"x": of(T, 40, dtype=FP8), "w": of(FEATURES, 40, dtype=FP8)},
        r"x to have a multiple of 16 columns \(float8_e4m3fn\), got 40",
    ),
    "w_rank": ({"w": of(D, dtype=BF16)}, "w to have 2 dimensions, got 1 .*"),
    "w_dtype": ({"w_dtype": FP16}, r"w to be bfloat16 \(the dtype of x\), got float16"),
    "w_fp8": ({"w_dtype": FP8}, r"w to be bfloat16 \(the dtype of x\), got float8_e4m3fn"),
    "w_columns": ({"w": of(FEATURES, 32, dtype=BF16)}, r"w to have 48 columns \(columns of x\), got 32"),
    "scale_x_count": ({"scale_x": of(39)}, r"scale_x to have 1 or 40 elements \(rows of x\), got 39"),
    "scale_x_none": ({"scale_x": of(0)}, r"scale_x to have 1 or 40 elements \(rows of x\), got 0"),
    "scale_x_dtype": ({"scale_x": of(1, dtype=FP64)}, "scale_x to be float32, got float64"),
    "scale_w_count": ({"scale_w": of(T)}, r"scale_w to have 1 or 64 elements \(rows of w\), got 40"),
    "scale_w_dtype": ({"scale_w": of(1, dtype=BF16)}, "scale_w to be float32, got bfloat16"),
    "bias_count": ({"bias": of(T, dtype=BF16)}, r"bias to have 64 elements \(rows of w\), got 40"),
    "bias_rank": ({"bias": of(1, FEATURES, dtype=BF16)}, r"bias to have 1 dimension, got 2 .*"),
    "bias_dtype": ({"bias": of(FEATURES)}, "bias to be bfloat16, got float32"),
    "bias_of_fp8": (
        {"x_dtype": FP8, "bias": of(FEATURES, dtype=FP16), "scale_out": of(1)},
        "bias to be bfloat16, got float16",
    ),
    "out_dtype": ({"out_dtype": FP16}, "out_dtype to be bfloat16 or float8_e4m3fn, got float16"),
    "out_dtype_of_fp8": ({"x_dtype": FP8, "out_dtype": FP32}, "out_dtype to be bfloat16 or float8_e4m3fn, got float32"),
    "scale_out_dtype": ({"scale_out": of(1, dtype=FP64), "out_dtype": FP8}, "scale_out to be float32, got float64"),
    "scale_out_count": (
        {"scale_out": of(FEATURES), "out_dtype": FP8},
        r"scale_out to have 1 or 40 elements \(rows of x\), got 64",
    ),
    "scale_out_missing": ({"out_dtype": FP8}, r"scale_out to be a tensor \(.*float8_e4m3fn output\), got None"),
    "scale_out_missing_by_default": ({"x_dtype": FP8}, r"scale_out to be a tensor \(.*\), got None"),
    "scale_out_unused": (
        {"scale_out": of(1)},
        r"scale_out to be None \(the output is not float8_e4m3fn\), got a tensor",
    ),
}
CASES = {(op, name): case for op in OPS for name, case in BOTH.items()}
for op, features, out, multiple in (
    ("linear_relu2", 60, BF16, 8),
    ("linear_relu2", 72, FP8, 16),
    ("linear_compress", 72, BF16, 16),
    ("linear_compress", 48, FP8, 32),
):
    sentence = rf"w to have a multiple of {multiple} rows \(.* output\), got {features}"
    scale = of(1) if out == FP8 else None
    CASES[op, f"w_{features}_rows"] = (
        {"w": of(features, D, dtype=BF16), "out_dtype": out, "scale_out": scale},
        sentence,
    )
for op in OPS:
    for word in ("none", "relu3", ""):
        CASES[op, f"activation_{word}"] = ({"activation": word}, f'activation to be "relu2" or "relu", got "{word}"')
    CASES[op, "activation_of_fp8"] = (
        {"x_dtype": FP8, "scale_out": of(1), "activation": "none"},
        'activation to be "relu2" or "relu", got "none"',
    )
    CASES[op, "activation_of_float16"] = (
        {"x_dtype": FP16, "activation": "none"},
        'activation to be "relu2" or "relu", got "none"',
    )
for word in ("tensor", "", "rows"):
    CASES["linear_compress", f"scaling_{word}"] = ({"scaling": word}, f'scaling to be "given" or "row", got "{word}"')
CASES["linear_compress", "row_scaling_of_sixteen_bits"] = (
    {"scaling": "row"},
    r'scaling to be "given" \(bfloat16 output has no scale\), got "row"',
)
CASES["linear_compress", "row_scaling_with_a_scale"] = (
    {"scaling": "row", "out_dtype": FP8, "scale_out": of(1)},
    r'scale_out to be None \(scaling="row" computes it\), got a tensor',
)


@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_one_sentence(checked_device, key):
    changes, rule = CASES[key]
    with pytest.raises(RuntimeError) as caught:
        call(key[0], checked_device, **changes)
    message = str(caught.value).splitlines()[0]
    assert re.search(rf"^sparse24\.{key[0]}: expected {rule}$", message), message


@pytest.mark.parametrize("op", OPS)
def test_the_operands_of_the_cases_are_good(device, op):
    """Otherwise they would test something else than they say."""
    for x_dtype in (BF16, FP16, FP8):
        out = call(op, device, x_dtype=x_dtype, out_dtype=BF16 if x_dtype == FP8 else x_dtype)
        assert (out[0].float() == D**2).all()
        assert (call(op, device, x_dtype=x_dtype, scale_out=of(1), out_dtype=FP8)[0].float() == 448).all()


@pytest.mark.parametrize("op", OPS)
def test_float32_is_refused_on_cuda(cuda, op):
    sentence = rf"^sparse24\.{op}: expected x to be .* on a CUDA device, got float32"
    with pytest.raises(RuntimeError, match=sentence):
        call(op, cuda, x_dtype=FP32)


@pytest.mark.parametrize("argument", ["w", "scale_x", "scale_w", "bias", "scale_out"])
@pytest.mark.parametrize("op", OPS)
def test_two_devices(cuda, op, argument):
    shape = {"w": (FEATURES, D), "bias": (FEATURES,)}.get(argument, (1,))
    dtype = BF16 if argument in ("w", "bias") else FP32
    changes = {"scale_out": of(1), "out_dtype": FP8}
    for here, there in ((cuda, "cpu"), ("cpu", cuda)):
        wrong = {argument: ones(there, *shape, dtype=dtype)}
        sentence = rf"^sparse24\.{op}: expected {argument} to be on {here}.* \(the device of x\), got {there}"
        with pytest.raises(RuntimeError, match=sentence):
            call(op, here, **(changes | wrong))


def test_wrong_shapes_fail_while_tracing(device):
    compiled = torch.compile(sparse24.linear_compress, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sparse24.linear_compress: expected w to have 48 columns .*got 32"):
        compiled(ones(device, T, D), ones(device, FEATURES, 32))
    torch._dynamo.reset()
