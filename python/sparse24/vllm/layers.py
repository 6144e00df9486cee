"""What a module of vLLM becomes: its forward calls the second layer alone, and that layer's product is the network.

The layers own the collectives: a `RowParallelLinear` decides on which rank the bias is added, calls the product of its
`quant_method`, and sums over ranks if it is to. So the second layer keeps its forward and gets a `quant_method` that
knows one more kind of input, what the whole network is computed of.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, kFp8StaticTensorSym

from sparse24.vllm import operator
from sparse24.vllm.network import Network


@dataclass
class NetworkInput:
    """The input of the first layer, on its way through the second one's forward."""

    x: Tensor


def attach(module: nn.Module, names: tuple[str, str], network: Network, key: str) -> None:
    """Make a module run its network through the op.

    Parameters
    ----------
    module : Module
        Its own parameters, children and their forwards stay.
    names : tuple of str
        Of the two layers in it.
    network : Network
        Of these layers.
    key : str
        Where the op finds the network in vLLM's table of layers.
    """
    method = copy.copy(network.down_method)
    method.__class__ = _method_class(type(method))
    method.network, method.key, method.quantize = network, key, None
    if network.static and get_input_quant_key(network.up) == kFp8StaticTensorSym:
        # In the graph, where vLLM's compiler fuses it with the norm before it.
        method.quantize = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)
    network.down.quant_method = method
    module._sparse24_network, module._sparse24_layers = network, names
    module.__class__ = _module_class(type(module))


@functools.cache  # compiled graphs guard on classes
def _method_class(base: type) -> type:
    def apply(self: Any, layer: nn.Module, x: object, bias: Tensor | None = None) -> Tensor:
        if not isinstance(x, NetworkInput):
            return base.apply(self, layer, x, bias)
        rows, scale = x.x.reshape(-1, self.network.d), None
        if self.quantize is not None:
            rows, scale = self.quantize(rows, self.network.up.input_scale)
        out = operator.call(self.network, self.key, rows, scale, bias is not None)
        return out.view(*x.x.shape[:-1], self.network.d_out)

    return _subclass(base, apply)


@functools.cache
def _module_class(base: type) -> type:
    def forward(self: Any, x: Tensor) -> Tensor:
        network, (up, down) = self._sparse24_network, self._sparse24_layers
        if getattr(self, up) is not network.up or getattr(self, down) is not network.down:  # adapters around them
            return base.forward(self, x)
        out = network.down(NetworkInput(x))
        return out[0] if isinstance(out, tuple) else out

    return _subclass(base, forward)


def _subclass(base: type, method: Callable) -> type:
    """Override one method. With a second base the layout of objects may differ, and none could become one."""
    return type(base.__name__, (base,), {method.__name__: method, "__module__": base.__module__})
