"""How a network is called: by which method of its module, with which arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

#: Layers of torch whose network is a method of theirs, and the children that it calls.
_METHOD = "_ff_block"
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CALLED = {
    nn.TransformerEncoderLayer._ff_block: ("linear1", "activation", "dropout", "linear2", "dropout2"),
    nn.TransformerDecoderLayer._ff_block: ("linear1", "activation", "dropout", "linear2", "dropout3"),
}


def method_of(kind: type[nn.Module]) -> str:
    """Name the method that is the network, where a module of that class is or has one."""
    return _METHOD if getattr(kind, _METHOD, None) in _CALLED else "forward"


def called_children(module: nn.Module) -> tuple[str, ...] | None:
    """Name the children that the network calls; None if that is all of the module."""
    names = _CALLED.get(getattr(type(module), _METHOD, None))  # type: ignore[arg-type]
    return names and tuple(name for name in names if name in module._modules)


@functools.cache
def arguments_of(method: Callable[..., Any]) -> "Arguments":
    """Make the `Arguments` of a method, once."""
    return Arguments(method)


class Arguments:
    """Which argument of a method is the input, and which of the others say nothing.

    The network was tried with the input alone. An argument says nothing if it is its default, or None where anything
    goes (``*args``, ``**kwargs``) or where there is no default.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        kinds = inspect.Parameter
        parameters = list(inspect.signature(method).parameters.values())[1:]
        positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self.positional = tuple((p.name, _default(p)) for p in positional)
        self.named = {p.name: _default(p) for p in named}
        self.has_args = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self.has_kwargs = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        self.input = positional[0].name if positional and positional[0].name in self.named else ""
        required = [p.name for p in positional[1:] if p.default is p.empty]
        self.required = (*required, *(p.name for p in named if p.kind is kinds.KEYWORD_ONLY and p.default is p.empty))

    def call(self, method: Callable[..., Any], x: Any) -> Any:
        """Call a method with the input, and None for what else it needs."""
        named = {name: None for name in self.required if name in self.named}
        return method(x, *[None] * (len(self.required) - len(named)), **named)

    def first_three(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any] | None:
        """Give the tokens, their experts and their factors; None where the arguments are others."""
        names = [name for name, _ in self.positional[:3]]
        given = dict(zip(names, args, strict=False)) | kwargs
        fits = len(args) <= 3 and len(given) == len(args) + len(kwargs) and given.keys() == set(names)
        return tuple(given[name] for name in names) if fits else None  # type: ignore[return-value]

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        """Give the input, and what speaks against taking it alone.

        No input where the arguments do not fit: the module's own forward says so.
        """
        x, given = (args[0], args[1:]) if args else (kwargs.get(self.input), ())
        names = [name for name in kwargs if args or name != self.input]
        taken = {name for name, _ in self.positional[: len(args)]}
        fits = len(args) <= len(self.positional) or self.has_args
        if not fits or any(name in taken or not (name in self.named or self.has_kwargs) for name in names):
            return None, None
        if any(name not in taken and name not in kwargs for name in self.required):
            return None, None
        further = [(name, value, default) for (name, default), value in zip(self.positional[1:], given, strict=False)]
        further += [("*args", value, None) for value in given[len(self.positional[1:]) :]]
        further += [(name, kwargs[name], self.named.get(name)) for name in names]
        for name, value, default in further:
            if value is not default and not (type(value) in (bool, int, float, str) and value == default):
                return x, f"it is called with {name}"
        return x, None


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is parameter.empty else parameter.default
