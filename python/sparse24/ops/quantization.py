"""float8 of what is not compressed: dense operands of the scaled products."""

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE, token_padding, up
from sparse24.ops.arguments import Scaling, run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_given_scale,
    check_scale,
    check_scaling,
    check_sizes,
    expect,
    new_scale,
)
from sparse24.ops.registration import ROUNDING, define

__all__ = [
    "quantize_fp8",
    "quantize_fp8_both",
    "quantize_fp8_predict",
    "transpose_fp8",
]

#: Of one launch.
_MOST_MATRICES = 65_535


def quantize_fp8(x: Tensor, scale: Tensor | None = None, scaling: Scaling = "row") -> tuple[Tensor, Tensor]:
    """Store a dense matrix as float8_e4m3fn: the operands that are not compressed.

    ``values = e4m3(x * (1 / scale))`` in float32, rounded once to nearest even, saturating at 448.

    Parameters
    ----------
    x : Tensor [R, C]
        bfloat16 or float16; on the CPU also float32. C: a multiple of 16.
    scale : Tensor, optional
        Dequantising multiplier, float32: R elements for scaling="row", one for "tensor". By default computed as in
        `compress_fp8`.
    scaling : {"row", "tensor"}
        One scale per row of x, or one for all.

    Returns
    -------
    values : Tensor [R, C]
        float8_e4m3fn.
    scale : Tensor
        [R, 1] or [1], float32: the computed scale, or what was used of the given one.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank, number of columns or scale; backward, which is not defined.

    Notes
    -----
    Source: the scaled fp8 products of Haziza et al. 2025, arXiv 2503.16672.
    """
    return run(_quantize_fp8, x, scale, scaling)


def quantize_fp8_predict(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise by row as `quantize_fp8`, and predict the scale of squares of products with each row.

    ``predicted[r] = factor * |x_r|^2``, of the quantised row: the scale of ``relu(x @ w.T)^2`` grows with it, whatever
    w is, so that no pass over the result is needed to find its maximum. Use it as `scale_out` of `linear_compress`.

    Parameters
    ----------
    x : Tensor [R, C]
        As in `quantize_fp8`.
    factor : Tensor [1]
        float32, on x's device. ``max_f |w_f|^2 / 448`` can never saturate (Cauchy-Schwarz); smaller factors, from data,
        use more of float8's range: `linear_compress` counts what saturates.

    Returns
    -------
    values : Tensor [R, C]
        float8_e4m3fn.
    scale : Tensor [R, 1]
        float32, of the rows of x.
    predicted : Tensor [R, 1]
        float32, at least the smallest normal number; 1 where a row is zero. The squares are added exactly: the same
        bits on every device, NaN included.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank, number of columns or factor; backward, which is not defined.

    Notes
    -----
    Source: the scaled fp8 products of Haziza et al. 2025, arXiv 2503.16672; the bound is that of Cauchy and Schwarz.
    """
    return run(_quantize_fp8_predict, x, factor)


def quantize_fp8_both(
    x: Tensor, scale: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise as `quantize_fp8` with one scale, and write both the matrix and its transpose, from one read.

    float8 products want their reduction dimension contiguous in both operands: what is multiplied along its rows and
    along its columns, as all operands of a training step are, is needed twice.

    Parameters
    ----------
    x : Tensor [R, C] or [E, R, C]
        As in `quantize_fp8`; or E matrices, each with a scale of its own. E: at most 65,535.
    scale : Tensor [1] or [E], optional
        Dequantising multiplier, float32. By default ``max |x| / 448``, which costs one more read of x.
    interleaved : bool
        The columns of the transpose are in the order of the rows that `linear_gradient_fp8` writes with the same flag:
        column ``4 g + i`` is row ``i Q + g`` of x, ``Q = R // 4``, and the last R % 4 are their own.

    Returns
    -------
    values : Tensor [R, C] or [E, R, C]
        float8_e4m3fn.
    transposed : Tensor [C, P] or [E, C, P]
        The same codes; P is R rounded up to a multiple of 32, and the columns from R on are zeros.
    scale : Tensor [1] or [E]
        float32: the computed scale, or what was used of the given one.
    amax : Tensor [1] or [E]
        float32: ``max |x|``, NaN not counted. The scale of a later step follows from it.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank, number of columns or scale; backward, which is not defined.

    Notes
    -----
    Source: the scaled fp8 products of Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> values, transposed, scale, amax = sparse24.quantize_fp8_both(torch.randn(32, 16))
    >>> assert torch.equal(transposed.t().float(), values.float())
    """
    return run(_quantize_fp8_both, x, scale, interleaved)


def transpose_fp8(values: Tensor) -> Tensor:
    """Write the transpose of codes, as `quantize_fp8_both` would have written it beside them.

    Parameters
    ----------
    values : Tensor [R, C]
        float8_e4m3fn. C: a multiple of 16.

    Returns
    -------
    Tensor [C, P]
        The same codes; P is R rounded up to a multiple of 32, and the columns from R on are zeros.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or number of columns; backward, which is not defined.

    Notes
    -----
    Source: the scaled fp8 products of Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> values, transposed, scale, amax = sparse24.quantize_fp8_both(torch.randn(32, 16))
    >>> assert torch.equal(sparse24.transpose_fp8(values).float(), transposed.float())
    """
    return run(_transpose_fp8, values)


def check_quantized(op: str, x: Tensor, name: str = "x") -> None:
    """Check a matrix that becomes float8."""
    check_sizes(op, name, x, 2)
    check_dtype(op, name, x, WIDE)
    expect(x.shape[1] % 16 == 0, op, f"{name} to have a multiple of 16 columns", x.shape[1])


def _fake_quantize_fp8(x: Tensor, scale: Tensor | None, scaling: str) -> tuple[Tensor, Tensor]:
    op = "quantize_fp8"
    check_scaling(op, scaling)
    check_quantized(op, x)
    check_given_scale(op, scale, scaling, x.shape[0], "rows of x", x)
    return x.new_empty(x.shape, dtype=FP8), new_scale(x, scaling, x.shape[0])


def _fake_quantize_fp8_predict(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_fp8_predict"
    check_quantized(op, x)
    check_device(op, "factor", factor, "x", x)
    check_scale(op, "factor", factor, 1, "one factor")
    return x.new_empty(x.shape, dtype=FP8), *(new_scale(x, "row", x.shape[0]) for _ in range(2))


def _fake_quantize_fp8_both(
    x: Tensor, scale: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return both_orders("quantize_fp8_both", "x", x, scale, several=x.dim() == 3)


def _fake_transpose_fp8(values: Tensor) -> Tensor:
    op = "transpose_fp8"
    check_sizes(op, "values", values, 2)
    check_dtype(op, "values", values, (FP8,))
    expect(values.shape[1] % 16 == 0, op, "values to have a multiple of 16 columns", values.shape[1])
    return values.new_empty((values.shape[1], up(values.shape[0], token_padding(FP8))))


def both_orders(
    op: str, name: str, x: Tensor, scale: Tensor | None, *, several: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give what `quantize_fp8_both` and its kin return: codes, their transpose, the scale and the largest magnitude."""
    check_sizes(op, name, x, 3 if several else 2)
    check_dtype(op, name, x, WIDE)
    *count, rows, columns = x.shape
    expect(columns % 16 == 0, op, f"{name} to have a multiple of 16 columns", columns)
    if several:
        expect(count[0] <= _MOST_MATRICES, op, f"{name} to have at most {_MOST_MATRICES} matrices", count[0])
    if scale is not None:
        check_device(op, "scale", scale, name, x)
        elements, meaning = (count[0], "matrices of x") if several else (1, "one scale")
        check_scale(op, "scale", scale, elements, meaning, one_allowed=False)
    transposed = x.new_empty((*count, columns, up(rows, token_padding(FP8))), dtype=FP8)
    scales = (x.new_empty(count or (1,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=FP8), transposed, *scales


_quantize_fp8 = define("quantize_fp8", _fake_quantize_fp8, no_backward=ROUNDING)
_quantize_fp8_both = define("quantize_fp8_both", _fake_quantize_fp8_both, no_backward=ROUNDING)
_quantize_fp8_predict = define("quantize_fp8_predict", _fake_quantize_fp8_predict, no_backward=ROUNDING)
_transpose_fp8 = define("transpose_fp8", _fake_transpose_fp8, no_backward="codes have none")
