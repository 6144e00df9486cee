"""A converted module: the class it gets, the forward of that class, and the switch that turns all of them off.

Conversion changes the *class* of a module to a subclass made for it, and leaves its children, parameters and hooks
alone. An instance attribute ``forward`` would do for calling, but a bound method is pickled by its name, so that a
loaded copy would silently run the original; and replicas that copy the ``__dict__`` would run the module they were
copied from. A class has neither problem, is what Dynamo guards on and what export traces, and leaves `isinstance` true.
"""

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.convert.again import run_again
from sparse24.convert.call import arguments_of, method_of
from sparse24.convert.conversion import SCALES, Conversion, number_of, numbered
from sparse24.convert.run import run, runs_as_before
from sparse24.convert.run_experts import run_experts
from sparse24.convert.weights import ADAPTERS, recipe_in_use, stored_weights, wants_copies, what_to_copy
from sparse24.nn import delayed_scales
from sparse24.nn.children import is_bound, warn_once
from sparse24.nn.entering_weights import drop, held, hold
from sparse24.nn.weight_copies import (
    bytes_of_copies,
    drop_copies,
    follow_traced,
    let_go,
    put_copies,
    renew_when_loaded,
    stop_renewing,
    without_copies,
)

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
    takes_more = bool(arguments.required)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Whoever makes another of a module's class (a slice of `torch.nn.Sequential`) means the class it was.
        object.__setattr__(self, "__class__", base)
        base.__init__(self, *args, **kwargs)

    def attempt(
        self: Any, conversion: Conversion, args: tuple[Any, ...], kwargs: dict[str, Any], alone: bool
    ) -> Tensor | str | None:
        """Compute the network, or say why not; None where nothing is to be said of running its own forward."""
        if conversion.experts:
            three = arguments.first_three(args, kwargs)
            return None if three is None else run_experts(self, conversion, *three)
        x, further = (args[0], None) if alone else arguments.split(args, kwargs)
        if x is None:
            return None
        if getattr(conversion.seen.kind, method) is not original:  # which is `base`, but not of this function's module
            return "its forward is patched in its class"
        if further is None and runs_as_before(self, conversion, x):
            return None
        return further or run(self, conversion, x)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        # A reference to this forward may outlive the conversion.
        number = getattr(self, "_sparse24_number", None) if compiling else None
        conversion = self.__dict__.get("_sparse24") if number is None else numbered[number]
        if _enabled and not _traced_blocks and conversion is not None and self.sparse24_enabled:
            alone = len(args) == 1 and not kwargs and not takes_more
            out = run_again(self, conversion, args[0]) if alone and not compiling else None
            if out is None:
                out = attempt(self, conversion, args, kwargs, alone)
            if isinstance(out, str):
                warn_once(self, f"{base.__name__} runs as before conversion: {out}")
            elif out is not None:
                return out
        return getattr(base, method)(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: what is pickled and copied is the class it was made from.
        function, args, *rest = base.__reduce_ex__(self, protocol)
        if rest and isinstance(rest[0], dict):
            rest[0] = without_copies(self, rest[0])
        return _rebuild, (function, *(base if arg is type(self) else arg for arg in args)), *rest

    def setstate(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        if "_sparse24" in self.__dict__:
            _put(self, self._sparse24)
            delayed_scales.watch(self, SCALES)
            put_copies(self)

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, masks = self._buffers.get(SCALES), held(self)
        drop_copies(self)  # they are neither cast nor left behind
        let_go(self)
        base._apply(self, fn, recurse)
        delayed_scales.keep(self, SCALES, before)
        hold(self, masks)
        if "_sparse24" in self.__dict__:
            put_copies(self)
        return self

    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        let_go(self)
        base._load_from_state_dict(self, *args, **kwargs)

    def refresh_scales(self: Any) -> bool:
        return delayed_scales.refresh(self, SCALES)

    def extra_repr(self: Any) -> str:
        copied = bytes_of_copies(self)
        copies = f", {copied / 1e6:.1f} MB of copies" if copied else ""
        return ", ".join(filter(None, (base.extra_repr(self), f"sparse24: {self._sparse24}{copies}")))

    namespace = {
        "__init__": init,
        method: forward,
        "__reduce_ex__": reduce_ex,
        "__setstate__": setstate,
        "_apply": apply,
        "_load_from_state_dict": load,
        "_copies": None,
        "_copies_fresh": None,
        "_sparse24_number": None,
        "_what_to_copy": what_to_copy,
        "_follow_traced": follow_traced,
        "_recipe_in_use": recipe_in_use,
        "_stored_weights": stored_weights,
        "extra_repr": extra_repr,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        # False: dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it).
        "sparse": True,
        # False: the module runs as before conversion.
        "sparse24_enabled": True,
        **delayed_scales.ATTRIBUTES,
        "refresh_scales": refresh_scales,
        "_sparse24_converted": True,
        "_sparse24_base": base,
        "_sparse24_original": original,
    }
    return type(base)(f"Sparse24{base.__name__}", (base,), namespace)


def _put(module: nn.Module, conversion: Conversion) -> None:
    module.__dict__["_sparse24"] = conversion
    if conversion.decode:  # the other ones are called with so many tokens that guards do not count
        module.__dict__["_sparse24_number"] = number_of(conversion)


def install(module: nn.Module, conversion: Conversion) -> str | None:
    """Convert a module, or say why it cannot be, and leave it as it is."""
    before = type(module)
    try:
        _set_class(module, converted_class(before))
    except Exception as error:  # of a metaclass or of __init_subclass__, and it may be anything
        return f"its class cannot be extended: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    _put(module, conversion)
    recipe, features = conversion.options.get("recipe"), conversion.sizes[0]
    if not conversion.experts and delayed_scales.wanted(conversion.precision, recipe, features):
        delayed_scales.register(module, SCALES, conversion.precision, recipe, features, persistent=False)
    put_copies(module)
    if wants_copies(module, conversion):
        renew_when_loaded(module)
    return None


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    drop_copies(module)
    drop(module)
    for name in ADAPTERS:
        module._parameters.pop(name, None)
    stop_renewing(module)
    _set_class(module, type(module)._sparse24_base)  # type: ignore[attr-defined]
    for attribute in ("_sparse24", "_sparse24_number", "sparse", "sparse24_enabled", *delayed_scales.ATTRIBUTES):
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
