"""Find out by running it what a module computes: ``W2 max(W1 x + b1, 0)^2 + b2``, or something else.

What runs is a replica, whose weights are small random matrices: the module itself is not touched, zeros of an
initialisation hide nothing, and weights on the meta device are no obstacle. The first weight is positive, so there are
tokens that make all of the hidden layer negative. They must come out as *exact* zeros in every precision: no leak and
no smoothing is small enough to pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparse24._convert_forward import Layer

_FP8 = torch.float8_e4m3fn
#: Largest error, in units of the same sum of magnitudes. float64 leaves room for a detour through float32, and float32
#: for TF32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TOLERANCE_FP8 = 0.15
#: Of the inputs. Squared ReLU looks the same at every magnitude, and nothing that is smoother at zero does.
_MAGNITUDES = (2.0**-6, 1.0, 8.0)


@dataclass(frozen=True)
class Network:
    """The two layers of a module, and their sizes: x [.., d], hidden layer [.., f], output [.., d_out]."""

    up: Layer
    down: Layer
    d: int
    f: int
    d_out: int

    def smaller(self) -> "Network":
        """Shrink it to sizes that are quick to try. The hidden layer's differs from the others, which tells layouts."""
        return replace(self, d=32, f=80, d_out=32 if self.d_out == self.d else 48)


def probe(module: nn.Module, networks: list[Network]) -> Network | str:
    """Find the network that a module computes.

    It has to be that one in training and in evaluation, with and without biases.

    Parameters
    ----------
    module : Module
        Its parameters and buffers are those of the two layers.
    networks : list of Network
        What it could be: a parameter of the module itself may be stored either way.

    Returns
    -------
    Network or str
        One of `networks`, or why it is none of them.
    """
    difference = error = ""
    for small in (True, False):  # a module may insist on its own sizes
        for network in networks:
            for dtype, x_dtype in _dtypes(module, network):
                try:
                    difference = _difference(module, network.smaller() if small else network, dtype, x_dtype)
                except Exception as caught:  # of the module, and it may be anything
                    error = f"its forward does not run: {type(caught).__name__}: {str(caught).partition(chr(10))[0]}"
                    continue
                if not difference:
                    return network
                break  # it runs in this dtype: the answer holds
        if difference:
            return difference
    return error


def _dtypes(module: nn.Module, network: Network) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Of weights and input: the most precise first, then those that a cast inside the module may ask for."""
    owner = getattr(module, network.up.name)
    own = owner.dtype if isinstance(owner, Tensor) else owner.weight.dtype
    if own == _FP8:
        return iter([(_FP8, torch.bfloat16), (_FP8, torch.float32), (_FP8, torch.float16)])
    return iter([(torch.float64, torch.float64), (own, own), (own, torch.bfloat16)])


def _difference(module: nn.Module, network: Network, dtype: torch.dtype, x_dtype: torch.dtype) -> str:
    """How a replica of the module with random weights differs from the network; empty if it does not."""
    device = next(module.parameters(), next(module.buffers(), torch.empty(0))).device
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    replica = _replica(module)
    w1 = _replace_weight(replica, network.up, normal(network.f, network.d).abs() / network.d, dtype, device)
    w2 = _replace_weight(replica, network.down, normal(network.d_out, network.f), dtype, device)
    directions = torch.stack([-normal(network.d).abs(), normal(network.d).abs(), normal(network.d)])
    magnitudes = torch.tensor((1.0,) if dtype == _FP8 else _MAGNITUDES, dtype=torch.float64, device="cpu")
    x = (magnitudes.reshape(-1, 1, 1) * directions).to(x_dtype)  # [magnitudes, 3, d]

    tolerance = _TOLERANCE_FP8 if dtype == _FP8 else _TOLERANCE[x_dtype]
    for biases in (False, True):
        b1 = _replace_bias(replica, network.up, normal(network.f) * biases, x_dtype, device)
        b2 = _replace_bias(replica, network.down, normal(network.d_out) * biases, x_dtype, device)
        h = x.double() @ w1.t() + b1
        expected = h.clamp(min=0).square() @ w2.t() + b2
        scale = (x.double().abs() @ w1.t() + b1.abs()).square() * (h > 0) @ w2.abs().t() + b2.abs()
        for training in (False, True):
            out = _run(replica, x.to(device, copy=True), training)
            if not isinstance(out, Tensor) or out.shape != expected.shape:
                return f"its forward returns {_describe(out)}"
            out = out.double().cpu()
            if not biases and out[:, 0].count_nonzero() > 0:
                return "its activation is not zero for negative inputs, as that of a leaky or smoothed variant"
            if not bool(((out - expected).abs() <= tolerance * scale).all()):
                return "it does not compute W2 relu(W1 x)^2"
    return ""


def _run(replica: nn.Module, x: Tensor, training: bool) -> object:
    for module in replica.modules():
        module.training = training
    devices = [x.device] if x.is_cuda else []
    # Dropout without a module draws random numbers in training: it differs, and leaves no trace.
    with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(x.device.type, enabled=False):
        return replica.forward(x)


def _replica(module: nn.Module) -> nn.Module:
    """Copy a tree of modules, but not its tensors."""
    replica = object.__new__(type(module))
    replica.__dict__ = module.__dict__.copy()
    for name in ("_parameters", "_buffers"):
        replica.__dict__[name] = module.__dict__[name].copy()
    replica.__dict__["_modules"] = {
        name: child if child is None else _replica(child) for name, child in module._modules.items()
    }
    return replica


def _replace_weight(
    replica: nn.Module, layer: Layer, weight: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Put a weight in the place of the module's; return what it is worth after rounding, in float64."""
    owner = replica._modules.get(layer.name)
    if dtype == _FP8:
        assert owner is not None
        rows = owner.weight_scale.numel() != 1
        amax = weight.abs().amax(1) if rows else weight.abs().amax()
        scale = (amax / 448).float()
        values = (weight / scale.double().reshape(-1, 1)).to(_FP8)
        shape = (-1, *owner.weight_scale.shape[1:]) if rows else owner.weight_scale.shape
        _put(owner, "weight", values.to(device))
        _put(owner, "weight_scale", scale.reshape(shape).to(device))
        if getattr(owner, "input_scale", None) is not None:
            _put(owner, "input_scale", torch.full_like(owner.input_scale, 2.0**-4, device=device))
        return values.double() * scale.double().reshape(-1, 1)
    rounded = weight.to(dtype)
    if owner is None:
        _put(replica, layer.name, (rounded.t().contiguous() if layer.transposed else rounded).to(device))
    else:
        _put(owner, "weight", rounded.to(device))
    return rounded.double()


def _replace_bias(replica: nn.Module, layer: Layer, bias: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    owner = replica._modules.get(layer.name)
    if owner is None or getattr(owner, "bias", None) is None:
        return torch.zeros_like(bias)
    rounded = bias.to(dtype)
    _put(owner, "bias", rounded.to(device))
    return rounded.double()


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    elif name in module._buffers:
        module._buffers[name] = value
    else:
        module.__dict__[name] = value


def _describe(out: object) -> str:
    return f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
