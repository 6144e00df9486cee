"""What the backward pass of experts makes of their 2:4 activation, and products over the rows of each."""

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
from sparse24.ops.experts import check_experts, check_offsets, check_weight_scale, padded_rows
from sparse24.ops.registration import define

__all__ = ["experts_linear_gradient", "experts_weight_gradient"]

#: What a may be.
_WIDE = (torch.bfloat16, torch.float16, torch.float32)


def experts_linear_gradient(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    offsets: Tensor,
    row_scale: Tensor | None = None,
    scale_grad: Tensor | None = None,
    scale_w: Tensor | None = None,
    scale_y: Tensor | None = None,
    *,
    dense: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the second product of each expert and the squared ReLU before it.

    ``dy[s] = grad[s] @ w[e]`` for rows of expert e, in float32, rounded to grad's dtype, or bfloat16 for float8;
    ``dh[s] = row_scale[s] * dy[s] * (2 * sqrt(y[s]))`` in float32, rounded once, at the entries that y keeps.

    Parameters
    ----------
    grad : Tensor [S, D_out]
        That of the result before the factors of the rows: bfloat16 or float8_e4m3fn; on the CPU also float16 and
        float32. D_out: a multiple of 16 bytes.
    w : Tensor [E, D_out, F]
        The second weights, of grad's dtype; in float8 K-major, as ``.mT`` of [E, F, D_out] is. F: a multiple of 16, or
        of 32 in float8. E: 1 to 1024.
    values, meta : Tensor
        y as `experts_linear_compress` returns it.
    offsets : Tensor [E]
        int32: where the rows of each expert end.
    row_scale : Tensor, optional
        float32, S elements.
    scale_grad : Tensor, optional
        float8: float32, 1 or S elements.
    scale_w : Tensor, optional
        float8: float32 [E] or [E, F].
    scale_y : Tensor, optional
        float8: float32, those of the rows of `values`. y is rounded to bfloat16 before it is multiplied.
    dense : bool
        Whether the dense matrices are wanted, for the products over rows.

    Returns
    -------
    dh_values : Tensor
        As `values`, or of bfloat16: with `meta` what `experts_mm` multiplies with the first weights, in float8 once it
        is quantised by row. On CUDA padding is not written.
    dh : Tensor [S, F]
        The same, dense. On CUDA, rows of no expert are not written.
    y : Tensor [S, F]
        ``row_scale * y``, rounded once more, likewise. Without `dense` these two have no rows.
    products : Tensor [S]
        float32: the sum of y * dy over F, the gradient of `row_scale`; zero in rows of no expert.

    Raises
    ------
    RuntimeError
        ``sparse24.experts_linear_gradient: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: `relu2_experts` is, once.

    Source: So et al. 2021, arXiv 2109.08668 (squared ReLU), for each expert.
    """
    tensors = grad, w, values, meta, offsets, row_scale, scale_grad, scale_w, scale_y
    return run(_experts_linear_gradient, *tensors, dense=dense)


def experts_weight_gradient(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Multiply two matrices over the rows of each expert: ``a_e.T @ b_e``, with sums in float32, rounded once.

    Rows of other experts, or of none, are in no sum, whatever they hold. The result of an expert without rows is zeros.

    Parameters
    ----------
    a : Tensor [S, M]
        bfloat16; on the CPU also float16 and float32. M: a multiple of 8.
    b : Tensor [S, N]
        Of a's dtype. N: a multiple of 8.
    offsets : Tensor [E]
        int32: where the rows of each expert end. E: 1 to 1024.

    Returns
    -------
    Tensor [E, M, N]
        Of a's dtype.

    Raises
    ------
    RuntimeError
        ``sparse24.experts_weight_gradient: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: `relu2_experts` is, once.

    Source: Gale et al. 2022, arXiv 2211.15841 (experts of any number of rows).
    """
    return run(_experts_weight_gradient, a, b, offsets)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _fake_linear_gradient(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    offsets: Tensor,
    row_scale: Tensor | None,
    scale_grad: Tensor | None,
    scale_w: Tensor | None,
    scale_y: Tensor | None,
    *,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "experts_linear_gradient"
    check_sizes(op, "grad", grad, 2)
    check_dtype(op, "grad", grad, VALUES)
    check_experts(op, offsets, "w", w, grad)
    dtype = f"{name_of(grad.dtype)} (the dtype of grad)"
    expect(w.dtype == grad.dtype, op, f"w to be {dtype}", name_of(w.dtype))
    rows, columns = grad.shape
    expect(w.shape[1] == columns, op, f"w to have {columns} rows (columns of grad)", w.shape[1])
    expect(columns > 0, op, "grad to have columns", columns)
    if grad.dtype != torch.float32:
        step = 16 // grad.dtype.itemsize
        expect(columns % step == 0, op, f"grad to have a multiple of {step} columns ({name_of(grad.dtype)})", columns)
    features, multiple = w.shape[2], feature_alignment(grad.dtype, -1)
    expect(
        features % multiple == 0, op, f"w to have a multiple of {multiple} columns ({name_of(grad.dtype)})", features
    )
    check_device(op, "values", values, "grad", grad)
    check_sizes(op, "values", values, 2)
    expect(values.dtype == grad.dtype, op, f"values to be {dtype}", name_of(values.dtype))
    padded = padded_rows(rows, offsets.shape[0])
    rule = f"values to have {padded} rows (padded, of {rows} rows and {offsets.shape[0]} experts)"
    expect(values.shape[0] == padded, op, rule, values.shape[0])
    rule = f"values to have {features // 2} columns (half the columns of w)"
    expect(values.shape[1] == features // 2, op, rule, values.shape[1])
    check_device(op, "meta", meta, "grad", grad)
    check_meta(op, meta, Operand.of(padded, features, grad.dtype, -1))
    if row_scale is not None:
        check_device(op, "row_scale", row_scale, "grad", grad)
        check_scale(op, "row_scale", row_scale, rows, "rows of grad", one_allowed=False)
    fp8 = grad.dtype == FP8
    scaled = not (scale_grad is None and scale_w is None and scale_y is None)
    expect(fp8 or not scaled, op, "scales of the operands to be None without float8", "a tensor")
    check_optional_scale(op, "scale_grad", scale_grad, rows, "rows of grad", "grad", grad)
    check_weight_scale(op, "scale_w", scale_w, offsets.shape[0], features, grad)
    if scale_y is not None:
        check_device(op, "scale_y", scale_y, "grad", grad)
        check_scale(op, "scale_y", scale_y, padded, "rows of values", one_allowed=False)
    dtype_out, matrix = torch.bfloat16 if fp8 else grad.dtype, (rows if dense else 0, features)
    dense_out = (grad.new_empty(matrix, dtype=dtype_out) for _ in range(2))
    products = grad.new_empty((rows,), dtype=torch.float32)
    return values.new_empty(values.shape, dtype=dtype_out), *dense_out, products


def _flops(grad: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 2 * grad[0] * grad[1] * w[2]


_experts_linear_gradient = define(
    "experts_linear_gradient", _fake_linear_gradient, no_backward="it is a backward pass itself", flops=_flops
)


def _fake_weight_gradient(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    op = "experts_weight_gradient"
    check_sizes(op, "a", a, 2)
    check_dtype(op, "a", a, _WIDE)
    check_device(op, "b", b, "a", a)
    check_sizes(op, "b", b, 2)
    expect(b.dtype == a.dtype, op, f"b to be {name_of(a.dtype)} (the dtype of a)", name_of(b.dtype))
    expect(b.shape[0] == a.shape[0], op, f"b to have {a.shape[0]} rows (those of a)", b.shape[0])
    check_offsets(op, offsets, a)
    expect(a.shape[1] % 8 == 0, op, "a to have a multiple of 8 columns", a.shape[1])
    expect(b.shape[1] % 8 == 0, op, "b to have a multiple of 8 columns", b.shape[1])
    return a.new_empty((offsets.shape[0], a.shape[1], b.shape[1]))


def _weight_flops(a: torch.Size, b: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


_experts_weight_gradient = define(
    "experts_weight_gradient", _fake_weight_gradient, no_backward="it is a backward pass itself", flops=_weight_flops
)
