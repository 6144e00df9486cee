"""What a module and its children have, in a form that one function compares: for calls that are like one before.

It is what `difference` finds no fault with, and where weights are. Whatever else is there is another call, of which
the same is found out anew.
"""

from typing import Any

from torch import nn

from sparse24 import _C
from sparse24.convert.conversion import Conversion
from sparse24.convert.seen import Seen
from sparse24.convert.weights import ADAPTERS

#: What `sparse24._C.unchanged` takes.
Facts = tuple[tuple[Any, ...], ...]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: What makes another call of one with a layer.
_OF_LAYERS = ("forward", "_hf_hook")


class _Facts:
    """Lists of them, by kind."""

    def __init__(self) -> None:
        self.same: list[Any] = []
        self.absent: list[Any] = []
        self.at: list[Any] = []
        self.empty: list[Any] = []
        self.sizes: list[Any] = []
        self.classes: list[Any] = []
        self.known = True

    def has(self, names: dict[str, Any], name: str) -> Any:
        """Take what a name stands for, or that it stands for nothing."""
        if name in names:
            self.same += names, name, names[name]
        else:
            self.absent += names, name
        return names.get(name)

    def of_class(self, module: nn.Module) -> None:
        """Take a module's class, and that nothing is set in it or in those it is made from."""
        kind = type(module)
        version = _C.class_version(kind)
        self.known = self.known and version != 0
        self.classes += module, kind, version

    def see(self, module: nn.Module, seen: Seen) -> None:
        """Take what `difference` compares."""
        state = module.__dict__
        self.of_class(module)
        for name in (*(name for name, _ in seen.attributes), *seen.methods):
            self.has(state, name)
        children = self.has(state, "_modules")
        if seen.whole:
            self.sizes += children, len(seen.children)
        for name, expected in seen.children:
            child = self.has(children, name)
            if expected is None or child is None:
                continue
            for hooks in _HOOKS:
                self.empty += child.__dict__, hooks
            for name_of_layers in _OF_LAYERS:
                self.absent += child.__dict__, name_of_layers
            if expected.kind is nn.Linear:
                self.of_class(child)
            else:
                self.see(child, expected)

    def weights(self, layer: nn.Module) -> None:
        """Take where the parameters of a layer are, which may be replaced and are not to be kept alive."""
        parameters = self.has(layer.__dict__, "_parameters")
        for name in ("weight", "bias"):
            if parameters.get(name) is None:
                self.has(parameters, name)
            else:
                self.at += parameters, name, id(parameters[name])
        self.has(self.has(layer.__dict__, "_buffers"), "weight_scale")

    def tuples(self) -> Facts:
        """Give them as they are compared."""
        lists = self.same, self.absent, self.at, self.empty, self.sizes, self.classes
        return tuple(tuple(facts) for facts in lists)


def facts_of(module: nn.Module, conversion: Conversion, further: tuple[str, ...]) -> Facts | None:
    """Give the facts that hold now; None where they cannot be compared so.

    Parameters
    ----------
    module : Module
        A converted one, with which there is no `difference`, and whose layers are called as they are.
    conversion
        Its own.
    further : tuple of str
        More attributes of it that count.
    """
    facts = _Facts()
    facts.see(module, conversion.seen)
    for name in ("_sparse24", *further):
        facts.has(module.__dict__, name)
    parameters = facts.has(module.__dict__, "_parameters")
    for name in ADAPTERS:
        facts.has(parameters, name)
    for layer in (conversion.up, conversion.down):
        facts.weights(module._modules[layer.name])
    # A call with hooks or patches is another one, and so is that of a replica, whose dictionary is its own.
    return facts.tuples() if facts.known and _C.unchanged(facts.tuples()) else None
