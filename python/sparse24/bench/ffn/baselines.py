"""The rivals: dense products and FFNs of torch, and cuSPARSELt. What they get is prepared as well as ours is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparse24.bench.reference import FP8, FP8_MAX


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Torch's fp8 product to bf16 with fast accumulation; scales of one element each, or [M, 1] and [1, N]."""
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


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

    def compress_and_multiply(self, a: torch.Tensor) -> torch.Tensor:
        """The product of another `a` of that shape, with the same algorithm."""
        return torch._cslt_sparse_mm(torch._cslt_compress(a), self.b, out_dtype=self.out_dtype, **self.choice)

    def _search(self) -> dict[str, int]:
        try:
            # Also finds the split of K; private, so it may be absent or answer differently.
            found = torch._C._cusparselt.mm_search(self.compressed, self.b, None, None, self.out_dtype, False)
            return {"alg_id": int(found[0]), "split_k": int(found[1]), "split_k_mode": int(found[2])}
        except (AttributeError, TypeError, IndexError, RuntimeError):
            return {"alg_id": int(torch._cslt_sparse_mm_search(self.compressed, self.b, out_dtype=self.out_dtype))}


def quantize(x: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """X as float8_e4m3fn and its scale, [rows, 1] or one element: what users write and torch.compile fuses."""
    amax = x.abs().amax(dim=-1, keepdim=True) if per_row else x.abs().amax().view(1, 1)
    scale = (amax.float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def pruned_relu2(pre_activation: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """relu(h)^2 with the two largest of each four of a row, zeros elsewhere; with a scale as float8. Compile it.

    torch's cuSPARSELt compression takes a matrix that is 2:4 already. Of equals the lower index stays.
    """
    root = F.relu(pre_activation.reshape(-1, 4)).unbind(-1)
    kept = []
    for i, mine in enumerate(root):
        larger = [(other >= mine if j < i else other > mine).int() for j, other in enumerate(root) if j != i]
        kept.append(torch.where(larger[0] + larger[1] + larger[2] < 2, mine, torch.zeros_like(mine)))
    pruned = torch.stack(kept, dim=-1).view(pre_activation.shape)
    if scale is None:
        return pruned.square()
    return (pruned.float().square() * scale.reciprocal()).clamp(max=FP8_MAX).to(FP8)


def dequantise(out: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Out * scale + bias in one pass, or none: cuSPARSELt's bias is along tokens, its scale is a number on the host."""
    if scale is None:
        return out if bias is None else out + bias
    return out * scale.to(out.dtype) if bias is None else torch.addcmul(bias, out, scale.to(out.dtype))


def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """relu(x @ w1.T + b1)^2 @ w2.T + b2 in x's dtype."""
    return F.linear(F.relu(F.linear(x, w1, b1)).square(), w2, b2)


def mlp_fp8_rows(
    x: torch.Tensor,
    w1: torch.Tensor,
    scale1: torch.Tensor,
    w2: torch.Tensor,
    scale2: torch.Tensor,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The FFN with row-wise fp8: weights are quantised already (scales [rows, 1]), x and the activation are here."""
    xq, scale_x = quantize(x, per_row=True)
    y = F.relu(scaled_mm(xq, w1.t(), scale_x, scale1.t(), b1)).square()
    yq, scale_y = quantize(y, per_row=True)
    return scaled_mm(yq, w2.t(), scale_y, scale2.t(), b2)


def mlp_fp8_tensor(
    x: torch.Tensor,
    w1: torch.Tensor,
    scale1: torch.Tensor,
    w2: torch.Tensor,
    scale2: torch.Tensor,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The FFN with one scale per tensor."""
    xq, scale_x = quantize(x, per_row=False)
    y = F.relu(scaled_mm(xq, w1.t(), scale_x, scale1, b1)).square()
    yq, scale_y = quantize(y, per_row=False)
    return scaled_mm(yq, w2.t(), scale_y, scale2, b2)


def mlp_fp8_static(
    x: torch.Tensor,
    w1: torch.Tensor,
    scale1: torch.Tensor,
    w2: torch.Tensor,
    scale2: torch.Tensor,
    scale_x: torch.Tensor,
    scale_y: torch.Tensor,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The FFN with one scale per tensor, those of x and the activation from calibration."""
    xq = (x.float() * scale_x.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    y = F.relu(scaled_mm(xq, w1.t(), scale_x, scale1, b1)).square()
    yq = (y.float() * scale_y.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return scaled_mm(yq, w2.t(), scale_y, scale2, b2)
