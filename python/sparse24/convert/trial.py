"""A replica of a module with random weights, and the network that it may be, with the same weights, in float64.

With weights of its own, zeros of an initialisation hide nothing, and the meta device is no obstacle. The first weight
is positive, so there are tokens that make all of the hidden layer negative. They must come out as *exact* zeros in
every precision: no leak and no smoothing is small enough to pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse24.convert.conversion import Layer, weights_of
from sparse24.convert.reason import OTHER, Mismatch, reason
from sparse24.convert.replica import Network, device_of, make_replica, replace_bias, replace_weight, run
from sparse24.errors import dtype_name
from sparse24.format import FP8

#: Largest error, in units of the same sum of magnitudes. float64 leaves room for a detour through float32, and float32
#: for TF32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TOLERANCE_FP8 = 0.15
#: Where the question is whether it is the same network at all, whatever it rounds to.
ROUGH = _TOLERANCE[torch.bfloat16]
#: Of a gradient, in units of its largest entry.
_TOLERANCE_GRADIENT = 1e-3
#: Of the inputs. Squared ReLU looks the same at every magnitude, and nothing that is smoother at zero or bounded does.
_MAGNITUDES = (2.0**-6, 1.0, 8.0, 2.0**16, 2.0**52)
#: Of inputs in types where sums of larger squares overflow.
_SMALL_MAGNITUDES = {torch.float16: _MAGNITUDES[:3], FP8: _MAGNITUDES[1:2]}
#: Up to which magnitude `reason` looks.
_NAMED_UP_TO = 3
_BOUNDED = "it is not W2 relu(W1 x)^2 for large inputs, as where something is clipped"


class Trial:
    """A module and a network with the same weights.

    Attributes
    ----------
    x : Tensor [magnitudes, 3, d]
        Tokens on the CPU: of each magnitude a negative one, a positive one and one of both signs.
    expected, scale : Tensor [magnitudes, 3, d_out]
        What the network computes, and the sum of magnitudes that rounding errors are in proportion to.
    """

    def __init__(
        self,
        module: nn.Module,
        network: Network,
        dtype: torch.dtype,
        x_dtype: torch.dtype,
        biases: bool,
        tolerance: float = 0,
    ) -> None:
        self.module, self.network, self.dtype = module, network, dtype
        self.device, self.biases = device_of(module), biases
        self.tolerance = max(tolerance, _TOLERANCE_FP8 if dtype == FP8 else _TOLERANCE[x_dtype])
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        self.replica = replica = make_replica(module)
        up, down = network.up, network.down
        self.w1 = replace_weight(replica, up, normal(network.f, network.d).abs() / network.d, dtype, self.device)
        self.w2 = replace_weight(replica, down, normal(network.d_out, network.f), dtype, self.device)
        self.b1 = replace_bias(replica, up, normal(network.f) * biases, x_dtype, self.device)
        self.b2 = replace_bias(replica, down, normal(network.d_out) * biases, x_dtype, self.device)
        directions = torch.stack([-normal(network.d).abs(), normal(network.d).abs(), normal(network.d)])
        of_type = _SMALL_MAGNITUDES.get(FP8 if dtype == FP8 else x_dtype, _MAGNITUDES)
        magnitudes = torch.tensor(of_type, dtype=torch.float64, device="cpu")
        self.x = (magnitudes.reshape(-1, 1, 1) * directions).to(x_dtype)
        self.expected, self.scale = self._expected(self.x, self.w1, self.w2)

    def mismatch(self, training: bool, arranged: Callable[[Tensor], Tensor] | None = None) -> Mismatch | None:
        """Tell how the module differs from the network, if it does, for tokens that are `arranged` in another way."""
        x, expected, scale = (t if arranged is None else arranged(t) for t in (self.x, self.expected, self.scale))
        out = run(self.replica, x.to(self.device, copy=True), training)
        if not isinstance(out, Tensor) or out.shape != expected.shape:
            return Mismatch(f"its forward returns {_describe(out)}", False)
        if out.dtype != x.dtype and x.dtype != torch.float64:
            return Mismatch(f"its forward returns {dtype_name(out.dtype)} for {dtype_name(x.dtype)}", True)
        out = out.double().cpu()
        is_off = ~((out - expected).abs() <= self.tolerance * scale)  # exact zeros where all of h is negative
        if not is_off.any():
            return None
        found = reason(self.module, self.network, self.dtype, x.dtype, self.tolerance)
        if found.reason == OTHER and arranged is None and not is_off[:_NAMED_UP_TO].any():
            return found._replace(reason=_BOUNDED)
        return found

    def gradients_differ(self) -> bool:
        """Whether the module's gradients are others than the network's; no if it has none at all."""
        x = self.x[1].to(self.device, copy=True).requires_grad_()
        layers = [(weights_of(self.replica, layer), layer) for layer in self.network.layers()]
        stored = [weights.stored.requires_grad_() for weights, _ in layers]
        out = run(self.replica, x, training=False, gradients=True)
        if not isinstance(out, Tensor) or not out.requires_grad:
            return False
        found = torch.autograd.grad(out.square().sum(), [x, *stored], allow_unused=True)
        inputs = [t.detach().cpu().double().requires_grad_() for t in (x, self.w1, self.w2)]
        with torch.enable_grad():
            expected = torch.autograd.grad(self._expected(*inputs)[0].square().sum(), inputs)
        for gradient, e, layer in zip(found, expected, (Layer(""), *self.network.layers()), strict=True):
            g = torch.zeros_like(e) if gradient is None else gradient.double().cpu()
            g = g.t() if layer.transposed else g
            if not bool(((g - e).abs() <= _TOLERANCE_GRADIENT * e.abs().max()).all()):
                return True
        return False

    def _expected(self, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `expected` and `scale`."""
        h = x.double() @ w1.t() + self.b1
        expected = h.clamp(min=0).square() @ w2.t() + self.b2
        magnitudes = (x.double().abs() @ w1.abs().t() + self.b1.abs()).square() * (h > 0)
        return expected, magnitudes @ w2.abs().t() + self.b2.abs()


def _describe(out: object) -> str:
    return f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
