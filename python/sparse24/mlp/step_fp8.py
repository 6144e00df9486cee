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

Where it runs dense, as in the warm-up of training, y and dh are transposed whole (`linear_relu2_gradient_fp8`).

Scales that are known before are those of the step before (delayed): `next_scales` says how they follow. Without them
all are exact: both dense products then run twice, once to find the largest number.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse24._autocast import without_autocast, without_autograd
from sparse24.format import FP8
from sparse24.mlp.arguments import Arguments, Gradients, Needed, Packed, Plan
from sparse24.mlp.backward import again
from sparse24.mlp.float8 import cast, linear_fp8
from sparse24.mlp.function import refuse_second_derivatives
from sparse24.mlp.gathered_weight import transposed_again
from sparse24.mlp.kept_weights import BothOrders, both_orders, codes_of
from sparse24.mlp.tokens import distinct_features, put_rows
from sparse24.ops import (
    decompress,
    densest_features,
    feature_counts,
    linear_compress,
    linear_compress_packed,
    linear_gradient_fp8,
    linear_gradient_fp8_packed,
    linear_relu2,
    linear_relu2_gradient_fp8,
    mm,
    quantize_fp8_both,
)
from sparse24.recipe import Recipe


def next_scales(used: Tensor, amax: Tensor) -> Tensor:
    """Give the scales [4] of the next step from those of this one and the largest magnitudes that it saw.

    They have room for twice those magnitudes, and shrink to a half at most, so that one quiet step does not make the
    next one saturate.

    0 is a scale that is not known yet. A magnitude of 0, or one that is not finite, in a step that a gradient scaler
    skips, changes nothing.
    """
    # Here and not beside the function: a float of the module is a symbol where a compiler takes sizes for some. Codes
    # keep their digits over 15 binades, so that one of them less costs nothing.
    # Of the same data, a power of two makes the bits of the exact scale.
    headroom, shrink = 2.0, 0.5
    wanted = (_over_largest(amax) * headroom).maximum(used * shrink)
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
    codes: tuple[BothOrders | None, BothOrders | None]  # of both weights, where they are kept
    plan: Plan
    recipe: Recipe


def runs_float8(a: Arguments) -> bool:
    """Tell whether a step runs so: the recipe says it, and there is all of it to run, with scales of its own."""
    plan = a.plan
    fits = not plan.sparse or has_products(a.recipe)
    own = a.w1_scale is None and a.w2_scale is None and a.scale_y is None and a.scale_y_factor is None
    return plan.fp8_weight_gradients and fits and own and a.w1.requires_grad and a.w2.requires_grad


def has_products(recipe: Recipe) -> bool:
    """Tell whether there are float8 kernels for the sparse products of a recipe."""
    return recipe.weight_gradients == "sparse" and recipe.reuse_mask and not recipe.residual


def of_step(
    a: Arguments,
    delayed: Tensor | None,
    known: bool,
    stored: tuple[Tensor, Tensor],
    pruned: tuple[int | None, int | None],
) -> StepArguments:
    """Give the arguments of the step that `runs_float8`.

    `stored` are its weights before they were pruned and cast, `pruned` along which dimensions they were pruned.
    """
    prunes, packs = a.plan.prunes, a.plan.packs
    first = codes_of(stored[0], a.w1, pruned[0], prunes[0], packs=packs[0])
    second = codes_of(stored[1], a.w2, pruned[1], prunes[1], packs=packs[1])
    codes = first, second
    return StepArguments(a.x, a.w1, a.w2, a.b1, a.b2, a.hot_features, delayed, known, codes, a.plan, a.recipe)


class _Saved(NamedTuple):
    """What lies between the passes: the activation and the transposes, or what both are computed again from."""

    x: Tensor  # codes [D, P]; or x itself
    w1: Tensor  # codes [D, P]; or the weight; or its codes, where they are gathered again
    w2: Tensor  # codes [F, P]; or likewise; or packed [F, D_out/2]
    values: Tensor | None
    meta: Tensor | None
    scale_x: Tensor
    scale_w1: Tensor
    scale_w2: Tensor
    scale_y: Tensor
    amax_x: Tensor  # [1], as that of y
    amax_y: Tensor
    b1: Tensor | None  # to compute again
    used: Tensor | None  # the delayed scales of this step, as `_aligned` has them
    hot_features: Tensor | None
    w2_meta: Tensor | None  # where w2 is packed


class FeedForwardFp8(torch.autograd.Function):
    """The network as one differentiable function of x, weights and biases; takes `StepArguments` one by one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run both layers."""
        with without_autograd():
            return FeedForwardFp8._forward(ctx, StepArguments(*arguments))

    @staticmethod
    def _forward(ctx: Any, a: StepArguments) -> Tensor:
        # A copy: other calls may replace them before this one's backward pass. That of x is copied where it is used.
        delayed = a.delayed if a.known else None
        used = None if delayed is None else _aligned(delayed)
        scale_x = None if delayed is None else delayed[:1]
        x, x_t, scale_x, amax_x = quantize_fp8_both(a.x, scale_x, _permuted(a.plan, a.recipe))
        w1, w1_t, scale_w1 = a.codes[0] or both_orders(a.w1, a.plan.prunes[0], packs=a.plan.packs[0])
        w2, w2_t, scale_w2 = a.codes[1] or both_orders(a.w2, a.plan.prunes[1], packs=a.plan.packs[1])
        first = x, w1, scale_x, scale_w1, a.b1
        scale_y = _at(used, 1)
        if scale_y is None:
            scale_y = _exact(_activation(a.plan, first, torch.ones_like(scale_x), statistics=True)[2])
        values, meta, amax_y = _activation(a.plan, first, scale_y, statistics=True)
        if meta is None:
            out = cast(linear_fp8(values, scale_y, w2, scale_w2, a.b2), a.x.dtype)
        else:
            out = mm(values, meta, w2.t(), scale_y, scale_w2, a.b2, out_dtype=a.x.dtype)

        scales, amax = (scale_x, scale_w1, scale_w2, scale_y), (amax_x, amax_y)
        ctx.gathered = w1_t is None and not a.plan.recompute, w2_t is None
        w1_t, w2_t = (w1 if w1_t is None else w1_t), (w2 if w2_t is None else w2_t)
        w2_t, w2_meta = w2_t if isinstance(w2_t, Packed) else (w2_t, None)
        if a.plan.recompute:
            saved = _Saved(a.x, a.w1, w2_t, None, None, *scales, *amax, a.b1, used, a.hot_features, w2_meta)
        else:
            saved = _Saved(x_t, w1_t, w2_t, values, meta, *scales, *amax, None, used, a.hot_features, w2_meta)
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
        with without_autocast(grad.device.type), without_autograd():
            if ctx.gathered[0]:
                saved = saved._replace(w1=transposed_again(saved.w1))
            if ctx.gathered[1]:
                saved = saved._replace(w2=transposed_again(saved.w2))
            found, amax = _gradients(*ctx.how, saved, Needed(*ctx.needs_input_grad[:5]), grad.contiguous())
            if ctx.delayed is not None:
                if saved.used is None:
                    found_scales = next_scales(torch.zeros_like(amax), amax)
                else:
                    # Where another call's backward pass was here since this one's forward pass, the larger scale stays.
                    used = saved.used[:, 0]
                    found_scales = next_scales(used, amax)
                    found_scales = torch.where(ctx.delayed == used, found_scales, found_scales.maximum(ctx.delayed))
                ctx.delayed.copy_(found_scales)
        return *found, *(None,) * (len(StepArguments._fields) - len(found))


def _activation(
    plan: Plan, first: tuple[Tensor | Packed | None, ...], scale_y: Tensor, *, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute codes of the activation, their positions where it is 2:4, and the largest number."""
    options = {"statistics": statistics, **plan.function.options}
    if plan.sparse:
        x, w1, *others = first
        if isinstance(w1, Packed):
            values, meta, _, amax, _ = linear_compress_packed(x, *w1, *others, scale_y, **options)
        else:
            values, meta, _, amax, _ = linear_compress(x, w1, *others, scale_y, **options)
        return values, meta, amax
    y, amax, _ = linear_relu2(*first, scale_y, **options)
    return y, None, amax


def _gradients(
    plan: Plan, recipe: Recipe, dtype: torch.dtype, saved: _Saved, needed: Needed, grad: Tensor
) -> tuple[Gradients, Tensor]:
    """Compute the gradients, and the largest magnitudes [4] of x, y, grad and dh."""
    permuted = _permuted(plan, recipe)
    if saved.values is None:
        x, x_t, *_ = quantize_fp8_both(again(saved.x), saved.scale_x, permuted)
        w1, w1_t, _ = both_orders(saved.w1, plan.prunes[0], saved.scale_w1, packs=plan.packs[0])
        first = x, w1, saved.scale_x, saved.scale_w1, saved.b1
        values, meta, _ = _activation(plan, first, saved.scale_y, statistics=False)
        saved = saved._replace(x=x_t, w1=w1_t, values=values, meta=meta)
    q, q_t, scale_grad, amax_grad = quantize_fp8_both(grad, _at(saved.used, 2), permuted)
    of_output = _Gradient(q, q_t, scale_grad)
    if plan.sparse:
        found, amax_dh = _sparse(saved, recipe, needed, of_output, dtype)
    else:
        found, amax_dh = _dense(saved, needed, of_output, dtype)
    db2 = grad.sum(0, dtype=torch.float32).to(dtype) if needed.b2 else None
    return found._replace(b2=db2), torch.cat((saved.amax_x, saved.amax_y, amax_grad, amax_dh))


class _Gradient(NamedTuple):
    """The gradient of the output: codes [T, D_out], and [D_out, P]."""

    values: Tensor
    transposed: Tensor
    scale: Tensor


def _sparse(
    saved: _Saved, recipe: Recipe, needed: Needed, grad: _Gradient, dtype: torch.dtype
) -> tuple[Gradients, Tensor]:
    """Compute the gradients of a 2:4 activation, and the largest number of dh."""
    values, meta, hot = saved.values, saved.meta, saved.hot_features
    features, scale_y = saved.w2.shape[0], saved.scale_y
    if hot is not None:
        hot = distinct_features(hot, features)
    elif count := recipe.hot_features(features):
        hot = densest_features(feature_counts(values, meta, fp8_meta=True), count)
    others = values, meta, grad.scale, saved.scale_w2, scale_y
    if saved.w2_meta is None:
        differentiate = partial(linear_gradient_fp8, grad.values, _columns(saved.w2, grad.values), *others)
    else:
        differentiate = partial(linear_gradient_fp8_packed, grad.values, saved.w2, saved.w2_meta, *others)
    scale_dh = _at(saved.used, 3)
    if scale_dh is None:
        scale_dh = _exact(differentiate(torch.ones_like(scale_y))[-2])
    of_dh, dh_tokens, dh_meta, y_tokens, y_meta, y_hot, dh_hot, amax, _ = differentiate(
        scale_dh, recipe.permute_tokens, hot
    )
    dx = mm(of_dh, meta, saved.w1.t(), scale_dh, saved.scale_w1, out_dtype=dtype) if needed.x else None
    dw1 = mm(dh_tokens, dh_meta, saved.x.t(), scale_dh, saved.scale_x, dim=-2, out_dtype=dtype)
    right = grad.transposed.t(), scale_y, grad.scale
    dw2 = mm(y_tokens, y_meta, *right, dim=-2, out_dtype=dtype, transpose_out=True)
    if hot is not None:
        put_rows(dw1, hot, linear_fp8(dh_hot, scale_dh, saved.x, saved.scale_x, None).to(dtype))
        put_rows(dw2, hot, linear_fp8(grad.transposed, grad.scale, y_hot, scale_y, None).to(dtype), transpose=True)
    dense = decompress(of_dh, meta, grad.values.shape[0], features) if needed.b1 else None
    return Gradients(dx, dw1, dw2, None if dense is None else column_sums(dense, scale_dh, dtype)), amax


def _dense(saved: _Saved, needed: Needed, grad: _Gradient, dtype: torch.dtype) -> tuple[Gradients, Tensor]:
    """Compute the gradients of a dense activation, and the largest number of dh."""
    scale_y = saved.scale_y
    operands = grad.values, _columns(saved.w2, grad.values), saved.values, grad.scale, saved.scale_w2, scale_y
    scale_dh = _at(saved.used, 3)
    if scale_dh is None:
        scale_dh = _exact(linear_relu2_gradient_fp8(*operands, torch.ones_like(scale_y))[-2])
    dh, dh_t, y_t, amax, _ = linear_relu2_gradient_fp8(*operands, scale_dh)
    dx = linear_fp8(dh, scale_dh, _columns(saved.w1, dh), saved.scale_w1, None).to(dtype) if needed.x else None
    dw1 = linear_fp8(dh_t, scale_dh, saved.x, saved.scale_x, None).to(dtype)
    dw2 = linear_fp8(grad.transposed, grad.scale, y_t, scale_y, None).to(dtype)
    return Gradients(dx, dw1, dw2, column_sums(dh, scale_dh, dtype) if needed.b1 else None), amax


def _permuted(plan: Plan, recipe: Recipe) -> bool:
    """Whether tokens are in the order of groups that lie a quarter apart: dense products have no groups."""
    return plan.sparse and recipe.permute_tokens


def _columns(transposed: Tensor, like: Tensor) -> Tensor:
    """Return a transpose without the columns that `quantize_fp8_both` has added."""
    return transposed[:, : like.shape[1]]


def column_sums(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum columns in float32, in the dtype of the first bias."""
    return (codes.to(dtype).sum(0, dtype=torch.float32) * scale).to(torch.bfloat16)


def _aligned(scales: Tensor) -> Tensor:
    """Copy scales [4] to places that are 16 bytes apart, as cuBLAS wants addresses: the first column of [4, 4]."""
    return F.pad(scales.unsqueeze(1), (0, 3))


def _at(used: Tensor | None, index: int) -> Tensor | None:
    """Return one of the delayed scales, if there are any."""
    return None if used is None else used[index, :1]


def _exact(amax: Tensor) -> Tensor:
    """Return the scale that brings the largest magnitude to that of float8; 1 for zeros."""
    return torch.where(amax > 0, _over_largest(amax), 1.0)


def _over_largest(amax: Tensor) -> Tensor:
    """Return ``amax / 448`` as kernels divide, to the bit, eager and compiled.

    Torch and compilers multiply by an inverse that is rounded. In float64 that does not show: 448 is seven times a
    power of two, and a seventh of 24 bits is never nearer than 2^-28 of it to the middle of two numbers of float32.
    """
    return (amax.double() / torch.finfo(FP8).max).float()
