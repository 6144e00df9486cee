"""What a network of a model is given when the model runs on data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.convert.call import arguments_of


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without gradients and as if nothing were compiled, which calls no hooks of later.

    Every module gets its own mode back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, a tuple or a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def hook(called: nn.Module, given: Callable[[Tensor], None]) -> Any:
    """Call `given` with the input [T, D] of a module, whenever that is called."""
    arguments = arguments_of(type(called).forward)

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, _why = arguments.split(args, kwargs)
        if isinstance(x, Tensor):
            given(x.detach().reshape(-1, x.shape[-1]))

    return called.register_forward_pre_hook(watch, with_kwargs=True)
