"""2:4 weights of a trained dense model: which entries are kept, and adapters that restore a part of the others."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.convert.conversion import Conversion
from sparse24.convert.layers import owner_of, weight_of
from sparse24.convert.watch import call, evaluating, hook
from sparse24.convert.weights import ADAPTERS, both_weights
from sparse24.errors import fail
from sparse24.mlp.weights import kept24
from sparse24.nn.entering_weights import KEEP, put
from sparse24.nn.weight_copies import put_copies


@torch.no_grad()
def calibrate(
    model: nn.Module, networks: list[tuple[str, nn.Module, Conversion]], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Find the norm of each input feature [D] of networks that will be converted, over the tokens of batches."""
    squares: dict[str, Tensor] = {}

    def given(name: str, x: Tensor) -> None:
        found = x.float().square().sum(0)
        squares[name] = squares[name] + found if name in squares else found

    for name, module, conversion in networks:
        if weight_of(module, conversion.up.name).is_meta:
            fail("convert", f"{name or 'model'} to have its weights for calibration", "some on the meta device")
    called = 0
    with evaluating(model), ExitStack() as stack:
        for name, module, conversion in networks:
            layer = owner_of(module, conversion.up.name)
            watched = module if isinstance(layer, Tensor) else layer
            stack.callback(hook(watched, lambda x, name=name: given(name, x)).remove)  # type: ignore[misc]
        for batch in batches:
            call(model, batch)
            called += 1
    missing = [name for name, _, _ in networks if name not in squares]
    if not called or missing:
        fail("convert", "calibration to reach every network", f"none for {missing[0]}" if called else "no batch")
    norms = {name: found.sqrt() for name, found in squares.items()}
    for name, found in norms.items():
        if not found.isfinite().all():
            fail("convert", f"calibration to give {name or 'model'} finite inputs", "NaN or infinity")
        if not found.any():
            fail("convert", f"calibration to give {name or 'model'} inputs that are not all zeros", "none")
    return norms


@torch.no_grad()
def fit(module: Any, conversion: Conversion, rank: int, norms: Tensor | None) -> None:
    """Choose what is kept of the first weight by the norms of its inputs, and add adapters fitted to the rest.

    Both in float32: of entries of a row that are compared, each counts as often as its input is large, and so does what
    the adapters leave over.
    """
    first, _ = both_weights(module)
    w = first.weight.float() if first.scale is None else first.weight.float() * first.scale.reshape(-1, 1)
    norms = w.new_ones(w.shape[1]) if norms is None else norms.to(w.device)
    norms = norms.clamp_min(norms.max() * 1e-4)  # entries whose inputs are all zeros are compared with each other
    kept = kept24(w * norms, -1)
    if not (norms == 1).all():
        put(module, KEEP[0], kept)
    norms = norms / norms.mean()  # so that both adapters are in the range of float16, however many tokens there were
    if rank:
        for name, value in zip(ADAPTERS, low_rank(torch.where(kept, 0, w), rank, norms), strict=True):
            with torch.inference_mode(False):  # else they could not be trained
                made = value.detach().to(first.weight.dtype, memory_format=torch.contiguous_format, copy=True)
                module.register_parameter(name, nn.Parameter(made))
    put_copies(module)


def low_rank(rest: Tensor, rank: int, weigh: Tensor) -> tuple[Tensor, Tensor]:
    """Give left [F, rank] and right [rank, D], whose product is nearest to `rest` [F, D], its columns weighed."""
    weighed = rest * weigh
    # The singular vectors of a matrix with more rows than columns, by the smaller side.
    _, vectors = torch.linalg.eigh(weighed.t() @ weighed)
    vectors = vectors[:, -rank:].flip(1)
    return weighed @ vectors, vectors.t() / weigh
