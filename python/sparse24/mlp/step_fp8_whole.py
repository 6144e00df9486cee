"""The training step of `sparse24.mlp.step_fp8` in one op a pass, where its scales are known before: the usual step.

The same products and bits. A step of some thirty launches takes the host longer than the GPU where there are few
tokens, and what each op does for a call is done once. Two passes over nothing but four scales, some twenty launches,
are two.
"""

from typing import Any

import torch
from torch import Tensor

from sparse24._autocast import without_autocast, without_autograd
from sparse24.mlp.function import refuse_second_derivatives
from sparse24.mlp.gathered_weight import transposed_again
from sparse24.mlp.kept_weights import BothOrders, both_orders
from sparse24.mlp.step_fp8 import StepArguments, column_sums
from sparse24.mlp.tokens import distinct_features
from sparse24.ops import decompress, relu2_mlp_fp8, relu2_mlp_fp8_gradients
from sparse24.ops.steps import OF_DH


def runs_whole(a: StepArguments) -> bool:
    """Tell whether a step runs so: with delayed scales, none of its operands packed, and nothing computed again."""
    packed = a.plan.packs_first or a.plan.packs_second
    if a.delayed is None or not a.known or a.plan.recompute or packed:
        return False
    return a.x.shape[1] > 0 and a.w1.shape[0] > 0 and a.w2.shape[0] > 0


def _codes(kept: BothOrders | None, w: Tensor, prune: int | None) -> BothOrders | None:
    return both_orders(w, prune) if kept is None and prune is not None else kept


def _is_gathered(codes: BothOrders | None) -> bool:
    return codes is not None and codes.transposed is None


class WholeStepFp8(torch.autograd.Function):
    """As `FeedForwardFp8`; takes `StepArguments` one by one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run both layers."""
        a = StepArguments(*arguments)
        plan = a.plan
        permuted = plan.sparse and a.recipe.permute_tokens
        with without_autograd():
            first, second = _codes(a.codes[0], a.w1, plan.prunes[0]), _codes(a.codes[1], a.w2, plan.prunes[1])
            w1, of_w1 = (a.w1, None) if first is None else (first.values, first.scale)
            w2, of_w2 = (a.w2, None) if second is None else (second.values, second.scale)
            how = a.b1, a.b2, of_w1, of_w2, plan.sparse, permuted, plan.function.threshold
            out, x, w1_t, w2_t, values, meta, places = relu2_mlp_fp8(a.x, w1, w2, a.delayed, *how)
        # FSDP2 gives up what it has gathered, and gathers it again for the backward pass.
        ctx.gathered = _is_gathered(first), _is_gathered(second)
        if first is not None:
            w1_t = first.values if first.transposed is None else first.transposed
        if second is not None:
            w2_t = second.values if second.transposed is None else second.transposed
        ctx.save_for_backward(x, w1_t, w2_t, values, meta, places, a.hot_features)
        hot = a.recipe.hot_features(a.w1.shape[0]) if plan.sparse else 0
        ctx.how = plan.sparse, permuted, hot
        ctx.delayed = a.delayed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once, and leave the scales of the next step."""
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        x, w1, w2, values, meta, places, hot = ctx.saved_tensors
        sparse, permuted, count = ctx.how
        need_x, _, _, need_b1, need_b2 = ctx.needs_input_grad[:5]
        with without_autocast(grad.device.type), without_autograd():
            if ctx.gathered[0]:
                w1 = transposed_again(w1)
            if ctx.gathered[1]:
                w2 = transposed_again(w2)
            if hot is not None:
                hot = distinct_features(hot, w2.shape[0])
            saved = x, w1, w2, values, meta, places, ctx.delayed
            how = hot, count, sparse, permuted, need_x, need_b1
            dx, dw1, dw2, dh, found = relu2_mlp_fp8_gradients(grad, *saved, *how)
            db1 = db2 = None
            if need_b1:
                dense = decompress(dh, meta, grad.shape[0], w2.shape[0]) if sparse else dh
                db1 = column_sums(dense, places[OF_DH, :1], grad.dtype)
            if need_b2:
                db2 = grad.sum(0, dtype=torch.float32).to(grad.dtype)
            ctx.delayed.copy_(found)
        of_tensors = dx if need_x else None, dw1, dw2, db1, db2
        return *of_tensors, *(None,) * (len(StepArguments._fields) - len(of_tensors))
