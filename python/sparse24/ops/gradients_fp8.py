"""The second GEMM of the feed-forward network backwards, where everything that is multiplied is float8."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, Operand, feature_alignment, token_padding, up
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_exact_dtype,
    check_meta,
    check_scale,
    check_sizes,
    expect,
)
from sparse24.ops.registration import ROUNDING, define

__all__ = ["linear_gradient_fp8", "linear_relu2_gradient_fp8"]


def linear_gradient_fp8(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    scale_grad: Tensor,
    scale_w: Tensor,
    scale_y: Tensor,
    scale_dh: Tensor,
    interleaved: bool = False,
    hot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear_gradient` does of float8 operands, as float8: what the products after it multiply.

    ``dy = grad @ w.T``, summed in float32 and rounded to bfloat16; ``dh = dy * (2 * sqrt(y))`` in float32, at the
    entries that y keeps; ``e4m3(dh / scale_dh)``, rounded once to nearest even, saturating at 448. Each matrix has one
    scale, and that of dh is known before: nothing waits for a maximum, and along tokens codes are those along features.
    Given the same codes of dh the rest is bit for bit ``compress_fp8(decompress(...), one, dim=-2, scaling="tensor")``
    of codes as numbers.

    Parameters
    ----------
    grad : Tensor [T, D]
        The gradient of ``y @ w``, float8_e4m3fn. D: a multiple of 16.
    w : Tensor [F, D]
        The *transpose* of what ``torch.nn.Linear`` stores, float8_e4m3fn: `quantize_fp8_both` writes it. F: a multiple
        of 32.
    values, meta : Tensor
        The kept values [T, F/2] of y, float8_e4m3fn, and their positions: of `linear_compress` or `compress_fp8`.
    scale_grad, scale_w, scale_y, scale_dh : Tensor [1]
        Dequantising multipliers, float32; y's is not negative. A scale of dh from the `amax` of an earlier step needs
        some room above it.
    interleaved : bool
        As in `linear_gradient`; `quantize_fp8_both` with the same flag writes the other operands in this order.
    hot : Tensor [H], optional
        int64: features of which all tokens are wanted, as in `linear_gradient`.

    Returns
    -------
    dh_values : Tensor [T, F/2]
        The kept codes of dh, whose positions are `meta`.
    dh_tokens, dh_tokens_meta : Tensor
        dh with two of each four tokens kept, as `compress_fp8` with dim=-2 stores it.
    y_tokens, y_tokens_meta : Tensor
        The same of y.
    y_hot, dh_hot : Tensor [H, P]
        The `hot` features of both, in the order of the tokens of y_tokens; P is T rounded up to a multiple of 32, with
        zeros from T on. Without `hot` H is 0.
    amax : Tensor [1]
        float32, ``max |dh|``, NaN not counted.
    saturated : Tensor [1]
        int32, how many kept entries of dh exceed 448 times their scale.

    Raises
    ------
    RuntimeError
        Wrong dtype, device or rank; sizes that do not fit each other; backward, which is not defined.

    Notes
    -----
    On CUDA the last T % 128 rows of grad are copied where T is not a multiple of 32.

    Source: Haziza et al. 2025, arXiv 2503.16672, whose backward pass uses the forward's pattern.

    Examples
    --------
    >>> grad, one = torch.ones(4, 16).to(torch.float8_e4m3fn), torch.ones(1)
    >>> values, meta, scale = sparse24.compress_fp8(torch.ones(4, 32), one, "relu2", scaling="tensor")
    >>> w = torch.ones(32, 16).to(torch.float8_e4m3fn)
    >>> dh = sparse24.linear_gradient_fp8(grad, w, values, meta, one, one, scale, one)[0]
    >>> assert (dh.float() == 32).all()
    """
    arguments = grad, w, values, meta, scale_grad, scale_w, scale_y, scale_dh, interleaved, hot
    return run(_linear_gradient_fp8, *arguments)


def linear_relu2_gradient_fp8(
    grad: Tensor,
    w: Tensor,
    y: Tensor,
    scale_grad: Tensor,
    scale_w: Tensor,
    scale_y: Tensor,
    scale_dh: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear_relu2_gradient` does of float8 operands, as float8, and transpose what the products want so.

    Formulas and scales are those of `linear_gradient_fp8`, for all entries.

    Parameters
    ----------
    grad : Tensor [T, D]
        The gradient of ``y @ w``, float8_e4m3fn. D: a multiple of 16.
    w : Tensor [F, D]
        The *transpose* of what ``torch.nn.Linear`` stores, float8_e4m3fn. F: a multiple of 16.
    y : Tensor [T, F]
        ``relu(h)^2``, float8_e4m3fn: of `linear_relu2`.
    scale_grad, scale_w, scale_y, scale_dh : Tensor [1]
        Dequantising multipliers, float32; y's is not negative.

    Returns
    -------
    dh : Tensor [T, F]
        Codes of dh.
    dh_transposed, y_transposed : Tensor [F, P]
        The codes of both, transposed; P is T rounded up to a multiple of 32, with zeros from T on.
    amax : Tensor [1]
        float32, ``max |dh|``, NaN not counted.
    saturated : Tensor [1]
        int32, how many entries of dh exceed 448 times their scale.

    Raises
    ------
    RuntimeError
        Wrong dtype, device or rank; sizes that do not fit each other; backward, which is not defined.

    Notes
    -----
    On CUDA the last T % 128 rows of grad are copied where T is not a multiple of 32.

    Source: the dense counterpart of Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> grad, w, y, one = torch.ones(4, 16), torch.ones(32, 16), torch.ones(4, 32), torch.ones(1)
    >>> grad, w, y = (t.to(torch.float8_e4m3fn) for t in (grad, w, y))
    >>> dh, dh_transposed, *_ = sparse24.linear_relu2_gradient_fp8(grad, w, y, one, one, one, one)
    >>> assert (dh.float() == 32).all() and torch.equal(dh_transposed.float()[:, :4], dh.float().t())
    """
    arguments = grad, w, y, scale_grad, scale_w, scale_y, scale_dh
    return run(_linear_relu2_gradient_fp8, *arguments)


def check_fp8(op: str, name: str, t: Tensor, grad: Tensor) -> None:
    """Check a float8 matrix beside grad."""
    check_device(op, name, t, "grad", grad)
    check_sizes(op, name, t, 2)
    check_exact_dtype(op, name, t, FP8)


def check_fp8_product(op: str, grad: Tensor, w: Tensor, multiple: int, *, packed: bool = False) -> tuple[int, int]:
    """Check grad and w, or the values of a packed one, and return the sizes of ``grad @ w.T``."""
    check_sizes(op, "grad", grad, 2)
    check_exact_dtype(op, "grad", grad, FP8)
    rows, depth = grad.shape
    of_columns = feature_alignment(FP8, -1) if packed else 16
    expect(depth % of_columns == 0, op, f"grad to have a multiple of {of_columns} columns", depth)
    check_fp8(op, "w", w, grad)
    columns, what = (depth // 2, "half of those") if packed else (depth, "columns")
    expect(w.shape[1] == columns, op, f"w to have {columns} columns ({what} of grad)", w.shape[1])
    expect(w.shape[0] % multiple == 0, op, f"w to have a multiple of {multiple} rows", w.shape[0])
    return rows, w.shape[0]


def _check_scales(op: str, grad: Tensor, *scales: Tensor) -> None:
    for name, scale in zip(("scale_grad", "scale_w", "scale_y", "scale_dh"), scales, strict=True):
        check_device(op, name, scale, "grad", grad)
        check_scale(op, name, scale, 1, "one scale")


def _statistics(grad: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(1, dtype=torch.float32), grad.new_empty(1, dtype=torch.int32)


def _fake_linear_gradient_fp8(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    scale_grad: Tensor,
    scale_w: Tensor,
    scale_y: Tensor,
    scale_dh: Tensor,
    interleaved: bool,
    hot: Tensor | None,
) -> tuple[Tensor, ...]:
    op = "linear_gradient_fp8"
    sizes = check_fp8_product(op, grad, w, feature_alignment(FP8, -1))
    return gradient_fp8_outputs(op, grad, *sizes, values, meta, (scale_grad, scale_w, scale_y, scale_dh), hot)


def gradient_fp8_outputs(
    op: str,
    grad: Tensor,
    rows: int,
    features: int,
    values: Tensor,
    meta: Tensor,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    hot: Tensor | None,
) -> tuple[Tensor, ...]:
    """Check what stands beside grad and w, and make the results of `linear_gradient_fp8`."""
    check_fp8(op, "values", values, grad)
    expect(values.shape[0] == rows, op, f"values to have {rows} rows (rows of grad)", values.shape[0])
    half = features // 2
    expect(values.shape[1] == half, op, f"values to have {half} columns (half the rows of w)", values.shape[1])
    check_device(op, "meta", meta, "grad", grad)
    check_meta(op, meta, Operand.of(rows, features, FP8, -1))
    _check_scales(op, grad, *scales)
    hot_count = 0
    if hot is not None:
        check_device(op, "hot", hot, "grad", grad)
        check_sizes(op, "hot", hot, 1)
        check_exact_dtype(op, "hot", hot, torch.int64)
        hot_count = hot.shape[0]
        expect(hot_count <= features, op, f"hot to have at most {features} elements (rows of w)", hot_count)

    a = Operand.of(rows, features, FP8, -2)

    def along_tokens() -> tuple[Tensor, Tensor]:
        return grad.new_empty(a.values_shape), grad.new_empty(a.meta_bytes, dtype=torch.uint8)

    y_hot, dh_hot = (grad.new_empty(hot_count, 2 * a.values_shape[1]) for _ in range(2))
    return grad.new_empty(rows, half), *along_tokens(), *along_tokens(), y_hot, dh_hot, *_statistics(grad)


def _fake_linear_relu2_gradient_fp8(
    grad: Tensor, w: Tensor, y: Tensor, scale_grad: Tensor, scale_w: Tensor, scale_y: Tensor, scale_dh: Tensor
) -> tuple[Tensor, ...]:
    op = "linear_relu2_gradient_fp8"
    rows, features = check_fp8_product(op, grad, w, 16)
    check_fp8(op, "y", y, grad)
    expect(y.shape[0] == rows, op, f"y to have {rows} rows (rows of grad)", y.shape[0])
    expect(y.shape[1] == features, op, f"y to have {features} columns (rows of w)", y.shape[1])
    _check_scales(op, grad, scale_grad, scale_w, scale_y, scale_dh)
    transposed = (grad.new_empty(features, up(rows, token_padding(FP8))) for _ in range(2))
    return grad.new_empty(rows, features), *transposed, *_statistics(grad)


def _flops(grad: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``grad @ w.T``."""
    return 2 * grad[0] * grad[1] * w[0]


_linear_gradient_fp8 = define("linear_gradient_fp8", _fake_linear_gradient_fp8, no_backward=ROUNDING, flops=_flops)
_linear_relu2_gradient_fp8 = define(
    "linear_relu2_gradient_fp8", _fake_linear_relu2_gradient_fp8, no_backward=ROUNDING, flops=_flops
)
