"""2:4 weights as the sparse operands of the two products whose other operand is dense, ``x @ w1.T`` and ``grad @ w2``.

The other products of a weight have a sparse activation, and take the pruned weight as a dense matrix. So a weight
enters a step in two forms, which one pass over it makes: pruned, and packed. In training that is once an optimizer step
(`sparse24.mlp.kept_weights`), for inference once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse24._autocast import without_autocast
from sparse24.format import FP8, up
from sparse24.mlp.arguments import Packed
from sparse24.mlp.choice import gradient_weights_pay, weights_fit, weights_pay
from sparse24.mlp.float8 import cast
from sparse24.mlp.kept_weights import kept_form
from sparse24.mlp.weights import prune24, without_formula
from sparse24.ops import pack24, prune_pack24
from sparse24.recipe import Recipe

#: The left [F, rank] and the right one [rank, D].
Adapters = tuple[Tensor, Tensor]


class Entering(NamedTuple):
    """The weights as they enter the products, and which of them are packed."""

    w1: Tensor
    w2: Tensor
    rows: Tensor | None
    first: Packed | None = None
    second: Packed | None = None
    x_right: Tensor | None = None


class Packs(NamedTuple):
    """Which products of a call have a packed weight."""

    first: bool = False
    second: bool = False

    @staticmethod
    def of(
        recipe: Recipe,
        tokens: int,
        w1: Tensor,
        w2: Tensor,
        adapters: Adapters | None,
        *,
        fp8: bool,
        float8_step: bool,
        learns: bool,
    ) -> "Packs":
        """Decide by sizes: where the kernels have no tails for them, or gain nothing, weights are multiplied dense.

        `float8_step`: all six products are float8.
        """
        if adapters is None:
            first = weights_fit(*w1.shape, fp8=fp8) and (not w1.is_cuda or weights_pay(tokens, *w1.shape, fp8=fp8))
        else:
            first = not fp8 and packed_adapters_pay(w1, adapters[1], tokens)
        if not learns or recipe.sparse_weights != "both" or not recipe.reuse_mask:  # `linear_gradient` has the mask
            return Packs(first)
        sizes, fp8 = w2.shape[::-1], float8_step
        pays = not w2.is_cuda or gradient_weights_pay(tokens, *sizes, fp8=fp8)
        return Packs(first, pays and weights_fit(*sizes, fp8=fp8))


def packed_once(w1: Tensor) -> Packed | None:
    """Pack a first weight that is 2:4, for inference, if there is a kernel for it."""
    types = (torch.bfloat16, torch.float16, FP8) if w1.is_cuda else (torch.bfloat16, torch.float16, FP8, torch.float32)
    if w1.dtype not in types or not weights_fit(*w1.shape, fp8=w1.dtype == FP8):
        return None
    return Packed(*prune_pack24(w1)[1:])


def packed_with_adapters(pruned: Tensor, left: Tensor) -> Packed | None:
    """Pack a first weight and, as further columns, the left adapters [F, rank]: two of each four are a dense matrix."""
    return None if pruned.dtype != left.dtype else packed_once(torch.cat((pruned, two_of_four(left)), 1))


def packed_adapters_pay(w1: Tensor, right: Tensor, tokens: int) -> bool:
    """Whether a step in 16 bits is faster with adapters as further columns of the packed weight: never on the CPU."""
    return w1.is_cuda and weights_pay(tokens, w1.shape[0], w1.shape[1] + 2 * up(right.shape[0], 8))


def with_adapters(w: Tensor, adapters: Adapters | None) -> Tensor:
    """Add adapters to the first weight, in its dtype, if there are any."""
    if adapters is None:
        return w
    with without_autocast(w.device.type):
        return torch.addmm(w, *adapters)


def two_of_four(t: Tensor) -> Tensor:
    """Put the columns of a matrix [N, rank] in pairs, with two zeros after each: [N, 2 rank], of multiples of 16."""
    pairs = F.pad(t, (0, -t.shape[1] % 8)).unflatten(1, (-1, 2))
    return F.pad(pairs, (0, 2)).flatten(1)


def packed_pays(packed: tuple[Tensor, ...] | None, x: Tensor) -> bool:
    """Whether a call for inference is faster with a first weight that was packed before; see `w1_packed`."""
    if packed is None:
        return False
    values = packed[0]
    d_ff, depth = values.shape[0], 2 * values.shape[1]
    if not x.is_cuda:
        return len(packed) == 2
    return weights_pay(x.numel() // max(x.shape[-1], 1), d_ff, depth, fp8=values.dtype == FP8)


def entering(
    recipe: Recipe,
    w1: Tensor,
    w2: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
    packs: Packs,
    adapters: Adapters | None = None,
) -> Entering:
    """Prune what a recipe says, and pack what is to be packed: weights of 16 bits or masters, without double pruning.

    What is packed in float8 is packed where its codes are made. With adapters the first weight is their sum; packed it
    has the left one as further columns, and the right one in the dtype of the step makes those of x.
    """
    second = right = None
    if adapters is None:
        w1, first = _entering(w1, -1, dtype, packs.first)
    else:
        left, right = (t.to(dtype) for t in adapters)
        pruned, first = _entering(w1, -1, dtype, packs.first, adapters[0] if packs.first else None)
        w1, right = with_adapters(pruned, (left, right)), right if packs.first else None
    if recipe.sparse_weights == "both":
        w2, second = _entering(w2, -2, dtype, packs.second)
        rows = None if rows is None else prune24(rows, -1)
    return Entering(w1, w2, rows, first, second, right)


def _entering(
    w: Tensor, dim: int, dtype: torch.dtype, packs: bool, left: Tensor | None = None
) -> tuple[Tensor, Packed | None]:
    beside = None if left is None else left.detach().to(dtype)
    made = kept_form(w, dtype, ("pruned", dim, packs), lambda: _forms(w, dim, dtype, packs, beside), left)
    if without_formula(w):
        pruned, *packed = _forms(w, dim, dtype, packs, beside)
    else:
        pruned, *packed = _Prune.apply(w, dim, dtype, packs, made, beside)
    return pruned, Packed(*packed) if packs else None


def _forms(w: Tensor, dim: int, dtype: torch.dtype, packs: bool, left: Tensor | None = None) -> tuple[Tensor, ...]:
    """Prune and pack a weight; a left adapter stands beside it in what is packed, and not in what is pruned."""
    if left is not None:
        pruned, *packed = _forms(torch.cat((w, two_of_four(left.to(w.dtype))), 1), dim, dtype, packs)
        return pruned[:, : w.shape[1]], *packed
    sizes = w.shape if dim == -1 else w.shape[::-1]
    if w.dtype in (dtype, torch.float32) and weights_fit(*sizes):
        forms = prune_pack24(w, dim, dtype=dtype)
        return forms if packs else forms[:1]
    pruned = cast(prune24(w, dim), dtype)
    return (pruned, *pack24(pruned, dim)) if packs else (pruned,)


class _Prune(torch.autograd.Function):
    """The pruned weight in the dtype of the step, and packed; the gradient passes straight through."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        dim: int,
        dtype: torch.dtype,
        packs: bool,
        made: tuple[Tensor, ...] | None,
        left: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.dtype = w.dtype
        # Each call of a step has tensors of its own of what is kept: autograd marks those that a function returns.
        pruned, *packed = _forms(w, dim, dtype, packs, left) if made is None else tuple(t.detach() for t in made)
        ctx.mark_non_differentiable(*packed)
        ctx.set_materialize_grads(False)
        return pruned, *packed

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_packed: None) -> tuple[Tensor | None, ...]:
        return None if grad is None else grad.to(ctx.dtype), None, None, None, None, None
