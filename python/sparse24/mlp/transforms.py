"""The network under the transforms of torch.func, which want autograd functions of another style.

What they save has to be an input or an output, and calling them costs more on the host: hence a second one beside
`FeedForward`, with the same numbers. First derivatives are all there is; samples of `torch.vmap` run one after another.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse24.mlp.forward import Hidden, Mode, OutScale, Weight, activation, down_projection, squared
from sparse24.mlp.function import BackwardPass, Gradients, gradients, refuse_second_derivatives
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
    def forward(
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
    ) -> tuple[Tensor | None, ...]:
        """Run both layers."""
        hidden = activation(x, Weight(w1, w1_scale), b1, OutScale(scale_y, scale_y_factor), mode)
        return down_projection(squared(hidden, mode), Weight(w2, w2_scale), b2, x.dtype), *hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save what `gradients` takes."""
        x, w1, w2, b1, _, w1_scale, w2_scale, scale_y, factor, hot, *how = inputs
        hidden = Hidden(*output[1:])
        ctx.backward_pass = BackwardPass.of(*how)
        ctx.mark_non_differentiable(*(t for t in hidden if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b1, scale_y, factor, w1, w2, w1_scale, w2_scale, hot, *hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_hidden: None) -> tuple[Tensor | None, ...]:
        """Differentiate once."""
        needed = ctx.needs_input_grad[:5]
        return *_Gradients.apply(ctx.backward_pass, needed, grad, *ctx.saved_tensors), *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *_tangents: Any) -> NoReturn:
        """Refuse."""
        refuse_forward_mode("relu2_mlp")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run sample by sample."""
        return _one_by_one(TransformedFeedForward, info.batch_size, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """`gradients`, which has no derivative itself: torch.func asks for the graph of every backward pass."""

    @staticmethod
    def forward(how: BackwardPass, needed: tuple[bool, ...], grad: Tensor, *saved: Tensor | None) -> Gradients:
        return gradients(how, needed, grad, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
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
