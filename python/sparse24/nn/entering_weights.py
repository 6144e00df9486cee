"""What of the weights enters the products of a training step: softened, or by masks that stay for some steps.

Buffers of the module outside of its state_dict, which `sparse24.WeightPruning` makes and writes in place: compiled and
captured graphs see what is written. With neither, the recipe alone prunes. A cast of the module leaves them as they
are.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse24.mlp.weights import masked, soft_threshold24
from sparse24.nn.weight_copies import outdate
from sparse24.recipe import Recipe

#: Names of the buffers of both layers: which entries are kept, and the scale of a softened weight.
KEEP = ("_sparse24_keep_up", "_sparse24_keep_down")
SOFT = ("_sparse24_soft_up", "_sparse24_soft_down")


class Stored(NamedTuple):
    """A parameter that is a weight, stored [in, out] if `transposed`."""

    parameter: Tensor
    transposed: bool = False


def entering(module: Any, w1: Tensor, w2: Tensor, recipe: Recipe | None) -> tuple[Tensor, Tensor]:
    """Give both weights of a module as they enter the products of a step."""
    return entering_sparse(module, w1, w2, recipe) if module.sparse else (w1, w2)


def entering_sparse(module: Any, w1: Tensor, w2: Tensor, recipe: Recipe | None) -> tuple[Tensor, Tensor]:
    """Give them as they enter those of a sparse step, in a dense phase too."""
    if recipe is None or recipe.sparse_weights == "none":
        return w1, w2
    dims = recipe.weight_groups()
    return _entering(module, w1, 0, dims[0]), _entering(module, w2, 1, dims[1])


def _entering(module: Any, w: Tensor, index: int, dim: int | None) -> Tensor:
    keep, scale = module._buffers.get(KEEP[index]), module._buffers.get(SOFT[index])
    if dim is not None and scale is not None:
        return soft_threshold24(w, dim, scale)
    return w if dim is None or keep is None else masked(w, keep)


@torch.no_grad()
def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Write a buffer in place, or make it."""
    old = module._buffers.get(name)
    if old is not None and old.shape == value.shape and old.device == value.device:
        old.copy_(value)
    else:
        with torch.inference_mode(False):  # what is made in it can neither be written to nor saved for a backward pass
            module.register_buffer(name, value.clone() if value.is_inference() else value, persistent=False)
    outdate(module)


def drop(module: nn.Module, names: Iterable[str] = (*KEEP, *SOFT)) -> None:
    """Remove some of them, or all."""
    for name in names:
        if module._buffers.pop(name, None) is not None:
            module._non_persistent_buffers_set.discard(name)
            outdate(module)


def held(module: nn.Module) -> dict[str, Tensor]:
    """Give those that are there, before `module._apply`."""
    found = {name: module._buffers.get(name) for name in (*KEEP, *SOFT)}
    return {name: t for name, t in found.items() if t is not None}


def hold(module: nn.Module, before: dict[str, Tensor]) -> None:
    """After `module._apply`: the same masks and float32 scales, whatever it has done to them; none of those unknown."""
    for name, old in before.items():
        new = module._buffers.get(name)
        if new is None or new is old:
            continue
        if old.is_meta and not new.is_meta:
            drop(module, (name,))
        else:
            module._buffers[name] = old.to(new.device)
