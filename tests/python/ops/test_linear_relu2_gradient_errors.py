"""Wrong arguments of linear_relu2_gradient: the argument, the rule and the value in one sentence."""

import re

import pytest
import torch
from oracle import FP8

import sparse24

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def of(*shape, dtype=BF16):
    return lambda device: torch.ones(shape, device=device).to(dtype)


def call(device, roots=False, **changes):
    """The op with operands that fit each other, but for `changes`: functions of the device."""
    arguments = {"grad": of(40, 24), "w": of(24, 64), "y": of(40, 64)} | changes
    return sparse24.linear_relu2_gradient(**{name: make(device) for name, make in arguments.items()}, roots=roots)


#: name: (changes, the sentence behind "expected ").
ERRORS = {
    "grad_float64": ({"grad": of(40, 24, dtype=torch.float64)}, "grad to be bfloat16.*float16.*, got float64"),
    "grad_float8": ({"grad": of(40, 24, dtype=FP8)}, "grad to be bfloat16.*float16.*, got float8_e4m3fn"),
    "grad_rank": ({"grad": of(24)}, r"grad to have 2 dimensions, got 1 with shape \(24\)"),
    "w_rank": ({"w": of(24, 64, 1)}, r"w to have 2 dimensions, got 3 with shape \(24, 64, 1\)"),
    "w_dtype": ({"w": of(24, 64, dtype=FP16)}, r"w to be bfloat16 \(the dtype of grad\), got float16"),
    "w_rows": ({"w": of(32, 64)}, r"w to have 24 rows \(columns of grad\), got 32"),
    "w_columns": ({"w": of(24, 68)}, r"w to have a multiple of 8 columns \(bfloat16 output\), got 68"),
    "y_rank": ({"y": of(64)}, r"y to have 2 dimensions, got 1 with shape \(64\)"),
    "y_dtype": ({"y": of(40, 64, dtype=FP32)}, r"y to be bfloat16 \(the dtype of grad\), got float32"),
    "y_float8": ({"y": of(40, 64, dtype=FP8)}, r"y to be bfloat16 \(the dtype of grad\), got float8_e4m3fn"),
    "y_rows": ({"y": of(41, 64)}, r"y to have 40 rows \(rows of grad\), got 41"),
    "roots_of_bfloat16": ({"roots": True}, r"roots to be False \(bfloat16 grad\), got True"),
    "y_columns": ({"y": of(40, 32)}, r"y to have 64 columns \(columns of w\), got 32"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_sentence(checked_device, name):
    changes, rule = ERRORS[name]
    with pytest.raises(RuntimeError) as caught:
        call(checked_device, **changes)
    message = str(caught.value).splitlines()[0]
    assert re.search(rf"^sparse24\.linear_relu2_gradient: expected {rule}$", message), message


def test_the_operands_of_the_errors_are_good(device):
    """Otherwise they would test something else than they say."""
    assert (call(device) == 48).all()


def test_float32_is_refused_on_cuda(cuda):
    sentence = r"linear_relu2_gradient: expected grad to be .* on a CUDA device, got float32"
    with pytest.raises(RuntimeError, match=sentence):
        call(cuda, grad=of(40, 24, dtype=FP32))


@pytest.mark.parametrize("argument", ["w", "y"])
def test_two_devices(cuda, argument):
    shapes = {"w": of(24, 64), "y": of(40, 64)}
    for here, there in ((cuda, "cpu"), ("cpu", cuda)):
        sentence = rf"expected {argument} to be on {here}.* \(the device of grad\), got {there}"
        with pytest.raises(RuntimeError, match=sentence):
            call(here, **{argument: lambda _, there=there: shapes[argument](there)})
