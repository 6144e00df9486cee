"""What a converted module computes: the network, from the weights of the layers that it does not call."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse24._symbolic import known
from sparse24.convert.again import remember
from sparse24.convert.conversion import SCALES, Conversion, weights_of
from sparse24.convert.layers import weight_of
from sparse24.convert.seen import difference, trains
from sparse24.convert.weights import adapters_of, as_they_enter, for_inference, has_changes, owner
from sparse24.format import FP8
from sparse24.mlp import Precision, relu2_mlp
from sparse24.mlp.arguments import Weight
from sparse24.mlp.choice import few_tokens, least_when_exact, leaves_open, runs_dense_few, tokens_that_pay
from sparse24.mlp.inference import inferred, learns
from sparse24.mlp.packed_weights import packed_pays
from sparse24.mlp.scale import factor_of
from sparse24.nn import delayed_scales
from sparse24.nn.children import is_moved, run_moved, weight_problem
from sparse24.ops.few_tokens import MAX_TOKENS


def run(module: Any, conversion: Conversion, x: Any) -> Tensor | str:
    """Compute the network, or say why this call has to run the original forward."""
    if not isinstance(x, Tensor):  # also what `torch.fx` traces with
        return f"the input is a {type(x).__name__}"
    problem = difference(module, conversion.seen)
    if problem is None and not conversion.in_training and trains(module):
        problem = "in training it computes something else, as dropout does"
    if problem is not None:
        return problem
    up, down = owner(module, conversion.up), owner(module, conversion.down)
    first, second = weights_of(module, conversion.up, up), weights_of(module, conversion.down, down)
    moved = is_moved(up)
    problem = weight_problem(conversion.up.name, first.weight) or weight_problem(conversion.down.name, second.weight)
    if problem is not None:
        return problem
    infers = not learns(x, first.weight, second.weight, first.bias, second.bias, *(adapters_of(module) or ()))
    find = for_inference if infers else as_they_enter
    first, second, rows, settled, packed, bound = find(module, conversion, first, second)
    options = conversion.options
    if infers and conversion.decode and rows is None:
        options = {**options, "min_tokens": least_when_exact(options.get("min_tokens"), x)}
    packed = packed if packed_pays(packed, x) else None
    # The static scale of a quantised second layer's input is that of the activation; else a first layer may bound it.
    scale_y = getattr(down, "input_scale", None) if second.stored.dtype == FP8 else None
    factor = factor_of(up, scale_y) if first.stored.dtype == FP8 else None
    if bound is not None and scale_y is None and first.bias is None and _runs_dense_few(module, conversion, x, options):
        factor = bound
    if settled and infers and packed is None and not moved and type(x) is Tensor and not torch.compiler.is_compiling():
        keeps = module._copies is not None and not has_changes(module, conversion)
        out = inferred(
            x,
            Weight(first.weight, first.scale),
            Weight(second.weight, second.scale),
            rows,
            first.bias,
            second.bias,
            precision=conversion.precision,
            recipe=None,
            scale_y=scale_y,
            scale_y_factor=factor,
            threshold=float(options.get("threshold", 0)),
            min_tokens=options.get("min_tokens"),
            sparse=module.sparse,
            ran=partial(remember, module, conversion, x, first, second) if keeps else None,
        )
        if out is not None:
            return out
    problem = input_problem(x, first.weight.device if moved else None)
    if problem is None and moved and first.weight.device != second.weight.device:
        problem = "its layers are on different devices"
    if problem is not None:
        return problem
    scales, known_scales = delayed_scales.for_step(module, SCALES)

    def network(x: Tensor) -> Tensor:
        return relu2_mlp(
            x,
            first.weight,
            second.weight,
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
            weights_pruned=settled,
            w1_packed=packed,
            adapters=None if settled else adapters_of(module),
            **options,
        )

    return run_moved(up, down, x, network) if moved else network(x)


def _runs_dense_few(module: Any, conversion: Conversion, x: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a call with float8 copies is one for `relu2_mlp_dense`, where a scale known before saves a pass.

    Calls that run 2:4 keep exact scales, as in training.
    """
    tokens = x.numel() // conversion.sizes[0]
    is_open = leaves_open(tokens, options.get("min_tokens"), module.sparse)
    return is_open and runs_dense_few(tokens, *conversion.sizes, fp8=True, is_cuda=x.is_cuda)


def dense_tokens(
    sizes: tuple[int, int, int], float8: bool, precision: Precision, options: Mapping[str, Any], decode: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tell between which numbers of tokens a call for inference runs what the module ran before: on the CPU, on CUDA.

    Where neither few tokens nor 2:4 pay nothing is faster, on the host too; with `decode` of float8 copies as well.
    Those of `relu2_mlp_dense` are among them.
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
    if runs_dense_few(tokens, *conversion.sizes, fp8=conversion.precision == "fp8", is_cuda=x.is_cuda):
        return False
    if torch.is_grad_enabled():
        first, second = (weights_of(module, layer, owner(module, layer)) for layer in (conversion.up, conversion.down))
        if learns(x, first.weight, second.weight, first.bias, second.bias):
            return False
    child = module._modules.get(conversion.up.name)
    weight = None if child is None else child._parameters.get("weight")
    if weight is None:
        weight = weight_of(module, conversion.up.name)
    # A plain layer does not take another dtype, such as that of masters; autocast casts.
    return weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


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
