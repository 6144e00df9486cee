"""The network under the transforms of torch.func, which want autograd functions of another style.

What they save has to be an input or an output, and calling them costs more on the host: hence a second one beside
`FeedForward`, with the same numbers. First derivatives are all there is; samples of `torch.vmap` run one after another.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse24.mlp.arguments import Activated, Arguments, Plan
from sparse24.mlp.forward import activation, output
from sparse24.mlp.function import all_gradients, gradients_of_saved, refuse_second_derivatives, what_is_saved
from sparse24.ops.few_tokens import relu2_mlp_few
from sparse24.ops.forward_mode import in_torch_func, refuse_forward_mode, refuse_tangents
from sparse24.recipe import Recipe


def run_transformed(*arguments: Any) -> Tensor:
    """Run `FeedForward` with these arguments, or refuse."""
    if not in_torch_func():  # a level of torch.autograd.forward_ad
        refuse_tangents("relu2_mlp", arguments)
    return TransformedFeedForward.apply(*arguments)[0]


class TransformedFeedForward(torch.autograd.Function):
    """As `FeedForward`; returns its output, and the activation beside it."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        """Run both layers."""
        a = Arguments(*arguments)
        activated = activation(a)
        return output(a, activated), *activated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
        """Save what the backward pass takes."""
        a, activated = Arguments(*inputs), Activated(*outputs[1:])
        ctx.how = a.plan, a.recipe
        ctx.mark_non_differentiable(*(t for t in activated if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*what_is_saved(a, activated))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_hidden: None) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        return all_gradients(_Gradients.apply(ctx.how, ctx.needs_input_grad, grad, *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *_tangents: Any) -> NoReturn:
        """Refuse."""
        refuse_forward_mode("relu2_mlp")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run sample by sample."""
        return _one_by_one(TransformedFeedForward, info.batch_size, in_dims, inputs)


def run_few_transformed(*arguments: Any) -> Tensor:
    """Run `relu2_mlp_few` under `torch.vmap` alone, without a derivative."""
    return _Few.apply(*arguments)[0]


class _Few(torch.autograd.Function):
    """The op, whose few tokens are those of a sample."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor]:
        return (relu2_mlp_few(*arguments),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run sample by sample."""
        return _one_by_one(_Few, info.batch_size, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """The backward pass, which has no derivative itself: torch.func asks for the graph of every backward pass."""

    @staticmethod
    def forward(
        how: tuple[Plan, Recipe], needed: tuple[bool, ...], grad: Tensor, *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(gradients_of_saved(how, needed, grad, saved))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> NoReturn:
        refuse_second_derivatives()

    @staticmethod
    def jvp(ctx: Any, *_tangents: Any) -> NoReturn:
        refuse_forward_mode("relu2_mlp")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what autograd functions do under `torch.vmap`: stacked outputs, and the dimensions of the batch."""

    def sample(index: int) -> list[Any]:
        return [t.select(d, index) if isinstance(d, int) else t for t, d in zip(inputs, in_dims, strict=True)]

    outputs = zip(*(function.apply(*sample(index)) for index in range(size)), strict=True)
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in outputs)
    return stacked, tuple(None if t is None else 0 for t in stacked)
