"""The rivals: dense products and FFNs of torch, and cuSPARSELt. What they get is prepared as well as ours is."""

from __future__ import annotations

import torch
from reference import FP8, FP8_MAX
from torch.nn import functional as F


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    """torch's fp8 product to bf16 with fast accumulation; scales of one element each, or [M, 1] and [1, N]."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


class CuSparseLt:
    """A 2:4 matrix `a` in cuSPARSELt's form, times `b`; the algorithm is the one its own search finds fastest.

    Parameters
    ----------
    a : torch.Tensor
        [M, K], at most two non-zeros in each four of a row.
    b : torch.Tensor
        [K, N], K-major for fp8.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.b = b
        self.out_dtype = torch.bfloat16 if a.dtype == FP8 else None
        self.compressed = torch._cslt_compress(a)
        self.choice = self._search()

    def __call__(self, _: int = 0) -> torch.Tensor:
        return torch._cslt_sparse_mm(self.compressed, self.b, out_dtype=self.out_dtype, **self.choice)

    def _search(self) -> dict[str, int]:
        try:
            # Also finds the split of K; private, so it may be absent or answer differently.
            found = torch._C._cusparselt.mm_search(self.compressed, self.b, None, None, self.out_dtype, False)
            return {"alg_id": int(found[0]), "split_k": int(found[1]), "split_k_mode": int(found[2])}
        except (AttributeError, TypeError, IndexError, RuntimeError):
            return {"alg_id": int(torch._cslt_sparse_mm_search(self.compressed, self.b, out_dtype=self.out_dtype))}


def quantize(x: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float8_e4m3fn and its scale, [rows, 1] or one element: what users write and torch.compile fuses."""
    amax = x.abs().amax(dim=-1, keepdim=True) if per_row else x.abs().amax().view(1, 1)
    scale = (amax.float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def mlp(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """relu(x @ w1.T)^2 @ w2.T in x's dtype."""
    return F.linear(F.relu(F.linear(x, w1)).square(), w2)


def mlp_fp8_rows(
    x: torch.Tensor, w1: torch.Tensor, scale1: torch.Tensor, w2: torch.Tensor, scale2: torch.Tensor
) -> torch.Tensor:
    """The FFN with row-wise fp8: weights are quantised already (scales [rows, 1]), x and the activation are here."""
    xq, scale_x = quantize(x, per_row=True)
    y = F.relu(scaled_mm(xq, w1.t(), scale_x, scale1.t())).square()
    yq, scale_y = quantize(y, per_row=True)
    return scaled_mm(yq, w2.t(), scale_y, scale2.t())


def mlp_fp8_tensor(
    x: torch.Tensor, w1: torch.Tensor, scale1: torch.Tensor, w2: torch.Tensor, scale2: torch.Tensor
) -> torch.Tensor:
    """The FFN with one scale per tensor."""
    xq, scale_x = quantize(x, per_row=False)
    y = F.relu(scaled_mm(xq, w1.t(), scale_x, scale1)).square()
    yq, scale_y = quantize(y, per_row=False)
    return scaled_mm(yq, w2.t(), scale_y, scale2)
