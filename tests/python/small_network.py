"""Weights and inputs of a small network, not square, that fits 16 bits and fp8."""

import torch
from data import normal

D, HIDDEN, OUT = 64, 160, 48


def weights(dtype, device, *, hidden=HIDDEN, bias=False):
    w1 = normal(hidden, D, dtype=torch.float32, seed=1).div(D**0.5)
    w2 = normal(OUT, hidden, dtype=torch.float32, seed=2).div(hidden**0.5)
    b1, b2 = (normal(n, dtype=torch.float32, seed=s).mul(0.3) for n, s in ((hidden, 3), (OUT, 4)))
    return tuple(
        t.to(device, dtype) if t is not None else None for t in (w1, w2, *((b1, b2) if bias else (None, None)))
    )


def tokens(count, dtype, device, seed=0):
    return normal(count, D, dtype=dtype, seed=seed).to(device)
