"""The two halves of the experts: x to the activation, and the activation to the output. They only compute."""

from torch import Tensor

from sparse24.experts import fused
from sparse24.experts.arguments import Arguments
from sparse24.experts.products import by_expert, by_expert_fp8, float8_experts, scaled_rows, zero_beyond
from sparse24.mlp.arguments import Activated
from sparse24.mlp.float8 import cast
from sparse24.ops import compress, compress_fp8, decompress, quantize_fp8


def activation(a: Arguments) -> Activated:
    """Compute the activation [S, F] of all experts, 2:4 along features where the plan is sparse, or its root.

    Where `fused` runs, a 2:4 activation has padded rows.
    """
    if fused.runs(a):
        return fused.activation(a)
    plan, stored = a.plan, a.plan.stored
    if plan.fp8:
        q, q_scale = quantize_fp8(a.x)
        h = by_expert_fp8(q, q_scale, *float8_experts(a.w1, a.w1_scale), a.offsets)
        if plan.sparse:
            return Activated(*compress_fp8(h, None, **stored.options))
        y, scale = quantize_fp8(stored(h))
        return Activated(y, None, scale)
    h = by_expert(a.x, a.w1.mT, a.offsets)
    if plan.sparse:
        return Activated(*compress(h, **stored.options), None)
    return Activated(stored(h), None, None)


def output(a: Arguments, activated: Activated) -> Tensor:
    """Multiply the activation with the second weights, and each row with its factor: [S, D_out] of x's dtype."""
    if fused.runs(a):
        return fused.output(a, activated)
    y = _stored(activated, a)
    if activated.scale is None:
        out = by_expert(y.square() if a.plan.roots else y, a.w2.mT, a.offsets)
    else:
        out = cast(by_expert_fp8(y, activated.scale, *float8_experts(a.w2, a.w2_scale), a.offsets), a.x.dtype)
    return zero_beyond(out if a.row_scale is None else scaled_rows(out, a.row_scale), a.offsets)


def matrix(activated: Activated, a: Arguments) -> Tensor:
    """Return what was stored, y or its root [S, F], dense and in x's dtype."""
    y = _stored(activated, a)
    if activated.scale is not None:
        y = (y.float() * activated.scale).to(a.x.dtype)
    if activated.meta is None or not fused.runs(a):
        return y
    return y.index_select(0, fused.padded_rows_of(a.offsets, a.x.shape[0]))


def _stored(activated: Activated, a: Arguments) -> Tensor:
    values, meta, _ = activated
    return values if meta is None else decompress(values, meta, values.shape[0], a.w1.shape[1])
