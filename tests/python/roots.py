"""Gradients through a root, as the ops round them."""

import numpy as np
import oracle
import torch
from torch import Tensor


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of `dtype`; one code for NaN."""
    codes = torch.where(x.isnan(), oracle._NAN_CODE[dtype], oracle.bits(x.to(dtype)).to(torch.int64))
    return oracle.from_bits(codes, dtype)


def times_root(dy: Tensor, y: Tensor, roots: bool = False) -> Tensor:
    """``dy * (2 * sqrt(y))`` in float32, rounded once; `roots`: ``dy * (2 * y)``.

    torch's own root of CPU tensors is not always the nearest.
    """
    root = y.cpu().float() if roots else torch.from_numpy(np.sqrt(y.cpu().float().numpy()))
    return round_to(dy.cpu().float() * (2 * root), dy.dtype).to(dy.device)
