"""Find out by running it what a module computes: ``W2 max(W1 x + b1, 0)^2 + b2``, or something else.

What runs is a replica, whose weights are small random matrices: the module itself is not touched, zeros of an
initialisation hide nothing, and weights on the meta device are no obstacle. The first weight is positive, so there are
tokens that make all of the hidden layer negative. They must come out as *exact* zeros in every precision: no leak and
no smoothing is small enough to pass.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse24.convert.layers import weight_of
from sparse24.convert.reason import Mismatch, reason
from sparse24.convert.replica import Network, device_of, make_replica, replace_bias, replace_weight, run
from sparse24.format import FP8

#: Largest error, in units of the same sum of magnitudes. float64 leaves room for a detour through float32, and float32
#: for TF32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TOLERANCE_FP8 = 0.15
#: Of the inputs. Squared ReLU looks the same at every magnitude, and nothing that is smoother at zero or bounded does.
_MAGNITUDES = (2.0**-6, 1.0, 8.0, 128.0)
#: Of inputs in types where sums of larger squares overflow.
_SMALL_MAGNITUDES = {torch.float16: _MAGNITUDES[:3], FP8: (1.0,)}
#: What is raised where sizes are not those that a module insists on.
_OF_SIZES = (RuntimeError, ValueError, AssertionError, IndexError)


def probe(module: nn.Module, networks: list[Network], own_sizes: bool = True) -> Network | Mismatch:
    """Find the network that a module computes.

    It has to be that one in evaluation, with and without biases, and in training too if the module is in training.

    Parameters
    ----------
    module : Module
        Its parameters and buffers are those of the two layers, or it calls nothing else.
    networks : list of Network
        What it could be: layers have an order, and a parameter may be stored either way.
    own_sizes : bool
        Whether to try it also with its own sizes, which may take long, where it does not run with smaller ones.

    Returns
    -------
    Network or Mismatch
        One of `networks`, or why it is none of them.
    """
    errors: list[Exception] = []
    mismatch: Mismatch | None = None
    for small in (True, False) if own_sizes else (True,):  # a module may insist on its own sizes
        for network in networks:
            for dtype, x_dtype in _dtypes(module, network):
                try:
                    found = _try(module, network.smaller() if small else network, dtype, x_dtype)
                except Exception as caught:  # of the module, and it may be anything
                    errors.append(caught)
                    continue
                if isinstance(found, bool):
                    return replace(network, in_training=found)
                mismatch = mismatch or found
                break  # it runs in this dtype: the answer holds
        if mismatch:
            return mismatch
        if not isinstance(errors[0], _OF_SIZES) or isinstance(errors[0], NotImplementedError):
            break
    text = str(errors[0]).partition("\n")[0]
    return Mismatch(f"its forward does not run: {type(errors[0]).__name__}: {text}", False)


def _dtypes(module: nn.Module, network: Network) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Of weights and input: the most precise first, then those that a cast inside the module may ask for."""
    own = weight_of(module, network.up.name).dtype
    if own == FP8:
        return iter([(FP8, torch.bfloat16), (FP8, torch.float32), (FP8, torch.float16)])
    return iter([(torch.float64, torch.float64), (own, own), (own, torch.bfloat16)])


def _try(module: nn.Module, network: Network, dtype: torch.dtype, x_dtype: torch.dtype) -> bool | Mismatch:
    """Whether a replica of the module with random weights is the network in training too; or how it differs."""
    device = device_of(module)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    replica = make_replica(module)
    w1 = replace_weight(replica, network.up, normal(network.f, network.d).abs() / network.d, dtype, device)
    w2 = replace_weight(replica, network.down, normal(network.d_out, network.f), dtype, device)
    directions = torch.stack([-normal(network.d).abs(), normal(network.d).abs(), normal(network.d)])
    of_type = _SMALL_MAGNITUDES.get(FP8 if dtype == FP8 else x_dtype, _MAGNITUDES)
    magnitudes = torch.tensor(of_type, dtype=torch.float64, device="cpu")
    x = (magnitudes.reshape(-1, 1, 1) * directions).to(x_dtype)  # [magnitudes, 3, d]

    in_training = True
    tolerance = _TOLERANCE_FP8 if dtype == FP8 else _TOLERANCE[x_dtype]
    for biases in (False, True):
        b1 = replace_bias(replica, network.up, normal(network.f) * biases, x_dtype, device)
        b2 = replace_bias(replica, network.down, normal(network.d_out) * biases, x_dtype, device)
        h = x.double() @ w1.t() + b1
        expected = h.clamp(min=0).square() @ w2.t() + b2
        scale = (x.double().abs() @ w1.t() + b1.abs()).square() * (h > 0) @ w2.abs().t() + b2.abs()
        for training in (False, True):
            out = run(replica, x.to(device, copy=True), training)
            if not isinstance(out, Tensor) or out.shape != expected.shape:
                return Mismatch(f"its forward returns {_describe(out)}", False)
            out = out.double().cpu()
            leaks = not biases and out[:, 0].count_nonzero() > 0
            if leaks or not bool(((out - expected).abs() <= tolerance * scale).all()):
                if training and not module.training:
                    in_training = False
                    continue
                return reason(module, network, dtype, x_dtype, tolerance)
    return in_training


def _describe(out: object) -> str:
    return f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
