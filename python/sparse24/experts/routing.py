"""From tokens and the choices of a router to rows sorted by expert, and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse24._symbolic import or_false
from sparse24.errors import dtype_name, type_name

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def routing_problem(x: Any, index: Any, weights: Any) -> tuple[str, object] | None:
    """Tell what is expected of the arguments of `run_routed` that they are not, and what it got."""
    for name, t in (("x", x), ("index", index), ("weights", weights)):
        if not isinstance(t, Tensor):
            return f"{name} to be a Tensor", type_name(t)
        if t.dim() != 2:
            return f"{name} to have 2 dimensions", t.dim()
        if t.device != x.device:
            return f"{name} to be on {x.device} as x is", t.device
    if index.dtype not in _INTEGERS:
        return "index to be of integers", dtype_name(index.dtype)
    if not weights.is_floating_point():
        return "weights to be of a floating dtype", dtype_name(weights.dtype)
    if or_false(index.shape[0] != x.shape[0]):
        return f"index to have {x.shape[0]} rows (those of x)", index.shape[0]
    if or_false(weights.shape[0] != index.shape[0]) or or_false(weights.shape[1] != index.shape[1]):
        return f"weights to have shape {list(index.shape)} (that of index)", list(weights.shape)
    return None


def run_routed(
    x: Tensor, index: Tensor, weights: Tensor, experts: int, run: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Send each token to its experts, and add up what they give.

    Deterministic, without atomic additions, and the host does not wait for the device.

    Parameters
    ----------
    x : Tensor [T, D]
        Tokens.
    index : Tensor [T, k]
        Integers: the experts of each token. One that is negative, or from `experts` on, is nobody's, as for experts
        on other devices.
    weights : Tensor [T, k]
        Their factors, of any floating dtype.
    experts : int
        How many there are.
    run : callable
        Computes [S, D_out] of rows sorted by expert [S, D], offsets [E] and factors [S].

    Returns
    -------
    Tensor [T, D_out]
    """
    tokens, choices = index.shape
    expert, order = torch.where(index < 0, experts, index).reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(experts, device=x.device, dtype=expert.dtype), right=True)
    weights = weights if weights.dtype in (torch.float32, x.dtype) else weights.float()
    out = run(_Sorted.apply(x, order, choices), offsets.int(), weights.reshape(-1)[order])
    return _unsorted(out, order).view(tokens, choices, out.shape[1]).sum(1)


class _Sorted(torch.autograd.Function):
    """The token of each choice, in the order of the experts. Backward, the choices of a token are added in their order.

    torch's own derivative of a gather adds in any order, or sorts once more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.choices = choices
        return x.index_select(0, order // choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _unsorted(grad, order).unflatten(0, (-1, ctx.choices)).sum(1), None, None


def _unsorted(t: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(t).index_copy(0, order, t)
