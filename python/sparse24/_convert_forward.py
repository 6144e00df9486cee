"""A converted module: the class it gets, the forward of that class, and the switch that turns all of them off.

Conversion changes the *class* of a module to a subclass made for it, and leaves its children, parameters and hooks
alone. An instance attribute ``forward`` would do for calling, but a bound method is pickled by its name, so that a
loaded copy would silently run the original; and replicas that copy the ``__dict__`` would run the module they were
copied from. A class has neither problem, is what Dynamo guards on and what export traces, and leaves `isinstance` true.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse24._bounding_factor import factor_of
from sparse24._children import is_bound, is_moved, run_moved, warn_once, weight_problem
from sparse24._convert_seen import Seen, difference
from sparse24.mlp import Precision, relu2_mlp
from sparse24.training import Recipe

_FP8 = torch.float8_e4m3fn

_lock = threading.Lock()
#: How many blocks of `disabled` are open, and whether none is, which converted modules read: a constant when traced.
_blocks = 0
_enabled = True
#: Likewise of blocks inside of what is being traced. Dynamo has no locks, and such a block opens and ends in one graph.
_traced_blocks = 0


@contextmanager
def disabled() -> Iterator[None]:
    """Run converted modules as they were before conversion, inside the ``with`` block or the decorated function.

    For evaluation, or to compare. It holds for the whole process, in all of its threads, until the last of the blocks
    that overlap ends. The switch is read while tracing: a compiled model gets a second graph, and takes the right one
    afterwards. Activation checkpointing runs the forward again in the backward pass, which then has to be inside too.

    Examples
    --------
    >>> with sparse24.disabled():
    ...     loss = evaluate(model)
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _blocks, _enabled, _traced_blocks
    if torch.compiler.is_compiling():
        _traced_blocks += change
        return
    with _lock:
        _blocks += change
        _enabled = _blocks == 0


class Layer(NamedTuple):
    """Where a weight is: a child module's, or a parameter of the network itself, stored [in, out] if `transposed`."""

    name: str
    transposed: bool = False


class Weights(NamedTuple):
    """What `relu2_mlp` takes of one layer."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


@dataclass(frozen=True)
class Conversion:
    """What the forward of a converted module needs to know.

    Attributes
    ----------
    up, down : Layer
        The two weights.
    seen : Seen
        The module at conversion: where that does not hold any more, it runs its own forward.
    precision, recipe, min_tokens, recompute
        As in `relu2_mlp`.
    """

    up: Layer
    down: Layer
    seen: Seen
    precision: Precision
    recipe: Recipe | None
    min_tokens: int | None
    recompute: bool

    def __str__(self) -> str:
        options = {"min_tokens": self.min_tokens, "recipe": self.recipe, "recompute": self.recompute or None}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        return ", ".join([f"precision={self.precision}", *given])


def layer_weights(module: nn.Module, layer: Layer) -> Weights:
    """Read the weights of one layer, as `torch.nn.Linear` stores them; a scale only where the weight is float8."""
    owner = getattr(module, layer.name)
    if isinstance(owner, Tensor):
        return Weights(owner.t() if layer.transposed else owner, None, None)
    weight = owner.weight
    return Weights(weight, getattr(owner, "bias", None), owner.weight_scale if weight.dtype == _FP8 else None)


def converted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Make the class of converted modules of class `base`: once, so that modules of a class stay of one class.

    It has no other base: with a second one the layout of its objects may differ, and a module could not become one.
    """
    made = _classes.get(base)
    if made is None or made._sparse24_original is not base.forward:
        made = _classes[base] = _make_class(base)
    return made


_classes: dict[type[nn.Module], Any] = {}


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    original = base.forward
    arguments = Arguments(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        conversion = self.__dict__.get("_sparse24")  # a reference to this forward may outlive the conversion
        if _enabled and not _traced_blocks and conversion is not None and self.sparse24_enabled:
            x, further = (args[0], None) if len(args) == 1 and not kwargs else arguments.split(args, kwargs)
            if x is not None:
                problem = further or _problem(self, conversion, x)
                if base.forward is not original:
                    problem = "its forward is patched in its class"
                if problem is None:
                    return _run(self, conversion, x)
                warn_once(self, f"{base.__name__} runs as before conversion: {problem}")
        return base.forward(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: what is pickled and copied is the class it was made from.
        function, args, *rest = base.__reduce_ex__(self, protocol)
        return _rebuild, (function, *(base if arg is type(self) else arg for arg in args)), *rest

    def extra_repr(self: Any) -> str:
        return ", ".join(filter(None, (base.extra_repr(self), f"sparse24: {self._sparse24}")))

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "extra_repr": extra_repr,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        # False: dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it).
        "sparse": True,
        # False: the module runs as before conversion.
        "sparse24_enabled": True,
        "_sparse24_converted": True,
        "_sparse24_base": base,
        "_sparse24_original": original,
    }
    return type(base)(f"Sparse24{base.__name__}", (base,), namespace)


class Arguments:
    """Which argument of a forward is the input, and which of the others say nothing.

    The network was tried with the input alone. An argument says nothing if it is its default, or None where anything
    goes (``*args``, ``**kwargs``).
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        kinds = inspect.Parameter
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self.positional = tuple((p.name, p.default) for p in positional)
        self.named = {p.name: p.default for p in named}
        self.has_args = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self.has_kwargs = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        self.input = positional[0].name if positional and positional[0].name in self.named else ""

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
        further = [(name, value, default) for (name, default), value in zip(self.positional[1:], given, strict=False)]
        further += [("*args", value, None) for value in given[len(self.positional[1:]) :]]
        further += [(name, kwargs[name], self.named.get(name)) for name in names]
        for name, value, default in further:
            if value is not default and not (type(value) in (bool, int, float, str) and value == default):
                return x, f"it is called with {name}"
        return x, None


def install(module: nn.Module, conversion: Conversion) -> str | None:
    """Convert a module, or say why it cannot be, and leave it as it is."""
    before = type(module)
    try:
        _set_class(module, converted_class(before))
    except Exception as error:  # of a metaclass or of __init_subclass__, and it may be anything
        return f"its class cannot be extended: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    module.__dict__["_sparse24"] = conversion
    return None


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    _set_class(module, type(module)._sparse24_base)  # type: ignore[attr-defined]
    for attribute in ("_sparse24", "sparse", "sparse24_enabled"):
        module.__dict__.pop(attribute, None)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    before = type(module).forward
    object.__setattr__(module, "__class__", kind)
    # What wraps the forward of a module holds its method: accelerate, or what it leaves behind.
    for name in ("forward", "_old_forward"):
        if is_bound(module.__dict__.get(name), module, before):
            module.__dict__[name] = types.MethodType(kind.forward, module)


def _rebuild(function: Callable[..., nn.Module], *args: Any) -> nn.Module:
    module = function(*args)
    module.__class__ = converted_class(type(module))
    return module


def _run(module: Any, conversion: Conversion, x: Tensor) -> Tensor:
    up = getattr(module, conversion.up.name)
    if is_moved(up):
        return run_moved(up, getattr(module, conversion.down.name), x, lambda t: _network(module, conversion, t))
    return _network(module, conversion, x)


def _network(module: Any, conversion: Conversion, x: Tensor) -> Tensor:
    w1, b1, w1_scale = layer_weights(module, conversion.up)
    w2, b2, w2_scale = layer_weights(module, conversion.down)
    # The static scale of a quantised second layer's input is that of the activation; else a first layer may bound it.
    scale_y = None if w2_scale is None else getattr(getattr(module, conversion.down.name), "input_scale", None)
    factor = None if w1_scale is None else factor_of(getattr(module, conversion.up.name), scale_y)
    return relu2_mlp(
        x,
        w1,
        w2,
        b1,
        b2,
        precision=conversion.precision,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        scale_y=scale_y,
        scale_y_factor=factor,
        min_tokens=conversion.min_tokens,
        recipe=conversion.recipe,
        recompute=conversion.recompute,
        sparse=module.sparse,
    )


def _problem(module: Any, conversion: Conversion, x: Any) -> str | None:
    """Why this call has to run the original forward."""
    problem = difference(module, conversion.seen)
    if problem is not None:
        return problem
    owners = [getattr(module, layer.name) for layer in (conversion.up, conversion.down)]
    weights = [owner if isinstance(owner, Tensor) else owner.weight for owner in owners]
    for layer, weight in zip((conversion.up, conversion.down), weights, strict=True):
        problem = weight_problem(layer.name, weight)
        if problem is not None:
            return problem
    if is_moved(owners[0]):
        if weights[0].device != weights[1].device:
            return "its layers are on different devices"
        return _input_problem(x, weights[0].device)
    return _input_problem(x)


def _input_problem(x: Any, device: torch.device | None = None) -> str | None:
    if not isinstance(x, Tensor) or is_traceable_wrapper_subclass(x):
        return f"the input is a {type(x).__name__}"
    device_type = (device or x.device).type
    if device_type not in ("cpu", "cuda", "meta"):
        return f"the input is on {device_type}"
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and device_type != "cuda"):
        return None
    return f"the input is {dtype} on {device_type}"
