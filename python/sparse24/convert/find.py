"""Find the squared-ReLU feed-forward networks of a model, and the reasons against converting one."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse24.convert.forward import Layer
from sparse24.convert.probe import Network, probe
from sparse24.convert.seen import difference, look
from sparse24.env import cuda_problem
from sparse24.format import FEATURES, FP8
from sparse24.mlp import Precision
from sparse24.nn import ReLU2MLP
from sparse24.nn.children import runs_own_forward

#: Names that feed-forward networks without a gate give their two layers. Parameters of the network count as modules do.
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
#: Attributes that converted modules have: the module's own must not be hidden.
_RESERVED = ("sparse", "sparse24_enabled")


class Candidate(NamedTuple):
    """A module that looks like a feed-forward network by the names of its layers."""

    name: str
    module: nn.Module
    up: str
    down: str


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Find the modules that have a pair of NAMES."""
    for name, module in model.named_modules():
        if isinstance(module, ReLU2MLP):
            continue
        owned = {**module._parameters, **module._modules}
        # The keys and values of attention are no layers of a network.
        pairs = [pair for pair in NAMES if all(owned.get(n) is not None for n in pair) and "query" not in owned]
        if pairs:
            yield Candidate(name, module, *pairs[0])


def find_network(candidate: Candidate, precision: Precision) -> Network | str:
    """Tell what a module computes and where its weights are, or why it cannot be converted.

    Parameters
    ----------
    candidate : Candidate
        The module.
    precision : {"auto", "16bit", "fp8"}
        How it is meant to run.
    """
    module = candidate.module
    reason = (
        _module_problem(candidate)
        or _layer_problem(module, candidate.up)
        or _layer_problem(module, candidate.down)
        or _further_problem(candidate)
        or difference(module, look(module))
    )
    if reason:
        return reason
    weights = [_weight(module, name) for name in (candidate.up, candidate.down)]
    if (weights[0].dtype == FP8) != (weights[1].dtype == FP8):
        return "of its weights one is float8 and one is not"
    networks = list(_networks(candidate, *weights))
    if not networks:
        shapes = " and ".join(f"{name} {list(w.shape)}" for name, w in zip(candidate[2:], weights, strict=True))
        gated = "gated: " if weights[0].shape[0] == 2 * weights[1].shape[1] else ""
        return f"{gated}the sizes of {shapes} do not fit"
    found = probe(module, networks)
    if isinstance(found, str):
        return found + _others(candidate)
    is_float8 = weights[0].dtype == FP8
    if is_float8 and precision == "16bit":
        return "its weights are float8"
    return _size_problem(found, is_float8 or precision == "fp8") or found


def _module_problem(candidate: Candidate) -> str | None:
    module = candidate.module
    if getattr(module, "_sparse24_converted", False):
        return "already converted"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if not runs_own_forward(module):
        return "its forward is patched"
    for name in _RESERVED:
        if hasattr(module, name):
            return f"it has an attribute {name} of its own"
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            return f"it has dropout ({name}, p={child.p})"
    return None


def _layer_problem(module: nn.Module, name: str) -> str | None:
    """Why a weight cannot be read past its owner."""
    owner = getattr(module, name)
    weight = _weight(module, name)
    if not isinstance(owner, Tensor):
        # Of other modules only float8 ones are known by what they hold; for the rest the class has to vouch.
        is_float8 = isinstance(weight, Tensor) and weight.dtype == FP8
        if not isinstance(owner, nn.Linear) and not is_float8:
            return f"{name} is a {type(owner).__module__}.{type(owner).__qualname__}, not a torch.nn.Linear"
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


def _further_problem(candidate: Candidate) -> str | None:
    """Name what a network of two layers does not have: gates, norms, adapters, parametrisations."""
    known = {candidate.up, candidate.down}
    for name in known.copy():
        known |= {f"{name}.{part}" for part in ("weight", "bias", "weight_scale", "input_scale", "scale_y_factor")}
    module = candidate.module
    tensors = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    further = [name for name in tensors if name not in known]
    if further:
        what = "gated: it" if any("gate" in name for name in further) else "it"
        return f"{what} has parameters or buffers beside its two layers ({', '.join(further[:3])})"
    return None


def _networks(candidate: Candidate, up: Tensor, down: Tensor) -> Iterator[Network]:
    """List every reading of the two weights whose sizes fit."""
    readings = [(False, True) if name in candidate.module._parameters else (False,) for name in candidate[2:]]
    for up_transposed, down_transposed in product(*readings):
        f, d = reversed(up.shape) if up_transposed else up.shape
        d_out, f_down = reversed(down.shape) if down_transposed else down.shape
        if f == f_down:
            yield Network(Layer(candidate.up, up_transposed), Layer(candidate.down, down_transposed), d, f, d_out)


def _size_problem(network: Network, fp8: bool) -> str | None:
    multiple = FEATURES[fp8]
    if network.f % multiple:
        return f"{network.f} hidden features are no multiple of {multiple}: it would never run sparse"
    if fp8 and (network.d % 16 or network.d_out % 16):
        return f"fp8 needs multiples of 16 features, it has {network.d} and {network.d_out}"
    return None


def _others(candidate: Candidate) -> str:
    """Name the children that may be the reason: all but plain linear layers."""
    children = candidate.module.named_children()
    others = [f"{name}: {type(child).__name__}" for name, child in children if type(child) is not nn.Linear]
    return f" ({', '.join(others)})" if others else ""


def _weight(module: nn.Module, name: str) -> Tensor:
    owner = getattr(module, name)
    return owner if isinstance(owner, Tensor) else getattr(owner, "weight", None)
