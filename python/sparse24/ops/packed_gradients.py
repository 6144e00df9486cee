"""The second GEMM backwards with a 2:4 weight."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE, Operand, feature_alignment
from sparse24.ops.arguments import run
from sparse24.ops.checks import check_device, check_dtype, check_meta, check_sizes, expect, name_of
from sparse24.ops.gradients import check_beside, gradient_outputs
from sparse24.ops.gradients_fp8 import check_fp8_product, gradient_fp8_outputs
from sparse24.ops.registration import ROUNDING, define

__all__ = ["linear_gradient_fp8_packed", "linear_gradient_packed"]


def linear_gradient_packed(
    grad: Tensor,
    w: Tensor,
    w_meta: Tensor,
    values: Tensor,
    meta: Tensor,
    interleaved: bool = False,
    tokens: bool = True,
    fp8_meta: bool = False,
    hot: Tensor | None = None,
    roots: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear_gradient` does, with a weight that is 2:4 along its rows as the sparse operand.

    Given the same dy the results are bit for bit those of `linear_gradient`; dy is that of the pruned weight, but for
    the order of summation. It reaches memory where groups are not whole: unless tokens come in multiples of 16 and
    features of 32, y's metadata is of its own type, and no counts are wanted (`hot` is given).

    Parameters
    ----------
    grad : Tensor [T, D]
        bfloat16 or float16; on the CPU also float32. D: a multiple of 16.
    w : Tensor [F, D/2]
        The values of ``pack24(weight, dim=-2)`` of the weight [D, F], of grad's dtype.
    w_meta : Tensor
        Their metadata.
    values, meta, interleaved, tokens, fp8_meta, hot, roots
        As in `linear_gradient`.

    Returns
    -------
    dh_values, dh_tokens, dh_tokens_meta, y_tokens, y_tokens_meta, counts, y_hot, dh_hot : Tensor
        As of `linear_gradient`.

    Raises
    ------
    RuntimeError
        As in `linear_gradient`; sizes of w, w_meta and grad that do not fit each other.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672; 2:4 weights: Mozaffari et al. 2024 (SLoPe), arXiv 2405.16325.

    Examples
    --------
    >>> grad, w2 = torch.randint(-2, 3, (8, 16)).float(), torch.randint(-2, 3, (16, 32)).float()
    >>> y = sparse24.compress(torch.randint(0, 3, (8, 32)).float())
    >>> packed = sparse24.pack24(w2, -2)
    >>> dh, *_ = sparse24.linear_gradient_packed(grad, *packed, *y)
    >>> assert torch.equal(dh, sparse24.linear_gradient(grad, sparse24.unpack24(*packed, 16, 32, -2), *y)[0])
    """
    tensors = (grad, w, w_meta, values, meta)
    return run(_linear_gradient_packed, *tensors, interleaved, tokens, fp8_meta, hot, roots)


def linear_gradient_fp8_packed(
    grad: Tensor,
    w: Tensor,
    w_meta: Tensor,
    values: Tensor,
    meta: Tensor,
    scale_grad: Tensor,
    scale_w: Tensor,
    scale_y: Tensor,
    scale_dh: Tensor,
    interleaved: bool = False,
    hot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear_gradient_fp8` does, with a weight that is 2:4 along its rows as the sparse operand.

    Given the same dy the results are bit for bit those of `linear_gradient_fp8`; dy is that of the pruned weight, but
    for the order of summation. It reaches memory, in bfloat16, where tokens do not come in multiples of 32.

    Parameters
    ----------
    grad : Tensor [T, D]
        The gradient of ``y @ w``, float8_e4m3fn. D: a multiple of 32.
    w : Tensor [F, D/2]
        The values of ``prune_pack_fp8_both(weight, dim=-2)`` of the weight [D, F], float8_e4m3fn. F: a multiple of 32.
    w_meta : Tensor
        Their metadata.
    values, meta, scale_grad, scale_w, scale_y, scale_dh, interleaved, hot
        As in `linear_gradient_fp8`.

    Returns
    -------
    dh_values, dh_tokens, dh_tokens_meta, y_tokens, y_tokens_meta, y_hot, dh_hot, amax, saturated : Tensor
        As of `linear_gradient_fp8`.

    Raises
    ------
    RuntimeError
        As in `linear_gradient_fp8`; sizes of w, w_meta and grad that do not fit each other.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672; 2:4 weights: Mozaffari et al. 2024 (SLoPe), arXiv 2405.16325.

    Examples
    --------
    >>> grad, one = torch.ones(4, 32).to(torch.float8_e4m3fn), torch.ones(1)
    >>> y, meta, scale = sparse24.compress_fp8(torch.ones(4, 32), one, "relu2", scaling="tensor")
    >>> w, w_meta, codes, *_ = sparse24.prune_pack_fp8_both(torch.ones(32, 32), one, -2)
    >>> dh = sparse24.linear_gradient_fp8_packed(grad, w, w_meta, y, meta, one, one, scale, one)[0]
    >>> assert (dh.float() == 32).all()
    """
    scales = scale_grad, scale_w, scale_y, scale_dh
    return run(_linear_gradient_fp8_packed, grad, w, w_meta, values, meta, *scales, interleaved, hot)


def _fake_linear_gradient_packed(
    grad: Tensor,
    w: Tensor,
    w_meta: Tensor,
    values: Tensor,
    meta: Tensor,
    interleaved: bool,
    tokens: bool,
    fp8_meta: bool,
    hot: Tensor | None,
    roots: bool,
) -> tuple[Tensor, ...]:
    op = "linear_gradient_packed"
    check_sizes(op, "grad", grad, 2)
    check_dtype(op, "grad", grad, WIDE)
    check_beside(op, "w", w, grad)
    columns, features = grad.shape[1], w.shape[0]
    multiple = feature_alignment(grad.dtype, -1)
    rule = f"grad to have a multiple of {multiple} columns ({name_of(grad.dtype)})"
    expect(columns % multiple == 0, op, rule, columns)
    expect(2 * w.shape[1] == columns, op, f"w to have {columns // 2} columns (half of those of grad)", w.shape[1])
    check_device(op, "w_meta", w_meta, "grad", grad)
    check_meta(op, w_meta, Operand.of(features, columns, grad.dtype, -1), "w_meta")
    return gradient_outputs(op, grad, features, "rows of w", values, meta, tokens, fp8_meta, hot, roots)


def _fake_linear_gradient_fp8_packed(
    grad: Tensor,
    w: Tensor,
    w_meta: Tensor,
    values: Tensor,
    meta: Tensor,
    scale_grad: Tensor,
    scale_w: Tensor,
    scale_y: Tensor,
    scale_dh: Tensor,
    interleaved: bool,
    hot: Tensor | None,
) -> tuple[Tensor, ...]:
    op = "linear_gradient_fp8_packed"
    rows, features = check_fp8_product(op, grad, w, feature_alignment(FP8, -1), packed=True)
    check_device(op, "w_meta", w_meta, "grad", grad)
    check_meta(op, w_meta, Operand.of(features, grad.shape[1], FP8, -1), "w_meta")
    scales = scale_grad, scale_w, scale_y, scale_dh
    return gradient_fp8_outputs(op, grad, rows, features, values, meta, scales, hot)


def _flops(grad: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count the dense ``grad @ weight`` that it stands for."""
    return 2 * grad[0] * grad[1] * w[0]


_linear_gradient_packed = define(
    "linear_gradient_packed", _fake_linear_gradient_packed, no_backward="it is a part of one", flops=_flops
)
_linear_gradient_fp8_packed = define(
    "linear_gradient_fp8_packed", _fake_linear_gradient_fp8_packed, no_backward=ROUNDING, flops=_flops
)
