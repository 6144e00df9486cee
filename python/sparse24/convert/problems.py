"""Reasons against converting a module that can be told by looking at it, without running it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.convert.call import called_children
from sparse24.convert.layers import owner_of, weight_of
from sparse24.convert.replica import Network
from sparse24.env import cuda_problem
from sparse24.format import FEATURES, FP8
from sparse24.mlp import Precision
from sparse24.nn.children import runs_own_forward
from sparse24.recipe import Recipe

#: Attributes that converted modules have: the module's own must not be hidden.
_RESERVED = ("sparse", "sparse24_enabled")
CONVERTED = "already converted"
PATCHED = "its forward is patched"


def module_problem(module: nn.Module) -> str | None:
    """Why no network can be read past this module."""
    if getattr(module, "_sparse24_converted", False):
        return CONVERTED
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if not runs_own_forward(module):
        return PATCHED
    for name in _RESERVED:
        if hasattr(module, name):
            return f"it has an attribute {name} of its own"
    return None


def dropout_problem(module: nn.Module) -> str | None:
    """Name a child that drops something as long as the module is in training."""
    called = called_children(module)
    for name, child in module.named_modules():
        if called is not None and name.partition(".")[0] not in called:
            continue
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 and (child.training or module.training):
            return f"it has dropout ({name}, p={child.p})"
    return None


def layer_problem(module: nn.Module, name: str) -> str | None:
    """Why a weight cannot be read past its owner."""
    owner = owner_of(module, name)
    weight = weight_of(module, name)
    if not isinstance(owner, Tensor):
        # Of other modules only float8 ones are known by what they hold; for the rest the class has to vouch.
        is_float8 = isinstance(weight, Tensor) and weight.dtype == FP8
        if not isinstance(owner, nn.Linear) and not is_float8:
            return not_linear(name, owner)
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the weight of {name} is a {type(weight).__name__}"
    if weight.dim() != 2:
        experts = "a mixture of experts: " if weight.dim() == 3 else ""
        return f"{experts}the weight of {name} has {weight.dim()} dimensions"
    if weight.is_cuda and cuda_problem() is not None:
        return f"the kernels cannot run: {cuda_problem()}"
    if weight.dtype == FP8:
        scale = getattr(owner, "weight_scale", None)
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.numel() not in (1, weight.shape[0]):
            return f"{name} is float8 without a weight_scale in float32, one or one per row"
        scale = getattr(owner, "input_scale", None)
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return f"the input_scale of {name} is not one float32 number"
    elif weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the weight of {name} is {str(weight.dtype).removeprefix('torch.')}"
    return None


def not_linear(name: str, owner: nn.Module) -> str:
    """Say of which class a layer is."""
    return f"{name} is a {type(owner).__module__}.{type(owner).__qualname__}, not a torch.nn.Linear"


def further_tensors(module: nn.Module, up: str, down: str) -> list[str]:
    """Name parameters and buffers that are no part of the two layers, in the order of the module."""
    if called_children(module) is not None:
        return []
    known = {up, down}
    for name in known.copy():
        known |= {f"{name}.{part}" for part in ("weight", "bias", "weight_scale", "input_scale", "scale_y_factor")}
    tensors = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    return [name for name in tensors if name not in known]


def further_problem(module: nn.Module, up: str, down: str) -> str | None:
    """Name what a network of two layers does not have: gates, norms, adapters, parametrisations."""
    further = further_tensors(module, up, down)
    if further:
        what = "gated: it" if any("gate" in name for name in further) else "it"
        return f"{what} has parameters or buffers beside its two layers ({', '.join(further[:3])})"
    return None


def sizes_problem(module: nn.Module, up: str, down: str) -> str:
    """Say which sizes do not fit."""
    weights = [weight_of(module, name) for name in (up, down)]
    shapes = " and ".join(f"{name} {list(w.shape)}" for name, w in zip((up, down), weights, strict=True))
    gated = "gated: " if weights[0].shape[0] == 2 * weights[1].shape[1] else ""
    return f"{gated}the sizes of {shapes} do not fit"


def precision_problem(module: nn.Module, network: Network | None, precision: Precision) -> str | None:
    """Why a network cannot run in a precision, or would never run sparse."""
    if network is None:
        return None
    is_float8 = weight_of(module, network.up.name).dtype == FP8
    if is_float8 and precision == "16bit":
        return "its weights are float8"
    fp8 = is_float8 or precision == "fp8"
    multiple = FEATURES[fp8]
    if network.f % multiple:
        return f"{network.f} hidden features are no multiple of {multiple}: it would never run sparse"
    if fp8 and (network.d % 16 or network.d_out % 16):
        return f"fp8 needs multiples of 16 features, it has {network.d} and {network.d_out}"
    return None


def experts_problem(network: Network | None, options: Mapping[str, Any]) -> str | None:
    """Why experts cannot run as the configuration says."""
    if network is None or network.experts is None:
        return None
    if "threshold" in options:
        return "experts have no threshold"
    recipe = options.get("recipe")
    return None if recipe is None or recipe.reuse_mask else "experts reuse the mask"


def weights_problem(module: nn.Module, network: Network | None, recipe: Recipe | None, adapters: int) -> str | None:
    """Why the weights of a network cannot be 2:4, or have no adapters fitted."""
    if network is None or recipe is None or recipe.sparse_weights == "none":
        return None
    if network.d % 4 or (recipe.sparse_weights == "both" and network.d_out % 4):
        return f"2:4 weights need multiples of 4 features, it has {network.d} and {network.d_out}"
    w1 = weight_of(module, network.up.name)
    if adapters and network.experts is not None:
        return "experts have no adapters"
    if adapters and (w1.is_meta or w1.dtype == FP8):
        return (
            f"adapters are fitted to weights, and its first one is {'on the meta device' if w1.is_meta else 'float8'}"
        )
    if adapters and not w1.isfinite().all():
        return "adapters are fitted to weights, and its first one has NaN or infinity"
    return None
