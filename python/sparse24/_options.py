"""Values of options: of NumPy, torch or JSON they become those of Python, which `torch.compile` takes for constants."""

from typing import Any

from sparse24.errors import fail


def boolean(what: str, name: str, value: Any) -> bool:
    """Convert True or False."""
    if value not in (False, True):
        fail(what, f"{name} to be True or False", value)
    return bool(value)


def whole_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 0."""
    if value < 0:
        fail(what, f"{name} to be at least 0", value)
    if value % 1 != 0:  # also what is not finite
        fail(what, f"{name} to be a whole number", value)
    return int(value)


def positive_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 1."""
    number = whole_number(what, name, value)
    if number == 0:
        fail(what, f"{name} to be at least 1", number)
    return number
