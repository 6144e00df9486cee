"""The network for few tokens as modules call it: with as little on the host as the checks allow."""

import torch
from torch import Tensor

from sparse24._autocast import without_autograd
from sparse24.mlp.arguments import Weight
from sparse24.mlp.choice import runs_few
from sparse24.ops.few_tokens import relu2_mlp_few
from sparse24.ops.forward_mode import in_forward_mode, in_torch_func

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def learns(*tensors: Tensor | None) -> bool:
    """Whether a call with these is differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def decoded(
    x: Tensor, first: Weight, rows: Weight, b1: Tensor | None, b2: Tensor | None, threshold: float
) -> Tensor | None:
    """Compute what `relu2_mlp` does with `w2_rows`, where that is `relu2_mlp_few` and nothing has to be cast.

    None otherwise, for whatever reason: then `relu2_mlp` is to be called. The same of what does not fit, which it
    refuses in its own words.

    Parameters
    ----------
    x : Tensor
        A plain tensor; the call is not differentiated.
    first, rows : Weight
        w1 and w2_rows with their scales.
    b1, b2, threshold
        As in `relu2_mlp`.
    """
    w1, w2_rows = first.values, rows.values
    dtype, device = x.dtype, x.device.type
    if (
        dtype not in _DTYPES
        or device not in ("cpu", "cuda")
        or torch.is_autocast_enabled(device)
        or (dtype == torch.float32 and x.is_cuda)
    ):
        return None
    if first.scale is None and not (w1.dtype == w2_rows.dtype == dtype):
        return None
    if (b1 is not None and b1.dtype != dtype) or (b2 is not None and b2.dtype != dtype):
        return None
    place = x.get_device()
    if w1.get_device() != place or w2_rows.get_device() != place:
        return None
    d_ff, d = w1.shape
    if d == 0 or x.dim() == 0 or x.shape[-1] != d or in_torch_func() or in_forward_mode():
        return None
    fp8 = first.scale is not None
    if not runs_few(x.numel() // d, d_ff, w2_rows.shape[1], fp8=fp8, is_cuda=x.is_cuda):
        return None
    with without_autograd():
        return relu2_mlp_few(x, w1, w2_rows, b1, b2, first.scale, rows.scale, threshold)
