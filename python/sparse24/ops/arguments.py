"""Arguments that several ops have, and what the wrappers say of one that is no tensor."""

from typing import Any, Literal

from torch import Tensor
from torch._ops import OpOverload

from sparse24.errors import refusal, type_name

Activation = Literal["none", "relu", "relu2"]
Dim = Literal[-1, -2]
Scaling = Literal["row", "tensor"]


def run(op: OpOverload, *arguments: Any, **options: Any) -> Any:
    """Run an op, and say in a sentence what should have been a tensor: torch's own message prints schema and value."""
    try:
        return op(*arguments, **options)
    except RuntimeError:
        refuse_non_tensors(op, *arguments)
        raise


def refuse_non_tensors(op: OpOverload, *values: object) -> None:
    """Refuse the first of `values` that has to be a tensor and is none; return where there is none.

    Parameters
    ----------
    op : OpOverload
        Its schema says what has to be a tensor, or a tensor or None.
    *values : object
        The positional arguments, in order.
    """
    name = op._schema.name.removeprefix("sparse24::")
    for argument, value in zip(op._schema.arguments, values, strict=False):
        kind = str(argument.type)
        wanted = {"Tensor": "a Tensor", "Optional[Tensor]": "a Tensor or None"}.get(kind)
        allowed = isinstance(value, Tensor) or (value is None and kind == "Optional[Tensor]")
        if wanted is not None and not allowed:
            raise refusal(name, f"{argument.name} to be {wanted}", type_name(value)) from None
