"""Fake functions: shapes, strides and dtypes of the ops, for tracing.

Python rather than C++, because a C++ meta kernel specialises on sizes and recompiles. `torch._check` states the rules
on shapes, so that tracing fails where running would; rules on a symbolic size become guards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn


def _up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def _expect(condition: bool, op: str, rule: str, got: object) -> None:
    torch._check(condition, lambda: f"sparse24.{op}: expected {rule}, got {got}")


def _check_dim(op: str, dim: int) -> None:
    _expect(dim in (-1, -2), op, "dim to be -1 or -2", dim)


def _check_x(op: str, x: Tensor, values_dtype: torch.dtype, dim: int) -> tuple[int, int]:
    _check_dim(op, dim)
    _expect(x.dim() == 2, op, "x to have 2 dimensions", x.dim())
    rows, cols = x.shape
    multiple = 8 if dim == -2 else 32 if values_dtype == _FP8 else 16
    _expect(cols % multiple == 0, op, f"x to have a multiple of {multiple} columns", cols)
    return rows, cols


def _values_shape(rows: int, cols: int, dtype: torch.dtype, dim: int) -> tuple[int, int]:
    if dim == -1:
        return rows, cols // 2
    if dtype == _FP8:
        return cols, _up(rows, 32) // 2
    return _up(rows, 4) // 2, cols


def _meta_bytes(rows: int, cols: int, dtype: torch.dtype, dim: int) -> int:
    m, k = (rows, cols) if dim == -1 else (cols, rows)
    return _up(m, 128) * _up(k, 128 if dtype == _FP8 else 64) // 8


def _compress(x: Tensor, activation: str = "none", dim: int = -1) -> tuple[Tensor, Tensor]:
    rows, cols = _check_x("compress", x, x.dtype, dim)
    return (
        x.new_empty(_values_shape(rows, cols, x.dtype, dim)),
        x.new_empty(_meta_bytes(rows, cols, x.dtype, dim), dtype=torch.uint8),
    )


def _compress_fp8(
    x: Tensor, scale: Tensor | None, activation: str = "none", dim: int = -1, scaling: str = "row"
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = _check_x("compress_fp8", x, _FP8, dim)
    m = rows if dim == -1 else cols
    return (
        x.new_empty(_values_shape(rows, cols, _FP8, dim), dtype=_FP8),
        x.new_empty(_meta_bytes(rows, cols, _FP8, dim), dtype=torch.uint8),
        x.new_empty((m, 1) if scaling == "row" else (1,), dtype=torch.float32),
    )


def _compress_like(x: Tensor, meta: Tensor, dim: int = -1) -> Tensor:
    rows, cols = _check_x("compress_like", x, x.dtype, dim)
    return x.new_empty(_values_shape(rows, cols, x.dtype, dim))


def _decompress(values: Tensor, meta: Tensor, rows: int, cols: int, dim: int = -1) -> Tensor:
    _check_dim("decompress", dim)
    _expect(values.dim() == 2, "decompress", "values to have 2 dimensions", values.dim())
    stored_rows, stored_cols = _values_shape(rows, cols, values.dtype, dim)
    _expect(
        values.shape[0] == stored_rows,
        "decompress",
        f"values to have shape ({stored_rows}, {stored_cols}) for rows={rows}, cols={cols}, dim={dim}",
        tuple(values.shape),
    )
    return values.new_empty(rows, cols)


def _densest_features(counts: Tensor, k: int) -> Tensor:
    _expect(counts.dim() == 1, "densest_features", "counts to have 1 dimension", counts.dim())
    features = counts.shape[0]
    rule = f"k to be at least 0 and at most {features} (elements of counts)"
    _expect(0 <= k <= features, "densest_features", rule, k)
    return counts.new_empty(k, dtype=torch.int64)


def _feature_counts(values: Tensor, meta: Tensor, samples: int = 1024, fp8_meta: bool = False) -> Tensor:
    _expect(values.dim() == 2, "feature_counts", "values to have 2 dimensions", values.dim())
    _expect(samples >= 1, "feature_counts", "samples to be 1 or more", samples)
    return values.new_empty(2 * values.shape[1], dtype=torch.int32)


def _gather_features(values: Tensor, meta: Tensor, features: Tensor, fp8_meta: bool = False) -> Tensor:
    _expect(values.dim() == 2, "gather_features", "values to have 2 dimensions", values.dim())
    _expect(features.dim() == 1, "gather_features", "features to have 1 dimension", features.dim())
    return values.new_empty(values.shape[0], features.shape[0])


def _mm(
    values: Tensor,
    meta: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    bias: Tensor | None,
    *,
    dim: int = -1,
    out_dtype: torch.dtype | None = None,
    transpose_out: bool = False,
    interleaved: bool = False,
) -> Tensor:
    _check_dim("mm", dim)
    _expect(not interleaved or dim == -2, "mm", "dim to be -2 with interleaved=True", dim)
    _expect(values.dim() == 2, "mm", "values to have 2 dimensions", values.dim())
    _expect(b.dim() == 2, "mm", "b to have 2 dimensions", b.dim())
    if dim == -1:
        k = 2 * values.shape[1]
        _expect(b.shape[0] == k, "mm", f"b to have {k} rows (K of the sparse operand)", b.shape[0])
    m = values.shape[1] if dim == -2 and values.dtype != _FP8 else values.shape[0]
    n = b.shape[1]
    if out_dtype is None:
        out_dtype = torch.bfloat16 if values.dtype == _FP8 else values.dtype
    return values.new_empty((n, m) if transpose_out else (m, n), dtype=out_dtype)


def _put_features(out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    _check_dim("put_features", dim)
    _expect(out.dim() == 2, "put_features", "out to have 2 dimensions", out.dim())
    _expect(parts.dim() == 3, "put_features", "parts to have 3 dimensions", parts.dim())
    _expect(features.dim() == 1, "put_features", "features to have 1 dimension", features.dim())


def _quantize_fp8(x: Tensor, scale: Tensor | None, scaling: str = "row") -> tuple[Tensor, Tensor]:
    _expect(x.dim() == 2, "quantize_fp8", "x to have 2 dimensions", x.dim())
    rows, cols = x.shape
    _expect(cols % 16 == 0, "quantize_fp8", "x to have a multiple of 16 columns", cols)
    return (
        x.new_empty((rows, cols), dtype=_FP8),
        x.new_empty((rows, 1) if scaling == "row" else (1,), dtype=torch.float32),
    )


def _quantize_fp8_predict(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _expect(x.dim() == 2, "quantize_fp8_predict", "x to have 2 dimensions", x.dim())
    rows, cols = x.shape
    _expect(cols % 16 == 0, "quantize_fp8_predict", "x to have a multiple of 16 columns", cols)
    scale, predicted = (x.new_empty((rows, 1), dtype=torch.float32) for _ in range(2))
    return x.new_empty((rows, cols), dtype=_FP8), scale, predicted


def _check_linear(
    op: str, x: Tensor, w: Tensor, out_dtype: torch.dtype | None, fp8_multiple: int, multiple: int
) -> tuple[int, int, torch.dtype]:
    """Tokens, output features and the stored type of ``x @ w.T``."""
    _expect(x.dim() == 2, op, "x to have 2 dimensions", x.dim())
    _expect(w.dim() == 2, op, "w to have 2 dimensions", w.dim())
    tokens, features = x.shape
    if x.dtype == _FP8:
        _expect(features % 16 == 0, op, "x to have a multiple of 16 columns (float8_e4m3fn)", features)
    _expect(w.shape[1] == features, op, f"w to have {features} columns (columns of x)", w.shape[1])
    dtype = x.dtype if out_dtype is None else out_dtype
    rule = fp8_multiple if dtype == _FP8 else multiple
    _expect(w.shape[0] % rule == 0, op, f"w to have a multiple of {rule} rows", w.shape[0])
    return tokens, w.shape[0], dtype


def _statistics(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(int(wanted), dtype=torch.float32), x.new_empty(int(wanted), dtype=torch.int32)


def _linear_relu2(
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    bias: Tensor | None,
    scale_out: Tensor | None,
    *,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, out, dtype = _check_linear("linear_relu2", x, w, out_dtype, 16, 8)
    return x.new_empty((tokens, out), dtype=dtype), *_statistics(x, statistics)


def _linear_compress(
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    bias: Tensor | None,
    scale_out: Tensor | None,
    *,
    activation: str = "relu2",
    scaling: str = "given",
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, out, dtype = _check_linear("linear_compress", x, w, out_dtype, 32, 16)
    if dtype != _FP8:
        scale_shape: tuple[int, ...] = (0,)
    else:
        scale_shape = (1,) if scale_out is not None and scale_out.numel() == 1 else (tokens, 1)
    return (
        x.new_empty((tokens, out // 2), dtype=dtype),
        x.new_empty(_meta_bytes(tokens, out, dtype, -1), dtype=torch.uint8),
        x.new_empty(scale_shape, dtype=torch.float32),
        *_statistics(x, statistics),
    )


def _check_gradient(op: str, grad: Tensor, w: Tensor, multiple: int, name: str, y: Tensor) -> tuple[int, int]:
    """Tokens and features of ``grad @ w``. `name` is that of y, which has a row for each token."""
    for argument, t in (("grad", grad), ("w", w), (name, y)):
        _expect(t.dim() == 2, op, f"{argument} to have 2 dimensions", t.dim())
    rows, depth = grad.shape
    features = w.shape[1]
    _expect(w.shape[0] == depth, op, f"w to have {depth} rows (columns of grad)", w.shape[0])
    _expect(features % multiple == 0, op, f"w to have a multiple of {multiple} columns", features)
    _expect(y.shape[0] == rows, op, f"{name} to have {rows} rows (rows of grad)", y.shape[0])
    return rows, features


def _linear_gradient(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    interleaved: bool = False,
    tokens: bool = True,
    fp8_meta: bool = False,
    hot: Tensor | None = None,
) -> tuple[Tensor, ...]:
    op = "linear_gradient"
    rows, features = _check_gradient(op, grad, w, 32 if fp8_meta else 16, "values", values)
    half = features // 2
    _expect(values.shape[1] == half, op, f"values to have {half} columns (half the columns of w)", values.shape[1])

    hot_count = 0
    if hot is not None:
        _expect(tokens, op, "tokens to be True where hot is given", tokens)
        _expect(hot.dim() == 1, op, "hot to have 1 dimension", hot.dim())
        hot_count = hot.shape[0]
        _expect(hot_count <= features, op, f"hot to have at most {features} elements (columns of w)", hot_count)

    def along_tokens() -> tuple[Tensor, Tensor]:
        if not tokens:
            return grad.new_empty(0), grad.new_empty(0, dtype=torch.uint8)
        return (
            grad.new_empty(_values_shape(rows, features, grad.dtype, -2)),
            grad.new_empty(_meta_bytes(rows, features, grad.dtype, -2), dtype=torch.uint8),
        )

    counts = grad.new_empty(features if tokens and hot is None else 0, dtype=torch.int32)
    y_hot, dh_hot = (grad.new_empty(hot_count, rows) for _ in range(2))
    return grad.new_empty(rows, features // 2), *along_tokens(), *along_tokens(), counts, y_hot, dh_hot


def _linear_relu2_gradient(grad: Tensor, w: Tensor, y: Tensor) -> Tensor:
    op = "linear_relu2_gradient"
    rows, features = _check_gradient(op, grad, w, 8, "y", y)
    _expect(y.shape[1] == features, op, f"y to have {features} columns (columns of w)", y.shape[1])
    return grad.new_empty(rows, features)


def register() -> None:
    """Register all of them."""
    functions: dict[str, Callable[..., Any]] = {
        "compress": _compress,
        "compress_fp8": _compress_fp8,
        "compress_like": _compress_like,
        "decompress": _decompress,
        "densest_features": _densest_features,
        "feature_counts": _feature_counts,
        "gather_features": _gather_features,
        "mm": _mm,
        "put_features": _put_features,
        "quantize_fp8": _quantize_fp8,
        "quantize_fp8_predict": _quantize_fp8_predict,
        "linear_relu2": _linear_relu2,
        "linear_compress": _linear_compress,
        "linear_gradient": _linear_gradient,
        "linear_relu2_gradient": _linear_relu2_gradient,
    }
    for name, function in functions.items():
        torch.library.register_fake(f"sparse24::{name}", function)
