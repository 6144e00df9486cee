"""A converted module: the class it gets, the forward of that class, and the switch that turns all of them off.

Conversion changes the *class* of a module to a subclass made for it, and leaves its children, parameters and hooks
alone. An instance attribute ``forward`` would do for calling, but a bound method is pickled by its name, so that a
loaded copy would silently run the original; and replicas that copy the ``__dict__`` would run the module they were
copied from. A class has neither problem, is what Dynamo guards on and what export traces, and leaves `isinstance` true.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse24._bounding_factor import factor_of
from sparse24.mlp import Precision, relu2_mlp
from sparse24.training import Recipe

_FP8 = torch.float8_e4m3fn
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_enabled = True


@contextmanager
def disabled() -> Iterator[None]:
    """Run converted modules as they were before conversion, inside the ``with`` block or the decorated function.

    For evaluation, or to compare. It holds for the whole process and can be nested. The switch is read while tracing:
    a compiled model gets a second graph, and takes the right one afterwards. Activation checkpointing runs the forward
    again in the backward pass, which then has to be inside too.

    Examples
    --------
    >>> with sparse24.disabled():
    ...     loss = evaluate(model)
    """
    global _enabled
    before = _enabled
    _enabled = False
    try:
        yield
    finally:
        _enabled = before


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
    children : tuple of (str, type)
        The children at conversion: with others the module runs its own forward.
    precision, recipe, min_tokens, recompute
        As in `relu2_mlp`.
    """

    up: Layer
    down: Layer
    children: tuple[tuple[str, type], ...]
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


def bypass_problem(module: nn.Module) -> str | None:
    """Why the children of a module have to be called: what runs only then; None if nothing does.

    Hooks for all modules of the process do not count. Profilers and FLOP counters install them, which would then see
    another computation than the one they are there for.
    """
    for name, child in module._modules.items():
        if child is None:
            continue
        for kind in _HOOKS:
            if len(getattr(child, kind)) > 0:
                return f"{name} has hooks"
        if "forward" in child.__dict__:
            return f"the forward of {name} is patched"
    return None


class Converted:
    """What the classes of converted modules have in common.

    Attributes
    ----------
    sparse : bool
        False: dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it).
    sparse24_enabled : bool
        False: the module runs as before conversion.
    """

    sparse: bool = True
    sparse24_enabled: bool = True
    _sparse24_converted = True
    _sparse24: Conversion
    _sparse24_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: what is pickled and copied is the class it was made from.
        function, args, *rest = super().__reduce_ex__(protocol)
        base = type(self)._sparse24_base
        return _rebuild, (function, *(base if arg is type(self) else arg for arg in args)), *rest

    def extra_repr(self) -> str:
        """Add how it runs."""
        return ", ".join(filter(None, (super().extra_repr(), f"sparse24: {self._sparse24}")))  # type: ignore[misc]


@functools.cache
def converted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Make the class of converted modules of class `base`: once, so that modules of a class stay of one class."""
    original = base.forward
    parameters = list(inspect.signature(original).parameters)
    input_name = parameters[1] if len(parameters) > 1 else ""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _enabled and self.sparse24_enabled:
            # With more than the one argument that the conversion was checked for, the module knows better.
            if len(args) == 1 and not kwargs:
                x = args[0]
            else:
                x = kwargs.get(input_name) if not args and len(kwargs) == 1 else None
            if x is not None:
                problem = _problem(self, x)
                if problem is None:
                    return _run(self, x)
                if not torch.compiler.is_compiling():
                    _warn(base, problem)
        return original(self, *args, **kwargs)

    namespace = {"forward": forward, "_sparse24_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base)(f"Sparse24{base.__name__}", (Converted, base), namespace)


def _rebuild(function: Callable[..., nn.Module], *args: Any) -> nn.Module:
    module = function(*args)
    module.__class__ = converted_class(type(module))
    return module


def _run(module: Any, x: Tensor) -> Tensor:
    conversion = module._sparse24
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


def _problem(module: Any, x: Any) -> str | None:
    """Why this call has to run the original forward."""
    conversion = module._sparse24
    children = module._modules
    if len(children) != len(conversion.children):
        return "its children are others than at conversion"
    for name, kind in conversion.children:
        if type(children.get(name)) is not kind:
            return f"{name} is not a {kind.__name__} any more"
    problem = bypass_problem(module)
    if problem is not None:
        return problem
    for layer in (conversion.up, conversion.down):
        owner = getattr(module, layer.name)
        if is_traceable_wrapper_subclass(owner if isinstance(owner, Tensor) else owner.weight):
            return f"the weight of {layer.name} is distributed or quantised"
    return _input_problem(x)


def _input_problem(x: Any) -> str | None:
    if not isinstance(x, Tensor) or is_traceable_wrapper_subclass(x):
        return f"the input is a {type(x).__name__}"
    device_type = x.device.type
    if device_type not in ("cpu", "cuda", "meta"):
        return f"the input is on {device_type}"
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and device_type != "cuda"):
        return None
    return f"the input is {dtype} on {device_type}"


def _warn(base: type[nn.Module], problem: str) -> None:
    warnings.warn(f"sparse24: {base.__name__} runs as before conversion: {problem}", stacklevel=4)
