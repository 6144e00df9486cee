"""A small mixture: rows sorted by expert, three-dimensional weights, and what each expert gives on its own."""

import torch
from data import normal
from torch import Tensor

import sparse24
from sparse24.experts import grouped
from sparse24.experts.arguments import Arguments
from sparse24.experts.step_fp8 import ExpertsFp8, of_step
from sparse24.mlp.arguments import Plan
from sparse24.ops.activation import RELU2

D, HIDDEN, OUT = 32, 64, 48
#: Rows of each expert. One without rows, one with a single row, and numbers that are no multiples of four.
COUNTS = (7, 0, 1, 30, 12)


def weights(dtype: torch.dtype, device: str, experts: int = len(COUNTS)) -> tuple[Tensor, Tensor]:
    w1 = normal(experts, HIDDEN, D, dtype=torch.float32, seed=1).div(D**0.5)
    w2 = normal(experts, OUT, HIDDEN, dtype=torch.float32, seed=2).div(HIDDEN**0.5)
    return w1.to(device, dtype), w2.to(device, dtype)


def rows(dtype: torch.dtype, device: str, counts=COUNTS, beyond: int = 0) -> tuple[Tensor, Tensor]:
    """Return x, whose last rows are NaN and belong to nobody, and offsets."""
    x = normal(sum(counts) + beyond, D, dtype=dtype, seed=3).to(device)
    x[sum(counts) :] = torch.nan
    return x, torch.tensor(counts, device=device).cumsum(0).int()


def float8(w1: Tensor, w2: Tensor, by_row: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both weights in float8, and their scales."""
    quantised = []
    for w in (w1, w2):
        largest = w.float().abs().amax(2 if by_row else (1, 2))
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        factor = scale[..., None] if by_row else scale[:, None, None]
        quantised.append(((w.float() / factor).to(torch.float8_e4m3fn), scale))
    (w1, w1_scale), (w2, w2_scale) = quantised
    return w1, w2, w1_scale, w2_scale


def one_by_one(x, w1, w2, offsets, row_scale=None, w1_scale=None, w2_scale=None, **options) -> Tensor:
    """Run each expert as a network of its own."""
    parts, begin = [], 0
    for e, end in enumerate(offsets.tolist()):
        scales = {n: s if s is None else s[e] for n, s in (("w1_scale", w1_scale), ("w2_scale", w2_scale))}
        out = sparse24.relu2_mlp(x[begin:end], w1[e], w2[e], min_tokens=0, **scales, **options)
        parts.append(out if row_scale is None else (out * row_scale[begin:end, None]).to(out.dtype))
        begin = end
    return torch.cat([*parts, x.new_zeros(len(x) - begin, w2.shape[1])])


def together(x, w1, w2, offsets, row_scale=None, w1_scale=None, w2_scale=None, *, fp8=False, sparse=True):
    """What CUDA runs, on any device."""
    learns = any(t is not None and t.requires_grad for t in (x, w1, w2, row_scale))
    plan = Plan(RELU2, fp8, sparse, roots=learns and x.dtype == torch.float16 and not fp8)
    return grouped(Arguments(x, w1, w2, row_scale, offsets, w1_scale, w2_scale, plan), learns)


def in_float8(x, w1, w2, offsets, row_scale=None, stored=None) -> Tensor:
    """What a training step in float8 runs on CUDA, on any device."""
    a = Arguments(x, w1, w2, row_scale, offsets, None, None, Plan(RELU2, fp8=True, sparse=True))
    return ExpertsFp8.apply(*of_step(a, stored))
