"""The second products of experts, of a dense activation and of a 2:4 one, with the factors of a router."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, VALUES, Operand, feature_alignment
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_meta,
    check_optional_scale,
    check_scale,
    check_sizes,
    expect,
    name_of,
)
from sparse24.ops.experts import (
    INFERENCE,
    check_experts,
    check_features,
    check_weight_scale,
    linear_flops,
    padded_rows,
)
from sparse24.ops.registration import define

__all__ = ["experts_linear", "experts_mm"]


def experts_linear(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply the rows of each expert with its weight, and each row with a factor.

    ``out[s] = row_scale[s] * scale_x[s] * scale_w[e] * (x[s] @ w[e].T)`` for rows of expert e, in float32, rounded
    once; zeros in rows of no expert, whatever x holds there.

    Parameters
    ----------
    x : Tensor [S, K]
        bfloat16; on the CPU also float16, float32 and float8. K: a multiple of 16 bytes.
    w : Tensor [E, N, K]
        Of x's dtype. N: a multiple of 8. E: 1 to 1024.
    offsets : Tensor [E]
        int32: where the rows of each expert end.
    scale_x : Tensor, optional
        float32, 1 or S elements.
    scale_w : Tensor, optional
        float32 [E] or [E, N].
    row_scale : Tensor, optional
        float32, S elements.
    out_dtype : torch.dtype, optional
        bfloat16 or float16; on the CPU also float32. Default: x's dtype, bfloat16 for float8.

    Returns
    -------
    Tensor [S, N]

    Raises
    ------
    RuntimeError
        ``sparse24.experts_linear: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: `relu2_experts` is.

    Source: Shazeer et al. 2017, arXiv 1701.06538 (experts, weighted by a router).
    """
    tensors = x, w, offsets, scale_x, scale_w, row_scale
    return run(_experts_linear, *tensors, out_dtype=out_dtype)


def experts_mm(
    values: Tensor,
    meta: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply the 2:4 rows of each expert with its matrix, and each row with a factor.

    ``out[s] = row_scale[s] * scale_a * scale_b[e] * (A[p] @ b[e])`` for rows s of expert e, whose padded row is p, in
    float32, rounded once; zeros in rows of no expert.

    Parameters
    ----------
    values, meta : Tensor
        As `experts_linear_compress` returns them.
    b : Tensor [E, K, N]
        Of the dtype of `values`. float8 is copied where it is not ``w.mT`` of a contiguous w [E, N, K], and 16 bits
        where they are neither that nor contiguous. N: a multiple of 8.
    offsets : Tensor [E]
        int32: where the rows of each expert end.
    scale_a : Tensor, optional
        float32, 1 or as many elements as `values` has rows.
    scale_b : Tensor, optional
        float32 [E] or [E, N].
    row_scale : Tensor, optional
        float32, `rows` elements.
    rows : int
        S.
    out_dtype : torch.dtype, optional
        bfloat16 or float16; on the CPU also float32. Default: the dtype of `values`, bfloat16 for float8.

    Returns
    -------
    Tensor [S, N]

    Raises
    ------
    RuntimeError
        ``sparse24.experts_mm: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: `relu2_experts` is.

    Source: Haziza et al. 2025, arXiv 2503.16672, for each expert.
    """
    tensors = values, meta, b, offsets, scale_a, scale_b, row_scale
    return run(_experts_mm, *tensors, rows=rows, out_dtype=out_dtype)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _product(
    op: str,
    first: Tensor,
    names: tuple[str, str, str],
    w: Tensor,
    offsets: Tensor,
    scale_a: Tensor | None,
    scale_w: Tensor | None,
    row_scale: Tensor | None,
    rows: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Check what both second products take, w [E, N, K], and make their result."""
    name, name_of_a, name_of_w = names
    check_experts(op, offsets, name, w, first)
    expect(w.dtype == first.dtype, op, f"{name} to be {name_of(first.dtype)}", name_of(w.dtype))
    expect(w.shape[1] % 8 == 0, op, f"{name} to have a multiple of 8 outputs", w.shape[1])
    check_optional_scale(op, name_of_a, scale_a, first.shape[0], "rows of the first operand", "x", first)
    check_weight_scale(op, name_of_w, scale_w, w.shape[0], w.shape[1], first)
    if row_scale is not None:
        check_device(op, "row_scale", row_scale, "x", first)
        check_scale(op, "row_scale", row_scale, rows, "rows of the result", one_allowed=False)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if first.dtype == FP8 else first.dtype
    allowed = (torch.bfloat16, torch.float16, *(() if first.is_cuda else (torch.float32,)))
    expect(out_dtype in allowed, op, "out_dtype to be bfloat16 or float16", name_of(out_dtype))
    return first.new_empty((rows, w.shape[1]), dtype=out_dtype)


def _fake_linear(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    row_scale: Tensor | None,
    *,
    out_dtype: torch.dtype | None,
) -> Tensor:
    op = "experts_linear"
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, VALUES)
    check_features(op, x)
    names = "w", "scale_x", "scale_w"
    out = _product(op, x, names, w, offsets, scale_x, scale_w, row_scale, x.shape[0], out_dtype)
    expect(w.shape[2] == x.shape[1], op, f"w to have {x.shape[1]} columns (columns of x)", w.shape[2])
    return out


def _fake_mm(
    values: Tensor,
    meta: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    row_scale: Tensor | None,
    *,
    rows: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    op = "experts_mm"
    check_sizes(op, "values", values, 2)
    check_dtype(op, "values", values, VALUES)
    check_sizes(op, "b", b, 3)
    expect(rows >= 0, op, "rows to be at least 0", rows)
    multiple = feature_alignment(values.dtype, -1) // 2
    rule = f"values to have a multiple of {multiple} columns ({name_of(values.dtype)})"
    expect(values.shape[1] > 0, op, rule, values.shape[1])
    expect(values.shape[1] % multiple == 0, op, rule, values.shape[1])
    names = "b", "scale_a", "scale_b"
    out = _product(op, values, names, b.mT, offsets, scale_a, scale_b, row_scale, rows, out_dtype)
    k = 2 * values.shape[1]
    expect(b.shape[1] == k, op, f"b to have {k} rows (K of the sparse operand)", b.shape[1])
    padded = padded_rows(rows, offsets.shape[0])
    rule = f"values to have {padded} rows (padded, of {rows} rows and {offsets.shape[0]} experts)"
    expect(values.shape[0] == padded, op, rule, values.shape[0])
    check_device(op, "meta", meta, "values", values)
    check_meta(op, meta, Operand.of(values.shape[0], k, values.dtype, -1))
    return out


def _mm_flops(_values: torch.Size, _meta: torch.Size, b: torch.Size, *_args: Any, rows: int, **_kwargs: Any) -> int:
    """Count ``A @ b`` with the dense A, without the padding."""
    return 2 * rows * b[1] * b[2]


_experts_linear = define("experts_linear", _fake_linear, no_backward=INFERENCE, flops=linear_flops)
_experts_mm = define("experts_mm", _fake_mm, no_backward=INFERENCE, flops=_mm_flops)
