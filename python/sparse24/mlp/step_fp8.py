"""A training step whose six products are all float8 (`Recipe.fp8_weight_gradients`), as an autograd function.

    y = 2:4 of max(x @ w1.T + b1, 0)^2       codes, one scale
    out = y @ w2.T + b2                      sparse
    dh = (grad @ w2) * 2 sqrt(y)             codes, one scale; with both directions of y and dh: `linear_gradient_fp8`
    dx = dh @ w1                             sparse, with the forward's pattern
    dw1, dw2 = dh.T @ x, grad.T @ y          sparse along tokens

float8 products want their reduction dimension contiguous in both operands. x, grad and the weights are multiplied along
rows and along columns, so each is quantised once and written in both orders (`quantize_fp8_both`); y and dh along
tokens leave the epilogue that makes dh. One scale a matrix, known before: then codes pass from one direction to the
other unchanged, and nothing waits for a maximum.

Scales that are known before are those of the step before (delayed): `next_scales` says how they follow. Without them
all are exact: both dense products then run twice, once to find the largest number.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse24._autocast import without_autocast
from sparse24.format import LARGEST_FP8
from sparse24.mlp.arguments import Arguments, Gradients, Needed, Plan
from sparse24.mlp.backward import again
from sparse24.mlp.float8 import linear_fp8
from sparse24.mlp.function import refuse_second_derivatives
from sparse24.mlp.tokens import distinct_features, put_rows
from sparse24.ops import (
    decompress,
    densest_features,
    feature_counts,
    linear_compress,
    linear_gradient_fp8,
    mm,
    quantize_fp8_both,
)
from sparse24.recipe import Recipe

#: A scale has room for magnitudes that are so many times those of the step before. Codes keep their digits over 15
#: binades: one of them less costs nothing that is measured.
HEADROOM = 2.0
#: From one step to the next a scale shrinks to this at most, so that one quiet step does not make the next saturate.
SHRINK = 0.5


def next_scales(used: Tensor, amax: Tensor) -> Tensor:
    """Give the scales [4] of the next step from those of this one and the largest magnitudes that it saw.

    0 is a scale that is not known yet. A magnitude of 0, or one that is not finite, in a step that a gradient scaler
    skips, changes nothing.
    """
    wanted = (amax * (HEADROOM / LARGEST_FP8)).maximum(used * SHRINK)
    return torch.where((amax > 0) & amax.isfinite(), wanted, used)


class StepArguments(NamedTuple):
    """What the step is computed from, checked and cast; tensors that can have a gradient are first."""

    x: Tensor  # [T, D]
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    hot_features: Tensor | None
    delayed: Tensor | None  # [4], the scales of x, y, grad and dh; the backward pass writes those of the next step
    known: bool  # `delayed` has scales for this step
    plan: Plan
    recipe: Recipe


def runs_float8(a: Arguments) -> bool:
    """Tell whether a step runs so: the recipe says it, and there is all of it to run, with scales of its own."""
    plan, recipe = a.plan, a.recipe
    wanted = plan.fp8 and plan.sparse and recipe.fp8_weight_gradients
    sparse = recipe.weight_gradients == "sparse" and recipe.reuse_mask and not recipe.residual
    own = a.w1_scale is None and a.w2_scale is None and a.scale_y is None and a.scale_y_factor is None
    return wanted and sparse and own and a.w1.requires_grad and a.w2.requires_grad


def of_step(a: Arguments, delayed: Tensor | None, known: bool) -> StepArguments:
    """Give the arguments of the step that `runs_float8`."""
    return StepArguments(a.x, a.w1, a.w2, a.b1, a.b2, a.hot_features, delayed, known, a.plan, a.recipe)


class _Saved(NamedTuple):
    """What lies between the passes: the activation and the transposes, or what both are computed again from."""

    x: Tensor  # codes [D, P]; or x itself
    w1: Tensor  # codes [D, P]; or the weight
    w2: Tensor  # codes [F, P]
    values: Tensor | None
    meta: Tensor | None
    scales: Tensor  # [4]: of x, w1, w2 and y
    amax: Tensor  # [2]: of x and y
    b1: Tensor | None  # to compute again
    used: Tensor | None  # the delayed scales of this step
    hot_features: Tensor | None


class FeedForwardFp8(torch.autograd.Function):
    """The network as one differentiable function of x, weights and biases; takes `StepArguments` one by one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run both layers."""
        a = StepArguments(*arguments)
        # A copy: other calls may replace them before this one's backward pass.
        used = a.delayed.clone() if a.delayed is not None and a.known else None
        x, x_t, scale_x, amax_x = quantize_fp8_both(a.x, _at(used, 0), a.recipe.permute_tokens)
        w1, w1_t, scale_w1, _ = quantize_fp8_both(a.w1)
        w2, w2_t, scale_w2, _ = quantize_fp8_both(a.w2)
        first = x, w1, scale_x, scale_w1, a.b1
        scale_y = _at(used, 1)
        if scale_y is None:
            largest = linear_compress(*first, torch.ones_like(scale_x), **a.plan.function.options)[3]
            scale_y = _exact(largest)
        values, meta, scale_y, amax_y, _ = linear_compress(*first, scale_y, **a.plan.function.options)
        out = mm(values, meta, w2.t(), scale_y, scale_w2, a.b2, out_dtype=a.x.dtype)

        scales, amax = torch.cat((scale_x, scale_w1, scale_w2, scale_y)), torch.cat((amax_x, amax_y))
        if a.plan.recompute:
            saved = _Saved(a.x, a.w1, w2_t, None, None, scales, amax, a.b1, used, a.hot_features)
        else:
            saved = _Saved(x_t, w1_t, w2_t, values, meta, scales, amax, None, used, a.hot_features)
        ctx.save_for_backward(*saved)
        ctx.how = a.plan, a.recipe, a.x.dtype
        ctx.delayed = a.delayed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once, and leave the scales of the next step."""
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        saved = _Saved(*ctx.saved_tensors)
        with without_autocast(grad.device.type):
            found, amax = _gradients(*ctx.how, saved, Needed(*ctx.needs_input_grad[:5]), grad.contiguous())
            if ctx.delayed is not None:
                used = torch.zeros_like(amax) if saved.used is None else saved.used
                ctx.delayed.copy_(next_scales(used, amax))
        return *found, *(None,) * (len(StepArguments._fields) - len(found))


def _gradients(
    plan: Plan, recipe: Recipe, dtype: torch.dtype, saved: _Saved, needed: Needed, grad: Tensor
) -> tuple[Gradients, Tensor]:
    """Compute the gradients, and the largest magnitudes [4] of x, y, grad and dh."""
    permuted = recipe.permute_tokens
    scale_x, scale_w1, scale_w2, scale_y = saved.scales.split(1)
    x_t, w1_t, values, meta = saved.x, saved.w1, saved.values, saved.meta
    if values is None or meta is None:
        x, x_t, *_ = quantize_fp8_both(again(saved.x), scale_x, permuted)
        w1, w1_t, *_ = quantize_fp8_both(saved.w1, scale_w1)
        options = {"statistics": False, **plan.function.options}
        values, meta, *_ = linear_compress(x, w1, scale_x, scale_w1, saved.b1, scale_y, **options)
    features, hot = saved.w2.shape[0], saved.hot_features
    if hot is not None:
        hot = distinct_features(hot, features)
    elif count := recipe.hot_features(features):
        hot = densest_features(feature_counts(values, meta, fp8_meta=True), count)

    q, q_t, scale_grad, amax_grad = quantize_fp8_both(grad, _at(saved.used, 2), permuted)
    columns = q.shape[1]
    # The transpose of a weight has its columns padded to 32.
    operands = q, saved.w2[:, :columns], values, meta, scale_grad, scale_w2, scale_y
    scale_dh = _at(saved.used, 3)
    if scale_dh is None:
        scale_dh = _exact(linear_gradient_fp8(*operands, torch.ones_like(scale_y))[-2])
    of_dh, dh_tokens, dh_meta, y_tokens, y_meta, y_hot, dh_hot, amax_dh, _ = linear_gradient_fp8(
        *operands, scale_dh, permuted, hot
    )
    dx = mm(of_dh, meta, w1_t.t(), scale_dh, scale_w1, out_dtype=dtype) if needed.x else None
    dw1 = mm(dh_tokens, dh_meta, x_t.t(), scale_dh, scale_x, dim=-2, out_dtype=dtype)
    dw2 = mm(y_tokens, y_meta, q_t.t(), scale_y, scale_grad, dim=-2, out_dtype=dtype, transpose_out=True)
    if hot is not None:
        put_rows(dw1, hot, linear_fp8(dh_hot, scale_dh, x_t, scale_x, None).to(dtype))
        put_rows(dw2, hot, linear_fp8(q_t, scale_grad, y_hot, scale_y, None).to(dtype), transpose=True)
    db1 = None
    if needed.b1:
        dh = decompress(of_dh, meta, q.shape[0], features).to(dtype)
        db1 = (dh.sum(0, dtype=torch.float32) * scale_dh).to(torch.bfloat16)
    db2 = grad.sum(0, dtype=torch.float32).to(dtype) if needed.b2 else None
    return Gradients(dx, dw1, dw2, db1, db2), torch.cat((saved.amax, amax_grad, amax_dh))


def _at(scales: Tensor | None, index: int) -> Tensor | None:
    """Return one of the delayed scales, if there are any."""
    return None if scales is None else scales[index : index + 1]


def _exact(amax: Tensor) -> Tensor:
    """Return the scale that brings the largest magnitude to that of float8; 1 for zeros."""
    return torch.where(amax > 0, amax / LARGEST_FP8, 1.0)
