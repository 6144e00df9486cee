"""Collectives over all ranks along the first dimension, and as functions with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist

#: torch's names for these in Python change; those of the ops do not.
ops = torch.ops._c10d_functional


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks."""
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), dist.get_world_size(), _group()))


def scattered(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the sum over the ranks."""
    return ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", dist.get_world_size(), _group()))


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks."""
    return ops.wait_tensor(ops.all_reduce(x, "sum", _group()))


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
