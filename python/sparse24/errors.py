"""The sentence of every refusal: ``sparse24.<what>: expected <argument> <rule>, got <value>``."""

from typing import NoReturn

import torch


def fail(what: str, rule: str, got: object) -> NoReturn:
    """Refuse.

    Parameters
    ----------
    what : str
        The function or class that refuses, without "sparse24.".
    rule : str
        The argument and what it has to be: "x to have 2 dimensions".
    got : object
        What it is instead.
    """
    raise refusal(what, rule, got)


def refusal(what: str, rule: str, got: object) -> RuntimeError:
    """Return what `fail` raises, for those that raise it from something."""
    return RuntimeError(f"sparse24.{what}: expected {rule}, got {got}")


def require_tensor(what: str, name: str, value: object) -> None:
    """Refuse what is no tensor, or none that is dense: a sparse or a nested one."""
    if not isinstance(value, torch.Tensor):
        fail(what, f"{name} to be a Tensor", type_name(value))
    if value.layout is not torch.strided or value.is_nested:
        fail(what, f"{name} to be dense (torch.strided)", "a nested tensor" if value.is_nested else value.layout)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as sentences do: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def type_name(value: object) -> str | None:
    """Name what was given in place of something else: a type, or None."""
    return None if value is None else type(value).__name__
