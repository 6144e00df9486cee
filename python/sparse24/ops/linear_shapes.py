"""What the fake functions of the first GEMM share: checks of its operands, and what they return."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sparse24.format import FP8, VALUES, Operand, feature_alignment
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_exact_dtype,
    check_optional_scale,
    check_same_dtype,
    check_sizes,
    check_vector,
    expect,
    name_of,
)


def check_linear(
    op: str,
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Check everything but the scale of the output, and return the type that it is stored as."""
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, VALUES)
    features = x.shape[1]
    if x.dtype == FP8:
        expect(features % 16 == 0, op, "x to have a multiple of 16 columns (float8_e4m3fn)", features)
    check_device(op, "w", w, "x", x)
    check_sizes(op, "w", w, 2)
    check_same_dtype(op, "w", w, "x", x)
    expect(w.shape[1] == features, op, f"w to have {features} columns (columns of x)", w.shape[1])
    return check_bias_and_scales(op, x, w.shape[0], scale_x, scale_w, bias, out_dtype)


def check_bias_and_scales(
    op: str,
    x: Tensor,
    out: int,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Check what stands beside x and a w of `out` rows, and return the type that the output is stored as."""
    check_optional_scale(op, "scale_x", scale_x, x.shape[0], "rows of x", "x", x)
    check_optional_scale(op, "scale_w", scale_w, out, "rows of w", "x", x)
    pre_activation = torch.bfloat16 if x.dtype == FP8 else x.dtype
    if bias is not None:
        check_device(op, "bias", bias, "x", x)
        check_exact_dtype(op, "bias", bias, pre_activation)
        check_vector(op, "bias", bias, out, "rows of w")
    stored = x.dtype if out_dtype is None else out_dtype
    expect(
        stored in (pre_activation, FP8),
        op,
        f"out_dtype to be {name_of(pre_activation)} or float8_e4m3fn",
        name_of(stored),
    )
    return stored


def check_rows_of_w(op: str, w: Tensor, multiple: int, stored: torch.dtype) -> None:
    """Check the features, a multiple of what the output's rows are aligned to."""
    rule = f"w to have a multiple of {multiple} rows ({name_of(stored)} output)"
    expect(w.shape[0] % multiple == 0, op, rule, w.shape[0])


def check_scale_out(op: str, scale_out: Tensor | None, x: Tensor, wanted: bool, reason: str) -> None:
    """Check that the scale of the output is there where it is used, and only there."""
    if not wanted:
        expect(scale_out is None, op, f"scale_out to be None ({reason})", "a tensor")
        return
    expect(scale_out is not None, op, f"scale_out to be a tensor ({reason})", None)
    check_optional_scale(op, "scale_out", scale_out, x.shape[0], "rows of x", "x", x)


def new_statistics(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Make amax and saturated, empty where they are not wanted."""
    return x.new_empty(int(wanted), dtype=torch.float32), x.new_empty(int(wanted), dtype=torch.int32)


def check_output_scaling(op: str, scaling: str) -> None:
    """Check where the scale of float8 output comes from."""
    expect(scaling in ("given", "row"), op, 'scaling to be "given" or "row"', f'"{scaling}"')


def compressed_output(
    op: str, x: Tensor, w: Tensor, scale_out: Tensor | None, stored: torch.dtype, scaling: str, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check the rest, for w with the rows of the weight, and make what the op returns."""
    fp8, by_row = stored == FP8, scaling == "row"
    check_rows_of_w(op, w, feature_alignment(stored, -1), stored)
    rule = f'scaling to be "given" ({name_of(stored)} output has no scale)'
    expect(fp8 or not by_row, op, rule, '"row"')
    reason = 'scaling="row" computes it' if by_row else 'scaling="given" of float8_e4m3fn output'
    check_scale_out(op, scale_out, x, fp8 and not by_row, reason if fp8 else "the output is not float8_e4m3fn")

    a = Operand.of(x.shape[0], w.shape[0], stored, -1)
    return (
        x.new_empty(a.values_shape, dtype=stored),
        x.new_empty(a.meta_bytes, dtype=torch.uint8),
        x.new_empty(_scale_shape(a.m, scale_out) if fp8 else (0,), dtype=torch.float32),
        *new_statistics(x, statistics),
    )


def _scale_shape(tokens: int, scale_out: Tensor | None) -> tuple[int, ...]:
    """[1] where one element is given; a number that is known at run time only counts as many."""
    return (1,) if scale_out is not None and guard_or_false(scale_out.numel() == 1) else (tokens, 1)
