"""The second GEMM backwards with a 2:4 weight."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import WIDE, Operand, feature_alignment
from sparse24.ops.arguments import run
from sparse24.ops.checks import check_device, check_dtype, check_meta, check_sizes, expect, name_of
from sparse24.ops.gradients import check_beside, gradient_outputs
from sparse24.ops.registration import define

__all__ = ["linear_gradient_packed"]


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
    the order of summation. It does reach memory.

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


def _flops(grad: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count the dense ``grad @ weight`` that it stands for."""
    return 2 * grad[0] * grad[1] * w[0]


_linear_gradient_packed = define(
    "linear_gradient_packed", _fake_linear_gradient_packed, no_backward="it is a part of one", flops=_flops
)
