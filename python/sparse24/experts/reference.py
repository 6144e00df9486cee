"""The experts on the CPU: one after another, each as `relu2_mlp` runs it. The oracle of all that is grouped.

Two ops, forward and backward, because a compiled graph cannot know how many rows an expert has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse24.experts.checks import check_values, fail
from sparse24.mlp import relu2_mlp
from sparse24.recipe import Recipe

_OF_RECIPE = ("weight_gradients", "permute_tokens", "residual", "fp8_weight_gradients")


def options_of(recipe: Recipe) -> tuple[str, int]:
    """Give what the ops take of a recipe: words, and the share of dense features in millionths."""
    return " ".join(str(getattr(recipe, name)) for name in _OF_RECIPE), recipe._millionths


def _recipe_of(words: str, millionths: int) -> Recipe:
    kind, *flags = words.split()
    permute, residual, fp8 = ({"True": True, "False": False, "None": None}[flag] for flag in flags)
    return Recipe(kind, permute, millionths / 1_000_000, residual, fp8_weight_gradients=fp8)


@torch.library.custom_op("sparse24_reference::relu2_experts", mutates_args=(), device_types="cpu")
def relu2_experts_reference(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    row_scale: Tensor | None,
    offsets: Tensor,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    fp8: bool,
    sparse: bool,
    recipe: str,
    dense_millionths: int,
    needed: list[bool],
) -> Tensor:
    """Compute [S, D_out] of x [S, D]; `needed` says which of the first four will be differentiated."""
    with _autograd(any(needed)):
        leaves = _leaves((x, w1, w2, row_scale), needed)
        out = _one_by_one(*leaves, offsets, w1_scale, w2_scale, fp8, sparse, _recipe_of(recipe, dense_millionths))
    return out.detach()


@relu2_experts_reference.register_fake
def _fake(x: Tensor, w1: Tensor, w2: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(x.shape[0], w2.shape[1])


@torch.library.custom_op("sparse24_reference::relu2_experts_gradients", mutates_args=(), device_types="cpu")
def _gradients(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    row_scale: Tensor | None,
    offsets: Tensor,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    fp8: bool,
    sparse: bool,
    recipe: str,
    dense_millionths: int,
    needed: list[bool],
) -> list[Tensor]:
    with _autograd(True):
        leaves = _leaves((x, w1, w2, row_scale), needed)
        out = _one_by_one(*leaves, offsets, w1_scale, w2_scale, fp8, sparse, _recipe_of(recipe, dense_millionths))
        wanted = [t for t, need in zip(leaves, needed, strict=True) if need]
        if not out.requires_grad:  # no row belongs to an expert
            return [torch.zeros_like(t) for t in wanted]
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.clone() for t, g in zip(wanted, found, strict=True)]


@_gradients.register_fake
def _fake_gradients(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *_, needed = arguments
    return [t.new_empty(t.shape) for t, need in zip(arguments[:4], needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        fail("create_graph to be False (second derivatives are not defined)", True)
    *options, needed = ctx.options
    found = iter(_gradients(grad, *ctx.saved_tensors, *options, needed))
    return *(next(found) if need else None for need in needed), *(None,) * 8


relu2_experts_reference.register_autograd(_backward, setup_context=_setup_context)


def _one_by_one(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    row_scale: Tensor | None,
    offsets: Tensor,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    fp8: bool,
    sparse: bool,
    recipe: Recipe,
) -> Tensor:
    ends = offsets.tolist()
    check_values(ends, x.shape[0])
    first, second = w1.unbind(), w2.unbind()
    parts, begin = [], 0
    for expert, end in enumerate(ends):
        if end > begin:
            out = relu2_mlp(
                x[begin:end],
                first[expert],
                second[expert],
                precision="fp8" if fp8 else "auto",
                w1_scale=None if w1_scale is None else w1_scale[expert],
                w2_scale=None if w2_scale is None else w2_scale[expert],
                min_tokens=0,
                recipe=recipe,
                sparse=sparse,
            )
            if row_scale is not None:
                out = (out * row_scale[begin:end, None]).to(out.dtype)
            parts.append(out)
        begin = end
    parts.append(x.new_zeros(x.shape[0] - begin, w2.shape[1]))
    return torch.cat(parts)


def _leaves(tensors: tuple[Tensor | None, ...], needed: list[bool]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]


@contextmanager
def _autograd(on: bool) -> Iterator[None]:
    """Record derivatives inside of an op, below the autograd of whoever calls it."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.ADInplaceOrView, keys.AutogradOther):
        excluded = excluded.remove(key)
    if not on:
        with torch.no_grad():
            yield
        return
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield
