"""Inputs: numbers that make every rule matter, and the layouts in which they arrive."""

import functools

import torch
from oracle import round_up
from torch import Tensor

#: Neither contiguous nor aligned, in every way that a view can have.
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "offset", "expanded")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.lru_cache(maxsize=64)
def activations(rows: int, cols: int, dtype: torch.dtype, *, seed: int = 0, specials: bool = True) -> Tensor:
    """Numbers of many magnitudes with zeros of both signs and ties; with `specials` also NaN, infinities, subnormals.

    Cached: not to be written to.
    """
    g = generator(seed)
    x = torch.randn(rows, cols, generator=g) * torch.exp2(torch.randint(-6, 7, (rows, cols), generator=g).float())
    chosen = [0.0] * 6 + [-0.0] * 2 + [1.0] * 3 + [-1.0] * 2 + [2.0]
    if specials:
        smallest = torch.finfo(dtype).smallest_normal
        chosen += [torch.nan, -torch.nan, torch.inf, -torch.inf, smallest / 4, -smallest]
    kind = torch.randint(0, 80, (rows, cols), generator=g)
    return torch.where(kind < len(chosen), torch.tensor(chosen)[kind % len(chosen)], x).to(dtype)


def relu2_like(rows: int, cols: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Pre-activations of which 85 % are negative."""
    return (torch.randn(rows, cols, generator=generator(seed)) - 1.04).to(dtype)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def integers(*shape: int, dtype: torch.dtype, limit: int = 3, seed: int = 0) -> Tensor:
    """Small integers: sums of products of them are exact in every order."""
    return torch.randint(-limit, limit + 1, shape, generator=generator(seed)).float().to(dtype)


def relayout(x: Tensor, layout: str) -> Tensor:
    """x (for "expanded": its first row, repeated) in a layout of LAYOUTS."""
    rows, cols = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":  # rows that are far apart
        wide = x.new_full((rows, cols + 24), 7)
        wide[:, 16 : 16 + cols] = x
        return wide[:, 16 : 16 + cols]
    if layout == "strided":  # every second column
        wide = x.new_full((rows, 2 * cols), 7)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "offset":  # contiguous, but not aligned
        flat = x.new_full((rows * cols + 1,), 7)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(rows, cols)
    assert layout == "expanded"
    return x[:1].expand(rows, cols)


def unaligned(t: Tensor) -> Tensor:
    """A contiguous 1-dimensional tensor that starts one element into its storage."""
    flat = t.new_zeros(t.numel() + 1)
    flat[1:] = t.reshape(-1)
    return flat[1:]


def k_major(b: Tensor) -> Tensor:
    """b [K, N] with stride 1 along K and 16-byte aligned columns."""
    k, n = b.shape
    step = 16 // b.element_size()
    storage = b.new_zeros(n, round_up(k, step))
    storage[:, :k] = b.t()
    return storage[:, :k].t()
