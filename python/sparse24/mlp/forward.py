"""The two halves of the network: x to the activation, and the activation to the output. They only compute."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse24._symbolic import or_true
from sparse24.mlp.arguments import Activated, Arguments, Packed
from sparse24.mlp.float8 import cast, down_projection_fp8, float8_weight, linear_fp8
from sparse24.mlp.packed_weights import two_of_four
from sparse24.ops import (
    OutputScaling,
    Scaling,
    compress,
    compress_fp8,
    linear_compress,
    linear_compress_packed,
    linear_relu2,
    mm,
    prune_pack24,
    quantize_fp8,
    quantize_fp8_predict,
)


def activation(a: Arguments) -> Activated:
    """Compute the squared ReLU of the first layer of x [T, D], or its root."""
    return _activation_fp8(a) if a.plan.fp8 else _activation_16bit(a)


def output(a: Arguments, activated: Activated) -> Tensor:
    """Multiply the activation, which may be stored as its root, with the second weight: [T, D_out] of x's dtype."""
    values, meta, scale = activated
    if scale is None:
        if a.plan.roots:
            values = values.square()
        return F.linear(values, a.w2, a.b2) if meta is None else mm(values, meta, a.w2.t(), bias=a.b2)
    w, w_scale = float8_weight(a.second())
    if meta is None:
        return cast(down_projection_fp8(values, scale, w, w_scale, a.b2), a.x.dtype)
    # None for bfloat16, which is what float8 gives: AOTInductor of torch 2.11 calls ops with another dtype than traced.
    out_dtype = None if a.x.dtype == torch.bfloat16 else a.x.dtype
    return mm(values, meta, w.t(), scale, w_scale, a.b2, out_dtype=out_dtype)


def _activation_16bit(a: Arguments) -> Activated:
    x, w1, b1, plan = a.x, a.w1, a.b1, a.plan
    stored = plan.stored
    if plan.fused and w1.shape[0] % 8 == 0:  # as linear_relu2 needs it; where it is sparse, it is a multiple of 16
        if plan.sparse:
            if a.x_right is not None:
                x = torch.cat((x, two_of_four(x @ a.x_right.t())), 1)
            packed, options = a.first_packed(), {"bias": b1, "statistics": False, **stored.options}
            made = (
                linear_compress(x, w1, **options) if packed is None else linear_compress_packed(x, *packed, **options)
            )
            return Activated(*made[:2], None)
        return Activated(linear_relu2(x, w1, bias=b1, statistics=False, **stored.options)[0], None, None)
    h = F.linear(x, w1, b1)
    if plan.sparse:
        return Activated(*compress(h, **stored.options), None)
    return Activated(stored(h), None, None)


def _activation_fp8(a: Arguments) -> Activated:
    plan, factor = a.plan, a.scale_y_factor
    if factor is None:
        scale_y = a.scale_y
        q, x_scale = quantize_fp8(a.x)
    else:
        q, x_scale, scale_y = quantize_fp8_predict(a.x, factor)
    options = {"statistics": False, **plan.function.options}
    packed, w1_scale = a.first_packed(), a.w1_scale
    if plan.packs_first:
        codes, w1_scale = float8_weight(a.first())
        packed = Packed(*prune_pack24(codes)[1:])
    if packed is not None:
        scaling_out: OutputScaling = "row" if scale_y is None else "given"
        values, meta, scale, *_ = linear_compress_packed(
            q, *packed, x_scale, w1_scale, a.b1, scale_y, scaling=scaling_out, **options
        )
        return Activated(values, meta, scale if factor is None else scale_y)
    w1, w1_scale = float8_weight(a.first())
    if not plan.fused:
        h = linear_fp8(q, x_scale, w1, w1_scale, a.b1)
        scaling: Scaling = "row" if scale_y is None or or_true(scale_y.numel() != 1) else "tensor"
        if plan.sparse:
            return Activated(*compress_fp8(h, scale_y, scaling=scaling, **plan.function.options))
        y, scale = quantize_fp8(plan.function(h), scale_y, scaling)
        return Activated(y, None, scale)
    first = q, w1, x_scale, w1_scale, a.b1
    if plan.sparse:
        scaling_out = "row" if scale_y is None else "given"
        values, meta, scale, *_ = linear_compress(*first, scale_y, scaling=scaling_out, **options)
        # The predicted scale is [T, 1] for any T, where the op's copy of a single token's is [1].
        return Activated(values, meta, scale if factor is None else scale_y)
    if scale_y is not None:
        return Activated(linear_relu2(*first, scale_y, **options)[0], None, scale_y)
    y, scale = quantize_fp8(linear_relu2(*first, out_dtype=torch.bfloat16, **options)[0])
    return Activated(y, None, scale)
