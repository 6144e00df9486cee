"""2:4 matrices: what is kept of a dense one, with its positions, and the way back."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, VALUES, WIDE, Operand, feature_alignment
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import Activation, Dim, Scaling, run
from sparse24.ops.checks import (
    check_columns,
    check_device,
    check_dim,
    check_dtype,
    check_given_scale,
    check_meta,
    check_scaling,
    check_sizes,
    expect,
    listed,
    name_of,
    new_scale,
)
from sparse24.ops.registration import ROUNDING, define

__all__ = ["compress", "compress_fp8", "compress_like", "decompress"]


def compress(
    x: Tensor, activation: Activation = "none", dim: Dim = -1, *, threshold: float = 0
) -> tuple[Tensor, Tensor]:
    """Apply an activation and keep the two largest magnitudes of each group of four.

    ``y = activation(x)`` in float32; a group keeps its two largest ``|y|``, of equals the lower index, and NaN counts
    as largest. Squares are compared by their roots, which order the same but never underflow. So the result is a pure
    function of the input: the same bits on CPU and GPU and from run to run.

    Parameters
    ----------
    x : Tensor [R, C]
        bfloat16 or float16; on the CPU also float32. C: a multiple of 16 for dim=-1, of 8 for dim=-2. R: any.
    activation : {"none", "relu", "relu2"}
        x, ``max(x, 0)`` or ``max(x, 0)**2``. NaN stays NaN. A square is rounded once to x's dtype; the others keep the
        bits of x.
    dim : {-1, -2}
        Along which dimension the groups lie: features (the sparse operand is x) or tokens (it is x.T).
    threshold : float
        Finite, from 0: with an activation, entries of x that do not exceed it count as zero. It is compared in float32,
        and what is kept is not shifted. NaN stays NaN. With "none" it is 0.

    Returns
    -------
    values : Tensor
        The kept values, of x's dtype: [R, C/2] for dim=-1, [up(R, 4)/2, C] for dim=-2.
    meta : Tensor
        Their positions, uint8, 1-dimensional.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank, number of columns, activation, threshold or dim; a device without kernels.

    Notes
    -----
    Differentiable. The gradient reaches kept entries only: ``dx = decompress(d_values) * activation'(x)``.

    Source: Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x = torch.tensor([[4.0, -1.0, 2.0, 3.0] * 4])
    >>> values, meta = sparse24.compress(x, "relu2")
    >>> values[0, :2]
    tensor([16.,  9.])
    """
    return run(_compress, x, activation, dim, threshold=threshold)


def compress_fp8(
    x: Tensor,
    scale: Tensor | None = None,
    activation: Activation = "none",
    dim: Dim = -1,
    scaling: Scaling = "row",
    *,
    threshold: float = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply an activation, keep two of four as `compress` does, and store them as float8_e4m3fn.

    ``values = e4m3(y * (1 / scale))`` with ``y = activation(x)`` in float32: rounded once to nearest even, saturating
    at 448. The pattern is that of y, before rounding to fp8.

    Parameters
    ----------
    x : Tensor [R, C]
        bfloat16 or float16; on the CPU also float32. C: a multiple of 32 for dim=-1, of 8 for dim=-2. R: any.
    scale : Tensor, optional
        Dequantising multiplier, float32: M elements for scaling="row", one for "tensor". By default computed: the
        largest ``|y| / 448``, at least the smallest normal float; 1 where everything is zero. NaN does not count.
    activation : {"none", "relu", "relu2"}
        As in `compress`.
    dim : {-1, -2}
        As in `compress`.
    scaling : {"row", "tensor"}
        One scale per row of the sparse operand (M = R for dim=-1, C for dim=-2), or one for all.
    threshold : float
        As in `compress`.

    Returns
    -------
    values : Tensor
        float8_e4m3fn: [R, C/2] for dim=-1, [C, up(R, 32)/2] for dim=-2 (fp8 operands are K-major).
    meta : Tensor
        Positions, uint8, 1-dimensional.
    scale : Tensor
        [M, 1] or [1], float32: the computed scale, or what was used of the given one.

    Raises
    ------
    RuntimeError
        As in `compress`; wrong dtype, device or number of elements of the scale; backward, which is not defined.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672.
    """
    return run(_compress_fp8, x, scale, activation, dim, scaling, threshold=threshold)


def compress_like(x: Tensor, meta: Tensor, dim: Dim = -1) -> Tensor:
    """Gather the entries of x at a known pattern.

    ``values[...] = x[position]`` for the positions in `meta`, whatever x holds there.

    Parameters
    ----------
    x : Tensor [R, C]
        bfloat16, float16, float8_e4m3fn; on the CPU also float32. C as in `compress` and `compress_fp8`.
    meta : Tensor
        From `compress` (for 16-bit and float32 x) or `compress_fp8` (for float8 x) of a tensor of x's shape, same dim.
    dim : {-1, -2}
        As in `compress`.

    Returns
    -------
    Tensor
        Values in the shape that `compress` gives them; tokens of the padding are zero.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or number of columns; metadata of another size or device.

    Notes
    -----
    Differentiable: its transpose is `decompress`.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the backward pass uses the forward's pattern).
    """
    return run(_compress_like, x, meta, dim)


def decompress(values: Tensor, meta: Tensor, rows: int, cols: int, dim: Dim = -1) -> Tensor:
    """Put values back where they came from, zeros elsewhere.

    Parameters
    ----------
    values : Tensor
        bfloat16, float16, float8_e4m3fn; on the CPU also float32. The shape that `compress` gives values of X.
    meta : Tensor
        Their positions.
    rows, cols : int
        The shape of X.
    dim : {-1, -2}
        As in `compress`.

    Returns
    -------
    Tensor [rows, cols]
        X, of the dtype of `values`. fp8 values stay as stored: multiply by their scale.

    Raises
    ------
    RuntimeError
        Shapes of values and metadata that do not belong to rows, cols and dim.

    Notes
    -----
    Differentiable: its transpose is `compress_like`.

    Source: Haziza et al. 2025, arXiv 2503.16672.
    """
    return run(_decompress, values, meta, rows, cols, dim)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _check_x(op: str, x: Tensor, dtype: torch.dtype | None, dim: int) -> Operand:
    """Check x of `compress`, whose values are of `dtype` or of its own."""
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, WIDE)
    check_columns(op, "x", x.shape[1], dtype or x.dtype, dim)
    return Operand.of(*x.shape, dtype or x.dtype, dim)


def _new_compressed(x: Tensor, a: Operand) -> tuple[Tensor, Tensor]:
    return x.new_empty(a.values_shape, dtype=a.dtype), x.new_empty(a.meta_bytes, dtype=torch.uint8)


def _fake_compress(x: Tensor, activation: Activation, dim: int, *, threshold: float) -> tuple[Tensor, Tensor]:
    ActivationFunction(activation, threshold).check("compress")
    check_dim("compress", dim)
    return _new_compressed(x, _check_x("compress", x, None, dim))


def _fake_compress_fp8(
    x: Tensor, scale: Tensor | None, activation: Activation, dim: int, scaling: str, *, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = "compress_fp8"
    ActivationFunction(activation, threshold).check(op)
    check_dim(op, dim)
    check_scaling(op, scaling)
    a = _check_x(op, x, FP8, dim)
    check_given_scale(op, scale, scaling, a.m, "rows of the sparse operand", x)
    return *_new_compressed(x, a), new_scale(x, scaling, a.m)


def _fake_compress_like(x: Tensor, meta: Tensor, dim: int) -> Tensor:
    op = "compress_like"
    check_dim(op, dim)
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, VALUES)
    check_columns(op, "x", x.shape[1], x.dtype, dim)
    a = Operand.of(*x.shape, x.dtype, dim)
    check_device(op, "meta", meta, "x", x)
    check_meta(op, meta, a)
    return x.new_empty(a.values_shape)


def _fake_decompress(values: Tensor, meta: Tensor, rows: int, cols: int, dim: int) -> Tensor:
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


# ---- derivatives -----------------------------------------------------------------------------------------------------


def _compress_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    x, activation, ctx.dim = inputs
    ctx.activation = ActivationFunction(activation, **keyword_only_inputs)
    ctx.shape = x.shape
    # relu and relu2 need the sign or the value of x; without an activation the pattern is enough.
    ctx.save_for_backward(output[1], x if activation != "none" else None)
    ctx.mark_non_differentiable(output[1])


def _compress_backward(ctx: Any, grad_values: Tensor, _grad_meta: Tensor | None) -> tuple[Tensor, None, None]:
    meta, x = ctx.saved_tensors
    grad = _decompress(grad_values, meta, *ctx.shape, ctx.dim)
    return ctx.activation.gradient(grad, x), None, None


def _compress_like_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, meta, ctx.dim = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(meta)


def _compress_like_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (meta,) = ctx.saved_tensors
    return _decompress(grad, meta, *ctx.shape, ctx.dim), None, None


def _decompress_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, meta, _, _, ctx.dim = inputs
    ctx.save_for_backward(meta)


def _decompress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (meta,) = ctx.saved_tensors
    return _compress_like(grad, meta, ctx.dim), None, None, None, None


_compress = define("compress", _fake_compress, backward=_compress_backward, setup_context=_compress_setup)
_compress_fp8 = define("compress_fp8", _fake_compress_fp8, no_backward=ROUNDING)
_compress_like = define(
    "compress_like", _fake_compress_like, backward=_compress_like_backward, setup_context=_compress_like_setup
)
_decompress = define("decompress", _fake_decompress, backward=_decompress_backward, setup_context=_decompress_setup)
