"""Problems for mm: operands, the product in float64, and what torch makes of it in the same precision."""

from dataclasses import dataclass

import oracle
import torch
from data import k_major, normal, relu2_like
from oracle import FP8, round_up
from torch import Tensor

import sparse24


@dataclass
class Problem:
    """X compressed along dim, and b; on one device."""

    values: Tensor
    meta: Tensor
    b: Tensor
    dim: int
    a: Tensor  # A [M, K], of the dtype of values, zeros where nothing was kept

    def __call__(self, *scales_and_bias, **options) -> Tensor:
        return sparse24.mm(self.values, self.meta, self.b, *scales_and_bias, dim=self.dim, **options)


def compressed(x: Tensor, values_dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor]:
    """fp8 with a scale that uses the range but is one for all, so that A is the numbers as stored."""
    if values_dtype != FP8:
        return sparse24.compress(x, dim=dim)
    largest = x.abs().amax().float().clamp_min(1e-6) if x.numel() else torch.ones((), device=x.device)
    return sparse24.compress_fp8(x, (largest / 448).reshape(1), dim=dim, scaling="tensor")[:2]


def problem_of(x: Tensor, b: Tensor, dim: int) -> Problem:
    """x in float32, bfloat16 or float16; b in the dtype of the values."""
    values, meta = compressed(x, b.dtype, dim)
    dense = sparse24.decompress(values, meta, *x.shape, dim)
    return Problem(values, meta, b, dim, dense if dim == -1 else dense.t())


def random_problem(rows, cols, n, values_dtype, dim, device, *, seed=0, columns=k_major) -> Problem:
    """Squared-ReLU activations times normal weights; `columns` lays b out."""
    x_dtype = torch.bfloat16 if values_dtype == FP8 else values_dtype
    x = relu2_like(rows, cols, x_dtype, seed=seed).relu().square().to(device)
    k = cols if dim == -1 else rows
    return problem_of(x, columns(normal(k, n, dtype=values_dtype, seed=seed + 1).to(device)), dim)


def exact_product(p: Problem, scale_a=None, scale_b=None, bias=None) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the magnitudes of its terms."""
    a, b = p.a.cpu().float().double(), p.b.cpu().float().double()
    results = []
    for left, right, sign in ((a, b, 1), (a.abs(), b.abs(), -1)):
        d = left @ right
        for scale, shape in ((scale_a, (-1, 1)), (scale_b, (1, -1))):
            if scale is not None:
                factor = scale.cpu().double().reshape(shape)
                d = d * (factor if sign == 1 else factor.abs())
        if bias is not None:
            d = d + (bias.cpu().double() if sign == 1 else bias.cpu().double().abs())
        results.append(d)
    return results[0], results[1]


def torch_product(p: Problem, scale_a=None, scale_b=None, bias=None, out_dtype=None) -> Tensor:
    """torch's product of the same operands, dense: float32 accumulation, then scales and bias, then one rounding."""
    d = _accumulate(p.a, p.b)
    if scale_a is not None:
        d = d * scale_a.reshape(-1, 1)
    if scale_b is not None:
        d = d * scale_b.reshape(1, -1)
    if bias is not None:
        d = d + bias.float()
    return d.to(out_dtype or (torch.bfloat16 if p.values.dtype == FP8 else p.values.dtype))


def _accumulate(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_cuda or 0 in (*a.shape, *b.shape):
        return a.float() @ b.float()
    if a.dtype != FP8:
        return torch.mm(a, b, out_dtype=torch.float32)
    m, k, n = *a.shape, b.shape[1]  # cuBLAS wants multiples of 16
    left = a.new_zeros(round_up(m, 16), round_up(k, 16), dtype=torch.uint8)
    right = a.new_zeros(round_up(n, 16), round_up(k, 16), dtype=torch.uint8)
    left[:m, :k] = oracle.bits(a)
    right[:n, :k] = oracle.bits(b.t())
    one = torch.ones((), device=a.device)
    d = torch._scaled_mm(
        left.view(FP8), right.view(FP8).t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
    )
    return d[:m, :n]
