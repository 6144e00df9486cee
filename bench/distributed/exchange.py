"""Collectives over all ranks along the first dimension, and as functions with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

Exchange = Callable[[torch.Tensor], torch.Tensor]

#: torch's names for these in Python change; those of the ops do not.
ops = torch.ops._c10d_functional


def same(x: torch.Tensor) -> torch.Tensor:
    """What one rank exchanges with itself."""
    return x


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks."""
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), dist.get_world_size(), _group()))


def scattered(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the sum over the ranks."""
    return ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", dist.get_world_size(), _group()))


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks."""
    return ops.wait_tensor(ops.all_reduce(x, "sum", _group()))


def swapped(x: torch.Tensor) -> torch.Tensor:
    """As many rows from each rank, in order of ranks, as it gets of this one's."""
    ranks = dist.get_world_size()
    parts = [x.shape[0] // ranks] * ranks
    return ops.wait_tensor(ops.all_to_all_single(x.contiguous(), parts, parts, _group()))


def _group() -> str:
    return dist.group.WORLD.group_name


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return gathered(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return scattered(grad)


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return scattered(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return gathered(grad)


class Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return swapped(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return swapped(grad)
