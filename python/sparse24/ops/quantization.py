"""float8 of what is not compressed: dense operands of the scaled products."""

from torch import Tensor

from sparse24.format import FP8, WIDE
from sparse24.ops.arguments import Scaling, refuse_non_tensors
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

__all__ = ["quantize_fp8", "quantize_fp8_predict"]


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
    try:
        return _quantize_fp8(x, scale, scaling)
    except RuntimeError:
        refuse_non_tensors(_quantize_fp8, x, scale)
        raise


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
    try:
        return _quantize_fp8_predict(x, factor)
    except RuntimeError:
        refuse_non_tensors(_quantize_fp8_predict, x, factor)
        raise


def _check_quantized(op: str, x: Tensor) -> None:
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, WIDE)
    expect(x.shape[1] % 16 == 0, op, "x to have a multiple of 16 columns", x.shape[1])


def _fake_quantize_fp8(x: Tensor, scale: Tensor | None, scaling: str) -> tuple[Tensor, Tensor]:
    op = "quantize_fp8"
    check_scaling(op, scaling)
    _check_quantized(op, x)
    check_given_scale(op, scale, scaling, x.shape[0], "rows of x", x)
    return x.new_empty(x.shape, dtype=FP8), new_scale(x, scaling, x.shape[0])


def _fake_quantize_fp8_predict(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_fp8_predict"
    _check_quantized(op, x)
    check_device(op, "factor", factor, "x", x)
    check_scale(op, "factor", factor, 1, "one factor")
    return x.new_empty(x.shape, dtype=FP8), *(new_scale(x, "row", x.shape[0]) for _ in range(2))


_quantize_fp8 = define("quantize_fp8", _fake_quantize_fp8, no_backward=ROUNDING)
_quantize_fp8_predict = define("quantize_fp8_predict", _fake_quantize_fp8_predict, no_backward=ROUNDING)
