"""What is stored for a 2:4 matrix, and how large: the numbers are those of the compiled library (format.h).

Sizes may be symbolic: nothing here asks for their values.
"""

from typing import NamedTuple

import torch

from sparse24 import (
    _C,
    _library,  # noqa: F401  (says why, where _C does not load)
)
from sparse24.errors import dtype_name

FP8 = torch.float8_e4m3fn
#: What values can be, in the order in which sentences name them; float32 has no kernels on CUDA.
VALUES = (torch.bfloat16, torch.float16, FP8, torch.float32)
#: What is multiplied and compressed without float8.
WIDE = (torch.bfloat16, torch.float16, torch.float32)
#: Whose activation can be stored as its root, relu(h).
ROOTS = (torch.float16, torch.float32)

#: The largest number of float8_e4m3fn, at which conversions saturate.
LARGEST_FP8 = _C.largest_e4m3

_MULTIPLES = {dtype: _C.multiples(dtype_name(dtype)) for dtype in VALUES}


def up(size: int, multiple: int) -> int:
    """`size` rounded up."""
    return (size + multiple - 1) // multiple * multiple


def feature_alignment(dtype: torch.dtype, dim: int) -> int:
    """Multiple that the columns of X must have."""
    return _MULTIPLES[dtype]["features_of_tokens" if dim == -2 else "features"]


#: Multiple of the features of networks that run sparse: in 16 bits, and (True) in fp8.
FEATURES = {fp8: feature_alignment(FP8 if fp8 else torch.bfloat16, -1) for fp8 in (False, True)}


def token_padding(dtype: torch.dtype) -> int:
    """Multiple to which the tokens of values are padded, where groups lie along them."""
    return _MULTIPLES[dtype]["tokens"]


class Operand(NamedTuple):
    """The sparse operand [m, k] that X becomes, and the sizes of what is stored for it."""

    m: int
    k: int
    dtype: torch.dtype
    dim: int

    @classmethod
    def of(cls, rows: int, cols: int, dtype: torch.dtype, dim: int) -> "Operand":
        """See X [rows, cols] as the operand of `dim`."""
        return cls(*((rows, cols) if dim == -1 else (cols, rows)), dtype, dim)

    @property
    def values_shape(self) -> tuple[int, int]:
        """Shape of the kept values."""
        if self.dim == -1:
            return self.m, self.k // 2
        pairs = up(self.k, token_padding(self.dtype)) // 2
        return (self.m, pairs) if self.dtype == FP8 else (pairs, self.m)

    @property
    def meta_bytes(self) -> int:
        """Size of their positions."""
        multiples = _MULTIPLES[self.dtype]
        return up(self.m, multiples["meta_rows"]) * up(self.k, multiples["meta_columns"]) // 8
