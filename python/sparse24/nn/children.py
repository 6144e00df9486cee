"""What a child does when it is called, beside multiplying with its weight: whoever reads the weight has to know.

`sparse24.nn.ReLU2MLP` and converted modules read the weights of their layers and do not call them. That is the same
only while nothing hooks, patches or replaces the layers' forward.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse24.mlp.gathered_weight import GatheredWeight, refuse_second_call
from sparse24.nn.quantized_linear import QuantizedLinear

LINEAR_FORWARD = nn.Linear.forward
_QUANTIZED_FORWARD = QuantizedLinear.forward
#: What accelerate leaves on a module that it hooks.
ACCELERATE = ("forward", "_old_forward", "_hf_hook")
#: Where modules have hooks that a layer made of them would not.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_DISABLED = torch._C._disabled_torch_function_impl
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def call_problem(name: str, child: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> str | None:
    """Why a child has to be called: what runs only then. None if nothing does.

    Hooks for all modules of the process do not count. Profilers and FLOP counters install them, which would then see
    another computation than the one they are there for.

    Parameters
    ----------
    name : str
        For the sentence.
    child : Module
        The child.
    kind : type
        Its class.
    forward : function
        What the forward of that has to be.
    """
    if child._forward_pre_hooks or child._forward_hooks or child._backward_pre_hooks or child._backward_hooks:
        return f"{name} has hooks"
    # Not of `type(child)`, which is the same: torch does not skip guards on a module that are on its class as well.
    if kind.forward is not forward:
        return f"the forward of {name} is patched in its class"
    return moving_problem(name, child) if "forward" in child.__dict__ else None


def weight_problem(name: str, weight: Tensor) -> str | None:
    """Why a product with a weight is another than that with its numbers."""
    kind = type(weight)
    if kind is nn.Parameter or kind is Tensor or kind is GatheredWeight:
        return None
    if is_traceable_wrapper_subclass(weight):
        refuse_second_call(weight)
        return f"the weight of {name} is distributed or quantised"
    # Not `has_torch_function`, which is true of any tensor while export traces.
    function = getattr(kind, "__torch_function__", _DISABLED)
    if function is not _DISABLED and function.__func__ is not Tensor.__torch_function__.__func__:
        return f"the weight of {name} is a {kind.__name__}"
    return None


def moving_problem(name: str, child: nn.Module) -> str | None:
    """Name what the `forward` of an instance does beside its class's and the moving of inputs to the weights."""
    if runs_own_forward(child) and "_old_forward" not in child.__dict__:
        return None
    hook = child.__dict__.get("_hf_hook")
    if hook is None or not runs_own_forward(child):
        return f"the forward of {name} is patched"
    for part in getattr(hook, "hooks", (hook,)):
        if type(part).__module__ != "accelerate.hooks" or type(part).__name__ != "AlignDevicesHook":
            return f"{name} has a {type(part).__name__}"
        if part.offload:
            return f"the weight of {name} is offloaded"
    return None


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class, at most between accelerate's hooks."""
    patch = module.__dict__.get("forward")
    if isinstance(patch, functools.partial) and patch.func.__module__ == "accelerate.hooks":
        patch = module.__dict__.get("_old_forward") if patch.args and patch.args[0] is module else patch
    return patch is None or is_bound(patch, module, type(module).forward)


def is_bound(method: object, module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a method is `forward` of a module."""
    return isinstance(method, types.MethodType) and method.__self__ is module and method.__func__ is forward


def is_moved(child: object) -> bool:
    """Whether hooks move a child's input to its weight."""
    return isinstance(child, nn.Module) and "_hf_hook" in child.__dict__


def run_moved(up: nn.Module, down: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run on the device of the weights, as layers whose hooks move inputs do; the output lies where theirs would."""
    home = x.device
    out = run(x.to(up.weight.device))  # type: ignore[arg-type]
    hooks = [child.__dict__.get("_hf_hook") for child in (up, down)]
    return out.to(home) if all(getattr(hook, "io_same_device", False) for hook in hooks) else out


def warn_once(module: nn.Module, text: str) -> None:
    """Warn, once for each module and text; not while tracing."""
    if torch.compiler.is_compiling():
        return
    texts = _warned.setdefault(module, set())
    if text not in texts:
        texts.add(text)
        warnings.warn(f"sparse24: {text}", stacklevel=4)


def layer_problem(name: str, child: nn.Module) -> str | None:
    """Why a layer has to be called."""
    for kind, forward in ((nn.Linear, LINEAR_FORWARD), (QuantizedLinear, _QUANTIZED_FORWARD)):
        if kind is type(child):  # in this order: what Dynamo sees first is what it has guards on
            weight = child._parameters.get("weight")
            weight = child.weight if weight is None else weight
            return call_problem(name, child, kind, forward) or weight_problem(name, weight)
    found = type(child)
    return f"{name} is a {found.__module__}.{found.__qualname__}, not a torch.nn.Linear"


def further_problem(name: str, child: nn.Module) -> str | None:
    """Name what a layer has that a quantised one would not keep."""
    if any(getattr(child, kind) for kind in _STATE_HOOKS) or is_moved(child):
        return f"{name} has hooks"
    if child._modules or child._buffers or set(child._parameters) != {"weight", "bias"}:
        return f"{name} has more than a weight and a bias, or other than parameters"
    return None
