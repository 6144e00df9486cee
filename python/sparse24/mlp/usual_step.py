"""The usual float8 step as `relu2_mlp` begins it: with as little on the host as its conditions allow.

Nothing but Python runs between a step's launches there, and in a model none of it is in the caches of a processor: what
takes 20 us in a loop takes 100. So what decides for the usual step is asked at once, in the order of what is cheap, and
everything else is left to the function that knows all.
"""

from functools import lru_cache

import torch
from torch import Tensor

from sparse24.mlp.arguments import DENSE, PLAIN, Plan
from sparse24.mlp.choice import pays
from sparse24.mlp.kept_weights import BothOrders, may_accumulate
from sparse24.mlp.step_fp8 import has_products
from sparse24.mlp.step_fp8_whole import WholeStepFp8
from sparse24.ops.activation import RELU2, ActivationFunction
from sparse24.ops.forward_mode import in_forward_mode, in_torch_func
from sparse24.recipe import Recipe

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DEFAULT_RECIPE = Recipe()
_NO_CODES: tuple[BothOrders | None, BothOrders | None] = (None, None)


def stepped(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    scales: Tensor,
    recipe: Recipe | None,
    min_tokens: int | None,
    sparse: bool,
    threshold: float,
) -> Tensor | None:
    """Compute what `relu2_mlp` does with ``precision="fp8"``, where its step is one op a pass and keeps no weights.

    None otherwise, for whatever reason: then the rest of `relu2_mlp` is to run. The same of what does not fit, which it
    refuses in its own words.

    Parameters
    ----------
    x, w1, w2, b1, b2, recipe, min_tokens, sparse, threshold
        As in `relu2_mlp`, which nobody compiles; there is nothing beside them.
    scales : Tensor
        Its `delayed_scales`, which are known.
    """
    if type(x) is not Tensor or type(w1) not in PLAIN or type(w2) not in PLAIN or type(scales) is not Tensor:
        return None
    device, rank = x.device, x.dim()
    if not (w1.requires_grad and w2.requires_grad and torch.is_grad_enabled()) or may_accumulate(w1, w2):
        return None
    if in_torch_func() or in_forward_mode() or torch.jit.is_tracing() or device.type not in ("cpu", "cuda"):
        return None
    if not _are_dense(x, w1, w2) or rank < 2 or w1.dim() != 2 or w2.dim() != 2:
        return None
    (features, columns), (out, inner) = w1.shape, w2.shape
    if x.shape[-1] != columns or inner != features or not columns or not features or not out:
        return None
    if columns % 16 or features % 16 or out % 16 or not _are_scales(scales):
        return None
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
    if not w1.device == w2.device == scales.device == device or (dtype == torch.float32 and x.is_cuda):
        return None
    if not (dtype in _FLOATS and x.dtype in _FLOATS and w1.dtype in _FLOATS and w2.dtype in _FLOATS):
        return None
    if not (_is_bias(b1, features, device) and _is_bias(b2, out, device)):
        return None
    recipe = _DEFAULT_RECIPE if recipe is None else recipe
    if type(recipe) is not Recipe or not _is_usual(recipe, columns):
        return None
    if type(threshold) not in (int, float) or not 0 <= threshold < float("inf") or type(sparse) is not bool:
        return None

    tokens = x if rank == 2 else x.flatten(0, -2)
    if min_tokens is None:
        enough = not x.is_cuda or pays(tokens.shape[0], features, out, fp8=True, step=True)
    elif type(min_tokens) is int and min_tokens >= 0:
        enough = tokens.shape[0] >= min_tokens
    else:
        return None
    sparse = sparse and enough and features % 32 == 0
    # Differentiable casts: float32 master weights get float32 gradients.
    operands = _cast(tokens, dtype), _cast(w1, dtype), _cast(w2, dtype), _cast(b1, torch.bfloat16), _cast(b2, dtype)
    how = _plan(sparse, float(threshold)), recipe if sparse else DENSE
    arguments = *operands, None, scales, True, _NO_CODES, *how
    if autocast:
        with torch.autocast(device.type, enabled=False):
            made: Tensor = WholeStepFp8.apply(*arguments)
    else:
        made = WholeStepFp8.apply(*arguments)
    return made if rank == 2 else torch.ops.aten._unsafe_view.default(made, (*x.shape[:-1], out))


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


@lru_cache(maxsize=64)
def _plan(sparse: bool, threshold: float) -> Plan:
    function = RELU2 if threshold == 0 else ActivationFunction("relu2", threshold)
    return Plan(function, fp8=True, sparse=sparse, fused=True, fp8_weight_gradients=True)


@lru_cache(maxsize=64)
def _is_usual(recipe: Recipe, columns: int) -> bool:
    """Whether nothing but the activation is sparse, and all six products are float8."""
    plain = recipe.sparse_weights == "none" and not recipe.double_pruning
    return plain and has_products(recipe) and recipe.has_fp8_weight_gradients(columns)


def _are_dense(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    strided = torch.strided
    return x.layout is w1.layout is w2.layout is strided and not (x.is_nested or w1.is_nested or w2.is_nested)


def _are_scales(scales: Tensor) -> bool:
    fits = scales.dtype == torch.float32 and scales.dim() == 1 and scales.shape[0] == 4 and scales.stride(0) != 0
    return fits and not scales.requires_grad and not scales.is_inference()


def _is_bias(bias: Tensor | None, elements: int, device: torch.device) -> bool:
    if bias is None:
        return True
    if type(bias) not in PLAIN or bias.dtype not in _FLOATS or bias.device != device:
        return False
    return bias.layout is torch.strided and bias.dim() == 1 and bias.shape[0] == elements
