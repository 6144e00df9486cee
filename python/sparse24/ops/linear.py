"""The first GEMM of the feed-forward network with the squared ReLU in its epilogue: dense, or compressed to 2:4.

Both compute ``h = x @ w.T * scale_x * scale_w + bias`` in float32, round it to the 16-bit type of the pre-activation
(x's own; bfloat16 for float8), and store ``y = max(h, 0)^2``, or its root ``max(h, 0)``.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from sparse24.errors import fail
from sparse24.format import FP8
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import run
from sparse24.ops.compression import decompress
from sparse24.ops.linear_shapes import (
    check_linear,
    check_output_scaling,
    check_rows_of_w,
    check_scale_out,
    compressed_output,
    new_statistics,
)
from sparse24.ops.registration import define

__all__ = ["linear_compress", "linear_relu2"]

#: Where the scale of float8 output comes from: `scale_out`, or the largest value of each row.
OutputScaling = Literal["given", "row"]
#: What is stored of h: the squared ReLU, or its root.
OutputActivation = Literal["relu2", "relu"]


def linear_relu2(
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    bias: Tensor | None = None,
    scale_out: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
    activation: OutputActivation = "relu2",
    threshold: float = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply, add the bias, and store the squared ReLU of the result.

    ``y = max(h, 0)^2`` of ``h = x @ w.T * scale_x * scale_w + bias``, where h is rounded to 16 bits and y is rounded
    once: to h's dtype, or to ``e4m3(y * (1 / scale_out))``, saturating at 448. NaN stays NaN.

    Parameters
    ----------
    x : Tensor [T, D]
        bfloat16, float16 or float8_e4m3fn; on the CPU also float32. T: any. D: any; for float8 a multiple of 16.
        On CUDA, x and w are copied where D is not a multiple of 16 bytes.
    w : Tensor [F, D]
        Of x's dtype. F: a multiple of 8; for float8 output of 16.
    scale_x : Tensor, optional
        Dequantising multiplier, float32, 1 or T elements in any shape. Default: 1.
    scale_w : Tensor, optional
        Likewise, 1 or F elements.
    bias : Tensor [F], optional
        Of h's dtype: x's, bfloat16 for float8.
    scale_out : Tensor, optional
        float32, 1 or T elements: the dequantising multiplier of y. For float8 output, and only for it. Zero and
        subnormal ones count as the smallest normal number (`sparse24.ops`).
    out_dtype : torch.dtype, optional
        h's dtype or float8_e4m3fn. Default: x's dtype.
    statistics : bool
        Collect `amax` and `saturated`. False saves two small launches, and both come back empty.
    activation : {"relu2", "relu"}
        "relu" stores ``y = max(h, 0)``. In float16, whose squares have few digits below h = 1e-2 and underflow below
        2e-4, the network's training keeps these roots, which are the derivative.
    threshold : float
        Finite, from 0: y is zero where h does not exceed it. It is compared in float32 with h as it is rounded, and
        what is kept is not shifted.

    Returns
    -------
    y : Tensor [T, F]
        Contiguous.
    amax : Tensor [1]
        float32, the largest y before scaling: a delayed scale for a later call is ``amax / 448``. NaN does not count.
    saturated : Tensor [1]
        int32, how many values of float8 output were beyond 448.

    Raises
    ------
    RuntimeError
        Wrong dtype, device, rank; sizes of x, w, scales and bias that do not fit each other; a scale that is missing.

    Notes
    -----
    Differentiable with respect to x, w and bias in 16 bits and float32 (scales are constants); float8 raises in
    backward. The derivative ``2 h`` of the square is ``2 sqrt(y)``. In float16, whose squares do not hold it, the
    backward pass computes h again, which is one more product.

    Source: the dense counterpart of Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w = torch.eye(8), torch.arange(-32.0, 32.0).reshape(8, 8)
    >>> y, amax, saturated = sparse24.linear_relu2(x, w)
    >>> assert torch.equal(y, w.t().relu().square()) and amax.item() == 31**2
    """
    options = {"out_dtype": out_dtype, "statistics": statistics, "activation": activation, "threshold": threshold}
    return run(_linear_relu2, x, w, scale_x, scale_w, bias, scale_out, **options)


def linear_compress(
    x: Tensor,
    w: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    bias: Tensor | None = None,
    scale_out: Tensor | None = None,
    *,
    activation: OutputActivation = "relu2",
    scaling: OutputScaling = "given",
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
    threshold: float = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Multiply, add the bias, and store the squared ReLU of the result as 2:4 along its features.

    The dense activation never reaches memory. Given the same h, as `linear_relu2` defines it, the results are bit for
    bit those of ``compress(h, "relu2")`` and ``compress_fp8(h, scale_out, "relu2")``.

    Parameters
    ----------
    x : Tensor [T, D]
        As in `linear_relu2`.
    w : Tensor [F, D]
        Of x's dtype. F: a multiple of 16; for float8 output of 32.
    scale_x, scale_w, bias : Tensor, optional
        As in `linear_relu2`.
    scale_out : Tensor, optional
        float32, 1 or T elements: the dequantising multiplier of float8 values, needed for scaling="given". A static one
        from calibration, ``amax / 448`` of an earlier call, or one per token that is predicted as ``c * |x_row|^2``: it
        need not be exact, what saturates is counted, and may be 0 (`linear_relu2`).
    activation : {"relu2", "relu"}
        "relu" stores the root of what "relu2" does, at the same positions: see `linear_relu2`.
    scaling : {"given", "row"}
        For float8 output. "row" needs no scale: it stores 16-bit values and converts them at half the size, with the
        scale of each row's largest value. They are rounded twice, to h's dtype and to float8: the result is that of
        ``quantize_fp8(compress(h, "relu2")[0])``. float16 values overflow beyond 65504.
    out_dtype : torch.dtype, optional
        h's dtype or float8_e4m3fn. Default: x's dtype.
    statistics : bool
        Collect `amax` and `saturated`. False saves two small launches, and both come back empty.
    threshold : float
        As in `linear_relu2`.

    Returns
    -------
    values : Tensor [T, F/2]
        The kept values, of `out_dtype`.
    meta : Tensor
        Their positions, uint8, 1-dimensional, as `compress` and `compress_fp8` give them.
    scale : Tensor
        float32: what was used of `scale_out`, [T, 1] or [1]; the computed one [T, 1]; of 16-bit output [0].
    amax : Tensor [1]
        float32, the largest y before scaling. NaN does not count.
    saturated : Tensor [1]
        int32, how many kept values were beyond 448 with a given scale.

    Raises
    ------
    RuntimeError
        As in `linear_relu2`; wrong activation or scaling; a scale that is missing, or there where none is used.

    Notes
    -----
    Differentiable with respect to x, w and bias in 16 bits and float32 (scales are constants): the backward pass uses
    the forward's pattern, and takes the derivative ``2 h`` from the kept values as ``2 sqrt(y)``; in float16 from h,
    computed again as in `linear_relu2`. float8 raises in backward.

    Source: Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w = torch.randint(-2, 3, (3, 8)).float(), torch.randint(-2, 3, (32, 8)).float()
    >>> values, meta, *_ = sparse24.linear_compress(x, w)
    >>> expected = sparse24.compress(x @ w.t(), "relu2")
    >>> assert torch.equal(values, expected[0]) and torch.equal(meta, expected[1])
    """
    options = {"out_dtype": out_dtype, "statistics": statistics, "activation": activation, "threshold": threshold}
    return run(_linear_compress, x, w, scale_x, scale_w, bias, scale_out, scaling=scaling, **options)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _fake_linear_relu2(
    x: Tensor,
    w: Tensor,
    *others: Tensor | None,
    out_dtype: torch.dtype | None,
    statistics: bool,
    activation: OutputActivation,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_relu2"
    *scales_and_bias, scale_out = others
    stored = check_linear(op, x, w, *scales_and_bias, out_dtype)
    ActivationFunction(activation, threshold).check(op, ("relu2", "relu"))
    fp8 = stored == FP8
    check_rows_of_w(op, w, 16 if fp8 else 8, stored)
    reason = "float8_e4m3fn output" if fp8 else "the output is not float8_e4m3fn"
    check_scale_out(op, scale_out, x, fp8, reason)
    return x.new_empty((x.shape[0], w.shape[0]), dtype=stored), *new_statistics(x, statistics)


def _fake_linear_compress(
    x: Tensor,
    w: Tensor,
    *others: Tensor | None,
    activation: OutputActivation,
    scaling: str,
    out_dtype: torch.dtype | None,
    statistics: bool,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "linear_compress"
    check_output_scaling(op, scaling)
    *scales_and_bias, scale_out = others
    stored = check_linear(op, x, w, *scales_and_bias, out_dtype)
    ActivationFunction(activation, threshold).check(op, ("relu2", "relu"))
    return compressed_output(op, x, w, scale_out, stored, scaling, statistics)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def _linear_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    """For both linear ops: of what they return, only the activation is differentiable."""
    x, w, scale_x, scale_w, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.activation = ActivationFunction(keyword_only_inputs["activation"], keyword_only_inputs["threshold"])
    stored, *others = output
    ctx.save_for_backward(x, w, scale_x, scale_w, bias, stored, *(others[:1] if len(output) == 5 else ()))
    ctx.mark_non_differentiable(*others)


def _gradient_of_h(activation: ActivationFunction, op: str, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
    """From that of what is stored, in x's dtype."""
    x, w, scale_x, scale_w, bias, stored, *_ = saved
    if activation.kind == "relu":
        return torch.where(stored <= 0, 0, grad)
    # The pre-activation is not stored: y = h^2 has the derivative 2 h = 2 sqrt(y).
    if stored.dtype == torch.float16:
        # Squares underflow there: the product again, in the same kernel, so that the pattern is the same.
        root = getattr(torch.ops.sparse24, op).default(
            x, w, scale_x, scale_w, bias, None, statistics=False, **activation.root.options
        )[0]
    else:
        # Zeros are kept from the root, whose own derivative is infinite there.
        zero = stored == 0
        root = torch.where(zero, 0, torch.where(zero, 1, stored).float().sqrt())
    return (grad.float() * (2 * root.float())).to(x.dtype)


def _linear_backward(ctx: Any, op: str, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpoints give them away only once
    x, w, scale_x, scale_w, _, stored, *meta = saved
    for name, t in (("x", x), ("out_dtype", stored)):
        if t.dtype == torch.float8_e4m3fn:
            fail(op, f"{name} to be bfloat16, float16 or float32 for a backward pass", "float8_e4m3fn")
    grad_h = _gradient_of_h(ctx.activation, op, saved, grad)
    if meta:
        grad_h = decompress(grad_h, meta[0], x.shape[0], w.shape[0], -1)
    grad_bias = grad_h.sum(0, dtype=torch.float32).to(x.dtype) if ctx.has_bias and ctx.needs_input_grad[4] else None
    g = grad_h
    if scale_x is not None:
        g = g * scale_x.reshape(-1, 1)
    if scale_w is not None:
        g = g * scale_w.reshape(1, -1)
    g = g.to(x.dtype)
    grad_x = g @ w if ctx.needs_input_grad[0] else None
    grad_w = g.t() @ x if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None, None, grad_bias, None


def _linear_compress_backward(ctx: Any, grad_values: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    return _linear_backward(ctx, "linear_compress", grad_values)


def _linear_relu2_backward(ctx: Any, grad_y: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    return _linear_backward(ctx, "linear_relu2", grad_y)


def _flops(x: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``x @ w.T``."""
    return 2 * x[0] * x[1] * w[0]


_linear_relu2 = define(
    "linear_relu2", _fake_linear_relu2, backward=_linear_relu2_backward, setup_context=_linear_setup, flops=_flops
)
_linear_compress = define(
    "linear_compress",
    _fake_linear_compress,
    backward=_linear_compress_backward,
    setup_context=_linear_setup,
    flops=_flops,
)
