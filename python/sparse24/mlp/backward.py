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

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse24._autocast import without_autocast
from sparse24.mlp.arguments import Activated, Arguments, Gradients, Needed, Packed, Plan, Weight
from sparse24.mlp.float8 import float8_weight, linear_fp8
from sparse24.mlp.forward import activation
from sparse24.mlp.tokens import distinct_features, put_product, weight_gradient
from sparse24.ops import (
    compress,
    decompress,
    densest_features,
    feature_counts,
    gather_features,
    linear_gradient,
    linear_gradient_packed,
    linear_relu2_gradient,
    mm,
    quantize_fp8,
)
from sparse24.ops.activation import ActivationFunction
from sparse24.recipe import Recipe


def gradients(a: Arguments, activated: Activated | None, needed: Needed, grad: Tensor) -> Gradients:
    """Compute the gradients that are needed.

    Parameters
    ----------
    a : Arguments
        Those of the forward pass. x is only there for a gradient of w1 or to recompute, b1 and the scales of the
        activation are to recompute.
    activated : Activated, optional
        The activation, unless it is to be computed again.
    needed : Needed
        Which gradients.
    grad : Tensor [T, D_out]
        That of the output.
    """
    with without_autocast(grad.device.type):
        # The gradient of a sum is one number with strides of zero: copied once, not in each product.
        return _gradients(a, activated, needed, grad.contiguous())


class _Activation(NamedTuple):
    """The activation [T, F] as the backward pass multiplies it: in 16 bits, 2:4 where there is metadata."""

    values: Tensor
    meta: Tensor | None
    roots: bool  # the values are relu(h), not its square
    fp8: bool  # what the forward pass multiplied: the layout of the metadata, and how dx is computed

    @staticmethod
    def of(activated: Activated, plan: Plan, dtype: torch.dtype) -> "_Activation":
        values, meta, scale = activated
        if scale is not None:
            # In place: a product of its own would be float32.
            values = values.to(dtype).mul_(scale.reshape(-1, 1))
        return _Activation(values, meta, plan.roots, plan.fp8)

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


def _gradients(a: Arguments, activated: Activated | None, needed: Needed, grad: Tensor) -> Gradients:
    recipe, features, hot = a.recipe, a.w1.shape[0], a.hot_features
    db2 = _sum(grad) if needed.b2 else None
    need_dh = needed.x or needed.w1 or needed.b1
    if not (need_dh or needed.w2):
        return Gradients(b2=db2)

    # How many features to choose for a dense product.
    split = hot is None and (needed.w1 or needed.w2) and recipe.weight_gradients == "sparse"
    count = recipe.hot_features(features) if split else 0
    if hot is not None:
        hot = distinct_features(hot, features)
    w1, w2 = _sixteen_bit(a.first(), grad.dtype), a.second_packed() or _sixteen_bit(a.second(), grad.dtype)
    if not recipe.reuse_mask:
        h = F.linear(again(a.x), w1, a.b1)
        y, dh, dx = _without_mask(a.plan.function, h, grad @ w2 if need_dh else None, w1, needed.x)
        if count:
            hot = densest_features(y.count_nonzero(0).int(), count)
    else:
        if a.plan.recompute:
            activated = activation(a._replace(x=again(a.x)))
        saved = _Activation.of(activated, a.plan, grad.dtype)
        if count:
            hot = saved.densest(count)
        if needed.w1 and needed.w2 and recipe.weight_gradients == "sparse" and not recipe.residual:
            dx, dw1, dw2, dh = _both_directions(saved, grad, a.x, w1, w2, recipe, hot, needed.x)
            return Gradients(dx, dw1, dw2, _sum(saved.dense(dh)) if needed.b1 else None, db2)
        y, dh, dx = _separate(saved, grad, w1, w2, needed)

    dw1 = weight_gradient(dh, a.x, recipe, hot) if needed.w1 else None
    dw2 = weight_gradient(y, grad, recipe, hot, transpose=True) if needed.w2 else None
    return Gradients(dx, dw1, dw2, _sum(dh) if needed.b1 else None, db2)


def _both_directions(
    y: _Activation,
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor | Packed,
    recipe: Recipe,
    hot: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Compute dx, dw1, dw2 and the kept values of dh: nothing of size [T, F] is dense in memory."""
    permuted = recipe.permute_tokens
    # Given features, if only none: linear_gradient need not count.
    whole = grad.new_empty(0, dtype=torch.int64) if hot is None else hot
    dh, dh_tokens, dh_meta, y_tokens, y_meta, _, y_hot, dh_hot = _gradient_of_hidden(grad, w2, y, permuted, hot=whole)
    dw1 = mm(dh_tokens, dh_meta, x, dim=-2, interleaved=permuted)
    dw2 = mm(y_tokens, y_meta, grad, dim=-2, transpose_out=True, interleaved=permuted)
    if hot is not None:
        put_product(dw1, hot, dh_hot, x)
        put_product(dw2, hot, y_hot, grad, transpose=True)
    return _gradient_of_x(y, dh, w1) if need_x else None, dw1, dw2, dh


def _gradient_of_hidden(
    grad: Tensor, w2: Tensor | Packed, y: _Activation, *args: bool, **options: Any
) -> tuple[Tensor, ...]:
    """Run `linear_gradient`, or with a packed weight `linear_gradient_packed`."""
    options = {"fp8_meta": y.fp8, "roots": y.roots, **options}
    if isinstance(w2, Packed):
        return linear_gradient_packed(grad, *w2, y.values, y.meta, *args, **options)
    return linear_gradient(grad, w2, y.values, y.meta, *args, **options)


def _separate(y: _Activation, grad: Tensor, w1: Tensor, w2: Tensor | Packed, needed: Needed) -> _Operands:
    """Products over tokens of their own: everything that is per kept entry still happens on half of the entries."""
    if not (needed.x or needed.w1 or needed.b1):
        dh = None
    elif y.meta is None:
        dh = _gradient_of_dense(grad, w2, y.values, y.roots)
    else:
        dh = _gradient_of_hidden(grad, w2, y, tokens=False)[0]
    dx = _gradient_of_x(y, dh, w1) if needed.x else None
    if y.meta is None:
        return _Operands(y.squares(), dh, dx)
    if not (needed.w1 or needed.w2 or needed.b1):
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


def _without_mask(function: ActivationFunction, h: Tensor, dy: Tensor | None, w1: Tensor, need_x: bool) -> _Operands:
    """`Recipe.reuse_mask` of False: every pre-activation counts that the activation does not make zero."""
    y = function(h.float())
    dh = None if dy is None else function.gradient(dy.float(), h.float()).to(w1.dtype)
    return _Operands(y.to(w1.dtype), dh, mm(*compress(dh), w1) if need_x else None)


def again(x: Tensor) -> Tensor:
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
