"""Near misses: modules whose code speaks of squared ReLU, and which are no network of two layers."""

import re

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse24.convert.call import arguments_of
from sparse24.convert.layers import is_list, layers_of
from sparse24.convert.mention import mentions_relu2
from sparse24.convert.problems import PATCHED, not_linear
from sparse24.nn import ReLU2Experts, ReLU2MLP
from sparse24.nn.children import runs_own_forward

_WEIGHT = re.compile(r"^w\d*$|weight|w_|_w|fc|proj|up|down|lin", re.IGNORECASE)


def near_misses(model: nn.Module, found: set[str], others: dict[str, str]) -> dict[str, str]:
    """Name the innermost modules that mention squared ReLU, and why each is no network.

    Parameters
    ----------
    model : Module
        The model.
    found : set of str
        Names of its networks, within which nothing is missed.
    others : dict of str to str
        Reasons that are known.
    """
    missed: dict[str, str] = {}
    explained = set()  # the modules around what was found or missed
    for name in found:
        explained |= _around(name)
    for name, module in reversed(list(model.named_modules())):
        inside = name in found or not found.isdisjoint(_around(name))
        if inside or name in explained or isinstance(module, (ReLU2MLP, ReLU2Experts)) or not mentions_relu2(module):
            continue
        reason = others.get(name) or _reason(module)
        if reason:
            missed[name] = reason
            explained |= _around(name)
    return dict(reversed(missed.items()))


def _around(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))} if name else set()


def _reason(module: nn.Module) -> str | None:
    if not runs_own_forward(module):
        return PATCHED
    large = {name: list(p.shape) for name, p in _parameters(module).items() if sum(size > 1 for size in p.shape) > 2}
    if large:
        name, shape = next(iter(large.items()))
        if len(large) > 1 and len(shape) == 3:
            return f"a mixture of experts: the weight of {name} has 3 dimensions"
        return f"a bank of weights: {name} {shape}"
    layers = layers_of(module)
    if layers:
        return f"it has {len(layers)} {'layer' if len(layers) == 1 else 'layers'} ({', '.join(layers[:4])})"
    for name, child in module.named_children():
        if _is_layer(child) and not isinstance(child, (nn.Linear, nn.Embedding)):
            return not_linear(name, child)
    return "its weights are arguments of its forward" if _takes_weights(module) else None


def _is_layer(child: nn.Module) -> bool:
    """Whether it owns a matrix or more, such as that of a convolution, or says how many features it takes and gives."""
    weight = child._parameters.get("weight")
    says = all(isinstance(child.__dict__.get(name), int) for name in ("in_features", "out_features"))
    return says or (weight is not None and not is_lazy(weight) and Tensor.dim(weight) > 1)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Those that it owns itself, also in lists, and that have sizes."""
    owned = dict(module._parameters)
    for name, child in module._modules.items():
        if child is not None and is_list(child):
            owned |= {f"{name}.{inner}": p for inner, p in child._parameters.items()}
    return {name: p for name, p in owned.items() if p is not None and not is_lazy(p)}


def _takes_weights(module: nn.Module) -> bool:
    """Whether two further arguments have to be given, under names of weights: keys and values of attention are none."""
    try:
        required = arguments_of(type(module).forward).required
    except (TypeError, ValueError):  # a forward without a signature
        return False
    return sum(_WEIGHT.search(name) is not None for name in required) >= 2
