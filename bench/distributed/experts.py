"""Experts of a mixture in place of a layer's network, all of them or one rank's.

Every token goes to `top_k` experts, and every expert gets as many: the router is a fixed one, so that ranks exchange
equal parts and no host waits for counts. All experts compute the network of the dense model, each with its features in
another order: then a mixture of them has its zeros, and its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import sparse24
from bench.distributed.exchange import Exchange, same

if TYPE_CHECKING:
    from bench.distributed.model import Size, Variant


class Experts(nn.Module):
    """`swap` sends each rank the rows of its experts, and takes them back."""

    def __init__(self, size: Size, variant: Variant, ranks: int, swap: Exchange = same) -> None:
        super().__init__()
        self.size, self.ranks, self.swap = size, ranks, swap
        precision = "fp8" if variant.dtype == "fp8" else "16bit"
        self.own = sparse24.nn.ReLU2Experts(size.experts // ranks, size.d_model, size.d_ff, precision=precision)
        self.own.sparse = variant.sparse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, (local, top_k) = x.shape[0], (self.own.num_experts, self.size.top_k)
        rows = tokens * top_k // self.size.experts  # of an expert, from one rank
        # The j-th choices of the tokens are all tokens, from another one on: each expert gets neighbours.
        order = torch.cat([torch.arange(tokens, device=x.device).roll(j * tokens // top_k) for j in range(top_k)])
        received = self.swap(x[order]).view(self.ranks, local, rows, -1)
        sorted_rows = received.transpose(0, 1).flatten(0, 2)
        ends = torch.arange(1, local + 1, device=x.device, dtype=torch.int32) * (self.ranks * rows)
        out = self.own(sorted_rows, ends).view(local, self.ranks, rows, -1)
        returned = self.swap(out.transpose(0, 1).flatten(0, 2))
        return torch.zeros_like(x).index_add(0, order, returned / top_k)


def of_network(weights: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """Weights of layers with a network as those of layers with experts."""
    made = {}
    for name, weight in weights.items():
        prefix, _, last = name.partition(".mlp.")
        if not last:
            made[name] = weight
            continue
        dim = 0 if last == "up_proj.weight" else 1
        made[f"{prefix}.mlp.own.{last.removesuffix('.weight')}"] = torch.stack(
            [weight.roll(4 * e, dim) for e in range(experts)]
        )
    return made
