"""What the wrappers of the ops say of an argument that is no tensor."""

from typing import NoReturn

from torch import Tensor
from torch._ops import OpOverload


def refuse_non_tensors(op: OpOverload, *values: object) -> None:
    """Refuse the first of `values` that has to be a tensor and is none; return where there is none.

    For the handler of an error that torch raised, whose own message prints the schema and the value: calls that succeed
    pay nothing.

    Parameters
    ----------
    op : OpOverload
        Its schema says what has to be a tensor, or a tensor or None.
    *values : object
        The positional arguments, in order.
    """
    for argument, value in zip(op._schema.arguments, values, strict=False):
        kind = str(argument.type)
        if kind == "Tensor" and not isinstance(value, Tensor):
            _fail(op, argument.name, "a Tensor", value)
        if kind == "Optional[Tensor]" and value is not None and not isinstance(value, Tensor):
            _fail(op, argument.name, "a Tensor or None", value)


def _fail(op: OpOverload, name: str, wanted: str, value: object) -> NoReturn:
    got = None if value is None else type(value).__name__
    raise RuntimeError(f"{op._schema.name.replace('::', '.')}: expected {name} to be {wanted}, got {got}") from None
