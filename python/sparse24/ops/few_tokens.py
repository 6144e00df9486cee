"""Products for few tokens, bound by the weights that they read: exact, and without the rows that no token uses.

Both are for inference. On CUDA they take at most 64 tokens, find what is active on the device, need no synchronisation
and can be captured in a graph that is replayed with other data.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_same_dtype,
    check_scale,
    check_sizes,
    check_tensor,
    check_vector,
    expect,
    name_of,
)
from sparse24.ops.registration import define

__all__ = ["mm_active", "relu2_mlp_few"]

#: The most tokens of a call on CUDA.
MAX_TOKENS = 64


def mm_active(
    y: Tensor,
    w: Tensor,
    scale_w: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply an activation that is mostly zeros with a weight that is stored by neuron.

    ``y @ (w * scale_w) + bias``, in which an entry of y that is zero contributes nothing, whatever w holds: infinity
    and NaN too. On CUDA, rows of w that no token uses are not read.

    Sums are in float32, in an order that depends on F alone. The neurons of each of 128 slices are a chain of
    multiply-adds in ascending order; the slices are added by sixteen in order, and then the eight sums. So a row of the
    result depends on its row of y alone, and the bits are the same on the CPU and on CUDA, for any number of tokens.

    Parameters
    ----------
    y : Tensor [T, F]
        bfloat16 or float16; on the CPU also float32. T: up to 64 on CUDA, any on the CPU. F: any.
    w : Tensor [F, D_out]
        Of y's dtype or float8_e4m3fn: row f is what neuron f writes, the transpose of what `torch.nn.Linear` stores.
        D_out: any; multiples of 16 bytes are fast. Copied in each call where it is not contiguous.
    scale_w : Tensor, optional
        Of float8 w: dequantising multiplier, float32, 1 or D_out elements in any shape. Default: 1.
    bias : Tensor [D_out], optional
        y's dtype or float32.
    out_dtype : torch.dtype, optional
        bfloat16, float16 or float32. Default: y's dtype.

    Returns
    -------
    Tensor [T, D_out]
        Contiguous.

    Raises
    ------
    RuntimeError
        ``sparse24.mm_active: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: it is for inference, and raises in backward.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the sparsity of the activation); contextual sparsity as in Liu et al.
    2023, arXiv 2310.17157, here exact.

    Examples
    --------
    >>> y = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    >>> w = torch.tensor([[torch.inf, torch.nan], [1.0, 2.0], [torch.nan, 0.0], [5.0, 7.0]])
    >>> sparse24.mm_active(y, w)
    tensor([[ 7., 11.],
            [15., 21.]])
    """
    return run(_mm_active, y, w, scale_w, bias, out_dtype=out_dtype)


def relu2_mlp_few(
    x: Tensor,
    w1: Tensor,
    w2_rows: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    threshold: float = 0,
) -> Tensor:
    """Run a squared-ReLU network for few tokens: exactly, without pruning, in one call.

    ``y = h^2`` where ``h = x @ (w1 * w1_scale).T + b1``, rounded to x's dtype, is greater than `threshold`, else zero;
    the result is ``mm_active(y, w2_rows, w2_scale, b2)``: bit for bit, but for more than eight tokens on CUDA, whose
    float32 sums are tensor cores' and have another fixed order. There too a zero of y meets no weight. Weights in
    float8 are half of the bytes to read, and need no quantised activations.

    Parameters
    ----------
    x : Tensor [..., D]
        bfloat16 or float16; on the CPU also float32. Tokens: up to 64 on CUDA, any on the CPU.
    w1 : Tensor [F, D]
        Of x's dtype or float8_e4m3fn. On CUDA, x and w1 are copied in each call where a row of w1 is not a multiple of
        16 bytes.
    w2_rows : Tensor [F, D_out]
        As `w` of `mm_active`: ``w2.t().contiguous()`` of the weight of a `torch.nn.Linear`.
    b1 : Tensor [F], optional
        Of x's dtype.
    b2 : Tensor [D_out], optional
        x's dtype or float32.
    w1_scale, w2_scale : Tensor, optional
        Of float8 weights: dequantising multipliers, float32, 1 or F, 1 or D_out elements. Default: 1.
    threshold : float
        Finite and at least 0.

    Returns
    -------
    Tensor [..., D_out]
        Contiguous, of x's dtype.

    Raises
    ------
    RuntimeError
        ``sparse24.relu2_mlp_few: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Sums are in float32, in an order that depends on sizes of weights alone. A token's result does not depend on the
    other tokens; on CUDA it is the same for any number of up to eight of them, and for any of nine to 64. Not
    differentiable: it is for inference, and raises in backward.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the sparsity of the activation).

    Examples
    --------
    >>> x, w1, w2 = torch.eye(3), torch.tensor([[1.0, -1, 2], [-1, 0, 3]]), torch.tensor([[1.0, 10]])
    >>> sparse24.relu2_mlp_few(x, w1, w2.t())
    tensor([[ 1.],
            [ 0.],
            [94.]])
    """
    return run(_relu2_mlp_few, x, w1, w2_rows, b1, b2, w1_scale, w2_scale, threshold)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _check_tokens(op: str, name: str, t: Tensor, tokens: int) -> None:
    if t.device.type == "cuda":
        expect(tokens <= MAX_TOKENS, op, f"{name} to have at most {MAX_TOKENS} rows on a CUDA device", tokens)


def _check_weight(op: str, name: str, w: Tensor, of: str, like: Tensor) -> None:
    check_device(op, name, w, of, like)
    check_sizes(op, name, w, 2)
    rule = f"{name} to be {name_of(like.dtype)} (the dtype of {of}) or float8_e4m3fn"
    expect(w.dtype in (like.dtype, FP8), op, rule, name_of(w.dtype))


def _check_scale(
    op: str, name: str, scale: Tensor | None, w: Tensor, of: str, like: Tensor, elements: int, meaning: str
) -> None:
    if scale is None:
        return
    expect(w.dtype == FP8, op, f"{name} to be None ({name_of(w.dtype)} weights have no scale)", "a tensor")
    check_device(op, name, scale, of, like)
    check_scale(op, name, scale, elements, meaning)


def _check_bias(op: str, name: str, bias: Tensor | None, of: str, like: Tensor, elements: int, meaning: str) -> None:
    if bias is None:
        return
    check_device(op, name, bias, of, like)
    rule = f"{name} to be {name_of(like.dtype)}{'' if like.dtype == torch.float32 else ' or float32'}"
    expect(bias.dtype in (like.dtype, torch.float32), op, rule, name_of(bias.dtype))
    check_vector(op, name, bias, elements, meaning)


def _fake_mm_active(
    y: Tensor, w: Tensor, scale_w: Tensor | None, bias: Tensor | None, *, out_dtype: torch.dtype | None
) -> Tensor:
    op = "mm_active"
    check_sizes(op, "y", y, 2)
    check_dtype(op, "y", y, WIDE)
    tokens, features = y.shape
    _check_tokens(op, "y", y, tokens)
    _check_weight(op, "w", w, "y", y)
    expect(w.shape[0] == features, op, f"w to have {features} rows (columns of y)", w.shape[0])
    columns = w.shape[1]
    _check_scale(op, "scale_w", scale_w, w, "y", y, columns, "columns of w")
    _check_bias(op, "bias", bias, "y", y, columns, "columns of w")
    out = y.dtype if out_dtype is None else out_dtype
    expect(out in WIDE, op, "out_dtype to be bfloat16, float16 or float32", name_of(out))
    return y.new_empty(tokens, columns, dtype=out)


def _fake_relu2_mlp_few(
    x: Tensor,
    w1: Tensor,
    w2_rows: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    threshold: float,
) -> Tensor:
    op = "relu2_mlp_few"
    check_tensor(op, "x", x)
    expect(x.dim() >= 1, op, "x to have at least 1 dimension", "0 with shape ()")
    check_dtype(op, "x", x, WIDE)
    *tokens, columns = x.shape
    _check_tokens(op, "x", x, prod(tokens))
    _check_weight(op, "w1", w1, "x", x)
    expect(w1.shape[1] == columns, op, f"w1 to have {columns} columns (columns of x)", w1.shape[1])
    features = w1.shape[0]
    _check_weight(op, "w2_rows", w2_rows, "x", x)
    expect(w2_rows.shape[0] == features, op, f"w2_rows to have {features} rows (rows of w1)", w2_rows.shape[0])
    out = w2_rows.shape[1]
    if b1 is not None:
        check_device(op, "b1", b1, "x", x)
        check_same_dtype(op, "b1", b1, "x", x)
        check_vector(op, "b1", b1, features, "rows of w1")
    _check_bias(op, "b2", b2, "x", x, out, "columns of w2_rows")
    _check_scale(op, "w1_scale", w1_scale, w1, "x", x, features, "rows of w1")
    _check_scale(op, "w2_scale", w2_scale, w2_rows, "x", x, out, "columns of w2_rows")
    ActivationFunction("relu2", threshold).check(op)
    return x.new_empty(*tokens, out)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _flops_of_mm_active(y: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``y @ w``."""
    return 2 * y[0] * y[1] * w[1]


def _flops_of_network(x: torch.Size, w1: torch.Size, w2_rows: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``x @ w1.T`` and ``y @ w2_rows``."""
    return 2 * prod(x[:-1]) * (prod(w1) + prod(w2_rows))


_FOR_INFERENCE = "it is for inference"
_mm_active = define("mm_active", _fake_mm_active, no_backward=_FOR_INFERENCE, flops=_flops_of_mm_active)
_relu2_mlp_few = define("relu2_mlp_few", _fake_relu2_mlp_few, no_backward=_FOR_INFERENCE, flops=_flops_of_network)
