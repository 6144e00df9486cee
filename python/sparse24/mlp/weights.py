"""2:4 weights: which entries of a weight the network keeps, and that gradients pass straight through to all of them.

With 2:4 activations each weight is needed 2:4 in one orientation only. w1 is the sparse operand of ``x @ w1.T``, so its
groups lie along the input features; w2 that of ``grad @ w2``, so its groups lie along the output features. The other
products of both weights have a sparse activation, and take the pruned weight as a dense matrix. All products thus see
one network, and its gradients are exact.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparse24.errors import dtype_name, fail, require_tensor
from sparse24.mlp.arguments import Weight
from sparse24.mlp.float8 import cast
from sparse24.recipe import Recipe


def prune24(w: Tensor, dim: int = -1) -> Tensor:
    """Keep the two largest magnitudes of each four neighbours along a dimension; the others become zero.

    Of equals the lower index is kept, and NaN counts as largest: the rule of `sparse24.compress`.

    Parameters
    ----------
    w : Tensor
        Of any floating dtype, float8 included; a multiple of four entries along `dim`.
    dim : int
        Along which dimension the groups lie.

    Returns
    -------
    Tensor
        As w: what is kept has the bits that it has there.

    Raises
    ------
    RuntimeError
        ``sparse24.prune24: expected <argument> <rule>, got <value>``.

    Notes
    -----
    The gradient passes straight through: that of w is that of the result, at all entries.

    Source: Mishra et al. 2021, arXiv 2104.08378; straight through: Zhou et al. 2021, arXiv 2102.04010.

    Examples
    --------
    >>> sparse24.prune24(torch.tensor([4.0, -1.0, 2.0, -3.0]))
    tensor([ 4.,  0.,  0., -3.])
    """
    check(w, dim, "prune24")
    return _straight(_Prune, w, dim)


def soft_threshold24(w: Tensor, dim: int = -1, scale: float | Tensor = 1.0) -> Tensor:
    """Subtract from the magnitudes of each four neighbours the second smallest of them, times a scale.

    ``sign(w) * max(|w| - t, 0) * scale``: at most two of four are left, and an entry that stops being one of them does
    so at zero, where its place changes nothing. So the result is a continuous function of w, which that of `prune24` is
    not. In float32, rounded once to w's dtype. NaN counts as largest; of more than two, the lower ones stay.

    Parameters
    ----------
    w : Tensor
        As in `prune24`.
    dim : int
        Along which dimension the groups lie.
    scale : float or Tensor [1]
        Finite, from 0. `soft_scale` gives the one that makes up for what is subtracted.

    Returns
    -------
    Tensor
        Of w's shape and dtype: already 2:4, so that `prune24` leaves it as it is.

    Raises
    ------
    RuntimeError
        ``sparse24.soft_threshold24: expected <argument> <rule>, got <value>``.

    Notes
    -----
    The gradient passes straight through: that of w is that of the result, at all entries and without the scale.

    Source: Hu et al. 2024, S-STE, arXiv 2409.09099.

    Examples
    --------
    >>> sparse24.soft_threshold24(torch.tensor([4.0, -1.0, 2.0, -3.0]))
    tensor([ 2.,  0.,  0., -1.])
    """
    check(w, dim, "soft_threshold24")
    if isinstance(scale, Tensor):
        scale = _number(scale, w.device)
    elif not (isinstance(scale, (int, float)) and 0 <= scale < math.inf):
        fail("soft_threshold24", "scale to be a finite number from 0", scale)
    return _straight(_SoftThreshold, w, dim, scale)


@torch.no_grad()
def soft_scale(w: Tensor, dim: int = -1) -> Tensor:
    """Find the scale with which `soft_threshold24` of a weight is nearest to it.

    ``<w, s> / <s, s>`` with s the result for a scale of 1, in float32; 1 where s is zero. S-STE computes it once, at
    the first step, and keeps it.

    Parameters
    ----------
    w, dim
        As in `soft_threshold24`.

    Returns
    -------
    Tensor [1]
        float32, on w's device.
    """
    exact = w.detach().float()
    soft = soft_threshold24(exact, dim)
    norm = soft.square().sum()
    return torch.where(norm > 0, (exact * soft).sum() / norm, 1.0).reshape(1)


def kept24(w: Tensor, dim: int = -1) -> Tensor:
    """Tell which entries `prune24` keeps: True there."""
    magnitudes = _members((w.float() if w.dtype.itemsize == 1 else w).abs(), dim)
    nan = [t.isnan() for t in magnitudes[:3]]
    # Of a pair the later one wins only if it is larger. An entry stays if it wins against two of the three others.
    wins = {(i, j): (magnitudes[j] <= magnitudes[i]) | nan[i] for i in range(4) for j in range(i + 1, 4)}
    first = _two_of(wins[0, 1], wins[0, 2], wins[0, 3])
    second = _two_of(~wins[0, 1], wins[1, 2], wins[1, 3])
    third = _two_of(~wins[0, 2], ~wins[1, 2], wins[2, 3])
    fourth = _two_of(~wins[0, 3], ~wins[1, 3], ~wins[2, 3])
    return _joined((first, second, third, fourth), dim)


def masked(w: Tensor, keep: Tensor) -> Tensor:
    """Keep the entries of w where `keep` is true; the gradient passes straight through to all."""
    return _straight(_Mask, w, keep)


def check_groups(recipe: Recipe, w1: Tensor, w2: Tensor) -> None:
    """Check that the weights of the network have groups of four."""
    names = ("w1", "w2"), ("columns", "rows")
    for name, w, dim in zip(names[0], (w1, w2), recipe.weight_groups(), strict=True):
        if dim is not None and w.shape[dim] % 4 != 0:
            fail("relu2_mlp", f"{name} to have a multiple of 4 {names[1][dim + 1]} for 2:4 weights", w.shape[dim])


def check_untied(what: str, w1: Tensor, w2: Tensor) -> None:
    """Check that what is written to one weight does not change the other."""
    if w1.numel() > 0 and not w1.is_meta and w1.data_ptr() == w2.data_ptr():
        fail(what, "two weights with memory of their own, to be written to", "tied ones")


def pruned_weights(
    recipe: Recipe, first: Weight, second: Weight, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prune what a recipe says of w1, w2 and w2 by neuron.

    All four of a group of w1 have one scale. Those of w2 may not: they are compared as what they are worth.
    """
    dim = recipe.weight_groups()[1]
    w1, w2 = prune24(first.values, -1), second.values
    if dim is None:
        return w1, w2, rows
    w2 = pruned24(second, dim)
    if rows is None or second.scale is None:
        return w1, w2, None if rows is None else prune24(rows, -1 - dim)
    return w1, w2, masked(rows, kept24(rows.float() * second.scale.reshape(1, -1), -1 - dim))


def pruned24(weight: Weight, dim: int) -> Tensor:
    """Prune a weight; a float8 one by what its codes are worth."""
    if weight.scale is None:
        return prune24(weight.values, dim)
    return masked(weight.values, kept24(weight.values.float() * weight.scale.reshape(-1, 1), dim))


def check(w: Any, dim: int, what: str, name: str = "w") -> None:
    """Check that a weight has groups of four."""
    require_tensor(what, name, w)
    if not w.dtype.is_floating_point:
        fail(what, f"{name} to be of a floating dtype", dtype_name(w.dtype))
    if w.dim() == 0:
        fail(what, f"{name} to have at least 1 dimension", 0)
    if not isinstance(dim, int) or isinstance(dim, bool) or not -w.dim() <= dim < w.dim():
        fail(what, f"dim to be from {-w.dim()} to {w.dim() - 1}", dim)
    if w.shape[dim] % 4 != 0:
        fail(what, f"{name} to have a multiple of 4 entries along dimension {dim}", w.shape[dim])


def _number(scale: Tensor, device: torch.device) -> Tensor:
    """Check the scale of a soft threshold that is a tensor; it becomes one without dimensions, of which w gets none."""
    if scale.numel() != 1:
        fail("soft_threshold24", "scale to have 1 element", scale.numel())
    if scale.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        fail("soft_threshold24", "scale to be float32, float64, bfloat16 or float16", dtype_name(scale.dtype))
    if scale.device != device and (scale.dim() > 0 or scale.device.type != "cpu"):  # torch takes a number of the CPU
        fail("soft_threshold24", f"scale to be on {device} as w is", scale.device)
    return scale.reshape(())


def _two_of(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a & (b | c)) | (b & c)


def _members(t: Tensor, dim: int) -> tuple[Tensor, ...]:
    return t.unflatten(dim, (t.shape[dim] // 4, 4)).unbind(dim % t.dim() + 1)


def _joined(members: tuple[Tensor, ...], dim: int) -> Tensor:
    axis = dim % members[0].dim()
    return torch.stack(members, axis + 1).flatten(axis, axis + 1)


def _pruned(w: Tensor, keep: Tensor) -> Tensor:
    if w.dtype.itemsize > 1:
        return torch.where(keep, w, 0)
    return torch.where(keep, w.view(torch.uint8), 0).view(w.dtype)


def _soft(w: Tensor, dim: int, scale: float | Tensor) -> Tensor:
    exact = w if w.dtype == torch.float64 else w.float()
    magnitude = torch.where(exact.isnan(), math.inf, exact.abs())
    a, b, c, d = _members(magnitude, dim)
    low, high = (a.minimum(b), c.minimum(d)), (a.maximum(b), c.maximum(d))
    second = low[0].maximum(low[1]).minimum(high[0].minimum(high[1]))
    left = exact.abs() - _joined((second,) * 4, dim)
    soft = torch.where(kept24(w, dim), left.copysign(exact) * scale, 0)
    return cast(soft, w.dtype)


def without_formula(w: Tensor) -> bool:
    """Whether a formula of a gradient has to be left out: `torch.jit.trace` saves torch's own functions alone."""
    tracing = not torch.compiler.is_compiling() and torch.jit.is_tracing()
    return tracing and not (torch.is_grad_enabled() and w.requires_grad)


def _straight(function: Any, w: Tensor, *arguments: Any) -> Tensor:
    apply = function.forward if without_formula(w) else function.apply
    return apply(w, *arguments)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    """What passes the gradient to its first argument as it is."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.further = (None,) * (len(inputs) - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *ctx.further


class _Prune(_Straight):
    @staticmethod
    def forward(w: Tensor, dim: int) -> Tensor:
        return _pruned(w, kept24(w, dim))


class _SoftThreshold(_Straight):
    @staticmethod
    def forward(w: Tensor, dim: int, scale: float | Tensor) -> Tensor:
        return _soft(w, dim, scale)


class _Mask(_Straight):
    @staticmethod
    def forward(w: Tensor, keep: Tensor) -> Tensor:
        return _pruned(w, keep)
