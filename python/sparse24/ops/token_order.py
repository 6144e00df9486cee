"""The order of tokens in which groups of four are tokens a quarter apart: `interleaved_token` of the C++ core."""

import torch
from torch import Tensor


def interleaved_tokens(t: Tensor) -> Tensor:
    """Return the token of each row of the interleaved t [T, N]: of row ``4 g + i`` it is ``i Q + g``, ``Q = T // 4``.

    The last T % 4 rows are of their own tokens.
    """
    quarter = t.shape[0] // 4
    row = torch.arange(t.shape[0], device=t.device)
    return torch.where(row < 4 * quarter, row % 4 * quarter + row // 4, row)


def interleave(t: Tensor) -> Tensor:
    """Row ``4 g + i`` of the result is row ``i Q + g`` of t [T, N], with ``Q = T // 4``; the last T % 4 rows stay.

    Neighbouring tokens light the same features: a group of four is then made of tokens that are a quarter apart.
    """
    # One gather, and while tracing no branch on the number of rows: views would be a graph for each remainder.
    return t.index_select(0, interleaved_tokens(t))


def deinterleave(t: Tensor) -> Tensor:
    """Undo `interleave`."""
    return t.new_empty(t.shape).index_copy(0, interleaved_tokens(t), t)
