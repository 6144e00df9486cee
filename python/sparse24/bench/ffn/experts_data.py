"""A mixture as the bench of experts has it: rows sorted by expert as a router of random scores spreads them, weights.

`balanced`: every expert is as likely. `zipf`: the n-th is 1 / n as likely as the first. `recorded`: shares are like
those of trained routers, log-normal, and one expert of twenty is nobody's.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from sparse24.bench.inputs import Sparsity, generator, step_inputs
from sparse24.bench.options import Options
from sparse24.experts import pays
from sparse24.experts.choice import trains_in_float8
from sparse24.experts.products import float8_experts
from sparse24.format import FEATURES

#: Bytes of weights up to which each case holds the gradients of all.
MOST_HELD = 16e9


class Size(NamedTuple):
    """T tokens, each to `top_k` of `experts` networks [d_model -> d_ff -> d_model]."""

    tokens: int
    experts: int
    top_k: int
    d_model: int
    d_ff: int
    model: str = ""
    routing: str = "balanced"


def shares(size: Size, seed: int) -> torch.Tensor:
    """How likely a token chooses each expert, in logarithms and up to a factor."""
    gen = torch.Generator().manual_seed(seed)
    order = torch.randperm(size.experts, generator=gen)
    if size.routing == "zipf":
        return -torch.arange(1, size.experts + 1).float().log()[order]
    if size.routing == "recorded":
        likely = torch.randn(size.experts, generator=gen)
        likely[order[: size.experts // 20]] = -40.0
        return likely
    return torch.zeros(size.experts)


class Mixture:
    """Rows sorted by expert, weights, factors, and the gradient of the output."""

    def __init__(self, size: Size, sparsity: Sparsity, options: Options) -> None:
        place = {"device": options.device, "seed": options.seed}
        self.size = size
        tokens, w1, w2, _ = step_inputs(size.tokens, size.d_model, size.d_ff, sparsity, **place)
        gen = generator(options.device, options.seed + 9)
        scores = torch.rand(size.tokens, size.experts, device=options.device, generator=gen).log_().neg_().log_().neg_()
        index = (scores + shares(size, options.seed).to(options.device)).topk(size.top_k, sorted=False).indices
        expert, order = index.flatten().sort(stable=True)
        self.x = tokens[order // size.top_k]
        self.offsets = torch.searchsorted(expert, torch.arange(size.experts, device=options.device), right=True).int()
        self.ends = self.offsets.tolist()
        # Each expert is the network with its features in another order, and rows of w2 by another sign: no two are
        # alike, and all have the zeros that were asked for.
        self.w1, self.w2 = (w.new_empty(size.experts, *w.shape) for w in (w1, w2))
        for number in range(size.experts):
            features = torch.randperm(size.d_ff, device=options.device, generator=gen)
            self.w1[number], self.w2[number] = w1[features], w2[:, features] * (1 - 2 * (number % 2))
        self.row_scale = torch.rand(len(self.x), device=options.device, generator=gen)
        self.grad = torch.randn(self.x.shape, dtype=self.x.dtype, device=options.device, generator=gen)

    @cached_property
    def fp8(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Both weights in float8, with their scales."""
        return float8_experts(self.w1, None), float8_experts(self.w2, None)

    def rows_of(self, expert: int) -> slice:
        return slice(self.ends[expert - 1] if expert else 0, self.ends[expert])

    def largest(self) -> list[int]:
        """The two experts with the most rows."""
        counts = torch.tensor([0, *self.ends]).diff()
        return counts.topk(min(2, len(counts))).indices.tolist()

    def learned(self) -> list[int]:
        """The experts whose gradients of weights a step returns, which every case holds: of large models some."""
        large = self.w1.nbytes + self.w2.nbytes > MOST_HELD
        return self.largest() if large else list(range(self.size.experts))

    def trains_in_float8(self) -> bool:
        """Whether a step of `relu2_experts` with precision="fp8" runs in float8, where no gradients accumulate."""
        fits = not self.x.is_cuda or trains_in_float8(len(self.x), self.size.experts, kept=False)
        return self.sparse("fp8") and fits

    def fits(self, dtype: str) -> bool:
        """Whether an activation of these sizes can be 2:4."""
        return self.size.d_ff % FEATURES[dtype == "fp8"] == 0

    def sparse(self, dtype: str) -> bool:
        """Whether `relu2_experts` runs 2:4."""
        pay = not self.x.is_cuda or pays(len(self.x), self.size.experts, fp8=dtype == "fp8")
        return self.fits(dtype) and pay
