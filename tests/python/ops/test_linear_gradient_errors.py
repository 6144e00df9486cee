"""Wrong arguments of linear_gradient: the argument, the rule and the value in one sentence."""

import re

import pytest
import torch
from oracle import FP8

import sparse24

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def of(*shape, dtype=BF16):
    return lambda device: torch.ones(shape, device=device).to(dtype)


def call(device, fp8_meta=False, tokens=True, roots=False, **changes):
    """The op with operands that fit each other, but for `changes`: functions of the device."""
    arguments = {"grad": of(40, 24), "w": of(24, 64), "values": of(40, 32), "meta": of(1024, dtype=torch.uint8)}
    tensors = {name: make(device) for name, make in (arguments | changes).items()}
    return sparse24.linear_gradient(**tensors, tokens=tokens, fp8_meta=fp8_meta, roots=roots)


#: name: (changes, the sentence behind "expected ").
ERRORS = {
    "grad_float64": ({"grad": of(40, 24, dtype=torch.float64)}, "grad to be bfloat16.*float16.*, got float64"),
    "grad_float8": ({"grad": of(40, 24, dtype=FP8)}, "grad to be bfloat16.*float16.*, got float8_e4m3fn"),
    "grad_rank": ({"grad": of(24)}, r"grad to have 2 dimensions, got 1 with shape \(24\)"),
    "w_rank": ({"w": of(24, 64, 1)}, r"w to have 2 dimensions, got 3 with shape \(24, 64, 1\)"),
    "w_dtype": ({"w": of(24, 64, dtype=FP16)}, r"w to be bfloat16 \(the dtype of grad\), got float16"),
    "w_rows": ({"w": of(32, 64)}, r"w to have 24 rows \(columns of grad\), got 32"),
    "w_columns": ({"w": of(24, 72)}, r"w to have a multiple of 16 columns \(bfloat16 values\), got 72"),
    "values_rank": ({"values": of(32)}, r"values to have 2 dimensions, got 1 with shape \(32\)"),
    "values_dtype": ({"values": of(40, 32, dtype=FP32)}, r"values to be bfloat16 \(the dtype of grad\), got float32"),
    "values_rows": ({"values": of(41, 32)}, r"values to have 40 rows \(rows of grad\), got 41"),
    "values_columns": ({"values": of(40, 64)}, r"values to have 32 columns \(half the columns of w\), got 64"),
    "meta_dtype": ({"meta": of(1024, dtype=torch.int8)}, "meta to be uint8, got int8"),
    "meta_rank": ({"meta": of(2, 512, dtype=torch.uint8)}, r"meta to have 1 dimension, got 2 with shape \(2, 512\)"),
    "meta_size": (
        {"meta": of(1025, dtype=torch.uint8)},
        r"meta to have 1024 elements \(a sparse operand of 40 x 64 in bfloat16\), got 1025",
    ),
    "w_columns_beside_fp8_meta": (
        {"w": of(24, 80), "fp8_meta": True},
        r"w to have a multiple of 32 columns \(fp8_meta=True\), got 80",
    ),
    "no_meta_of_fp8": (
        {"fp8_meta": True},
        r"meta to have 2048 elements \(a sparse operand of 40 x 64 in float8_e4m3fn\), got 1024",
    ),
    "meta_of_fp8": (
        {"meta": of(2048, dtype=torch.uint8)},
        r"meta to have 1024 elements \(a sparse operand of 40 x 64 in bfloat16\), got 2048",
    ),
    "hot_dtype": ({"hot": of(8, dtype=torch.int32)}, "hot to be int64, got int32"),
    "hot_rank": ({"hot": of(2, 4, dtype=torch.int64)}, r"hot to have 1 dimension, got 2 with shape \(2, 4\)"),
    "hot_size": ({"hot": of(65, dtype=torch.int64)}, r"hot to have at most 64 elements \(columns of w\), got 65"),
    "hot_without_tokens": (
        {"hot": of(8, dtype=torch.int64), "tokens": False},
        "tokens to be True where hot is given, got False",
    ),
    "roots_of_bfloat16": ({"roots": True}, r"roots to be False \(bfloat16 grad\), got True"),
    "no_hot_without_tokens": (
        {"hot": of(0, dtype=torch.int64), "tokens": False},
        "tokens to be True where hot is given, got False",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_sentence(checked_device, name):
    changes, rule = ERRORS[name]
    with pytest.raises(RuntimeError) as caught:
        call(checked_device, **changes)
    message = str(caught.value).splitlines()[0]
    assert re.search(rf"^sparse24\.linear_gradient: expected {rule}$", message), message


def test_the_operands_of_the_errors_are_good(device):
    """Otherwise they would test something else than they say."""
    meta = lambda d: torch.full((1024,), 0x44, dtype=torch.uint8, device=d)  # noqa: E731
    dh, *_, counts, _, _ = call(device, meta=meta)
    assert (dh == 48).all() and counts.sum() == 40 * 32
    *_, y_hot, dh_hot = call(device, meta=meta, hot=lambda d: torch.tensor([1, 2], device=d))
    assert y_hot[0].sum() == 40 and dh_hot[0].sum() == 40 * 48 and not y_hot[1].any() and not dh_hot[1].any()


def test_float32_is_refused_on_cuda(cuda):
    with pytest.raises(RuntimeError, match=r"linear_gradient: expected grad to be .* on a CUDA device, got float32"):
        call(cuda, grad=of(40, 24, dtype=FP32))


@pytest.mark.parametrize("argument", ["w", "values", "meta", "hot"])
def test_two_devices(cuda, argument):
    shapes = {"w": of(24, 64), "values": of(40, 32), "meta": of(1024, dtype=torch.uint8)}
    shapes["hot"] = of(8, dtype=torch.int64)
    for here, there in ((cuda, "cpu"), ("cpu", cuda)):
        sentence = rf"expected {argument} to be on {here}.* \(the device of grad\), got {there}"
        with pytest.raises(RuntimeError, match=sentence):
            call(here, **{argument: lambda _, there=there: shapes[argument](there)})
