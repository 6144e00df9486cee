"""The second GEMM of the feed-forward network backwards, with the derivative of the squared ReLU in its epilogue.

For a 2:4 activation with all that the sparse products after it multiply; or for a dense one.
"""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, ROOTS, WIDE, Operand, feature_alignment
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_exact_dtype,
    check_meta,
    check_same_dtype,
    check_sizes,
    expect,
    name_of,
)
from sparse24.ops.registration import define

__all__ = ["linear_gradient", "linear_relu2_gradient"]


def linear_gradient(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    interleaved: bool = False,
    tokens: bool = True,
    fp8_meta: bool = False,
    hot: Tensor | None = None,
    roots: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate ``y @ w.T`` and the squared ReLU that gave y, and compress along tokens what comes of it.

    ``dy = grad @ w`` in float32, rounded to grad's dtype; ``dh = dy * (2 * sqrt(y))`` in float32, rounded once, at the
    entries that y keeps. Neither reaches memory as a dense matrix. Given the same dy, the results are bit for bit those
    of ``compress_like(dy, meta)``, the product with the root, and ``compress(decompress(...), dim=-2)`` of dh and y.

    Parameters
    ----------
    grad : Tensor [T, D]
        The gradient of ``y @ w.T``: bfloat16 or float16; on the CPU also float32.
    w : Tensor [D, F]
        As ``torch.nn.Linear`` stores it, of grad's dtype. F: a multiple of 16, with `fp8_meta` of 32.
    values : Tensor [T, F/2]
        The kept values of y, of grad's dtype: from `linear_compress`, or `compress` with "relu2". With `fp8_meta` the
        dequantised ones of a float8 y.
    meta : Tensor
        Their positions.
    interleaved : bool
        The rows of what is compressed along tokens are ordered so that groups of four are tokens a quarter apart: row
        ``4 g + i`` is of token ``i Q + g``, ``Q = T // 4``, and the last T % 4 rows are of their own tokens. `mm` with
        the same flag multiplies it with tokens in their own order, which all other tensors here have.
    tokens : bool
        False: only dh along features is wanted, the other tensors are empty.
    fp8_meta : bool
        `meta` is in the layout of float8 values: of `compress_fp8` or fp8 `linear_compress`. Metadata along tokens is
        always in that of grad's dtype.
    hot : Tensor [H], optional
        int64: features of which all tokens are wanted, for dense products beside the sparse ones. They ascend, as
        `densest_features` gives them. Nothing can refuse what lies on a device: one that is not above all before it, or
        is not from 0 to F - 1, gives rows of NaN.
    roots : bool
        `values` are those of ``relu(h)``, the root of y, and no root is taken: from `linear_compress` with "relu". y is
        their squares, rounded. float16, where small y underflow; and float32.

    Returns
    -------
    dh_values : Tensor [T, F/2]
        The kept values of dh, whose positions are `meta`: ``mm(dh_values, meta, w1)`` is the gradient of x.
    dh_tokens, dh_tokens_meta : Tensor
        dh with two of each four tokens kept, as `compress` with dim=-2 stores it: for the gradient of w1.
    y_tokens, y_tokens_meta : Tensor
        The same of y: for the gradient of w.
    counts : Tensor [F]
        int32, in how many tokens a feature of y is not zero; NaN is not. With `hot` not counted, and empty.
    y_hot, dh_hot : Tensor [H, T]
        The `hot` features of y and dh: the bits of ``gather_features(values, meta, hot).t()``, and of dh_values.
        Without `hot` H is 0.

    Raises
    ------
    RuntimeError
        Wrong dtype, device or rank; sizes of grad, w, values and meta that do not fit each other; more than F `hot`
        features, or any without `tokens`; `roots` of bfloat16; backward, which is not defined.

    Notes
    -----
    On CUDA grad is copied where D is not a multiple of 8, and its last T % 128 rows where T is not one of 32.

    Source: Haziza et al. 2025, arXiv 2503.16672, whose backward pass uses the forward's pattern.

    Examples
    --------
    >>> x, w1, w2 = torch.randn(3, 8), torch.randn(32, 8), torch.randn(8, 32)
    >>> values, meta, *_ = sparse24.linear_compress(x, w1)
    >>> grad = torch.randn(3, 8)
    >>> dh, *_ = sparse24.linear_gradient(grad, w2, values, meta)
    >>> torch.testing.assert_close(dh, sparse24.compress_like(grad @ w2, meta) * 2 * values.sqrt())
    """
    return run(_linear_gradient, grad, w, values, meta, interleaved, tokens, fp8_meta, hot, roots)


def linear_relu2_gradient(grad: Tensor, w: Tensor, y: Tensor, roots: bool = False) -> Tensor:
    """Differentiate ``y @ w.T`` and the squared ReLU that gave y, where y is dense.

    ``dy = grad @ w`` in float32, rounded to grad's dtype; ``dh = dy * (2 * sqrt(y))`` in float32, rounded once. dy does
    not reach memory: y is read once and dh written once. Given the same dy, the result is bit for bit the product with
    the root.

    Parameters
    ----------
    grad : Tensor [T, D]
        The gradient of ``y @ w.T``: bfloat16 or float16; on the CPU also float32.
    w : Tensor [D, F]
        As ``torch.nn.Linear`` stores it, of grad's dtype. F: a multiple of 8, as `linear_relu2` needs it.
    y : Tensor [T, F]
        ``relu(h)^2``, of grad's dtype: from `linear_relu2`. The root stands for the pre-activation h, which need not be
        saved.
    roots : bool
        `y` is ``relu(h)``, from `linear_relu2` with "relu". float16, where small squares underflow; and float32.

    Returns
    -------
    Tensor [T, F]
        dh, of grad's dtype; contiguous.

    Raises
    ------
    RuntimeError
        Wrong dtype, device or rank; sizes of grad, w and y that do not fit each other; `roots` of bfloat16; backward,
        which is not defined.

    Notes
    -----
    On CUDA grad is copied where D is not a multiple of 8.

    Source: the dense counterpart of Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w1, w2 = torch.randn(3, 8), torch.randn(32, 8), torch.randn(8, 32)
    >>> y = sparse24.linear_relu2(x, w1)[0]
    >>> grad = torch.randn(3, 8)
    >>> dh = sparse24.linear_relu2_gradient(grad, w2, y)
    >>> torch.testing.assert_close(dh, (grad @ w2) * 2 * y.sqrt())
    """
    return run(_linear_relu2_gradient, grad, w, y, roots)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _check_gradient(op: str, grad: Tensor, w: Tensor) -> int:
    """Check grad and w, and return the number of features of ``grad @ w``."""
    check_sizes(op, "grad", grad, 2)
    check_dtype(op, "grad", grad, WIDE)
    check_beside(op, "w", w, grad)
    depth = grad.shape[1]
    expect(w.shape[0] == depth, op, f"w to have {depth} rows (columns of grad)", w.shape[0])
    return w.shape[1]


def check_beside(op: str, name: str, t: Tensor, grad: Tensor) -> None:
    """Check a matrix beside grad."""
    check_device(op, name, t, "grad", grad)
    check_sizes(op, name, t, 2)
    check_same_dtype(op, name, t, "grad", grad)


def _check_shape(op: str, name: str, t: Tensor, rows: int, columns: int, of_columns: str) -> None:
    expect(t.shape[0] == rows, op, f"{name} to have {rows} rows (rows of grad)", t.shape[0])
    expect(t.shape[1] == columns, op, f"{name} to have {columns} columns ({of_columns})", t.shape[1])


def _check_roots(op: str, roots: bool, grad: Tensor) -> None:
    expect(not roots or grad.dtype in ROOTS, op, f"roots to be False ({name_of(grad.dtype)} grad)", roots)


def _fake_linear_gradient(
    grad: Tensor,
    w: Tensor,
    values: Tensor,
    meta: Tensor,
    interleaved: bool,
    tokens: bool,
    fp8_meta: bool,
    hot: Tensor | None,
    roots: bool,
) -> tuple[Tensor, ...]:
    op = "linear_gradient"
    features = _check_gradient(op, grad, w)
    return gradient_outputs(op, grad, features, "columns of w", values, meta, tokens, fp8_meta, hot, roots)


def gradient_outputs(
    op: str,
    grad: Tensor,
    features: int,
    of_w: str,
    values: Tensor,
    meta: Tensor,
    tokens: bool,
    fp8_meta: bool,
    hot: Tensor | None,
    roots: bool,
) -> tuple[Tensor, ...]:
    """Check all but grad and w, whose `of_w` are the features, and make what the op returns."""
    rows = grad.shape[0]
    meta_dtype = FP8 if fp8_meta else grad.dtype
    multiple = feature_alignment(meta_dtype, -1)
    what = "fp8_meta=True" if fp8_meta else f"{name_of(grad.dtype)} values"
    expect(features % multiple == 0, op, f"w to have a multiple of {multiple} {of_w.split()[0]} ({what})", features)
    check_beside(op, "values", values, grad)
    _check_shape(op, "values", values, rows, features // 2, f"half the {of_w}")
    check_device(op, "meta", meta, "grad", grad)
    check_meta(op, meta, Operand.of(rows, features, meta_dtype, -1))
    _check_roots(op, roots, grad)
    hot_count = 0
    if hot is not None:
        expect(tokens, op, "tokens to be True where hot is given", tokens)
        check_device(op, "hot", hot, "grad", grad)
        check_sizes(op, "hot", hot, 1)
        check_exact_dtype(op, "hot", hot, torch.int64)
        hot_count = hot.shape[0]
        expect(hot_count <= features, op, f"hot to have at most {features} elements ({of_w})", hot_count)

    a = Operand.of(rows, features, grad.dtype, -2)

    def along_tokens() -> tuple[Tensor, Tensor]:
        shape: tuple[int, ...] = a.values_shape if tokens else (0,)
        return grad.new_empty(shape), grad.new_empty(a.meta_bytes if tokens else 0, dtype=torch.uint8)

    counts = grad.new_empty(features if tokens and hot is None else 0, dtype=torch.int32)
    y_hot, dh_hot = (grad.new_empty(hot_count, rows) for _ in range(2))
    return grad.new_empty(rows, features // 2), *along_tokens(), *along_tokens(), counts, y_hot, dh_hot


def _fake_linear_relu2_gradient(grad: Tensor, w: Tensor, y: Tensor, roots: bool) -> Tensor:
    op = "linear_relu2_gradient"
    features, rows = _check_gradient(op, grad, w), grad.shape[0]
    expect(features % 8 == 0, op, f"w to have a multiple of 8 columns ({name_of(grad.dtype)} output)", features)
    check_beside(op, "y", y, grad)
    _check_shape(op, "y", y, rows, features, "columns of w")
    _check_roots(op, roots, grad)
    return grad.new_empty(rows, features)


def _flops(grad: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``grad @ w``."""
    return 2 * grad[0] * grad[1] * w[1]


_PART = "it is a part of one"
_linear_gradient = define("linear_gradient", _fake_linear_gradient, no_backward=_PART, flops=_flops)
_linear_relu2_gradient = define("linear_relu2_gradient", _fake_linear_relu2_gradient, no_backward=_PART, flops=_flops)
