"""Calls with one wrong argument, and the sentence that each must raise."""

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

    def check(self, device: str) -> None:
        sentence = rf"^sparse24\.{self.op}: expected {self.rule}, got {self.got}$"
        with pytest.raises(RuntimeError) as caught:
            self.call(device)
        message = str(caught.value).splitlines()[0]
        assert re.search(sentence, message), f"{message!r} does not match {sentence!r}"


class Cases(list[Case]):
    def add(self, op: str, name: str, call: Callable[[str], object], rule: str, got: str) -> None:
        self.append(Case(op, name, call, rule, got))
