"""A copy of a module with small weights of one's own: what is tried is that, and not the module."""

import random
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparse24.convert.call import arguments_of, method_of
from sparse24.convert.conversion import Layer
from sparse24.convert.layers import owner_of
from sparse24.format import FP8, LARGEST_FP8
from sparse24.nn.children import ACCELERATE

_HOOKS = [name for name in nn.Module().__dict__ if "forward" in name and "hooks" in name]
_HOOKS += ["_backward_hooks", "_backward_pre_hooks"]
_NOT_COPIED = {*ACCELERATE, "_parameters", "_buffers", "_modules"}


@dataclass(frozen=True)
class Network:
    """The two layers of a module, and their sizes: x [.., d], hidden layer [.., f], output [.., d_out].

    `in_training` is whether it is the same in training: a module in evaluation mode may have dropout. `experts` is how
    many such networks the module is, where its weights have three dimensions.
    """

    up: Layer
    down: Layer
    d: int
    f: int
    d_out: int
    in_training: bool = True
    experts: int | None = None

    def layers(self) -> tuple[Layer, Layer]:
        """Give both."""
        return self.up, self.down

    def smaller(self) -> "Network":
        """Shrink it to sizes that are quick to try. The hidden layer's differs from the others, which tells layouts."""
        return replace(self, d=32, f=80, d_out=32 if self.d_out == self.d else 48)


def device_of(module: nn.Module) -> torch.device:
    """Where it can be tried: on the device of its weights, or on the CPU if they are on the meta device."""
    device = next(module.parameters(), next(module.buffers(), torch.empty(0))).device
    return torch.device("cpu") if device.type == "meta" else device


def run(
    replica: nn.Module,
    x: Tensor,
    training: bool,
    seed: int = 0,
    gradients: bool = False,
    further: tuple[Tensor, ...] = (),
) -> object:
    """Call it with x, and with what else it needs: `further`, or None. The state of random numbers stays."""
    for module in replica.modules():
        module.training = training
    devices = [x.device] if x.is_cuda else []
    # Dropout without a module draws random numbers in training: it differs, and leaves no trace.
    autocast = torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.random.fork_rng(devices), autocast:
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed devices that are not restored
        if x.is_cuda:
            torch.cuda.default_generators[x.device.index].manual_seed(seed)
        state = random.getstate()
        try:
            method = method_of(type(replica))
            if further:
                return getattr(replica, method)(x, *further)
            return arguments_of(getattr(type(replica), method)).call(getattr(replica, method), x)
        finally:
            random.setstate(state)


def make_replica(module: nn.Module) -> nn.Module:
    """Copy a tree of modules, but not its hooks, and of its tensors none that it owns."""
    replica = object.__new__(type(module))
    # What accelerate hangs on a module runs that one.
    replica.__dict__ = {name: _copy(v) for name, v in module.__dict__.items() if name not in _NOT_COPIED}
    for name in _HOOKS:
        replica.__dict__[name] = OrderedDict()
    for name in ("_parameters", "_buffers"):
        replica.__dict__[name] = module.__dict__[name].copy()
    replica.__dict__["_modules"] = {
        name: child if child is None else make_replica(child) for name, child in module._modules.items()
    }
    return replica


def replace_weight(
    replica: nn.Module, layer: Layer, weight: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Put a weight in the place of the module's; return what it is worth after rounding, in float64."""
    owner = owner_of(replica, layer.name)
    if dtype == FP8:
        assert isinstance(owner, nn.Module)
        rows = owner.weight_scale.numel() != 1
        amax = weight.abs().amax(1) if rows else weight.abs().amax()
        scale = (amax / LARGEST_FP8).float()
        values = (weight / scale.double().reshape(-1, 1)).to(FP8)
        shape = (-1, *owner.weight_scale.shape[1:]) if rows else owner.weight_scale.shape
        put(owner, "weight", values.to(device))
        put(owner, "weight_scale", scale.reshape(shape).to(device))
        if getattr(owner, "input_scale", None) is not None:
            put(owner, "input_scale", torch.full_like(owner.input_scale, 2.0**-4, device=device))
        return values.double() * scale.double().reshape(-1, 1)
    rounded = weight.to(dtype)
    if isinstance(owner, Tensor):
        *path, name = layer.name.split(".")
        put(
            replica.get_submodule(".".join(path)),
            name,
            (rounded.t().contiguous() if layer.transposed else rounded).to(device),
        )
    else:
        put(owner, "weight", rounded.to(device))
    return rounded.double()


def replace_bias(replica: nn.Module, layer: Layer, bias: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put a bias in the place of the module's, if it has one; return what it is worth, in float64."""
    owner = owner_of(replica, layer.name)
    name = "bias"
    if isinstance(owner, Tensor):
        path, _, name = layer.bias.rpartition(".")
        owner = replica.get_submodule(path)
    if not name or getattr(owner, name, None) is None:
        return torch.zeros_like(bias)
    rounded = bias.to(dtype)
    put(owner, name, rounded.to(device))
    return rounded.double()


def _copy(value: object) -> object:
    """Copy what a forward may write to: a tensor that is no parameter, a container."""
    if type(value) is Tensor:
        return value.detach().clone()
    if type(value) in (list, set):
        return type(value)(_copy(v) if type(v) is Tensor else v for v in value)  # type: ignore[attr-defined, call-arg]
    if type(value) in (dict, OrderedDict):
        return type(value)((k, _copy(v) if type(v) is Tensor else v) for k, v in value.items())  # type: ignore
    return value


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of one that a module owns."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    elif name in module._buffers:
        module._buffers[name] = value
    else:
        module.__dict__[name] = value
