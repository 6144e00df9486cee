"""What a converted module computes: the network, from the weights of the layers that it does not call."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse24._symbolic import known
from sparse24.convert.conversion import SCALES, Conversion, Layer, Weights, weights_of
from sparse24.convert.layers import owner_of, weight_of
from sparse24.convert.seen import difference
from sparse24.format import FP8
from sparse24.mlp import Precision, relu2_mlp
from sparse24.mlp.arguments import Weight
from sparse24.mlp.choice import few_tokens, tokens_that_pay
from sparse24.mlp.inference import inferred, learns
from sparse24.mlp.scale import factor_of
from sparse24.nn import delayed_scales
from sparse24.nn.children import is_moved, run_moved, weight_problem
from sparse24.nn.entering_weights import Stored, entering
from sparse24.nn.quantized_state import quantized, quantized_experts
from sparse24.nn.weight_copies import Copies, follow, is_by_neuron, put_copies
from sparse24.ops.few_tokens import MAX_TOKENS
from sparse24.recipe import Recipe


def run(module: Any, conversion: Conversion, x: Any) -> Tensor | str:
    """Compute the network, or say why this call has to run the original forward."""
    if not isinstance(x, Tensor):  # also what `torch.fx` traces with
        return f"the input is a {type(x).__name__}"
    problem = difference(module, conversion.seen)
    if problem is None and not conversion.in_training and trains(module):
        problem = "in training it computes something else, as dropout does"
    if problem is not None:
        return problem
    up, down = _owner(module, conversion.up), _owner(module, conversion.down)
    first, second = weights_of(up, conversion.up), weights_of(down, conversion.down)
    moved = is_moved(up)
    problem = weight_problem(conversion.up.name, first.weight) or weight_problem(conversion.down.name, second.weight)
    if problem is not None:
        return problem
    infers = not learns(x, first.weight, second.weight, first.bias, second.bias)
    rows = None
    if infers and copies_help(conversion, first):
        first, second, rows = for_inference(module, conversion, first, second)
    # The static scale of a quantised second layer's input is that of the activation; else a first layer may bound it.
    scale_y = getattr(down, "input_scale", None) if second.stored.dtype == FP8 else None
    factor = factor_of(up, scale_y) if first.stored.dtype == FP8 else None
    if infers and not moved and type(x) is Tensor and not torch.compiler.is_compiling():
        options = conversion.options
        out = inferred(
            x,
            Weight(first.weight, first.scale),
            Weight(second.weight, second.scale),
            rows,
            first.bias,
            second.bias,
            precision=conversion.precision,
            recipe=options.get("recipe"),
            scale_y=scale_y,
            scale_y_factor=factor,
            threshold=float(options.get("threshold", 0)),
            min_tokens=options.get("min_tokens"),
            sparse=module.sparse,
        )
        if out is not None:
            return out
    problem = input_problem(x, first.weight.device if moved else None)
    if problem is None and moved and first.weight.device != second.weight.device:
        problem = "its layers are on different devices"
    if problem is not None:
        return problem
    w1, w2 = entering(module, first.weight, second.weight, conversion.options.get("recipe"))
    scales, known_scales = delayed_scales.for_step(module, SCALES)

    def network(x: Tensor) -> Tensor:
        return relu2_mlp(
            x,
            w1,
            w2,
            first.bias,
            second.bias,
            precision=conversion.precision,
            w1_scale=first.scale,
            w2_scale=second.scale,
            scale_y=scale_y,
            scale_y_factor=factor,
            sparse=module.sparse,
            delayed_scales=scales,
            scales_known=known_scales,
            w2_rows=rows,
            **conversion.options,
        )

    return run_moved(up, down, x, network) if moved else network(x)


def dense_tokens(
    sizes: tuple[int, int, int], float8: bool, precision: Precision, options: Mapping[str, Any], decode: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tell between which numbers of tokens a call for inference runs what the module ran before: on the CPU, on CUDA.

    Where neither few tokens nor 2:4 pay nothing is faster, on the host too; with `decode` of float8 copies as well.
    """
    _, d_ff, d_out = sizes
    recipe = options.get("recipe")
    if recipe is not None and recipe.sparse_weights != "none":
        return (0, 0), (0, 0)
    if float8 or "threshold" in options or (precision == "fp8" and not decode):
        return (0, 0), (0, 0)
    least = options.get("min_tokens")
    ends = (0, tokens_that_pay(d_ff, d_out)) if least is None else (least, least)
    if not decode:
        return (-1, ends[0]), (-1, ends[1])
    few = few_tokens(d_ff, d_out, fp8=precision == "fp8")
    if precision == "fp8":
        ends = 0, 0
    return (MAX_TOKENS, ends[0]), (few, max(ends[1], MAX_TOKENS + 1))


def runs_as_before(module: nn.Module, conversion: Conversion, x: Any) -> bool:
    """Whether a call is one of those between `dense_tokens`."""
    if type(x) is not Tensor:
        return False
    low, high = conversion.dense[1 if x.is_cuda else 0]  # Dynamo of torch 2.11 takes no bool for an index
    tokens = x.numel() // conversion.sizes[0]
    if torch.compiler.is_compiling():  # where the host does not count, and the fused epilogue gains a little
        if not (known(low < tokens) and known(tokens < min(high, MAX_TOKENS + 1))):
            return False
    elif not low < tokens < high:
        return False
    if torch.is_grad_enabled():
        first, second = (weights_of(_owner(module, layer), layer) for layer in (conversion.up, conversion.down))
        if learns(x, first.weight, second.weight, first.bias, second.bias):
            return False
    child = module._modules.get(conversion.up.name)
    weight = None if child is None else child._parameters.get("weight")
    if weight is None:
        weight = weight_of(module, conversion.up.name)
    # A plain layer does not take another dtype, such as that of masters; autocast casts.
    return weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def recipe_in_use(self: Any) -> Recipe | None:
    """Give the recipe of a converted module: see `sparse24.WeightPruning`."""
    conversion = self._sparse24
    recipe: Recipe | None = conversion.options.get("recipe")
    return None if conversion.experts else recipe


def stored_weights(self: Any) -> tuple[Stored, Stored]:
    """Give the two parameters of a converted module that are its weights."""
    conversion = self._sparse24
    up, down = (
        Stored(weights_of(_owner(self, layer), layer).stored, layer.transposed)
        for layer in (conversion.up, conversion.down)
    )
    return up, down


def wants_copies(module: Any, conversion: Conversion) -> bool:
    """Whether a module keeps copies of its weights, or will in evaluation."""
    return copies_help(conversion, weights_of(_owner(module, conversion.up), conversion.up))


def what_to_copy(self: Any) -> Copies | None:
    """Tell what a converted module copies: see `sparse24.nn.weight_copies`."""
    conversion = self._sparse24
    first, second = (weights_of(_owner(self, layer), layer) for layer in (conversion.up, conversion.down))
    if not copies_help(conversion, first) or (self.training and not conversion.decode):
        return None
    if any(weight_problem("", t.weight) or t.weight.dtype == torch.float64 for t in (first, second)):
        return None
    quantises = _quantises(conversion, first)
    if not quantises and is_by_neuron(second.weight):
        return None

    def make() -> dict[str, Tensor]:
        made, w2 = {}, second.weight
        for number, weights in enumerate((first, second) if quantises else (), start=1):
            of_weight = quantized(weights.weight) if weights.weight.dim() == 2 else quantized_experts(weights.weight)
            made[f"sparse24_w{number}"] = w2 = of_weight["weight"]
            made[f"sparse24_w{number}_scale"] = of_weight["weight_scale"]
        return {**made, "sparse24_w2_rows": w2.t()} if conversion.decode else made

    return Copies(make, (first.stored, second.stored) if quantises else (second.stored,))


def _quantises(conversion: Conversion, first: Weights) -> bool:
    return conversion.precision == "fp8" and first.scale is None


def copies_help(conversion: Conversion, first: Weights) -> bool:
    """Whether copies of the weights are of use in inference."""
    return conversion.decode or _quantises(conversion, first)


def for_inference(
    module: Any, conversion: Conversion, first: Weights, second: Weights
) -> tuple[Weights, Weights, Tensor | None]:
    """Give the weights as inference wants them: quantised before the call, and the second one by neuron as well."""
    quantises = _quantises(conversion, first)
    if module._copies is None:
        if not quantises and is_by_neuron(second.weight):
            return first, second, second.weight.t()
        if not torch.compiler.is_compiling():
            put_copies(module)
    if not follow(module, (first.stored, second.stored) if quantises else (second.stored,)):
        return first, second, None
    copies = module._buffers
    if quantises:
        first = first._replace(weight=copies["sparse24_w1"], scale=copies["sparse24_w1_scale"])
        second = second._replace(weight=copies["sparse24_w2"], scale=copies["sparse24_w2_scale"])
    return first, second, copies["sparse24_w2_rows"] if conversion.decode else None


def _owner(module: nn.Module, layer: Layer) -> Any:
    child = module._modules.get(layer.name)
    return owner_of(module, layer.name) if child is None else child


def trains(module: nn.Module) -> bool:
    """Whether a module or one in it is in training."""
    return module.training or any(child is not None and trains(child) for child in module._modules.values())


def input_problem(x: Any, device: torch.device | None = None) -> str | None:
    """Why the network does not take an input."""
    if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
        return f"the input is a {type(x).__name__}"
    device_type = (device or x.device).type
    if device_type not in ("cpu", "cuda", "meta"):
        return f"the input is on {device_type}"
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and device_type != "cuda"):
        return None
    return f"the input is {dtype} on {device_type}"
