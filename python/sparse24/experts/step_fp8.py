"""A training step of the experts in float8, as an autograd function.

    y = 2:4 of max(x @ w1.T, 0)^2            codes, a scale for each row
    out = row_scale * (y @ w2.T)
    dh = row_scale * (grad @ w2) * 2 sqrt(y) in bfloat16
    dx = dh @ w1                             codes, a scale for each row
    dw1, dw2 = dh.T @ x, (row_scale * grad).T @ y

The first four products are float8. They want their reduction dimension contiguous in both operands, so a weight is
quantised once and written in both orders, with one scale for each expert; all micro-batches of an optimizer step take
what the first made of it (`sparse24.mlp.kept_weights`). Products over rows stay in 16 bits: their operands in float8
would be transposed first, each expert's rows from a multiple of 16, which takes longer than what it gains.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse24._autocast import without_autocast
from sparse24.experts.arguments import Arguments, Needed
from sparse24.experts.checks import refuse_second_derivatives
from sparse24.experts.fused import factors, runs
from sparse24.experts.products import over_rows, readable
from sparse24.mlp.arguments import Plan
from sparse24.mlp.kept_weights import BothOrders, both_orders, codes_of
from sparse24.ops import experts_linear_compress, experts_linear_gradient, experts_mm, quantize_fp8


class StepArguments(NamedTuple):
    """What the step is computed from, checked and cast; tensors that can have a gradient are first."""

    x: Tensor  # [S, D]
    w1: Tensor  # [E, F, D]
    w2: Tensor  # [E, D_out, F]
    row_scale: Tensor | None  # [S]
    offsets: Tensor  # [E]
    codes: tuple[BothOrders | None, BothOrders | None]  # of both weights, where they are kept
    plan: Plan


def of_step(a: Arguments, stored: tuple[Tensor, Tensor] | None) -> StepArguments:
    """Give the arguments of a step whose weights were `stored` so before they were cast; None: codes are not kept."""
    codes = (None, None) if stored is None else (codes_of(stored[0], a.w1), codes_of(stored[1], a.w2))
    return StepArguments(a.x, a.w1, a.w2, a.row_scale, a.offsets, codes, a.plan)


def runs_float8(a: Arguments) -> bool:
    """Tell whether there are kernels for all of the step."""
    return a.plan.sparse and a.x.dtype == torch.bfloat16 and a.w1_scale is None and runs(a)


class _Saved(NamedTuple):
    """What lies between the passes."""

    x: Tensor
    w1: Tensor  # codes [E, D, F], as the backward pass multiplies them
    w2: Tensor  # codes [E, F, D_out]
    scale_w1: Tensor  # [E]
    scale_w2: Tensor
    row_scale: Tensor | None
    offsets: Tensor
    values: Tensor
    meta: Tensor
    scale_y: Tensor


class ExpertsFp8(torch.autograd.Function):
    """The experts as one differentiable function of x, weights and factors; takes `StepArguments` one by one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run both layers."""
        a = StepArguments(*arguments)
        x, scale_x = quantize_fp8(a.x)
        w1, w2 = a.codes[0] or both_orders(a.w1), a.codes[1] or both_orders(a.w2)
        first = x, w1.values, a.offsets, scale_x, w1.scale
        values, meta, scale_y = experts_linear_compress(*first, **a.plan.function.options)
        second = a.offsets, scale_y, w2.scale, factors(a.row_scale)
        out = experts_mm(values, meta, w2.values.mT, *second, rows=a.x.shape[0], out_dtype=a.x.dtype)
        # Without what was added to the rows that the transposes have as columns.
        w1_t, w2_t = w1.transposed.narrow(2, 0, a.w1.shape[1]), w2.transposed.narrow(2, 0, a.w2.shape[1])
        weights = w1_t, w2_t, w1.scale, w2.scale
        ctx.save_for_backward(*_Saved(a.x, *weights, a.row_scale, a.offsets, values, meta, scale_y))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        refuse_second_derivatives()
        with without_autocast(grad.device.type):
            found = _gradients(_Saved(*ctx.saved_tensors), Needed(*ctx.needs_input_grad[:4]), readable(grad))
        return *found, *(None,) * (len(StepArguments._fields) - len(found))


def _gradients(saved: _Saved, needed: Needed, grad: Tensor) -> tuple[Tensor | None, ...]:
    offsets, rows = saved.offsets, saved.x.shape[0]
    q, scale_grad = quantize_fp8(grad)
    of_y = saved.values, saved.meta, offsets, factors(saved.row_scale)
    scales = scale_grad, saved.scale_w2, saved.scale_y
    learns = needed.w1 or needed.w2
    kept, dh, y, products = experts_linear_gradient(q, saved.w2.mT, *of_y, *scales, dense=learns)
    dx = None
    if needed.x:
        codes, scale_dh = quantize_fp8(kept)
        right = saved.w1.mT, offsets, scale_dh, saved.scale_w1
        dx = experts_mm(codes, saved.meta, *right, rows=rows, out_dtype=grad.dtype)
    return (
        dx,
        over_rows(dh, saved.x, offsets) if needed.w1 else None,
        over_rows(grad, y, offsets) if needed.w2 else None,
        products.to(saved.row_scale.dtype) if needed.row_scale else None,
    )
