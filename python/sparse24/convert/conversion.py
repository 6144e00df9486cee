"""What is known of a converted module: its two layers, and how it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from sparse24.convert.layers import owner_of
from sparse24.convert.seen import Seen, summary
from sparse24.format import FP8
from sparse24.mlp import Precision

#: The buffer of a module whose training steps are float8 throughout (`sparse24.nn.delayed_scales`).
SCALES = "_sparse24_scales"


class Layer(NamedTuple):
    """Where a weight is: a child's, or a parameter of the network itself, stored [in, out] if `transposed`.

    `bias` names the parameter that is the bias of a weight which is a parameter; a child has its own.
    """

    name: str
    transposed: bool = False
    bias: str = ""


class Weights(NamedTuple):
    """What `relu2_mlp` takes of one layer, and the tensor that the layer stores."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    stored: Tensor


def weights_of(module: Any, layer: Layer, owner: Any = None) -> Weights:
    """Read the weights of one layer, as `torch.nn.Linear` stores them; a scale only where the weight is float8.

    `owner` is the child or the parameter of the module that has the weight, where that is known.
    """
    owner = owner_of(module, layer.name) if owner is None else owner
    if isinstance(owner, Tensor):
        bias = owner_of(module, layer.bias) if layer.bias else None
        return Weights(owner.t() if layer.transposed else owner, bias, None, owner)  # type: ignore[arg-type]
    parameters = owner._parameters
    weight = parameters.get("weight")
    if weight is None:  # a buffer, or what a subclass computes
        weight = owner.weight
    bias = parameters["bias"] if "bias" in parameters else getattr(owner, "bias", None)
    scale = getattr(owner, "weight_scale", None) if weight.dtype == FP8 else None
    return Weights(weight, bias, scale, weight)


@dataclass(frozen=True)
class Conversion:
    """What the forward of a converted module needs to know.

    Attributes
    ----------
    up, down : Layer
        The two weights.
    seen : Seen
        The module at conversion: where that does not hold any more, it runs its own forward.
    precision
        As in `relu2_mlp`.
    sizes : tuple of int
        Features of the input, of the hidden layer, and of the output.
    dense : tuple of (int, int)
        Between which numbers of tokens, exclusive, calls for inference run the forward of before: on the CPU, on CUDA.
    in_training : bool
        Whether it is the same network in training.
    decode : bool
        Whether it keeps the second weight by neuron for few tokens.
    experts : bool
        Whether it is the experts of a mixture: the weights have three dimensions.
    options : mapping of str to object
        Further arguments of `relu2_mlp` that are not its default, by name.
    """

    up: Layer
    down: Layer
    seen: Seen
    precision: Precision
    options: Mapping[str, Any]
    sizes: tuple[int, int, int]
    dense: tuple[tuple[int, int], tuple[int, int]]
    in_training: bool = True
    decode: bool = False
    experts: bool = False

    def __str__(self) -> str:
        options = sorted(self.options.items(), key=lambda option: option[0] == "recipe")  # the longest comes last
        decode = ["decode=True"] if self.decode else []
        return ", ".join([f"precision={self.precision}", *decode, *(f"{name}={value}" for name, value in options)])


#: What graphs read instead of a module's own conversion. Dynamo skips all guards on a module while no dictionary in it
#: has changed, if these hold plain values, tensors and modules alone; one object in it, and all are evaluated in each
#: call. So the module has a number, and guards on what that stands for are evaluated once for all modules alike.
numbered: dict[int, Conversion] = {}


def number_of(conversion: Conversion) -> int:
    """Give the number of a conversion. Equal ones have the same: modules that are alike share graphs."""
    facts = _facts(conversion)
    for number, other in numbered.items():
        if _facts(other) == facts:
            return number
    numbered[len(numbered)] = conversion
    return len(numbered) - 1


def _facts(conversion: Conversion) -> list[Any]:
    others = [getattr(conversion, field.name) for field in fields(conversion) if field.name != "seen"]
    return [summary(conversion.seen), *others]
