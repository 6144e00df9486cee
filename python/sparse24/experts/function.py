"""The experts as an autograd function: what it saves between its passes."""

from typing import Any

import torch
from torch import Tensor

from sparse24.experts.arguments import Arguments, Needed
from sparse24.experts.backward import gradients
from sparse24.experts.checks import refuse_second_derivatives
from sparse24.experts.forward import activation, output
from sparse24.mlp.arguments import Activated


class Experts(torch.autograd.Function):
    """The experts as one differentiable function of x, weights and factors; takes `Arguments` one by one.

    It saves the activation as the forward stores it: 2:4 where it runs sparse.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run both layers."""
        a = Arguments(*arguments)
        activated = activation(a)
        ctx.plan = a.plan
        ctx.save_for_backward(*a.tensors(), *activated)
        return output(a, activated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        refuse_second_derivatives()
        *tensors, values, meta, scale = ctx.saved_tensors
        found = gradients(
            Arguments(*tensors, ctx.plan), Activated(values, meta, scale), Needed(*ctx.needs_input_grad[:4]), grad
        )
        return *found, *(None,) * (len(Arguments._fields) - len(found))
