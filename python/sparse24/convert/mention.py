"""Whether the code of a module speaks of squared ReLU: a hint, where running it says nothing."""

import dis
import functools
import inspect
import re
import types

from torch import nn

_NAME = re.compile(r"relu_?(2|sq)|(sq|squared|square)_?relu", re.IGNORECASE)
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_SQUARES = {"square", "square_", "pow", "pow_"}


def mentions_relu2(module: nn.Module) -> bool:
    """Whether an activation among the children, an attribute or the code of the forward is squared ReLU, by its name.

    Names are ReLUSquared, squared_relu, relu2 and the like; code may also square what comes from a ReLU.
    """
    kinds = [type(child) for child in module.children()]
    if any(_NAME.search(kind.__name__) for kind in kinds) or any(map(_is_squared_relu, module.children())):
        return True
    for name, value in module.__dict__.items():
        if isinstance(value, types.FunctionType) and (_NAME.search(value.__name__) or _squares_relu((value,), False)):
            return True
        if isinstance(value, str) and not name.startswith("_") and _NAME.search(value):
            return True
    return _squares_relu(_functions(type(module)), any(issubclass(kind, nn.ReLU) for kind in kinds))


def _is_squared_relu(child: nn.Module) -> bool:
    """Whether a child that owns nothing squares a ReLU."""
    owns = child._parameters or child._buffers or child._modules
    return not owns and _squares_relu(_functions(type(child)), False)


@functools.cache
def _functions(kind: type[nn.Module]) -> tuple[types.FunctionType, ...]:
    """List the forward of a class, and what it calls by name: methods of the class and functions of its file."""
    forward = getattr(kind, "forward", None)
    forward = inspect.unwrap(forward) if isinstance(forward, types.FunctionType) else None
    if not _is_code(forward):
        return ()
    instructions = list(dis.Bytecode(forward.__code__))
    found = [inspect.getattr_static(kind, i.argval, None) for i in instructions if i.opname.startswith(_ATTRIBUTES)]
    found += [forward.__globals__.get(i.argval) for i in instructions if i.opname.startswith("LOAD_GLOBAL")]
    return (forward, *filter(_is_code, found))


def _is_code(value: object) -> bool:
    return isinstance(value, types.FunctionType) and not str(value.__module__).startswith("torch.")


@functools.cache
def _squares_relu(functions: tuple[types.FunctionType, ...], has_relu: bool) -> bool:
    names: set[str] = set()
    squares = False
    for function in functions:
        code = function.__code__
        names |= {*code.co_names, function.__name__}
        squares = squares or _has_square(code)
    called = {function.__name__ for function in functions}
    # Many networks call their second ReLU relu2: such a child is known by its class.
    if any(_NAME.search(name) and (name in called or not name.startswith("relu2")) for name in names):
        return True
    relu = has_relu or any(name.lower().strip("_") == "relu" for name in names)
    return relu and (squares or bool(names & _SQUARES))


def _has_square(code: types.CodeType) -> bool:
    """Whether something is raised to the power of 2, written as a number."""
    instructions = list(dis.Bytecode(code))
    powers = ("**", "**=")
    pairs = zip(instructions, instructions[1:], strict=False)
    return any((i.argrepr in powers or "_POWER" in i.opname) and before.argval == 2 for before, i in pairs)
