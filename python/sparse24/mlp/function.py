"""The network as an autograd function: what it saves between its passes."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse24._autocast import without_autograd
from sparse24.mlp.arguments import Activated, Arguments, Gradients, Needed, Plan
from sparse24.mlp.backward import gradients
from sparse24.mlp.checks import fail
from sparse24.mlp.forward import activation, output
from sparse24.mlp.weights import prune24
from sparse24.recipe import Recipe


class FeedForward(torch.autograd.Function):
    """The network as one differentiable function of x, weights and biases; takes `Arguments` one by one.

    It saves the activation as the forward stores it (2:4 where it runs sparse), or with `recompute` nothing of it.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run both layers."""
        a = Arguments(*arguments)
        with without_autograd():
            activated = activation(a)
            ctx.how = a.plan, a.recipe
            kept = a if ctx.needs_input_grad[1] or a.plan.recompute else a._replace(x=None)
            ctx.save_for_backward(*what_is_saved(kept, activated))
            return output(a, activated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        # Autograd has no edge from here to an x that is not saved: a graph of this pass would lack it, silently.
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        saved = ctx.saved_tensors  # checkpoints compute them again here, and differentiably
        with without_autograd():
            return all_gradients(gradients_of_saved(ctx.how, ctx.needs_input_grad, grad, saved))


def what_is_saved(a: Arguments, activated: Activated) -> tuple[Tensor | None, ...]:
    """List the tensors that the backward pass takes: x and the weights, and the activation or what it is made of."""
    if a.second_packed() is not None:
        a = a._replace(w2=None)  # the backward pass multiplies the packed one
    if a.plan.recompute:
        return *a._replace(b2=None).tensors(), None, None, None
    if a.plan.double_pruned:
        a = a._replace(w1=prune24(a.w1, 0), w2=prune24(a.w2, 0))
    forwards = dict.fromkeys(("b1", "b2", "scale_y", "scale_y_factor", "w1_packed", "w1_meta", "x_right"))
    return *a._replace(**forwards).tensors(), *activated


def gradients_of_saved(
    how: tuple[Plan, Recipe], needed: tuple[bool, ...], grad: Tensor, saved: tuple[Tensor | None, ...]
) -> Gradients:
    """Run the backward pass with `what_is_saved`; `needed` is of all arguments."""
    return gradients(Arguments(*saved[:-3], *how), Activated(*saved[-3:]), Needed(*needed[: len(Needed._fields)]), grad)


def all_gradients(found: Gradients) -> tuple[Tensor | None, ...]:
    """Give those of all arguments, as a backward pass returns them."""
    return *found, *(None,) * (len(Arguments._fields) - len(found))


def refuse_second_derivatives() -> NoReturn:
    """Raise: the pattern, and what is dropped along tokens, are constants of one backward pass."""
    fail("create_graph to be False (second derivatives are not defined)", True)
