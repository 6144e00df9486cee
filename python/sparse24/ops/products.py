"""Products of a 2:4 matrix with a dense one."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from sparse24.errors import fail
from sparse24.format import FP8, VALUES, WIDE, Operand, feature_alignment, token_padding
from sparse24.ops.arguments import Dim, run
from sparse24.ops.checks import (
    check_device,
    check_dim,
    check_dtype,
    check_meta,
    check_optional_scale,
    check_same_dtype,
    check_sizes,
    check_vector,
    either,
    expect,
    listed,
    name_of,
)
from sparse24.ops.compression import compress_like, decompress
from sparse24.ops.registration import define
from sparse24.ops.token_order import deinterleave, interleave

__all__ = ["mm"]


def mm(
    values: Tensor,
    meta: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dim: Dim = -1,
    out_dtype: torch.dtype | None = None,
    transpose_out: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Multiply a compressed matrix with a dense one.

    ``out[m, n] = scale_a[m] * scale_b[n] * sum_k A[m, k] b[k, n] + bias[n]``, where A [M, K] is X for dim=-1 and X.T
    for dim=-2. Accumulates in float32 and rounds once. A row of the result does not depend on the other rows.

    Parameters
    ----------
    values, meta : Tensor
        X compressed along `dim`: bfloat16, float16 or float8_e4m3fn; on the CPU also float32.
    b : Tensor [K, N]
        Of the dtype of `values`. K is C for dim=-1 and the true number of tokens R for dim=-2; N is arbitrary. float8:
        K-major (``w.t()`` of a contiguous w). Otherwise either majorness. On CUDA b is copied where its address or
        leading dimension is not a multiple of 16 bytes, and where it is K-major with dim=-2: no kernel is compiled for
        this combination, which no product of a feed-forward network has.
    scale_a : Tensor, optional
        float32, 1 or M elements in any shape. Default: 1.
    scale_b : Tensor, optional
        float32, 1 or N elements in any shape. Default: 1.
    bias : Tensor [N], optional
        Of `out_dtype` or float32.
    dim : {-1, -2}
        The one that `values` and `meta` were compressed with.
    out_dtype : torch.dtype, optional
        bfloat16, float16 or float32. Default: the dtype of `values`, bfloat16 for float8.
    transpose_out : bool
        Store and return the transpose.
    interleaved : bool
        For dim=-2: the rows of X are ordered so that groups of four are tokens a quarter apart, as `linear_gradient`
        gives them, and those of b are tokens in their own order. Row ``4 g + i`` of X is of token ``i Q + g``,
        ``Q = K // 4``, and the last K % 4 rows are of their own tokens. On CUDA b is copied where K is not a multiple
        of 4, and in float8.

    Returns
    -------
    Tensor
        [M, N], or [N, M] with `transpose_out`; contiguous.

    Raises
    ------
    RuntimeError
        Wrong dtype, device, rank or majorness; sizes of values, meta, b, scales and bias that do not fit each other;
        `interleaved` with dim=-1.

    Notes
    -----
    Differentiable with respect to values, b and bias in 16 bits and float32 (scales are constants); float8 raises in
    backward. float8 on CUDA uses the fast accumulation of the tensor cores. A kept zero multiplies as any number: an
    infinite entry of b gives NaN there. What is not kept does not: there a dense product has NaN and this one has none.
    Tokens of the padding multiply nothing, whatever `values` holds for them. Where other metadata than that of
    `compress` keeps one of them in the last group, it multiplies zero.

    Source: Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w = torch.randn(3, 32).relu(), torch.randn(8, 32)
    >>> values, meta = sparse24.compress(x)
    >>> y = sparse24.mm(values, meta, w.t())
    >>> torch.testing.assert_close(y, sparse24.decompress(values, meta, 3, 32) @ w.t())
    """
    return run(
        _mm,
        values,
        meta,
        b,
        scale_a,
        scale_b,
        bias,
        dim=dim,
        out_dtype=out_dtype,
        transpose_out=transpose_out,
        interleaved=interleaved,
    )


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _operand_of_mm(values: Tensor, b: Tensor, dim: int) -> Operand:
    """Infer the sparse operand from the shapes of its values and of b [K, N]."""
    dtype, b_rows = values.dtype, b.shape[0]
    if dim == -1:
        multiple = feature_alignment(dtype, -1) // 2
        rule = f"values to have a multiple of {multiple} columns ({name_of(dtype)}, dim=-1)"
        expect(values.shape[1] % multiple == 0, "mm", rule, values.shape[1])
        k = 2 * values.shape[1]
        expect(b_rows == k, "mm", f"b to have {k} rows (K of the sparse operand)", b_rows)
        return Operand.of(values.shape[0], k, dtype, dim)
    # Values are [token pairs, M] in 16 bits and float32, [M, token pairs] in float8.
    m, pairs = values.shape if dtype == FP8 else reversed(values.shape)
    of_m, of_pairs = ("rows", "columns") if dtype == FP8 else ("columns", "rows")
    padding = token_padding(dtype)
    for size, multiple, name in ((m, feature_alignment(dtype, -2), of_m), (pairs, padding // 2, of_pairs)):
        rule = f"values to have a multiple of {multiple} {name} ({name_of(dtype)}, dim=-2)"
        expect(size % multiple == 0, "mm", rule, size)
    most = 2 * pairs
    least = most - padding + 1  # negative where there are none
    rule = f"b to have {torch.sym_max(0, least)} to {most} rows (K of the sparse operand)"
    padded = (b_rows + padding - 1) // padding * padding  # as the ops pad; what tracers see to hold for any size
    expect(padded == most, "mm", rule, b_rows)
    return Operand.of(b_rows, m, dtype, dim)


def _fake_mm(
    values: Tensor,
    meta: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    bias: Tensor | None,
    *,
    dim: int,
    out_dtype: torch.dtype | None,
    transpose_out: bool,
    interleaved: bool,
) -> Tensor:
    op = "mm"
    check_dim(op, dim)
    expect(not interleaved or dim == -2, op, "dim to be -2 with interleaved=True", dim)
    check_sizes(op, "values", values, 2)
    check_dtype(op, "values", values, VALUES)
    check_device(op, "meta", meta, "values", values)
    check_device(op, "b", b, "values", values)
    check_sizes(op, "b", b, 2)
    check_same_dtype(op, "b", b, "values", values)
    a = _operand_of_mm(values, b, dim)
    n = b.shape[1]
    check_meta(op, meta, a)
    if values.dtype == FP8:
        rule = "b to be K-major for float8_e4m3fn (stride 1 along dim 0, as w.t() of a contiguous w)"
        expect(either(b.stride(0) == 1, b.shape[0] <= 1), op, rule, f"strides {listed(b.stride())}")
    check_optional_scale(op, "scale_a", scale_a, a.m, "rows of the sparse operand", "values", values)
    check_optional_scale(op, "scale_b", scale_b, n, "columns of b", "values", values)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if values.dtype == FP8 else values.dtype
    expect(out_dtype in WIDE, op, "out_dtype to be bfloat16, float16 or float32", name_of(out_dtype))
    if bias is not None:
        check_device(op, "bias", bias, "values", values)
        allowed = "" if out_dtype == torch.float32 else " (out_dtype) or float32"
        rule = f"bias to be {name_of(out_dtype)}{allowed}"
        expect(bias.dtype in (out_dtype, torch.float32), op, rule, name_of(bias.dtype))
        check_vector(op, "bias", bias, n, "N")
    return values.new_empty((n, a.m) if transpose_out else (a.m, n), dtype=out_dtype)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def _mm_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    values, meta, b, scale_a, scale_b, bias = inputs
    ctx.dim = keyword_only_inputs["dim"]
    ctx.transpose_out = keyword_only_inputs["transpose_out"]
    ctx.interleaved = keyword_only_inputs["interleaved"]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, meta, b, scale_a, scale_b)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, meta, b, scale_a, scale_b = ctx.saved_tensors
    if values.dtype == torch.float8_e4m3fn:
        fail("mm", "values to be bfloat16, float16 or float32 for a backward pass", "float8_e4m3fn")
    g = grad.t() if ctx.transpose_out else grad  # [M, N]
    # Where trailing arguments are left out, needs_input_grad ends before them.
    learns_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[5]
    grad_bias = g.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if learns_bias else None
    if scale_a is not None:
        g = g * scale_a.reshape(-1, 1)
    if scale_b is not None:
        g = g * scale_b.reshape(1, -1)
    g = g.to(values.dtype)
    grad_values = grad_b = None
    if ctx.needs_input_grad[0]:
        rows_of_b = interleave(b) if ctx.interleaved else b
        grad_x = g @ b.t() if ctx.dim == -1 else rows_of_b @ g.t()  # [R, C], dense: only kept entries are read
        grad_values = compress_like(grad_x, meta, ctx.dim)
    if ctx.needs_input_grad[2]:
        if ctx.dim == -1:
            rows, cols = values.shape[0], b.shape[0]
        else:
            rows, cols = b.shape[0], values.shape[1]
        x = decompress(values, meta, rows, cols, ctx.dim)
        grad_b = (x.t() if ctx.dim == -1 else x) @ g
        if ctx.interleaved:
            grad_b = deinterleave(grad_b)
    return grad_values, None, grad_b, None, None, grad_bias


def _mm_flops(
    _values: torch.Size, _meta: torch.Size, b: torch.Size, *_args: Any, out_shape: Any, **_kwargs: Any
) -> int:
    """Count ``A @ b`` with the dense A."""
    return 2 * b[0] * prod(out_shape)


_mm = define("mm", _fake_mm, backward=_mm_backward, setup_context=_mm_setup, flops=_mm_flops)
