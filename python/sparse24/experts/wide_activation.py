"""The 2:4 activation of experts in float8, as products in 16 bits take it."""

import torch
from torch import Tensor

from sparse24.experts.arguments import Arguments
from sparse24.format import Operand
from sparse24.mlp.arguments import Activated


def wide_activation(activated: Activated, a: Arguments) -> tuple[Tensor, Tensor]:
    """Give the kept values of y in x's dtype, and their metadata in the layout of 16 bits."""
    values, meta, scale = activated
    if scale is None:
        return values, meta
    # In place: a product of its own would be float32.
    wide = values.to(a.x.dtype).mul_(scale)
    return wide, wide_meta(meta, values.shape[0], a.w1.shape[1])


def wide_meta(meta: Tensor, rows: int, features: int) -> Tensor:
    """Bring the metadata of float8 into the layout of 16 bits, which has the same nibbles in another order.

    Both are words of two bytes, which hold 16 columns of a row; rows are a multiple of 128 (docs/design/format.md).
    """
    # By 128 columns, 16 rows, 8 of them, one; by 64 columns, 32 of them, 16.
    words = meta.view(torch.int16).view((features + 127) // 128, -1, 2, 8, 2, 2, 2)
    wide = words.permute(0, 4, 1, 6, 3, 5, 2).reshape(-1).view(torch.uint8)
    return wide.narrow(0, 0, Operand.of(rows, features, torch.bfloat16, -1).meta_bytes)
