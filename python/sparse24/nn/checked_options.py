"""Options of a module that are checked whenever they are set, and not only when it is made."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from sparse24._options import boolean, one_of, whole_number
from sparse24.recipe import check_recipe

PRECISIONS = ("auto", "16bit", "fp8")


class CheckedOptions(nn.Module):
    """A module that refuses values its options cannot have: a call would refuse them late, in other words, or never.

    They are plain attributes, and no properties: Dynamo would evaluate all guards on the module to read one.
    """

    _NAME: ClassVar[str]
    _OPTIONS: ClassVar[Mapping[str, Callable[[str, str, Any], Any]]]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute: options to what their check makes of the value."""
        check = self._OPTIONS.get(name)
        super().__setattr__(name, value if check is None else check(self._NAME, name, value))


def precision(what: str, name: str, value: Any) -> Any:
    """Check how a network computes."""
    return one_of(what, name, value, PRECISIONS)


def recipe(what: str, _name: str, value: Any) -> Any:
    """Check a recipe, or none."""
    check_recipe(what, value)
    return value


def whole_number_or_none(what: str, name: str, value: Any) -> int | None:
    """Convert a number from 0, or None for the default."""
    return None if value is None else whole_number(what, name, value)


#: What all networks have.
OPTIONS: Mapping[str, Callable[[str, str, Any], Any]] = {"precision": precision, "recipe": recipe, "sparse": boolean}
