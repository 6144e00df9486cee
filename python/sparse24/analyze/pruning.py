"""The rule of 2:4, written independently of the ops."""

import torch
from torch import Tensor

#: As integers the bits of magnitudes are ordered as these are, and all NaNs are above infinity: here they are one.
_NAN = 0x7F800001


def top2_mask(y: Tensor, dim: int = -1) -> Tensor:
    """Mark an entry True where it is among the two largest magnitudes of its group of four along `dim`.

    The rule of the ops, written independently of them: NaN is larger than everything, of equals the lower index wins.

    Parameters
    ----------
    y : Tensor
        The activated values, or for squared ReLU their roots; `dim` has a multiple of 4 entries.
    dim : int
        Along which dimension the groups lie.

    Returns
    -------
    Tensor
        bool, of y's shape; exactly two of four are True.
    """
    dim = dim % y.dim()
    groups = y.unflatten(dim, (-1, 4))
    keys = groups.float().abs().view(torch.int32).clamp(max=_NAN).unbind(dim + 1)
    ahead = [torch.zeros_like(keys[0], dtype=torch.int8) for _ in keys]  # how many of its group are larger
    for i in range(4):
        for j in range(i + 1, 4):
            larger = keys[j] > keys[i]
            ahead[i] += larger.view(torch.int8)
            ahead[j] += (~larger).view(torch.int8)
    return torch.stack([count < 2 for count in ahead], dim + 1).flatten(dim, dim + 1)
