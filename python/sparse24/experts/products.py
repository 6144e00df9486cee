"""Products of rows sorted by expert with the matrix of their expert, and over the rows of each expert.

What lies beyond the last offset is read by none of them and written by none: results hold anything there.
"""

import torch
from torch import Tensor

from sparse24._symbolic import or_false
from sparse24.mlp.float8 import cast
from sparse24.ops import experts_weight_gradient, quantize_fp8
from sparse24.ops.experts import MOST_EXPERTS


def readable(t: Tensor) -> Tensor:
    """Return t, or a copy: torch's grouped products read matrices in either order that begin at 16 bytes."""
    if not t.is_contiguous():
        t = t if t.dim() == 3 and t.mT.is_contiguous() else t.contiguous()
    return t if torch.compiler.is_compiling() or t.data_ptr() % 16 == 0 else t.clone()


def by_expert(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``a_e @ b_e`` [S, N] of a [S, K] and b [E, K, N]."""
    return torch._grouped_mm(a, b, offs=offsets)


def over_rows(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``a_e.T @ b_e`` [E, M, N] of a [S, M] and b [S, N]: sums over the rows of each expert, zero where it has none."""
    columns = a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    if a.dtype == b.dtype == torch.bfloat16 and columns and or_false(offsets.shape[0] <= MOST_EXPERTS):
        return experts_weight_gradient(a, b, offsets)
    return torch._grouped_mm(a.t(), b, offs=offsets)


def by_expert_fp8(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    """``a_scale * w_scale * (a_e @ w_e.T)`` [S, N] in bfloat16; a [S, K], w [E, N, K], a scale for each row of both."""
    if a.is_cuda:
        return torch._scaled_grouped_mm(
            a, w.mT, a_scale.reshape(-1), w_scale, offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    rows = torch.arange(a.shape[0], device=a.device)
    expert = torch.searchsorted(offsets, rows, right=True).clamp_(max=w.shape[0] - 1)
    out = torch._grouped_mm(a.float(), w.float().mT, offs=offsets)
    return (out * a_scale.reshape(-1, 1) * w_scale[expert]).to(torch.bfloat16)


def quantized_experts(w: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """float8 matrices [E, N, K] with their scales [E] or [E, N], quantising by row what is not float8 yet."""
    if scale is not None:
        return w.contiguous(), scale
    experts, rows, columns = w.shape
    values, scale = quantize_fp8(w.reshape(experts * rows, columns))
    return values.view(experts, rows, columns), scale.view(experts, rows)


def float8_experts(w: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantise likewise, with a scale for each row [E, N]."""
    w, scale = quantized_experts(w, scale)
    scale = scale.unsqueeze(1) if scale.dim() == 1 else scale
    return w, scale.expand(w.shape[:2]).contiguous()


def sixteen_bit(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the matrices as the backward pass multiplies them."""
    if scale is None:
        return w
    return (w.float() * (scale.unsqueeze(1) if scale.dim() == 1 else scale).unsqueeze(2)).to(dtype)


def scaled_rows(t: Tensor, row_scale: Tensor) -> Tensor:
    """Multiply each row of t [S, N], which nobody else holds, in float32 where the factors are, rounded once more."""
    if (
        torch.compiler.is_compiling()
    ):  # Dynamo of torch 2.11 loses the gradient of what is written to: `mlp.float8.cast`
        return cast(t * row_scale.unsqueeze(1), t.dtype)
    return t.mul_(row_scale.unsqueeze(1))


def zero_beyond(t: Tensor, offsets: Tensor) -> Tensor:
    """Make the rows of t [S, N] or [S], which nobody else holds, zero that belong to no expert."""
    beyond = torch.arange(t.shape[0], device=t.device) >= offsets.select(0, -1)
    beyond = beyond if t.dim() == 1 else beyond.unsqueeze(1)
    return t.masked_fill(beyond, 0) if torch.compiler.is_compiling() else t.masked_fill_(beyond, 0)
