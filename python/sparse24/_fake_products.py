"""Fake functions of the products: `mm`, the linear ops and their gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sparse24._fake_checks import (
    FP8,
    VALUES,
    WIDE,
    Operand,
    check_device,
    check_dim,
    check_dtype,
    check_exact_dtype,
    check_meta,
    check_optional_scale,
    check_same_dtype,
    check_sizes,
    either,
    expect,
    feature_alignment,
    listed,
    name_of,
)


def _check_vector(op: str, name: str, t: Tensor, elements: int, meaning: str) -> None:
    check_sizes(op, name, t, 1)
    expect(t.shape[0] == elements, op, f"{name} to have {elements} elements ({meaning})", t.shape[0])


def _operand_of_mm(values: Tensor, b: Tensor, dim: int) -> Operand:
    """Infer the sparse operand from the shapes of its values and of b [K, N]."""
    dtype, b_rows = values.dtype, b.shape[0]
    if dim == -1:
        multiple = feature_alignment(dtype, -1) // 2
        rule = f"values to have a multiple of {multiple} columns ({name_of(dtype)}, dim=-1)"
        expect(values.shape[1] % multiple == 0, "mm", rule, values.shape[1])
        k = 2 * values.shape[1]
        expect(b_rows == k, "mm", f"b to have {k} rows (K of the sparse operand)", b_rows)
        return Operand.of(values.shape[0], k, dtype, dim)
    # Values are [token pairs, M] in 16 bits and float32, [M, token pairs] in float8.
    m, pairs = values.shape if dtype == FP8 else reversed(values.shape)
    of_m, of_pairs = ("rows", "columns") if dtype == FP8 else ("columns", "rows")
    padding = 32 if dtype == FP8 else 4
    for size, multiple, name in ((m, feature_alignment(dtype, -2), of_m), (pairs, padding // 2, of_pairs)):
        rule = f"values to have a multiple of {multiple} {name} ({name_of(dtype)}, dim=-2)"
        expect(size % multiple == 0, "mm", rule, size)
    most = 2 * pairs
    least = most - padding + 1  # negative where there are none
    rule = f"b to have {torch.sym_max(0, least)} to {most} rows (K of the sparse operand)"
    expect(b_rows >= least, "mm", rule, b_rows)
    expect(b_rows <= most, "mm", rule, b_rows)
    return Operand.of(b_rows, m, dtype, dim)


def _mm(
    values: Tensor,
    meta: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dim: int = -1,
    out_dtype: torch.dtype | None = None,
    transpose_out: bool = False,
    interleaved: bool = False,
) -> Tensor:
    op = "mm"
    check_dim(op, dim)
    expect(not interleaved or dim == -2, op, "dim to be -2 with interleaved=True", dim)
    check_sizes(op, "values", values, 2)
    check_dtype(op, "values", values, VALUES)
    check_device(op, "meta", meta, "values", values)
    check_device(op, "b", b, "values", values)
    check_sizes(op, "b", b, 2)
    check_same_dtype(op, "b", b, "values", values)
    a = _operand_of_mm(values, b, dim)
    n = b.shape[1]
    check_meta(op, meta, a)
    if values.dtype == FP8:
        rule = "b to be K-major for float8_e4m3fn (stride 1 along dim 0, as w.t() of a contiguous w)"
        expect(either(b.stride(0) == 1, b.shape[0] <= 1), op, rule, f"strides {listed(b.stride())}")
    check_optional_scale(op, "scale_a", scale_a, a.m, "rows of the sparse operand", "values", values)
    check_optional_scale(op, "scale_b", scale_b, n, "columns of b", "values", values)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if values.dtype == FP8 else values.dtype
    expect(out_dtype in WIDE, op, "out_dtype to be bfloat16, float16 or float32", name_of(out_dtype))
    if bias is not None:
        check_device(op, "bias", bias, "values", values)
        allowed = "" if out_dtype == torch.float32 else " (out_dtype) or float32"
        rule = f"bias to be {name_of(out_dtype)}{allowed}"
        expect(bias.dtype in (out_dtype, torch.float32), op, rule, name_of(bias.dtype))
        _check_vector(op, "bias", bias, n, "N")
    return values.new_empty((n, a.m) if transpose_out else (a.m, n), dtype=out_dtype)


def _check_linear(
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
    out = w.shape[0]
    check_optional_scale(op, "scale_x", scale_x, x.shape[0], "rows of x", "x", x)
    check_optional_scale(op, "scale_w", scale_w, out, "rows of w", "x", x)
    hidden = torch.bfloat16 if x.dtype == FP8 else x.dtype
    if bias is not None:
        check_device(op, "bias", bias, "x", x)
        check_exact_dtype(op, "bias", bias, hidden)
        _check_vector(op, "bias", bias, out, "rows of w")
    stored = x.dtype if out_dtype is None else out_dtype
    expect(stored in (hidden, FP8), op, f"out_dtype to be {name_of(hidden)} or float8_e4m3fn", name_of(stored))
    return stored


def _check_rows_of_w(op: str, w: Tensor, multiple: int, stored: torch.dtype) -> None:
    rule = f"w to have a multiple of {multiple} rows ({name_of(stored)} output)"
    expect(w.shape[0] % multiple == 0, op, rule, w.shape[0])


def _check_scale_out(op: str, scale_out: Tensor | None, x: Tensor, wanted: bool, reason: str) -> None:
    if not wanted:
        expect(scale_out is None, op, f"scale_out to be None ({reason})", "a tensor")
        return
    expect(scale_out is not None, op, f"scale_out to be a tensor ({reason})", None)
    check_optional_scale(op, "scale_out", scale_out, x.shape[0], "rows of x", "x", x)


def _statistics(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(int(wanted), dtype=torch.float32), x.new_empty(int(wanted), dtype=torch.int32)


#: Whose activation can be stored as its root, relu(h).
_ROOTS = (torch.float16, torch.float32)


def _check_activation(op: str, activation: str, x: Tensor) -> None:
    allowed = ("relu2", "relu") if x.dtype in _ROOTS else ("relu2",)
    rule = "activation to be " + " or ".join(f'"{word}"' for word in allowed)
    expect(activation in allowed, op, rule, f'"{activation}"')


def _check_roots(op: str, roots: bool, grad: Tensor) -> None:
    expect(not roots or grad.dtype in _ROOTS, op, f"roots to be False ({name_of(grad.dtype)} grad)", roots)


def _linear_relu2(
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    bias: Tensor | None = None,
    scale_out: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
    activation: str = "relu2",
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_relu2"
    stored = _check_linear(op, x, w, scale_x, scale_w, bias, out_dtype)
    _check_activation(op, activation, x)
    fp8 = stored == FP8
    _check_rows_of_w(op, w, 16 if fp8 else 8, stored)
    reason = "float8_e4m3fn output" if fp8 else "the output is not float8_e4m3fn"
    _check_scale_out(op, scale_out, x, fp8, reason)
    return x.new_empty((x.shape[0], w.shape[0]), dtype=stored), *_statistics(x, statistics)


def _linear_compress(
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    bias: Tensor | None = None,
    scale_out: Tensor | None = None,
    *,
    activation: str = "relu2",
    scaling: str = "given",
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "linear_compress"
    expect(scaling in ("given", "row"), op, 'scaling to be "given" or "row"', f'"{scaling}"')
    stored = _check_linear(op, x, w, scale_x, scale_w, bias, out_dtype)
    _check_activation(op, activation, x)
    fp8, by_row = stored == FP8, scaling == "row"
    _check_rows_of_w(op, w, feature_alignment(stored, -1), stored)
    rule = f'scaling to be "given" ({name_of(stored)} output has no scale)'
    expect(fp8 or not by_row, op, rule, '"row"')
    reason = 'scaling="row" computes it' if by_row else 'scaling="given" of float8_e4m3fn output'
    _check_scale_out(op, scale_out, x, fp8 and not by_row, reason if fp8 else "the output is not float8_e4m3fn")

    a = Operand.of(x.shape[0], w.shape[0], stored, -1)
    return (
        x.new_empty(a.values_shape, dtype=stored),
        x.new_empty(a.meta_bytes, dtype=torch.uint8),
        x.new_empty(_scale_shape(a.m, scale_out) if fp8 else (0,), dtype=torch.float32),
        *_statistics(x, statistics),
    )


def _scale_shape(tokens: int, scale_out: Tensor | None) -> tuple[int, ...]:
    """[1] where one element is given; a number that is known at run time only counts as many."""
    return (1,) if scale_out is not None and guard_or_false(scale_out.numel() == 1) else (tokens, 1)


def _check_gradient(op: str, grad: Tensor, w: Tensor) -> int:
    """Check grad and w, and return the number of features of ``grad @ w``."""
    check_sizes(op, "grad", grad, 2)
    check_dtype(op, "grad", grad, WIDE)
    _check_beside(op, "w", w, grad)
    depth = grad.shape[1]
    expect(w.shape[0] == depth, op, f"w to have {depth} rows (columns of grad)", w.shape[0])
    return w.shape[1]


def _check_beside(op: str, name: str, t: Tensor, grad: Tensor) -> None:
    check_device(op, name, t, "grad", grad)
    check_sizes(op, name, t, 2)
    check_same_dtype(op, name, t, "grad", grad)


def _check_shape(op: str, name: str, t: Tensor, rows: int, columns: int, of_columns: str) -> None:
    expect(t.shape[0] == rows, op, f"{name} to have {rows} rows (rows of grad)", t.shape[0])
    expect(t.shape[1] == columns, op, f"{name} to have {columns} columns ({of_columns} of w)", t.shape[1])


def _linear_gradient(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    interleaved: bool = False,
    tokens: bool = True,
    fp8_meta: bool = False,
    hot: Tensor | None = None,
    roots: bool = False,
) -> tuple[Tensor, ...]:
    op = "linear_gradient"
    features, rows = _check_gradient(op, grad, w), grad.shape[0]
    meta_dtype = FP8 if fp8_meta else grad.dtype
    multiple = feature_alignment(meta_dtype, -1)
    what = "fp8_meta=True" if fp8_meta else f"{name_of(grad.dtype)} values"
    expect(features % multiple == 0, op, f"w to have a multiple of {multiple} columns ({what})", features)
    _check_beside(op, "values", values, grad)
    _check_shape(op, "values", values, rows, features // 2, "half the columns")
    check_device(op, "meta", meta, "grad", grad)
    check_meta(op, meta, Operand.of(rows, features, meta_dtype, -1))
    _check_roots(op, roots, grad)
    hot_count = 0
    if hot is not None:
        expect(tokens, op, "tokens to be True where hot is given", tokens)
        check_device(op, "hot", hot, "grad", grad)
        check_sizes(op, "hot", hot, 1)
        check_exact_dtype(op, "hot", hot, torch.int64)
        hot_count = hot.shape[0]
        expect(hot_count <= features, op, f"hot to have at most {features} elements (columns of w)", hot_count)

    a = Operand.of(rows, features, grad.dtype, -2)

    def along_tokens() -> tuple[Tensor, Tensor]:
        shape: tuple[int, ...] = a.values_shape if tokens else (0,)
        return grad.new_empty(shape), grad.new_empty(a.meta_bytes if tokens else 0, dtype=torch.uint8)

    counts = grad.new_empty(features if tokens and hot is None else 0, dtype=torch.int32)
    y_hot, dh_hot = (grad.new_empty(hot_count, rows) for _ in range(2))
    return grad.new_empty(rows, features // 2), *along_tokens(), *along_tokens(), counts, y_hot, dh_hot


def _linear_relu2_gradient(grad: Tensor, w: Tensor, y: Tensor, roots: bool = False) -> Tensor:
    op = "linear_relu2_gradient"
    features, rows = _check_gradient(op, grad, w), grad.shape[0]
    expect(features % 8 == 0, op, f"w to have a multiple of 8 columns ({name_of(grad.dtype)} output)", features)
    _check_beside(op, "y", y, grad)
    _check_shape(op, "y", y, rows, features, "columns")
    _check_roots(op, roots, grad)
    return grad.new_empty(rows, features)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "linear_relu2": _linear_relu2,
    "linear_compress": _linear_compress,
    "linear_gradient": _linear_gradient,
    "linear_relu2_gradient": _linear_relu2_gradient,
}
