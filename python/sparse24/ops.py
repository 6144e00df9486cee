"""The ops: typed wrappers of ``torch.ops.sparse24`` with their documentation.

Fake functions and autograd are registered by `sparse24._fake` and `sparse24._autograd`.

``compress`` sees X [R, C] as the sparse operand A [M, K] of a matrix product:

=======  ==========================  =========  ==================  =====================================
dim      groups of four              A          product of `mm`     values
=======  ==========================  =========  ==================  =====================================
-1       ``X[r, 4g .. 4g+3]``        X          ``X @ b``           [R, C/2]
-2       ``X[4g .. 4g+3, c]``        X.T        ``X.T @ b``         16-bit and float32: [up(R, 4)/2, C];
                                                                    fp8: [C, up(R, 32)/2]
=======  ==========================  =========  ==================  =====================================

Rows R are arbitrary: for dim=-2 they are padded with zeros. Columns C must be a multiple of 16 (32 for fp8 values) for
dim=-1 and of 8 for dim=-2. ``meta`` is a 1-dimensional uint8 tensor in the order that the hardware reads; it belongs to
M, K, dim and the width of the values.

Every op runs on CUDA (compute capability 9.0) and on the CPU. The bits are the same but for what is a product: those of
`mm` and the ops named ``linear_*`` differ by the order of summation, and what is made of their sums is the same given
the same sums. float32 is for the CPU only. Inputs that are not contiguous or not 16-byte aligned are copied. Wrong
arguments raise RuntimeError: ``sparse24.<op>: expected <argument> <rule>, got <value>``, while tracing too. What is no
tensor at all gets that sentence from these functions; ``torch.ops`` has torch's own, but for None beside a tensor. An
allocation that fails raises torch.OutOfMemoryError, on both devices and however the op was called:
``sparse24.<op>: out of memory: <N> bytes asked for on <device>``. On the CPU the ops take as many threads as
``torch.get_num_threads()`` says.

A given scale that an op divides by counts as the smallest normal float32 number where its magnitude is below that: 0,
which ``amax / 448`` of zeros is, and subnormal numbers. Its inverse is then finite, as that of computed scales. Every
other scale counts as it is: a negative one turns the signs of what is stored, and what is stored with NaN or an
infinity decodes to NaN. The scale that an op returns is the one that was used.

Metadata from elsewhere than from the ops may hold anything. No op then leaves its memory, and all that decode it agree:
of a group's two values the first lies at i0 and the second at i1 (the bits of a nibble are ``i0 | i1 << 2``), and if
both lie at the same place the first counts. `mm` is for metadata that the ops made: of a nibble without i0 < i1 the
tensor cores make undefined numbers.

`linear_relu2` and `linear_compress` are documented in `sparse24.linear`.

Source: Haziza et al. 2025, "Accelerating Transformer Inference and Training with 2:4 Activation Sparsity",
arXiv 2503.16672.
"""

from typing import Literal

import torch
from torch import Tensor

from sparse24 import _autograd, _fake, _flop_counter, _in_place
from sparse24._arguments import refuse_non_tensors
from sparse24._densest_features import densest_features
from sparse24._feature_counts import feature_counts
from sparse24._linear_gradient import linear_gradient, linear_relu2_gradient
from sparse24._put_features import put_features
from sparse24.linear import OutputScaling, linear_compress, linear_relu2

Activation = Literal["none", "relu", "relu2"]
Dim = Literal[-1, -2]
Scaling = Literal["row", "tensor"]

__all__ = [
    "Activation",
    "Dim",
    "OutputScaling",
    "Scaling",
    "compress",
    "compress_fp8",
    "compress_like",
    "decompress",
    "densest_features",
    "feature_counts",
    "gather_features",
    "linear_compress",
    "linear_gradient",
    "linear_relu2",
    "linear_relu2_gradient",
    "mm",
    "put_features",
    "quantize_fp8",
    "quantize_fp8_predict",
]

_fake.register()
_autograd.register()
_in_place.register()
_flop_counter.register()

# Looked up once: each lookup through torch.ops costs as much as a small op.
_compress = torch.ops.sparse24.compress.default
_compress_fp8 = torch.ops.sparse24.compress_fp8.default
_compress_like = torch.ops.sparse24.compress_like.default
_decompress = torch.ops.sparse24.decompress.default
_gather_features = torch.ops.sparse24.gather_features.default
_mm = torch.ops.sparse24.mm.default
_quantize_fp8 = torch.ops.sparse24.quantize_fp8.default
_quantize_fp8_predict = torch.ops.sparse24.quantize_fp8_predict.default


def compress(x: Tensor, activation: Activation = "none", dim: Dim = -1) -> tuple[Tensor, Tensor]:
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

    Returns
    -------
    values : Tensor
        The kept values, of x's dtype: [R, C/2] for dim=-1, [up(R, 4)/2, C] for dim=-2.
    meta : Tensor
        Their positions, uint8, 1-dimensional.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank, number of columns, activation or dim; a device without kernels.

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
    try:
        return _compress(x, activation, dim)
    except RuntimeError:
        refuse_non_tensors(_compress, x)
        raise


def compress_fp8(
    x: Tensor,
    scale: Tensor | None = None,
    activation: Activation = "none",
    dim: Dim = -1,
    scaling: Scaling = "row",
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
    try:
        return _compress_fp8(x, scale, activation, dim, scaling)
    except RuntimeError:
        refuse_non_tensors(_compress_fp8, x, scale)
        raise


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
    try:
        return _compress_like(x, meta, dim)
    except RuntimeError:
        refuse_non_tensors(_compress_like, x, meta)
        raise


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
    try:
        return _decompress(values, meta, rows, cols, dim)
    except RuntimeError:
        refuse_non_tensors(_decompress, values, meta)
        raise


def gather_features(values: Tensor, meta: Tensor, features: Tensor, fp8_meta: bool = False) -> Tensor:
    """Fetch some columns of the dense matrix: ``decompress(values, meta, R, C)[:, features]``.

    The dense matrix is not made.

    Parameters
    ----------
    values : Tensor [R, C/2]
        bfloat16, float16, float8_e4m3fn; on the CPU also float32. As `compress` with dim=-1 gives it.
    meta : Tensor
        Its positions.
    features : Tensor [H]
        int64, from 0 to C - 1, in any order, also repeated. Nothing can refuse what lies on a device: an index outside
        gives a column of NaN.
    fp8_meta : bool
        `meta` is in the layout of float8 values, whatever `values` are: of `compress_fp8` or fp8 `linear_compress`. C
        is then a multiple of 32.

    Returns
    -------
    Tensor [R, H]
        Of the dtype of `values`. fp8 values stay as stored: multiply by their scale.

    Raises
    ------
    RuntimeError
        ``sparse24.gather_features: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: asking for a gradient raises.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the densest features take a dense product).
    """
    try:
        return _gather_features(values, meta, features, fp8_meta)
    except RuntimeError:
        refuse_non_tensors(_gather_features, values, meta, features)
        raise


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
    try:
        return _mm(
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
    except RuntimeError:
        refuse_non_tensors(_mm, values, meta, b, scale_a, scale_b, bias)
        raise


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
        bits on every device.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank, number of columns or factor; backward, which is not defined.
    """
    try:
        return _quantize_fp8_predict(x, factor)
    except RuntimeError:
        refuse_non_tensors(_quantize_fp8_predict, x, factor)
        raise
