"""The feed-forward networks of a model, as `convert` finds them, and what they are given when the model runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse24.analyze.counts import CHUNK, Counts
from sparse24.convert.call import arguments_of
from sparse24.convert.conversion import Layer, Weights, weights_of
from sparse24.convert.find import find_networks
from sparse24.convert.forward import disabled
from sparse24.convert.layers import owner_of
from sparse24.convert.near import near_misses
from sparse24.convert.problems import precision_problem
from sparse24.convert.watch import hook
from sparse24.convert.weights import all_entering
from sparse24.format import FP8
from sparse24.mlp import up_projection
from sparse24.mlp.scale import factor_of
from sparse24.nn import ReLU2Experts, ReLU2MLP
from sparse24.ops import quantize_fp8_predict
from sparse24.ops.activation import ActivationFunction


@dataclass(frozen=True)
class Watched:
    """A network, or the experts of a mixture: where the weights are, and which module is called with its input."""

    name: str
    module: nn.Module
    up: Layer
    down: Layer
    state: str
    threshold: float = 0

    def layers(self) -> tuple[Weights, Weights]:
        """Read both layers as they are stored."""
        return tuple(weights_of(self.module, layer) for layer in (self.up, self.down))

    def weights(self) -> tuple[Weights, Weights]:
        """Read both layers as sparse steps multiply them: pruned and with adapters, where they are."""
        layers = self.layers()
        if isinstance(self.module, ReLU2MLP):
            entering = self.module._all_entering()
        elif self.state == "converted" and not self.is_mixture():
            entering = all_entering(self.module)
        else:
            return layers
        return tuple(weights._replace(weight=w.detach()) for weights, w in zip(layers, entering, strict=True))

    def sizes(self) -> dict[str, int]:
        """Name d_model, d_ff and d_out, and how many experts there are."""
        up, down = self.layers()
        sizes = {"d_model": up.weight.shape[-1], "d_ff": up.weight.shape[-2], "d_out": down.weight.shape[-2]}
        return sizes | ({"experts": up.weight.shape[0]} if self.is_mixture() else {})

    def is_mixture(self) -> bool:
        """Whether it is the experts of a mixture."""
        return self.layers()[0].weight.dim() == 3

    def is_float8(self) -> bool:
        """Whether its weights are float8."""
        return self.layers()[0].weight.dtype == FP8

    def count(self, x: Tensor, experts: Tensor | None, counts: Counts) -> None:
        """Add the activation that the network has for tokens [T, D], or that their `experts` [T] have."""
        if experts is not None:
            first, second = self.weights()
            for number in experts.unique().tolist():
                if number < first.weight.shape[0]:  # others are on other devices
                    for part in x[experts == number].to(first.weight.device, first.weight.dtype).split(CHUNK):
                        counts.add(up_projection(part, first.weight[number]), second.weight[number])
            return
        up, down = (owner_of(self.module, layer.name) for layer in (self.up, self.down))
        first, second = self.weights()
        fp8, dtype = first.scale is not None, x.dtype
        w2 = second.weight.float() * second.scale.reshape(-1, 1) if second.scale is not None else second.weight
        scale = getattr(down, "input_scale", None) if fp8 else None
        factor = factor_of(up, scale) if fp8 else None
        if fp8 and first.weight.is_cuda:
            dtype = torch.bfloat16  # the kernels quantise 16 bits
        # Also to where the weights are: a module may bring its input there.
        for part in x.to(first.weight.device, dtype).split(CHUNK):
            predicted = scale if factor is None else quantize_fp8_predict(part, factor)[2]
            y1 = up_projection(part, first.weight, first.bias, fp8=fp8, w1_scale=first.scale)
            if self.threshold:
                y1 = ActivationFunction("relu", self.threshold)(y1)
            counts.add(y1, w2, predicted)


class Networks(NamedTuple):
    """Those that can be looked at, in the order of the model; why others of `convert` cannot, and its near misses."""

    watched: list[Watched]
    skipped: dict[str, str]
    near_misses: dict[str, str]


def networks_of(model: nn.Module) -> Networks:
    """Find the networks of a model as `convert` does, and the modules of this library."""
    watched, skipped = {}, {}
    found, others = find_networks(model)
    for name, module, network, reason in found:
        if getattr(module, "_sparse24_converted", False):
            conversion = module._sparse24
            threshold = float(conversion.options.get("threshold", 0))
            watched[name] = Watched(name, module, conversion.up, conversion.down, "converted", threshold)
        elif network is None or (problem := reason or precision_problem(module, network, "auto")):
            skipped[name] = reason or problem
        else:
            watched[name] = Watched(name, module, network.up, network.down, "dense")
    for name, module in model.named_modules():
        if isinstance(module, ReLU2MLP):
            layers = Layer("up_proj"), Layer("down_proj")
            watched[name] = Watched(name, module, *layers, "ReLU2MLP", module.threshold)
        elif isinstance(module, ReLU2Experts) and not module.up_proj.dtype == FP8:
            watched[name] = Watched(name, module, Layer("up_proj"), Layer("down_proj"), "ReLU2Experts")
    for name, network in watched.items():
        if any(weights.weight.is_meta for weights in network.layers()):
            skipped[name] = "its weights are on the meta device"
    in_order = [watched[name] for name, _ in model.named_modules() if name in watched and name not in skipped]
    return Networks(in_order, skipped, near_misses(model, {*watched, *skipped}, others))


@contextmanager
def watching(networks: list[Watched], given: Callable[[Watched, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Call `given` with what a network is given, whenever it is called. All networks run dense meanwhile.

    That are tokens [T, D]; of a mixture one for each choice of its router, and the experts [T] beside it.
    """
    with ExitStack() as stack:
        stack.enter_context(disabled())
        for network in networks:
            if isinstance(network.module, (ReLU2MLP, ReLU2Experts)):
                stack.callback(setattr, network.module, "sparse", network.module.sparse)
                network.module.sparse = False
            stack.enter_context(_hook(network, given))
        yield


def _hook(network: Watched, given: Callable[[Watched, Tensor, Tensor | None], None]) -> Any:
    """Watch the first layer, whose input is that of the network; or the network, where it calls no layer."""
    owner = owner_of(network.module, network.up.name)
    called = network.module if isinstance(owner, Tensor) or network.state == "ReLU2MLP" else owner
    if not network.is_mixture():
        return hook(called, lambda x: given(network, x, None))
    arguments = arguments_of(type(called).forward)

    def hook_of_mixture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, second = (*args, *(kwargs[name] for name, _ in arguments.positional if name in kwargs))[:2]
        if isinstance(network.module, ReLU2Experts):  # rows sorted by expert, and where those of each end
            places = torch.arange(x.shape[0], device=x.device)
            given(network, x.detach(), torch.searchsorted(second, places, right=True))
        else:
            given(network, x.detach().repeat_interleave(second.shape[1], 0), second.flatten())

    return called.register_forward_pre_hook(hook_of_mixture, with_kwargs=True)
