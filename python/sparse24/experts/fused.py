"""The experts in grouped products whose epilogues do the rest, in bfloat16 and in float8.

A 2:4 activation has padded rows here (`sparse24.ops.experts`), of which composed backward passes read those of x.
"""

import torch
from torch import Tensor

from sparse24._symbolic import or_false
from sparse24.experts.arguments import Arguments, Needed
from sparse24.experts.products import over_rows, quantized_experts, sixteen_bit
from sparse24.experts.wide_activation import wide_activation
from sparse24.mlp.arguments import Activated
from sparse24.ops import (
    experts_linear,
    experts_linear_compress,
    experts_linear_gradient,
    experts_linear_relu2,
    experts_mm,
    quantize_fp8,
)
from sparse24.ops.experts import MOST_EXPERTS


def runs(a: Arguments) -> bool:
    """Whether there are kernels for these operands, which lie as `torch.nn.Linear` stores them."""
    if not ((a.plan.fp8 or a.x.dtype == torch.bfloat16) and a.w1.is_contiguous() and a.w2.is_contiguous()):
        return False
    return or_false(a.w1.shape[0] <= MOST_EXPERTS)


def activation(a: Arguments) -> Activated:
    """Compute the activation: [S, F], or 2:4 with padded rows where the plan is sparse."""
    options = a.plan.stored.options
    if a.plan.fp8:
        x, x_scale = quantize_fp8(a.x)
        w, w_scale = quantized_experts(a.w1, a.w1_scale)
        operands = x, w, a.offsets, x_scale, w_scale
        if a.plan.sparse:
            return Activated(*experts_linear_compress(*operands, **options))
        y, scale = quantize_fp8(experts_linear_relu2(*operands, **options))
        return Activated(y, None, scale)
    if a.plan.sparse:
        values, meta, _ = experts_linear_compress(a.x, a.w1, a.offsets, **options)
        return Activated(values, meta, None)
    return Activated(experts_linear_relu2(a.x, a.w1, a.offsets, **options), None, None)


def output(a: Arguments, activated: Activated) -> Tensor:
    """Compute [S, D_out], zeros in rows of no expert."""
    values, meta, scale = activated
    w, w_scale = quantized_experts(a.w2, a.w2_scale) if a.plan.fp8 else (a.w2, None)
    others = a.offsets, scale, w_scale, factors(a.row_scale)
    if meta is None:
        return experts_linear(values, w, *others, out_dtype=a.x.dtype)
    return experts_mm(values, meta, w.mT, *others, rows=a.x.shape[0], out_dtype=a.x.dtype)


def differentiates(a: Arguments) -> bool:
    """Whether there are kernels for the backward pass too."""
    return a.plan.sparse and a.x.dtype == torch.bfloat16 and runs(a)


def gradients(a: Arguments, activated: Activated, needed: Needed, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, w1, w2 and row_scale that are needed, from that of the output [S, D_out].

    In 16 bits: those of float8 weights are for them that get no gradient (`sparse24.experts.step_fp8` is for others).
    """
    values, meta = wide_activation(activated, a)
    w1, w2 = (sixteen_bit(w, scale, grad.dtype) for w, scale in ((a.w1, a.w1_scale), (a.w2, a.w2_scale)))
    learns = needed.w1 or needed.w2
    of_y = values, meta, a.offsets, factors(a.row_scale)
    kept, dh, y, products = experts_linear_gradient(grad, w2, *of_y, dense=learns)
    return (
        experts_mm(kept, meta, w1, a.offsets, rows=a.x.shape[0]) if needed.x else None,
        over_rows(dh, a.x, a.offsets) if needed.w1 else None,
        over_rows(grad, y, a.offsets) if needed.w2 else None,
        products.to(a.row_scale.dtype) if needed.row_scale else None,
    )


def factors(row_scale: Tensor | None) -> Tensor | None:
    """Return the factors of the rows as kernels take them."""
    return None if row_scale is None else row_scale.float()


def padded_rows_of(offsets: Tensor, rows: int) -> Tensor:
    """Return the padded row of each of so many rows, and any behind those of no expert."""
    begin = torch.cat((offsets.new_zeros(1), offsets.narrow(0, 0, offsets.shape[0] - 1)))
    tiles = (offsets - begin + 127) // 128
    shift = 128 * (tiles.cumsum(0) - tiles) - begin  # of each expert
    row = torch.arange(rows, device=offsets.device)
    expert = torch.searchsorted(offsets, row, right=True).clamp(max=offsets.shape[0] - 1)
    return row + shift.index_select(0, expert)
