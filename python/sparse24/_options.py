"""Values of options: of NumPy, torch or JSON they become those of Python, which `torch.compile` takes for constants."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sparse24.errors import dtype_name, fail


def _holds(condition: Callable[[], Any]) -> bool:
    """Whether it does; not of what cannot be compared: no number, or more than one element."""
    try:
        return bool(condition())
    except (RuntimeError, TypeError, ValueError):
        return False


def boolean(what: str, name: str, value: Any) -> bool:
    """Convert True or False."""
    if not _holds(lambda: value in (False, True)):
        fail(what, f"{name} to be True or False", value)
    return bool(value)


def whole_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 0."""
    if _holds(lambda: value < 0):
        fail(what, f"{name} to be at least 0", value)
    if not _holds(lambda: value % 1 == 0):  # nor is what is not finite
        fail(what, f"{name} to be a whole number", value)
    return int(value)


def one_of(what: str, name: str, value: Any, choices: Sequence[str]) -> Any:
    """Check one of some words."""
    if not isinstance(value, str) or value not in choices:
        *others, last = [f'"{choice}"' for choice in choices]
        fail(what, f"{name} to be {', '.join(others)} or {last}", f'"{value}"')
    return value


def check_model(what: str, model: Any) -> None:
    """Check that a model is one."""
    if not isinstance(model, torch.nn.Module):
        fail(what, "model to be a torch.nn.Module", type(model).__name__)


def check_batches(what: str, name: str, batches: Any) -> None:
    """Check that something can be read batch by batch: a tensor or a mapping is one batch."""
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        fail(what, f"{name} to be an iterable of batches, such as a list of them", type(batches).__name__)


def floating_dtype(what: str, dtype: Any) -> Any:
    """Return the dtype of parameters, or None for torch's default."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        got = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        fail(what, "dtype to be float32, bfloat16 or float16", got)
    return dtype


def finite_number(what: str, name: str, value: Any) -> float:
    """Convert a number from 0 that is not infinite."""
    if not _holds(lambda: 0 <= value < float("inf")):
        fail(what, f"{name} to be a finite number from 0", value)
    return float(value)


def share(what: str, name: str, value: Any) -> float:
    """Convert a number from 0 to 1."""
    if not _holds(lambda: 0 <= value <= 1):
        fail(what, f"{name} to be from 0 to 1", value)
    return float(value)


def positive_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 1."""
    number = whole_number(what, name, value)
    if number == 0:
        fail(what, f"{name} to be at least 1", number)
    return number
