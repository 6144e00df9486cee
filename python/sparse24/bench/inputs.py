"""Inputs whose activation has a known share of exact zeros.

A pre-activation is negative where the activation is zero and positive elsewhere, so that relu and relu^2 produce the
zeros themselves and every variant, dense ones too, sees the same data: zeros change the clocks of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

# Far from the smallest bf16 number: squares stay exact zeros only where they should.
SMALLEST_MAGNITUDE = 2.0**-6


@dataclass(frozen=True)
class Sparsity:
    """Which entries of the activation are zero: `zeros` of them independently, or as in a recorded pattern."""

    zeros: float = 0.9
    pattern: Path | None = None

    @property
    def name(self) -> str:
        return self.pattern.stem if self.pattern else "iid"


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def recorded(folder: Path | None) -> list[Sparsity]:
    """The patterns recorded in `folder` (pattern_layer*.npy), none without a folder."""
    return [Sparsity(pattern=path) for path in sorted(folder.glob("pattern_layer*.npy"))] if folder else []


def preactivations(
    rows: int, cols: int, sparsity: Sparsity, *, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """[rows, cols], |normal| magnitudes, negative where the activation is to be zero."""
    gen = generator(device, seed)
    magnitude = torch.randn(rows, cols, dtype=dtype, device=device, generator=gen).abs_().clamp_(min=SMALLEST_MAGNITUDE)
    if sparsity.pattern:
        active = tiled_pattern(sparsity.pattern, rows, cols, device)
    else:
        active = torch.empty(rows, cols, dtype=torch.bool, device=device).bernoulli_(1 - sparsity.zeros, generator=gen)
    return torch.where(active, magnitude, -magnitude)


def tiled_pattern(path: Path, rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """A recorded pattern (packed bits, [tokens, features / 8]) repeated to [rows, cols], true where active.

    Each repetition along the features is shifted by some tokens: it keeps the densities of the features and the
    likeness of neighbouring tokens, without exact copies of columns.
    """
    import numpy

    bits = torch.from_numpy(numpy.unpackbits(numpy.load(path), axis=1)).to(device=device, dtype=torch.bool)
    tokens, features = bits.shape
    blocks = [bits.roll(997 * i, dims=0) for i in range(-(-cols // features))]
    wide = torch.cat(blocks, dim=1)[:, :cols]
    return wide.repeat(-(-rows // tokens), 1)[:rows].contiguous()


def zero_share(x: torch.Tensor) -> float:
    """Share of entries whose activation is zero."""
    return 1.0 - torch.count_nonzero(x > 0).item() / x.numel()


def weights(rows: int, cols: int, *, device: torch.device, seed: int) -> torch.Tensor:
    """[rows, cols] bf16, normal, variance 1 / cols as an initialised linear layer."""
    gen = generator(device, seed)
    return torch.randn(rows, cols, dtype=torch.bfloat16, device=device, generator=gen).mul_(cols**-0.5)


def biases(d_ff: int, d_model: int, *, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """b1 [d_ff] and b2 [d_model], bf16, small beside the pre-activation and the output."""
    gen = generator(device, seed + 4)
    both = torch.randn(d_ff + d_model, dtype=torch.bfloat16, device=device, generator=gen).mul_(0.1)
    return both[:d_ff].contiguous(), both[d_ff:].contiguous()


def mlp_inputs(
    tokens: int, d_model: int, d_ff: int, zeros: float, *, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X [tokens, d_model], w1 [d_ff, d_model], w2 [d_model, d_ff] such that a share `zeros` of relu(x @ w1.T) is zero.

    No bias: the first columns of x are 1 (as hidden states have a mean), and those of w1 share a negative shift, so
    that x @ w1.T is normal around -quantile(zeros) with variance about 1. The shift is spread over d_model / 64
    columns: none of them dominates a row's maximum, which would spoil the fp8 scales.
    """
    constant = max(1, d_model // 64)
    gen = generator(device, seed)
    x = torch.randn(tokens, d_model, dtype=torch.bfloat16, device=device, generator=gen)
    w1 = weights(d_ff, d_model, device=device, seed=seed + 1)
    w2 = weights(d_model, d_ff, device=device, seed=seed + 2)
    quantile = torch.special.ndtri(torch.tensor(zeros, dtype=torch.float64)).item()
    deviation = ((d_model - constant) / d_model) ** 0.5
    x[:, :constant] = 1
    w1[:, :constant] = -quantile * deviation / constant
    return x, w1, w2


# Repetitions of a recorded pattern are shifted by multiples of it, as tiled_pattern shifts features: tokens at equal
# places of two repetitions differ.
SHIFT = 997


def step_inputs(
    tokens: int, d_model: int, d_ff: int, sparsity: Sparsity, *, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """X [T, D], w1 [F, D], w2 [D, F], dy [T, D] in bfloat16; relu(x @ w1.T) has the zeros of `sparsity`."""
    if sparsity.pattern is None:
        x, w1, w2 = mlp_inputs(tokens, d_model, d_ff, sparsity.zeros, device=device, seed=seed)
    else:
        x, w1 = patterned(tokens, d_model, d_ff, sparsity, device=device, seed=seed)
        w2 = weights(d_model, d_ff, device=device, seed=seed + 2)
    dy = torch.randn(tokens, d_model, dtype=torch.bfloat16, device=device, generator=generator(device, seed + 3))
    return x, w1, w2, dy


def patterned(
    tokens: int, d_model: int, d_ff: int, sparsity: Sparsity, *, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """X and w1 whose product has the signs of a recorded pattern, for the first `d_model` tokens of it.

    The rows of an orthogonal matrix Q are the tokens, and w1 = P.T Q for pre-activations P [D, F] of the pattern: then
    Q @ w1.T = P. D tokens are as many as a product with D terms can be told; they repeat, shifted and scaled by a
    random positive number each (which squared ReLU turns into another scale and the same zeros).
    """
    gen = generator(device, seed)
    q = torch.linalg.qr(torch.randn(d_model, d_model, device=device, generator=gen)).Q
    p = preactivations(d_model, d_ff, sparsity, device=device, seed=seed + 1)
    w1 = p.float().t() @ q * d_model**-0.5
    index = torch.arange(tokens, device=device)
    rows = q[(index + SHIFT * (index // d_model)) % d_model]
    scale = torch.empty(tokens, 1, device=device).uniform_(0.5, 1.5, generator=gen)
    return (rows * scale * d_model**0.5).bfloat16(), w1.bfloat16()
