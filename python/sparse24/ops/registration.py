"""What each op has beside its wrapper, registered in one place: fake function, derivative, FLOPs.

A new op:

1. its adapter with its schema, cpp/torch/<op>.cpp (`SPARSE24_OP` in cpp/torch/tensor.h);
2. here, in the module of its family (or a new one, listed in `sparse24.ops.functions`): the wrapper with its
   documentation, named in ``__all__``; a fake function; and one call of `define`. The public names, the reference in
   docs/api/ops.md, and the tests of schemas and of documentation follow from these;
3. its schema in tests/python/bench/test_package.py, where changes of the interface are seen;
4. its rules in tests/python/fuzzing/contract.py, and a case in tests/python/samples.py.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24.errors import fail
from sparse24.ops import flop_counter
from sparse24.ops.forward_mode import AutogradLibrary

#: Why float8 has no backward pass.
ROUNDING = "rounding to fp8 has no gradient here"

# As long as it lives, its registrations do.
_kernels = AutogradLibrary()


def define(
    name: str,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    no_backward: str | None = None,
    flops: Callable[..., int] | None = None,
) -> OpOverload:
    """Register what an op of the compiled library has in Python, and return it.

    It is returned so that it is looked up once: each lookup through `torch.ops` costs as much as a small op.

    Parameters
    ----------
    name : str
        That of the schema.
    fake : callable
        Shapes, strides and dtypes, for tracing, of all arguments of the schema. What the op refuses when it runs it
        refuses too, in the same words (`sparse24.ops.checks`). Python rather than C++, because a C++ meta kernel
        specialises on sizes and recompiles.
    backward, setup_context : callable, optional
        As `torch.library.register_autograd` takes them. The pattern is a constant of the backward pass: dropped entries
        get no gradient (Haziza et al. 2025: without this, training diverges). Gradients go through the ops again, so
        second derivatives follow.
    no_backward : str, optional
        Instead of `backward`: why there is none. Neither is for ops that register kernels of their own (`in_place`).
    flops : callable, optional
        Those of the dense product that it stands for, as `torch.utils.flop_counter` asks for them.
    """
    packet = getattr(torch.ops.sparse24, name)
    op: OpOverload = packet.default
    torch.library.register_fake(f"sparse24::{name}", _with_defaults(op, fake))
    if no_backward is not None:
        backward = _refusing(name, no_backward)
    if backward is not None:
        torch.library.register_autograd(f"sparse24::{name}", backward, setup_context=setup_context, lib=_kernels)
    if flops is not None:
        flop_counter.register(packet, flops)
    return op


def _with_defaults(op: OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Call `fake` with all arguments: the dispatcher leaves out what has the default of the schema."""
    arguments = op._schema.arguments
    positional = tuple(a.default_value if a.has_default_value() else None for a in arguments if not a.kwarg_only)
    keywords = {a.name: a.default_value for a in arguments if a.kwarg_only}

    def complete(*args: Any, **kwargs: Any) -> Any:
        return fake(*args, *positional[len(args) :], **{**keywords, **kwargs})

    return complete


def _refusing(name: str, reason: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        fail(name, f"no backward pass ({reason})", "one")

    return backward
