"""States across quantisation: float weights for a quantised layer, and float8 ones for a layer that is not.

Loading casts what it copies, so that either would leave numbers without their scale. Here they are converted first.
Casting a module and pickling it have to spare float8 weights, too.
"""

from collections.abc import MutableMapping
from typing import NoReturn

import torch
from torch import Tensor

from sparse24.errors import dtype_name, fail
from sparse24.experts.products import float8_experts
from sparse24.format import FP8
from sparse24.mlp.scale import bounding_factor
from sparse24.ops import quantize_fp8

State = MutableMapping[str, Tensor]


@torch.no_grad()
def quantized(weight: Tensor) -> dict[str, Tensor]:
    """Give the buffers of a `QuantizedLinear`: float8 rows with one scale each, and the factor that bounds them."""
    weight = weight.detach()
    if weight.is_cuda and weight.dtype == torch.float32:
        weight = weight.to(torch.bfloat16)  # the kernels have no float32
    values, scale = quantize_fp8(weight)
    return {"weight": values, "weight_scale": scale.reshape(-1), "scale_y_factor": bounding_factor(values, scale)}


@torch.no_grad()
def quantized_experts(weights: Tensor) -> dict[str, Tensor]:
    """Give float8 matrices [E, N, K] and the scale of each row [E, N]."""
    weights = weights.detach()
    if weights.is_cuda and weights.dtype == torch.float32:
        weights = weights.to(torch.bfloat16)
    values, scale = float8_experts(weights, None)
    return {"weight": values, "weight_scale": scale}


@torch.no_grad()
def state_for_quantized(state: State, prefix: str, shape: torch.Size) -> State:
    """Give the entries of `state` that a quantised layer with a weight of `shape` takes; what does not fit is refused.

    A float weight is quantised. Entries that the state does not have stay missing, but for the factor, which the
    weight and its scale determine.
    """
    weight, scale = state.get(f"{prefix}weight"), state.get(f"{prefix}weight_scale")
    if weight is None:
        if scale is not None or f"{prefix}scale_y_factor" in state:
            _fail(f"{prefix}weight beside its scale", "none")
        return {}
    if weight.shape != shape:
        _fail(f"{prefix}weight to have shape {list(shape)}", list(weight.shape))
    if weight.dtype != FP8:
        if scale is not None:
            _fail(f"{prefix}weight to be float8_e4m3fn beside a scale", dtype_name(weight.dtype))
        entries = quantized(weight)
    else:
        _check_scale(prefix, weight, scale)
        factor = state.get(f"{prefix}scale_y_factor")
        factor = bounding_factor(weight, scale) if factor is None else factor
        entries = {"weight": weight, "weight_scale": scale, "scale_y_factor": factor}
    return {f"{prefix}{name}": value for name, value in entries.items()}


@torch.no_grad()
def state_for_float(state: State, prefix: str, weight: Tensor) -> State:
    """Give the entries of `state` that replace a float8 weight and its scale, for a layer with a float `weight`."""
    values, scale = state.get(f"{prefix}weight"), state.get(f"{prefix}weight_scale")
    if values is None or values.dtype != FP8:
        return {}
    _check_scale(prefix, values, scale)
    return {f"{prefix}weight": (values.float() * scale.reshape(-1, 1)).to(weight.dtype)}


def with_dtypes_of(buffers: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> None:
    """After `module._apply`: moved, and not cast. A float8 weight means nothing without its scale."""
    for name, old in before.items():
        new = buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            buffers[name] = old.to(new.device)


def as_bytes(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Give buffers for pickle, which does not know float8 (`torch.save` does)."""
    return {name: t.view(torch.uint8) if t is not None and t.dtype == FP8 else t for name, t in buffers.items()}


def _check_scale(prefix: str, weight: Tensor, scale: Tensor | None) -> None:
    if scale is None:
        _fail(f"{prefix}weight_scale beside a float8 weight", "none")
    if scale.numel() != weight.shape[0]:
        _fail(f"{prefix}weight_scale to have {weight.shape[0]} elements (rows of weight)", scale.numel())


def _fail(rule: str, got: object) -> NoReturn:
    fail("nn", f"the state to have {rule}", got)
