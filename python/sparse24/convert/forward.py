"""A converted module: the class it gets, the forward of that class, and the switch that turns all of them off.

Conversion changes the *class* of a module to a subclass made for it, and leaves its children, parameters and hooks
alone. An instance attribute ``forward`` would do for calling, but a bound method is pickled by its name, so that a
loaded copy would silently run the original; and replicas that copy the ``__dict__`` would run the module they were
copied from. A class has neither problem, is what Dynamo guards on and what export traces, and leaves `isinstance` true.
"""

import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse24.convert.call import arguments_of, method_of
from sparse24.convert.layers import owner_of
from sparse24.convert.seen import Seen, difference
from sparse24.format import FP8
from sparse24.mlp import Precision, relu2_mlp
from sparse24.mlp.scale import factor_of
from sparse24.nn import delayed_scales
from sparse24.nn.children import is_bound, is_moved, run_moved, warn_once, weight_problem

#: The buffer of a module whose training steps are float8 throughout (`sparse24.nn.delayed_scales`).
SCALES = "_sparse24_scales"

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
    """Where a weight is: a child's, or a parameter of the network itself, stored [in, out] if `transposed`."""

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
    precision
        As in `relu2_mlp`.
    in_training : bool
        Whether it is the same network in training.
    options : mapping of str to object
        Further arguments of `relu2_mlp` that are not its default, by name.
    """

    up: Layer
    down: Layer
    seen: Seen
    precision: Precision
    options: Mapping[str, Any]
    in_training: bool = True

    def __str__(self) -> str:
        options = sorted(self.options.items(), key=lambda option: option[0] == "recipe")  # the longest comes last
        return ", ".join([f"precision={self.precision}", *(f"{name}={value}" for name, value in options)])


def converted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Make the class of converted modules of class `base`: once, so that modules of a class stay of one class.

    It has no other base: with a second one the layout of its objects may differ, and a module could not become one.
    """
    made = _classes.get(base)
    if made is None or made._sparse24_original is not getattr(base, method_of(base)):
        made = _classes[base] = _make_class(base)
    return made


_classes: dict[type[nn.Module], Any] = {}


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    method = method_of(base)
    original = getattr(base, method)
    arguments = arguments_of(original)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Whoever makes another of a module's class (a slice of `torch.nn.Sequential`) means the class it was.
        object.__setattr__(self, "__class__", base)
        base.__init__(self, *args, **kwargs)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        conversion = self.__dict__.get("_sparse24")  # a reference to this forward may outlive the conversion
        if _enabled and not _traced_blocks and conversion is not None and self.sparse24_enabled:
            alone = len(args) == 1 and not kwargs and not arguments.required
            x, further = (args[0], None) if alone else arguments.split(args, kwargs)
            if x is not None:
                if getattr(base, method) is not original:
                    further = "its forward is patched in its class"
                out = further or _run(self, conversion, x)
                if not isinstance(out, str):
                    return out
                warn_once(self, f"{base.__name__} runs as before conversion: {out}")
        return getattr(base, method)(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: what is pickled and copied is the class it was made from.
        function, args, *rest = base.__reduce_ex__(self, protocol)
        return _rebuild, (function, *(base if arg is type(self) else arg for arg in args)), *rest

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self._buffers.get(SCALES)
        base._apply(self, fn, recurse)
        delayed_scales.keep(self, SCALES, before)
        return self

    def refresh_scales(self: Any) -> bool:
        return delayed_scales.refresh(self, SCALES)

    def extra_repr(self: Any) -> str:
        return ", ".join(filter(None, (base.extra_repr(self), f"sparse24: {self._sparse24}")))

    namespace = {
        "__init__": init,
        method: forward,
        "__reduce_ex__": reduce_ex,
        "extra_repr": extra_repr,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        # False: dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it).
        "sparse": True,
        # False: the module runs as before conversion.
        "sparse24_enabled": True,
        # Whether its delayed scales are used (`sparse24.nn.ReLU2MLP`).
        "scales_known": False,
        "_apply": apply,
        "refresh_scales": refresh_scales,
        "_sparse24_converted": True,
        "_sparse24_base": base,
        "_sparse24_original": original,
    }
    return type(base)(f"Sparse24{base.__name__}", (base,), namespace)


def install(module: nn.Module, conversion: Conversion) -> str | None:
    """Convert a module, or say why it cannot be, and leave it as it is."""
    before = type(module)
    try:
        _set_class(module, converted_class(before))
    except Exception as error:  # of a metaclass or of __init_subclass__, and it may be anything
        return f"its class cannot be extended: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    module.__dict__["_sparse24"] = conversion
    recipe = conversion.options.get("recipe")
    if recipe is not None and recipe.fp8_weight_gradients:
        delayed_scales.register(module, SCALES, conversion.precision, recipe, persistent=False)
    return None


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    _set_class(module, type(module)._sparse24_base)  # type: ignore[attr-defined]
    for attribute in ("_sparse24", "sparse", "sparse24_enabled", "scales_known"):
        module.__dict__.pop(attribute, None)
    if module._buffers.pop(SCALES, None) is not None:
        module._non_persistent_buffers_set.discard(SCALES)


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


def _run(module: Any, conversion: Conversion, x: Any) -> Tensor | str:
    """Compute the network, or say why this call has to run the original forward."""
    problem = difference(module, conversion.seen)
    if problem is None and not conversion.in_training and _trains(module):
        problem = "in training it computes something else, as dropout does"
    if problem is not None:
        return problem
    up, down = owner_of(module, conversion.up.name), owner_of(module, conversion.down.name)
    first, second = weights_of(up, conversion.up), weights_of(down, conversion.down)
    moved = is_moved(up)
    problem = (
        weight_problem(conversion.up.name, first.weight)
        or weight_problem(conversion.down.name, second.weight)
        or _input_problem(x, first.weight.device if moved else None)
    )
    if problem is None and moved and first.weight.device != second.weight.device:
        problem = "its layers are on different devices"
    if problem is not None:
        return problem
    # The static scale of a quantised second layer's input is that of the activation; else a first layer may bound it.
    scale_y = None if second.scale is None else getattr(down, "input_scale", None)
    factor = None if first.scale is None else factor_of(up, scale_y)
    scales, known = delayed_scales.for_step(module, SCALES) if module.sparse else (None, False)

    def network(x: Tensor) -> Tensor:
        return relu2_mlp(
            x,
            first.weight,
            second.weight,
            first.bias,
            second.bias,
            precision=conversion.precision,
            w1_scale=first.scale,
            w2_scale=second.scale,
            scale_y=scale_y,
            scale_y_factor=factor,
            sparse=module.sparse,
            delayed_scales=scales,
            scales_known=known,
            **conversion.options,
        )

    return run_moved(up, down, x, network) if moved else network(x)


def _trains(module: nn.Module) -> bool:
    return module.training or any(child is not None and _trains(child) for child in module._modules.values())


def weights_of(owner: Any, layer: Layer) -> Weights:
    """Read the weights of one layer, as `torch.nn.Linear` stores them; a scale only where the weight is float8."""
    if isinstance(owner, Tensor):
        return Weights(owner.t() if layer.transposed else owner, None, None)
    weight = owner.weight
    scale = getattr(owner, "weight_scale", None) if weight.dtype == FP8 else None
    return Weights(weight, getattr(owner, "bias", None), scale)


def _input_problem(x: Any, device: torch.device | None = None) -> str | None:
    if type(x) is not Tensor and (not isinstance(x, Tensor) or is_traceable_wrapper_subclass(x)):
        return f"the input is a {type(x).__name__}"
    device_type = (device or x.device).type
    if device_type not in ("cpu", "cuda", "meta"):
        return f"the input is on {device_type}"
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and device_type != "cuda"):
        return None
    return f"the input is {dtype} on {device_type}"
