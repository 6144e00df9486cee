"""Operands of a whole FFN step whose activation has a given zero pattern."""

from __future__ import annotations

import torch
from data import Sparsity, generator, mlp_inputs, preactivations, weights

# Repetitions of a recorded pattern are shifted by multiples of it, as data.tiled_pattern shifts features: tokens at
# equal places of two repetitions differ.
SHIFT = 997


def step_inputs(
    tokens: int, d_model: int, d_ff: int, sparsity: Sparsity, *, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], w1 [F, D], w2 [D, F], dy [T, D] in bfloat16; relu(x @ w1.T) has the zeros of `sparsity`."""
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
    """x and w1 whose product has the signs of a recorded pattern, for the first `d_model` tokens of it.

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
