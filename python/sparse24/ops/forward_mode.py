"""Forward-mode derivatives and torch.func: the ops say that they have none, instead of dropping tangents."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse24.errors import fail, refusal


def in_forward_mode() -> bool:
    """Whether there is a level of `torch.autograd.forward_ad`, which `torch.func.jvp` and `jacfwd` enter too."""
    return forward_ad._current_level >= 0


def in_torch_func() -> bool:
    """Whether a transform of torch.func runs."""
    return torch._C._are_functorch_transforms_active()


def is_mapped_alone(*tensors: Tensor | None) -> bool:
    """Whether the transforms that run are `torch.vmap`, and nothing is differentiated: not by autograd around it."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack()
    if not stack or any(level.key() != functorch.TransformType.Vmap for level in stack):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and _unwrapped(t).requires_grad for t in tensors))


def _unwrapped(t: Tensor) -> Tensor:
    """Give what a tensor of `torch.vmap` is made of, which alone knows whether it requires a gradient."""
    while torch._C._functorch.is_batchedtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def refuse_tangents(op: str, arguments: Iterable[Any]) -> None:
    """Raise where an argument is a dual tensor."""
    if not in_forward_mode() or not torch._C._is_fwd_grad_enabled():
        return
    for t in arguments:
        if isinstance(t, Tensor) and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None:
            refuse_forward_mode(op)


def refuse_forward_mode(op: str) -> NoReturn:
    """Raise."""
    fail(op, "no forward-mode derivative (jvp, jacfwd and hessian are not defined)", "one")


class AutogradLibrary(torch.library.Library):
    """Registers kernels of the autograd key that refuse what torch's own machinery drops or cannot do."""

    def __init__(self) -> None:
        super().__init__("sparse24", "FRAGMENT")

    def impl(self, op_name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register `fn`, with these checks around it."""

        def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            refuse_tangents(op_name, args)
            try:
                return fn(keyset, *args, **kwargs)
            except RuntimeError as error:
                if _differentiated_by_torch_func(args):
                    rule = "no derivative of torch.func (relu2_mlp has them)"
                    raise refusal(op_name, rule, "one") from error
                raise

        super().impl(op_name, kernel, *args, **kwargs)


def _differentiated_by_torch_func(arguments: tuple[Any, ...]) -> bool:
    # Autograd functions in the style of torch.library.register_autograd have none there.
    return (
        in_torch_func()
        and torch.is_grad_enabled()
        and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    )
