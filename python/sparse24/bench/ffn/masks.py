"""What an FFN keeps for its weight gradients, asked of the FFN itself.

dw2 = dy.T y and dw1 = dh.T x. With a one in a single place of each column of dy, the rows of dw2 are rows of y as the
backward pass has it, pruned along features and tokens; with columns of that kind beside those of x, the columns of dw1
are those of dh. So nothing is assumed about the order of tokens or which features are dense, and near ties that
rounding decides are decided as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sparse24.bench import reference

FFN = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Tokens asked for in one backward pass.
ROWS = 4096
# What a selection by rounded values may lose of the energy of the two largest of each four.
ENERGY_LOST = 1e-3


def kept_activation(ffn: FFN, x: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """Mask [T, F] of the entries of y that are not zero in dw2 = dy.T y."""
    mask = torch.empty(x.shape[0], w1.shape[0], dtype=torch.bool, device=x.device)
    for part, ones in _columns_of_ones(x):
        w2 = torch.zeros(ones.shape[1], w1.shape[0], dtype=x.dtype, device=x.device, requires_grad=True)
        (dw2,) = torch.autograd.grad(ffn(x, w1, w2), w2, ones)
        mask[part] = dw2[: mask[part].shape[0]] != 0
    return mask


def kept_gradient(ffn: FFN, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Mask [T, F] of the entries of dh that are not zero in dw1 = dh.T x."""
    mask = torch.empty(x.shape[0], w1.shape[0], dtype=torch.bool, device=x.device)
    for part, ones in _columns_of_ones(x):
        # The weights of the new columns are zero: h, and all that follows from it, stays as it is.
        wide_w1 = torch.cat((w1, w1.new_zeros(w1.shape[0], ones.shape[1])), 1).requires_grad_()
        (dw1,) = torch.autograd.grad(ffn(torch.cat((x, ones), 1), wide_w1, w2), wide_w1, dy)
        mask[part] = dw1[:, x.shape[1] :].t()[: mask[part].shape[0]] != 0
    return mask


def _columns_of_ones(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each part of the tokens, [T, rows] with a one in each of its rows, in columns of their own."""
    tokens = x.shape[0]
    rows = min(ROWS, -(-tokens // 16) * 16)
    for start in range(0, tokens, rows):
        ones = x.new_zeros(tokens, rows)
        ones[start : start + rows].fill_diagonal_(1)
        yield slice(start, start + rows), ones


def check_features(mask: torch.Tensor, y: torch.Tensor) -> None:
    """`mask` keeps at most two of each four features, and the energy that the two largest of them have."""
    if (mask.unflatten(1, (-1, 4)).sum(2) > 2).any():
        raise reference.Unverified("expected at most two of four features to be kept, got more")
    share = (_energy(y * mask) / _energy(reference.prune24(y, -1))).item()
    if not share > 1 - ENERGY_LOST:
        raise reference.Unverified(f"expected the kept entries to hold the energy of the two largest, got {share:.6f}")


def check_tokens(what: str, mask: torch.Tensor, features: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    """`mask` drops no more energy of `dense` (y or dh) under the mask of features than 2:4 along neighbouring tokens.

    Returns the shares of its non-zeros and of its energy that `mask` drops.
    """
    # Not where `dense` is zero: h next to zero may have another sign in another precision.
    if (mask & ~features).any():
        raise reference.Unverified(f"expected no entry of {what} that the forward pass dropped, got some")
    kept = dense * features
    whole = _energy(kept)
    dropped = max(0.0, (1 - _energy(kept * mask) / whole).item())
    natural = (1 - _energy(reference.prune24(kept, -2)) / whole).item()
    if not dropped <= 1.05 * natural + ENERGY_LOST:
        raise reference.Unverified(
            f"expected tokens to drop at most {natural:.4f} of the energy of {what}, got {dropped:.4f}"
        )
    share = 1 - torch.count_nonzero(mask).item() / max(1, torch.count_nonzero(kept).item())
    return {f"{what}_nonzeros_dropped": share, f"{what}_energy_dropped": dropped}


def _energy(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum(dtype=torch.float64)
