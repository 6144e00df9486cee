"""Backward formulas of the ops.

The pattern is a constant of the backward pass: dropped entries get no gradient (Haziza et al. 2025: without this,
training diverges). Gradients go through the ops again, so second derivatives follow.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24._forward_mode import AutogradLibrary
from sparse24._token_order import deinterleave, interleave

_ops = torch.ops.sparse24

# As long as it lives, its registrations do.
_kernels = AutogradLibrary()


def _compress_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.activation, ctx.dim = inputs
    ctx.shape = x.shape
    # relu and relu2 need the sign or the value of x; without an activation the pattern is enough.
    ctx.save_for_backward(output[1], *(() if ctx.activation == "none" else (x,)))
    ctx.mark_non_differentiable(output[1])


def _compress_backward(ctx: Any, grad_values: Tensor, _grad_meta: Tensor | None) -> tuple[Tensor, None, None]:
    meta, *saved = ctx.saved_tensors
    grad = _ops.decompress.default(grad_values, meta, *ctx.shape, ctx.dim)
    if ctx.activation == "relu":
        grad = torch.where(saved[0] <= 0, 0, grad)
    elif ctx.activation == "relu2":
        grad = grad * (2 * torch.relu(saved[0]))
    return grad, None, None


def _compress_like_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, meta, ctx.dim = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(meta)


def _compress_like_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (meta,) = ctx.saved_tensors
    return _ops.decompress.default(grad, meta, *ctx.shape, ctx.dim), None, None


def _decompress_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, meta, _, _, ctx.dim = inputs
    ctx.save_for_backward(meta)


def _decompress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (meta,) = ctx.saved_tensors
    return _ops.compress_like.default(grad, meta, ctx.dim), None, None, None, None


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
        _refuse("mm", "values to be bfloat16, float16 or float32 for a backward pass", "float8_e4m3fn")
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
        grad_values = _ops.compress_like.default(grad_x, meta, ctx.dim)
    if ctx.needs_input_grad[2]:
        if ctx.dim == -1:
            rows, cols = values.shape[0], b.shape[0]
        else:
            rows, cols = b.shape[0], values.shape[1]
        x = _ops.decompress.default(values, meta, rows, cols, ctx.dim)
        grad_b = (x.t() if ctx.dim == -1 else x) @ g
        if ctx.interleaved:
            grad_b = deinterleave(grad_b)
    return grad_values, None, grad_b, None, None, grad_bias


def _linear_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    """For both linear ops: of what they return, only the activation is differentiable."""
    x, w, scale_x, scale_w, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.activation = keyword_only_inputs["activation"]
    stored, *others = output
    ctx.save_for_backward(x, w, scale_x, scale_w, bias, stored, *(others[:1] if len(output) == 5 else ()))
    ctx.mark_non_differentiable(*others)


def _gradient_of_h(activation: str, op: str, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
    """From that of what is stored, in x's dtype."""
    x, w, scale_x, scale_w, bias, stored, *_ = saved
    if activation == "relu":
        return torch.where(stored <= 0, 0, grad)
    # The pre-activation is not stored: y = h^2 has the derivative 2 h = 2 sqrt(y).
    if stored.dtype == torch.float16:
        # Squares underflow there: the product again, in the same kernel, so that the pattern is the same.
        root = getattr(_ops, op).default(x, w, scale_x, scale_w, bias, None, activation="relu", statistics=False)[0]
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
            _refuse(op, f"{name} to be bfloat16, float16 or float32 for a backward pass", "float8_e4m3fn")
    grad_h = _gradient_of_h(ctx.activation, op, saved, grad)
    if meta:
        grad_h = _ops.decompress.default(grad_h, meta[0], x.shape[0], w.shape[0], -1)
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


def _refuse(op: str, wanted: str, got: str) -> NoReturn:
    raise RuntimeError(f"sparse24.{op}: expected {wanted}, got {got}")


def _refusing_backward(op: str, reason: str = "rounding to fp8 has no gradient here") -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        _refuse(op, f"no backward pass ({reason})", "one")

    return backward


def register() -> None:
    """Register all of them."""
    for name, backward, setup_context in (
        ("compress", _compress_backward, _compress_setup),
        ("compress_fp8", _refusing_backward("compress_fp8"), None),
        ("compress_like", _compress_like_backward, _compress_like_setup),
        ("decompress", _decompress_backward, _decompress_setup),
        ("densest_features", _refusing_backward("densest_features", "its input and output are integers"), None),
        ("feature_counts", _refusing_backward("feature_counts", "its output is integers"), None),
        ("gather_features", _refusing_backward("gather_features", "it is a part of one"), None),
        ("mm", _mm_backward, _mm_setup),
        ("linear_relu2", _linear_relu2_backward, _linear_setup),
        ("linear_compress", _linear_compress_backward, _linear_setup),
        ("linear_gradient", _refusing_backward("linear_gradient", "it is a part of one"), None),
        ("linear_relu2_gradient", _refusing_backward("linear_relu2_gradient", "it is a part of one"), None),
        ("quantize_fp8", _refusing_backward("quantize_fp8"), None),
        ("quantize_fp8_predict", _refusing_backward("quantize_fp8_predict"), None),
    ):
        torch.library.register_autograd(f"sparse24::{name}", backward, setup_context=setup_context, lib=_kernels)
