"""Fake functions: shapes, strides and dtypes of the ops, for tracing; here of those that store 2:4 and float8.

Python rather than C++, because a C++ meta kernel specialises on sizes and recompiles. What the ops refuse when they run
is refused while tracing, in the same words (`_fake_checks`). Those of `mm` and of the other products are in
`_fake_products`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse24 import _fake_products
from sparse24._fake_checks import (
    FP8,
    VALUES,
    WIDE,
    Operand,
    check_activation,
    check_columns,
    check_device,
    check_dim,
    check_dtype,
    check_exact_dtype,
    check_given_scale,
    check_kept,
    check_meta,
    check_same_dtype,
    check_scale,
    check_scaling,
    check_sizes,
    expect,
    feature_alignment,
    listed,
    name_of,
)


def _check_x(op: str, x: Tensor, dtype: torch.dtype | None, dim: int) -> Operand:
    """Check x of `compress`, whose values are of `dtype` or of its own."""
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, WIDE)
    check_columns(op, "x", x.shape[1], dtype or x.dtype, dim)
    return Operand.of(*x.shape, dtype or x.dtype, dim)


def _new_compressed(x: Tensor, a: Operand) -> tuple[Tensor, Tensor]:
    return x.new_empty(a.values_shape, dtype=a.dtype), x.new_empty(a.meta_bytes, dtype=torch.uint8)


def _new_scale(x: Tensor, scaling: str, rows: int) -> Tensor:
    return x.new_empty((rows, 1) if scaling == "row" else (1,), dtype=torch.float32)


def _compress(x: Tensor, activation: str = "none", dim: int = -1) -> tuple[Tensor, Tensor]:
    check_activation("compress", activation)
    check_dim("compress", dim)
    return _new_compressed(x, _check_x("compress", x, None, dim))


def _compress_fp8(
    x: Tensor, scale: Tensor | None = None, activation: str = "none", dim: int = -1, scaling: str = "row"
) -> tuple[Tensor, Tensor, Tensor]:
    op = "compress_fp8"
    check_activation(op, activation)
    check_dim(op, dim)
    check_scaling(op, scaling)
    a = _check_x(op, x, FP8, dim)
    check_given_scale(op, scale, scaling, a.m, "rows of the sparse operand", x)
    return *_new_compressed(x, a), _new_scale(x, scaling, a.m)


def _compress_like(x: Tensor, meta: Tensor, dim: int = -1) -> Tensor:
    op = "compress_like"
    check_dim(op, dim)
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, VALUES)
    check_columns(op, "x", x.shape[1], x.dtype, dim)
    a = Operand.of(*x.shape, x.dtype, dim)
    check_device(op, "meta", meta, "x", x)
    check_meta(op, meta, a)
    return x.new_empty(a.values_shape)


def _decompress(values: Tensor, meta: Tensor, rows: int, cols: int, dim: int = -1) -> Tensor:
    op = "decompress"
    check_dim(op, dim)
    check_sizes(op, "values", values, 2)
    check_dtype(op, "values", values, VALUES)
    for name, size in (("rows", rows), ("cols", cols)):
        rule = f"{name} to be at least 0 and below 2^31"
        expect(size >= 0, op, rule, size)
        if isinstance(size, int):
            expect(size < 2**31, op, rule, size)
    multiple = feature_alignment(values.dtype, dim)
    rule = f"cols to be a multiple of {multiple} ({name_of(values.dtype)} values, dim={dim})"
    expect(cols % multiple == 0, op, rule, cols)
    a = Operand.of(rows, cols, values.dtype, dim)
    for size, stored in zip(values.shape, a.values_shape, strict=True):
        rule = f"values to have shape {listed(a.values_shape)} for rows={rows}, cols={cols}, dim={dim}"
        expect(size == stored, op, rule, listed(values.shape))
    check_device(op, "meta", meta, "values", values)
    check_meta(op, meta, a)
    return values.new_empty(rows, cols)


def _densest_features(counts: Tensor, k: int) -> Tensor:
    op = "densest_features"
    check_sizes(op, "counts", counts, 1)
    check_exact_dtype(op, "counts", counts, torch.int32)
    features = counts.shape[0]
    rule = f"k to be at least 0 and at most {features} (elements of counts)"
    expect(k >= 0, op, rule, k)
    expect(k <= features, op, rule, k)
    return counts.new_empty(k, dtype=torch.int64)


def _feature_counts(values: Tensor, meta: Tensor, samples: int = 1024, fp8_meta: bool = False) -> Tensor:
    a = check_kept("feature_counts", values, meta, fp8_meta)
    expect(samples >= 1, "feature_counts", "samples to be 1 or more", samples)
    return values.new_empty(a.k, dtype=torch.int32)


def _check_features(op: str, features: Tensor, of: str, reference: Tensor) -> int:
    check_device(op, "features", features, of, reference)
    check_sizes(op, "features", features, 1)
    check_exact_dtype(op, "features", features, torch.int64)
    return features.shape[0]


def _gather_features(values: Tensor, meta: Tensor, features: Tensor, fp8_meta: bool = False) -> Tensor:
    a = check_kept("gather_features", values, meta, fp8_meta)
    return values.new_empty(a.m, _check_features("gather_features", features, "values", values))


def _put_features(out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    op = "put_features"
    check_dim(op, dim)
    check_sizes(op, "out", out, 2)
    check_dtype(op, "out", out, WIDE)
    expect(out.is_contiguous(), op, "out to be contiguous", f"strides {listed(out.stride())}")
    check_device(op, "parts", parts, "out", out)
    check_sizes(op, "parts", parts, 3)
    check_same_dtype(op, "parts", parts, "out", out)
    count = _check_features(op, features, "out", out)
    rows, columns = (out.shape[0], count) if dim == -1 else (count, out.shape[1])
    owners = ("rows of out", "elements of features") if dim == -1 else ("elements of features", "columns of out")
    expect(parts.shape[1] == rows, op, f"parts to have {rows} rows ({owners[0]})", parts.shape[1])
    expect(parts.shape[2] == columns, op, f"parts to have {columns} columns ({owners[1]})", parts.shape[2])


def _check_quantized(op: str, x: Tensor) -> None:
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, WIDE)
    expect(x.shape[1] % 16 == 0, op, "x to have a multiple of 16 columns", x.shape[1])


def _quantize_fp8(x: Tensor, scale: Tensor | None = None, scaling: str = "row") -> tuple[Tensor, Tensor]:
    op = "quantize_fp8"
    check_scaling(op, scaling)
    _check_quantized(op, x)
    check_given_scale(op, scale, scaling, x.shape[0], "rows of x", x)
    return x.new_empty(x.shape, dtype=FP8), _new_scale(x, scaling, x.shape[0])


def _quantize_fp8_predict(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_fp8_predict"
    _check_quantized(op, x)
    check_device(op, "factor", factor, "x", x)
    check_scale(op, "factor", factor, 1, "one factor")
    return x.new_empty(x.shape, dtype=FP8), *(_new_scale(x, "row", x.shape[0]) for _ in range(2))


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
        "put_features": _put_features,
        "quantize_fp8": _quantize_fp8,
        "quantize_fp8_predict": _quantize_fp8_predict,
        **_fake_products.FUNCTIONS,
    }
    for name, function in functions.items():
        torch.library.register_fake(f"sparse24::{name}", function)
