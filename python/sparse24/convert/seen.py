"""What was seen of a module at conversion, and what is different now.

The conversion holds for the children, and the plain attributes, that the module had when it was tried. Both are
compared at each call, which takes about a microsecond, and is guarded on when compiled. What cannot be compared so
cheaply is read once: tensors in closures, the contents of containers and of other objects, globals, methods.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sparse24.nn import delayed_scales
from sparse24.nn.children import ACCELERATE, call_problem

#: Attributes of these types are compared by value.
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
#: What modules have anyhow, what conversion adds, and marks of libraries that no forward of a network reads.
_IGNORED = {
    *nn.Module().__dict__,
    *dir(nn.Module),
    *ACCELERATE,
    *("_sparse24", "_sparse24_number", "_copies", "_copies_fresh", "sparse", "sparse24_enabled", "refresh_scales"),
    *delayed_scales.ATTRIBUTES,
    *("_is_hf_initialized", "gradient_checkpointing", "_gradient_checkpointing_func"),
}
#: In place of a value: there is a method of this name in the class, and nothing in the instance.
_METHOD = "method"
_MISSING = object()


class Seen:
    """A module as it was.

    Attributes
    ----------
    kind : type
        Its class.
    attributes : tuple of (str, object)
        Numbers, strings, functions and the like, of the instance and its classes.
    methods : tuple of str
        Names that an attribute of the instance would hide.
    children : tuple of (str, Seen or None)
        Its children, or those that the network calls.
    whole : bool
        Whether those are all children.
    forward : function
        That of its class. It is not copied or pickled: a copy has that of the class where it is made.
    """

    def __init__(
        self,
        kind: type[nn.Module],
        attributes: tuple[tuple[str, object], ...],
        methods: tuple[str, ...],
        children: tuple[tuple[str, "Seen | None"], ...],
        whole: bool = True,
    ) -> None:
        self.kind, self.attributes, self.methods, self.children = kind, attributes, methods, children
        self.whole = whole
        self.forward: Callable[..., Any] = kind.forward

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, (self.kind, self.attributes, self.methods, self.children, self.whole)


def look(module: nn.Module, called: tuple[str, ...] | None = None) -> Seen:
    """See a module, of its children those that are called."""
    kind = type(module)
    if kind is nn.Linear:
        return Seen(kind, (), (), ())
    found = dict(_class_attributes(kind))
    methods = tuple(name for name, value in found.items() if value is _METHOD)
    attributes = {name: value for name, value in found.items() if value is not _METHOD} | module.__dict__
    kept = tuple((name, v) for name, v in attributes.items() if name not in _IGNORED and _is_compared(v))
    found_children = module._modules.items() if called is None else [(name, module._modules[name]) for name in called]
    children = tuple((name, None if child is None else look(child)) for name, child in found_children)
    return Seen(kind, kept, methods, children, called is None)


def summary(seen: Seen) -> tuple[object, ...]:
    """Give what can be compared with that of another module."""
    children = tuple((name, None if child is None else summary(child)) for name, child in seen.children)
    return seen.kind, seen.attributes, seen.methods, children, seen.whole


def difference(module: nn.Module, seen: Seen, prefix: str = "") -> str | None:
    """Why what was seen does not hold any more, or why a child has to be called."""
    for name, value in seen.attributes:
        found = getattr(module, name, _MISSING)
        if found is not value and not _equal(found, value):
            return f"its attribute {prefix}{name} has changed"
    for name in seen.methods:
        if name in module.__dict__:
            return f"its attribute {prefix}{name} has changed"
    children = module._modules
    if seen.whole and len(children) != len(seen.children):
        return f"{'its children' if not prefix else f'the children of {prefix[:-1]}'} are others than at conversion"
    for name, expected in seen.children:
        child, path = children.get(name), f"{prefix}{name}"
        if expected is None:
            if child is not None:
                return f"{path} is not None any more"
            continue
        if expected.kind is not type(child):  # in this order: what Dynamo sees first is what it has guards on
            return f"{path} is not a {expected.kind.__name__} any more"
        problem = call_problem(path, child, expected.kind, expected.forward)
        if problem is None and expected.kind is not nn.Linear:
            problem = difference(child, expected, f"{path}.")
        if problem is not None:
            return problem
    return None


def trains(module: nn.Module) -> bool:
    """Whether a module or one in it is in training."""
    return module.training or any(child is not None and trains(child) for child in module._modules.values())


def _class_attributes(kind: type) -> Iterator[tuple[str, object]]:
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            if name.startswith("__") or name in _IGNORED:
                continue
            if isinstance(value, (types.FunctionType, staticmethod, classmethod)):
                yield name, _METHOD
            elif not hasattr(type(value), "__get__") and _is_compared(value):
                yield name, value


def _is_compared(value: object) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, _PLAIN) or (callable(value) and not isinstance(value, nn.Module))


def _equal(found: object, value: object) -> bool:
    if isinstance(value, (*_PLAIN, tuple)):
        return type(found) is type(value) and found == value
    # Dynamo cannot tell one of these from another.
    return isinstance(value, functools.partial) and torch.compiler.is_compiling()
