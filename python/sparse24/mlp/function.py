"""The backward pass of the whole network.

    dh = (grad @ w2) * 2 sqrt(y)            dense GEMM, at the entries that the forward kept
    dx = dh @ w1                            sparse, with the forward's pattern
    dw1, dw2 = dh.T @ x, grad.T @ y         sparse along tokens

y is the activation, saved as the 2:4 values and metadata of the forward pass: its root is the derivative, so the
pre-activation is not needed. In float16, where squares underflow long before their roots, the roots are saved. The
epilogue of the first GEMM writes everything that the sparse ones multiply (`linear_gradient`). The other ways to do it
that a recipe can ask for are composed from separate ops (`_tokens`).

In fp8 the kept values of y are dequantised first, and dx is a product of float8 operands; the other three are of x's
dtype.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse24.mlp.checks import fail
from sparse24.mlp.forward import (
    Hidden,
    Mode,
    OutScale,
    Weight,
    activation,
    down_projection,
    float8_weight,
    linear_fp8,
    squared,
)
from sparse24.mlp.tokens import distinct_features, put_product, weight_gradient
from sparse24.ops import (
    compress,
    decompress,
    densest_features,
    feature_counts,
    gather_features,
    linear_gradient,
    linear_relu2_gradient,
    mm,
    quantize_fp8,
)
from sparse24.recipe import Recipe

_DENSE = Recipe(weight_gradients="dense")


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off, where it is on: the dtypes here are chosen one by one."""
    # Not torch.amp.is_autocast_available: Dynamo of torch 2.11 cannot trace it.
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class FeedForward(torch.autograd.Function):
    """The network as one differentiable function of x, weights and biases.

    It saves the activation as the forward stores it (2:4 where `mode` is sparse), or with `recompute` nothing of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        scale_y: Tensor | None,
        scale_y_factor: Tensor | None,
        hot_features: Tensor | None,
        mode: Mode,
        recipe: Recipe,
        recompute: bool,
    ) -> Tensor:
        """Run both layers."""
        hidden = activation(x, Weight(w1, w1_scale), b1, OutScale(scale_y, scale_y_factor), mode)
        ctx.backward_pass = BackwardPass.of(mode, recipe, recompute)
        again = ctx.backward_pass.recompute
        replay = (
            (x, b1, scale_y, scale_y_factor) if again else (x if ctx.needs_input_grad[1] else None, None, None, None)
        )
        kept = Hidden(None, None, None) if again else hidden
        ctx.save_for_backward(*replay, w1, w2, w1_scale, w2_scale, hot_features, *kept)
        return down_projection(squared(hidden, mode), Weight(w2, w2_scale), b2, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        # Autograd has no edge from here to an x that is not saved: a graph of this pass would lack it, silently.
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        return *gradients(ctx.backward_pass, ctx.needs_input_grad[:5], grad, *ctx.saved_tensors), *(None,) * 8


def refuse_second_derivatives() -> NoReturn:
    """Raise: the pattern, and what is dropped along tokens, are constants of one backward pass."""
    fail("create_graph to be False (second derivatives are not defined)", True)


class BackwardPass(NamedTuple):
    """How it runs."""

    mode: Mode
    recipe: Recipe
    recompute: bool  # the activation, from x

    @staticmethod
    def of(mode: Mode, recipe: Recipe, recompute: bool) -> "BackwardPass":
        """Plan that of a forward pass."""
        recipe = recipe if mode.sparse else _DENSE
        return BackwardPass(mode, recipe, recompute or not recipe.reuse_mask)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Activation(NamedTuple):
    """The activation [T, F] as the backward pass multiplies it: in 16 bits, 2:4 where there is metadata."""

    values: Tensor
    meta: Tensor | None
    roots: bool  # the values are relu(h), not its square
    fp8: bool  # what the forward pass multiplied: the layout of the metadata, and how dx is computed

    @staticmethod
    def of(hidden: Hidden, mode: Mode, dtype: torch.dtype) -> "_Activation":
        values, meta, scale = hidden
        if scale is not None:
            # In place: a product of its own would be float32.
            values = values.to(dtype).mul_(scale.reshape(-1, 1))
        return _Activation(values, meta, mode.roots, mode.fp8)

    def squares(self) -> Tensor:
        """Return the values of the activation itself."""
        return self.values.square() if self.roots else self.values

    def dense(self, values: Tensor) -> Tensor:
        """Return the dense matrix with `values` at the pattern."""
        rows, columns = values.shape[0], 2 * values.shape[1]
        if not self.fp8:
            return decompress(values, self.meta, rows, columns)
        return gather_features(values, self.meta, torch.arange(columns, device=values.device), fp8_meta=True)

    def densest(self, count: int) -> Tensor:
        """Find the features that the most tokens of a sample use."""
        return densest_features(feature_counts(self.values, self.meta, fp8_meta=self.fp8), count)


class _Operands(NamedTuple):
    """What the products over tokens multiply, dense [T, F] (None where not needed), and the gradient of x."""

    y: Tensor | None
    dh: Tensor | None
    dx: Tensor | None


def gradients(how: BackwardPass, needed: tuple[bool, ...], grad: Tensor, *saved: Tensor | None) -> Gradients:
    """Compute those of x, w1, w2, b1, b2 that are needed, from what `FeedForward` saves."""
    with without_autocast(grad.device.type):
        # The gradient of a sum is one number with strides of zero: copied once, not in each product.
        return _gradients(how, needed, grad.contiguous(), *saved)


def _gradients(
    how: BackwardPass,
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    b1: Tensor | None,
    scale_y: Tensor | None,
    factor: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    hot: Tensor | None,
    *kept: Tensor | None,
) -> Gradients:
    need_x, need_w1, need_w2, need_b1, need_b2 = needed
    mode, recipe = how.mode, how.recipe

    db2 = _sum(grad) if need_b2 else None
    need_dh = need_x or need_w1 or need_b1
    if not (need_dh or need_w2):
        return None, None, None, None, db2

    # How many features to choose for a dense product.
    split = hot is None and (need_w1 or need_w2) and recipe.weight_gradients == "sparse"
    count = recipe.hot_features(w1.shape[0]) if split else 0
    if hot is not None:
        hot = distinct_features(hot, w1.shape[0])
    first = Weight(w1, w1_scale)
    w1, w2 = _sixteen_bit(first, grad.dtype), _sixteen_bit(Weight(w2, w2_scale), grad.dtype)
    if not recipe.reuse_mask:
        y, dh, dx = _without_mask(F.linear(_again(x), w1, b1), grad @ w2 if need_dh else None, w1, need_x)
        if count:
            hot = densest_features(y.count_nonzero(0).int(), count)
    else:
        hidden = activation(_again(x), first, b1, OutScale(scale_y, factor), mode) if how.recompute else Hidden(*kept)
        saved = _Activation.of(hidden, mode, grad.dtype)
        if count:
            hot = saved.densest(count)
        over_tokens = need_w1 and need_w2 and recipe.weight_gradients == "sparse" and not recipe.residual
        if over_tokens:
            dx, dw1, dw2, dh = _both_directions(saved, grad, x, w1, w2, recipe, hot, need_x)
            return dx, dw1, dw2, _sum(saved.dense(dh)) if need_b1 else None, db2
        y, dh, dx = _separate(saved, grad, w1, w2, need_x, need_dh, need_w1 or need_w2 or need_b1)

    dw1 = weight_gradient(dh, x, recipe, hot) if need_w1 else None
    dw2 = weight_gradient(y, grad, recipe, hot, transpose=True) if need_w2 else None
    return dx, dw1, dw2, _sum(dh) if need_b1 else None, db2


def _both_directions(
    y: _Activation, grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, recipe: Recipe, hot: Tensor | None, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Compute dx, dw1, dw2 and the kept values of dh: nothing of size [T, F] is dense in memory."""
    permuted = recipe.permute_tokens
    # Given features, if only none: linear_gradient need not count.
    whole = grad.new_empty(0, dtype=torch.int64) if hot is None else hot
    dh, dh_tokens, dh_meta, y_tokens, y_meta, _, y_hot, dh_hot = linear_gradient(
        grad, w2, y.values, y.meta, permuted, fp8_meta=y.fp8, hot=whole, roots=y.roots
    )
    dw1 = mm(dh_tokens, dh_meta, x, dim=-2, interleaved=permuted)
    dw2 = mm(y_tokens, y_meta, grad, dim=-2, transpose_out=True, interleaved=permuted)
    if hot is not None:
        put_product(dw1, hot, dh_hot, x)
        put_product(dw2, hot, y_hot, grad, transpose=True)
    return _gradient_of_x(y, dh, w1) if need_x else None, dw1, dw2, dh


def _separate(
    y: _Activation, grad: Tensor, w1: Tensor, w2: Tensor, need_x: bool, need_dh: bool, need_dense: bool
) -> _Operands:
    """Products over tokens of their own: everything that is per kept entry still happens on half of the entries."""
    if not need_dh:
        dh = None
    elif y.meta is None:
        dh = _gradient_of_dense(grad, w2, y.values, y.roots)
    else:
        dh = linear_gradient(grad, w2, y.values, y.meta, tokens=False, fp8_meta=y.fp8, roots=y.roots)[0]
    dx = _gradient_of_x(y, dh, w1) if need_x else None
    if y.meta is None:
        return _Operands(y.squares(), dh, dx)
    if not need_dense:
        return _Operands(None, None, dx)
    return _Operands(y.dense(y.squares()), None if dh is None else y.dense(dh), dx)


def _gradient_of_x(y: _Activation, dh: Tensor, w1: Tensor) -> Tensor:
    """``dh @ w1``, dh given as y is, in the precision of the forward's products."""
    if not y.fp8:
        return dh @ w1 if y.meta is None else mm(dh, y.meta, w1)
    # Zeros where nothing was kept: the scale of a row is that of its kept values.
    q, q_scale = quantize_fp8(dh)
    # mm needs w1 [F, D] K-major: the transpose of rows of features.
    w, w_scale = float8_weight(Weight(w1.t().contiguous(), None))
    if y.meta is None:
        return linear_fp8(q, q_scale, w, w_scale, None).to(w1.dtype)
    return mm(q, y.meta, w.t(), q_scale, w_scale, out_dtype=w1.dtype)


def _without_mask(h: Tensor, dy: Tensor | None, w1: Tensor, need_x: bool) -> _Operands:
    """`Recipe.reuse_mask` of False: every positive pre-activation counts."""
    y = torch.relu(h.float()).square()
    dh = None if dy is None else (dy.float() * (2 * torch.relu(h.float()))).to(w1.dtype)
    return _Operands(y.to(w1.dtype), dh, mm(*compress(dh), w1) if need_x else None)


def _again(x: Tensor) -> Tensor:
    """Return x, for a computation that the compiler must not merge with the same one in the forward pass.

    It would save the result between the passes, which is what recomputation avoids. A sum over nothing is zero, and the
    compiler does not merge what is made from uninitialised memory.
    """
    return x - x.new_empty(0).sum() if torch.compiler.is_compiling() else x


def _gradient_of_dense(grad: Tensor, w2: Tensor, y: Tensor, roots: bool) -> Tensor:
    """``(grad @ w2) * 2 sqrt(y)``: y = h^2 has the derivative 2 h. `roots`: y are the roots."""
    if w2.shape[1] % 8 == 0:  # as linear_relu2_gradient needs it
        return linear_relu2_gradient(grad, w2, y, roots)
    dy = grad @ w2
    # In place: without a compiler each step would be a float32 tensor of its own.
    root = y.float() if roots else y.float().sqrt()
    return root.mul_(2).mul_(dy).to(dy.dtype)


def _sixteen_bit(weight: Weight, dtype: torch.dtype) -> Tensor:
    w, scale = weight
    return w if scale is None else (w.float() * scale.reshape(-1, 1)).to(dtype)


def _sum(t: Tensor) -> Tensor:
    """Column sums, in float32, rounded once."""
    return t.sum(0, dtype=torch.float32).to(t.dtype)
