"""The layers that a module owns: linear children and two-dimensional parameters, also of lists and the like."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse24.convert.call import called_children
from sparse24.format import FP8

#: Names that feed-forward networks without a gate give their two layers. A module with such a pair counts as one that
#: is meant to be a network, whatever it computes.
NAMES = (
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("fc", "proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("linear_fc1", "linear_fc2"),
    ("linear_1", "linear_2"),
    ("key", "value"),
)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def owner_of(module: nn.Module, name: str) -> nn.Module | Tensor:
    """Give the child or the parameter of that name; those of lists have a path."""
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    for owned in (module._modules, module._parameters):  # methods of torch may hide them, such as `type`
        if last in owned and owned[last] is not None:  # those of a scripted module have no `get`
            return owned[last]  # type: ignore[return-value]
    return getattr(module, last)


def weight_of(module: nn.Module, name: str) -> Tensor:
    """Give the weight of a layer."""
    owner = owner_of(module, name)
    return owner if isinstance(owner, Tensor) else getattr(owner, "weight", None)  # type: ignore[return-value]


def is_parameter(module: nn.Module, name: str) -> bool:
    """Whether a layer is a parameter, which may be stored either way, and no child."""
    return isinstance(owner_of(module, name), Tensor)


def may_be_bias(owner: nn.Module | Tensor) -> bool:
    """Whether it is a parameter with one dimension."""
    return isinstance(owner, nn.Parameter) and not is_lazy(owner) and Tensor.dim(owner) == 1


def named_pair(module: nn.Module) -> tuple[str, str] | None:
    """Find a pair of NAMES."""
    owned = {**module._parameters, **module._modules}
    pairs = [pair for pair in NAMES if all(owned.get(n) is not None for n in pair)]
    # The keys and values of attention are no layers of a network; that of RWKV has no query, but an output.
    is_attention = "query" in owned or (pairs == [("key", "value")] and "output" in owned)
    return pairs[0] if pairs and not is_attention else None


def layers_of(module: nn.Module) -> list[str]:
    """Name the linear children and the two-dimensional parameters of a module and of its lists, in their order.

    Lists are modules that call their children one after another, or not at all.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []
    names = [name for name, p in module._parameters.items() if is_matrix(p)]
    for name, child in module._modules.items():
        if child is None or isinstance(child, torch.jit.ScriptModule):
            continue
        weight = child._parameters.get("weight", child._buffers.get("weight"))
        if is_matrix(weight) and (isinstance(child, nn.Linear) or weight.dtype == FP8):
            names.append(name)
        elif is_list(child):
            names += [f"{name}.{inner}" for inner in layers_of(child)]
    return names


def is_list(module: nn.Module) -> bool:
    """Whether a module is its children and parameters alone."""
    return isinstance(module, _LISTS) or getattr(type(module), "forward", None) is nn.Sequential.forward


def is_called(module: nn.Module | None) -> bool:
    """Whether a module has a forward, and is none of torch's own that are known to compute something else."""
    if module is None or getattr(type(module), "forward", None) in (None, nn.Module.forward):
        return False
    of_torch = type(module).__module__.startswith("torch.nn.") and not getattr(module, "_sparse24_converted", False)
    return not of_torch or is_list(module) or called_children(module) is not None


def is_matrix(weight: Tensor | None) -> bool:
    """Whether a parameter is two-dimensional; one without a size yet is not."""
    return weight is not None and not is_lazy(weight) and torch.Tensor.dim(weight) == 2
