"""Values of options: of NumPy, torch or JSON they become those of Python, which `torch.compile` takes for constants."""

from typing import Any

from sparse24.errors import fail


def boolean(what: str, name: str, value: Any) -> bool:
    """Convert True or False."""
    try:
        is_one = value in (False, True)
    except (RuntimeError, ValueError):  # of more than one element
        is_one = False
    if not is_one:
        fail(what, f"{name} to be True or False", value)
    return bool(value)


def whole_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 0."""
    try:
        is_negative, is_whole = bool(value < 0), bool(value % 1 == 0)  # nor is what is not finite
    except (RuntimeError, TypeError, ValueError):  # no number, or more than one
        is_negative = is_whole = False
    if is_negative:
        fail(what, f"{name} to be at least 0", value)
    if not is_whole:
        fail(what, f"{name} to be a whole number", value)
    return int(value)


def finite_number(what: str, name: str, value: Any) -> float:
    """Convert a number from 0 that is not infinite."""
    try:
        fits = bool(0 <= value < float("inf"))
    except (RuntimeError, TypeError, ValueError):  # no number, or more than one
        fits = False
    if not fits:
        fail(what, f"{name} to be a finite number from 0", value)
    return float(value)


def share(what: str, name: str, value: Any) -> float:
    """Convert a number from 0 to 1."""
    try:
        fits = bool(0 <= value <= 1)
    except (RuntimeError, TypeError, ValueError):  # no number, or more than one
        fits = False
    if not fits:
        fail(what, f"{name} to be from 0 to 1", value)
    return float(value)


def positive_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 1."""
    number = whole_number(what, name, value)
    if number == 0:
        fail(what, f"{name} to be at least 1", number)
    return number
