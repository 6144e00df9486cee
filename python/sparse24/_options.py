"""Values of options: of NumPy, torch or JSON they become those of Python, which `torch.compile` takes for constants."""

from typing import Any, NoReturn


def boolean(what: str, name: str, value: Any) -> bool:
    """Convert True or False."""
    if value not in (False, True):
        _fail(what, f"{name} to be True or False", value)
    return bool(value)


def whole_number(what: str, name: str, value: Any) -> int:
    """Convert a number from 0."""
    if value < 0:
        _fail(what, f"{name} to be at least 0", value)
    if value % 1 != 0:  # also what is not finite
        _fail(what, f"{name} to be a whole number", value)
    return int(value)


def _fail(what: str, rule: str, got: object) -> NoReturn:
    raise RuntimeError(f"sparse24.{what}: expected {rule}, got {got}")
