"""The backward pass of the experts.

    dy = grad @ w2, of each row with the weights of its expert
    dh = row_scale * dy * 2 sqrt(y)          at the entries that the forward kept
    dx = dh @ w1
    dw1, dw2 = dh.T @ x, (row_scale * grad).T @ y      over the rows of each expert
    drow_scale = sum of y * dy over the features

Products over rows are dense here, whatever the recipe says: exact under the forward's mask. Where there are no kernels
(`sparse24.experts.fused`) all of it is composed.
"""

import torch
from torch import Tensor

from sparse24._autocast import without_autocast
from sparse24.experts import fused
from sparse24.experts.arguments import Arguments, Needed
from sparse24.experts.forward import matrix
from sparse24.experts.products import by_expert, over_rows, readable, sixteen_bit, zero_beyond
from sparse24.mlp.arguments import Activated


def gradients(a: Arguments, activated: Activated, needed: Needed, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, w1, w2 and row_scale that are needed, from that of the output [S, D_out]."""
    run = fused.gradients if fused.differentiates(a) else _gradients
    with without_autocast(grad.device.type):
        return run(a, activated, needed, readable(grad))


def _gradients(a: Arguments, activated: Activated, needed: Needed, grad: Tensor) -> tuple[Tensor | None, ...]:
    dtype, offsets = grad.dtype, a.offsets
    dx = dw1 = dw2 = drow = None
    kept = matrix(activated, a)
    y = kept.square() if a.plan.roots else kept
    if needed.x or needed.w1 or needed.row_scale:
        dy = by_expert(grad, sixteen_bit(a.w2, a.w2_scale, dtype), offsets)
        if needed.row_scale:
            drow = zero_beyond((y * dy).sum(1, dtype=torch.float32), offsets).to(a.row_scale.dtype)
    if needed.x or needed.w1:
        dh = _times_derivative(dy, kept, a)
        if needed.x:
            dx = zero_beyond(by_expert(dh, sixteen_bit(a.w1, a.w1_scale, dtype), offsets), offsets)
        if needed.w1:
            dw1 = over_rows(dh, a.x, offsets)
    if needed.w2:
        scaled = grad if a.row_scale is None else _rounded(grad, a.row_scale.unsqueeze(1), dtype)
        dw2 = over_rows(scaled, y, offsets)
    return dx, dw1, dw2, drow


def _times_derivative(dy: Tensor, kept: Tensor, a: Arguments) -> Tensor:
    """``row_scale * dy * 2 sqrt(y)`` in float32, rounded once; `kept` is y, or its root."""
    scale = 2 if a.row_scale is None else 2 * a.row_scale.float().unsqueeze(1)
    root = kept.float() if a.plan.roots else kept.float().sqrt()
    if torch.compiler.is_compiling() or a.plan.roots:
        return (root * scale * dy).to(dy.dtype)
    # In place: each step would be a float32 tensor of its own.
    return _rounded(root.mul_(scale), dy, dy.dtype)


def _rounded(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Their product in float32, which is not stored where torch rounds it as it is computed."""
    if torch.compiler.is_compiling():
        return (t * factor).to(dtype)
    return torch.mul(t, factor, out=torch.empty(t.shape, dtype=dtype, device=t.device))
