"""The ops against plain torch: the format bit for bit, the FFN within what the same product costs dense.

The reference is written with a mask on dense tensors. It shares no code with the ops, except that both start from the
same pre-activation (`sparse24.mlp.up_projection`): a rounding difference there could swap two nearly equal entries. The
fused first layer adds up in its own order: its entries, and what it selects, are compared within errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24.analyze import top2_mask
from sparse24.mlp import relu2_mlp, up_projection
from sparse24.ops import compress, compress_fp8, decompress, linear_compress, quantize_fp8

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


@dataclass(frozen=True)
class Check:
    """`error` is a count of mismatches where `bound` is 0, else the largest absolute error."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        if self.bound == 0:
            return f"{self.name}: {self.error:.0f} mismatches"
        return f"{self.name}: largest error {self.error:.3g}, allowed {self.bound:.3g}"


@torch.no_grad()
def verify_ffn(x: Tensor, w1: Tensor, w2: Tensor, rows: slice | None = None) -> Iterator[Check]:
    """Check one squared-ReLU FFN in 16-bit and fp8 precision.

    Parameters
    ----------
    x : Tensor [T, D]
        bfloat16 or float16; T a multiple of 32.
    w1, w2 : Tensor [F, D], Tensor [D_out, F]
        Of x's dtype.
    rows : slice, optional
        The tokens whose output is compared; default all. The ops always see all of them: the reference is slow.
    """
    rows = slice(None) if rows is None else rows
    yield from _verify_16bit(x, w1, w2, rows)
    yield from _verify_fp8(x, w1, w2, rows)


def _verify_16bit(x: Tensor, w1: Tensor, w2: Tensor, rows: slice) -> Iterator[Check]:
    h = up_projection(x, w1)
    y2 = torch.relu(h.float()).square()
    for dim in (-1, -2):
        values, meta = compress(h, "relu2", dim)
        restored = decompress(values, meta, *h.shape, dim)
        expected = torch.where(top2_mask(torch.relu(h), dim), y2, 0.0).to(x.dtype)
        yield _equal(f"16-bit decompress(compress(h)), dim={dim}", restored, expected)

    out = relu2_mlp(x, w1, w2, precision="16bit", min_tokens=0, fused=False)[rows]
    masked = torch.where(top2_mask(torch.relu(h)), y2, 0.0).to(x.dtype)[rows]
    exact = masked.double() @ w2.double().t()
    yield _within("16-bit relu2_mlp, not fused", out, F.linear(masked, w2), exact)

    values, meta, *_ = linear_compress(x, w1)
    kept = decompress(values, meta, *h.shape)[rows]
    mask = decompress(torch.ones_like(values), meta, *h.shape)[rows] != 0
    exact = torch.relu(x[rows].double() @ w1.double().t()).square()
    yield from _first_layer("16-bit linear_compress", kept, mask, y2[rows].to(x.dtype), exact)
    out = relu2_mlp(x, w1, w2, precision="16bit", min_tokens=0, fused=True)[rows]
    yield _within("16-bit relu2_mlp, fused", out, F.linear(kept, w2), kept.double() @ w2.double().t())


def _verify_fp8(x: Tensor, w1: Tensor, w2: Tensor, rows: slice) -> Iterator[Check]:
    w2_values, w2_scale = quantize_fp8(w2)
    expected_values, expected_scale = _quantize(w2.float())
    yield _equal("quantize_fp8(w2)", w2_values, expected_values)
    yield _equal("quantize_fp8(w2), scale", w2_scale, expected_scale)

    h = up_projection(x, w1, fp8=True)
    y2 = torch.relu(h.float()).square()
    values, meta, scale = compress_fp8(h, None, "relu2")
    restored = decompress(values, meta, *h.shape)
    expected_values, expected_scale = _quantize(y2)
    kept = torch.where(top2_mask(torch.relu(h)), expected_values.float(), 0.0).to(_FP8)
    yield _equal("fp8 decompress(compress_fp8(h))", restored, kept)
    yield _equal("fp8 compress_fp8(h), scale", scale, expected_scale)

    out = relu2_mlp(x, w1, w2, precision="fp8", min_tokens=0, fused=False)[rows]
    masked, scale = kept[rows], expected_scale[rows]
    exact = (masked.double() @ w2_values.double().t()) * scale.double() * w2_scale.double().t()
    yield _within("fp8 relu2_mlp, not fused", out, _dense_fp8(masked, scale, w2_values, w2_scale).to(x.dtype), exact)

    (q, q_scale), (w1_values, w1_scale) = quantize_fp8(x), quantize_fp8(w1)
    values, meta, scale, *_ = linear_compress(q, w1_values, q_scale, w1_scale, scaling="row")
    masked, scale = decompress(values, meta, *h.shape)[rows], scale[rows]
    mask = decompress(torch.ones_like(values), meta, *h.shape)[rows].float() != 0
    exact_h = (q[rows].double() @ w1_values.double().t()) * q_scale[rows].double() * w1_scale.double().t()
    dense_values, dense_scale = _quantize(y2[rows])
    dense = dense_values.float() * dense_scale
    yield from _first_layer("fp8 linear_compress", masked.float() * scale, mask, dense, torch.relu(exact_h).square())
    out = relu2_mlp(x, w1, w2, precision="fp8", min_tokens=0, fused=True)[rows]
    exact = (masked.double() @ w2_values.double().t()) * scale.double() * w2_scale.double().t()
    yield _within("fp8 relu2_mlp, fused", out, _dense_fp8(masked, scale, w2_values, w2_scale).to(x.dtype), exact)


def _first_layer(name: str, kept: Tensor, mask: Tensor, dense: Tensor, exact: Tensor) -> Iterator[Check]:
    """Compare the kept entries, and the sum of each group's two largest: a wrong choice would make it smaller."""
    yield _within(name, kept, dense * mask, exact * mask)
    pairs = _sum_of_groups(dense.double() * top2_mask(dense))
    exact_pairs = _sum_of_groups(exact * top2_mask(exact))
    yield _within(f"{name}, two largest", _sum_of_groups(kept.double()), pairs, exact_pairs)


def _sum_of_groups(y: Tensor) -> Tensor:
    return y.unflatten(1, (-1, 4)).sum(2)


def _quantize(y: Tensor) -> tuple[Tensor, Tensor]:
    """float8 rows and their scales [rows, 1], by the documented formula. y is finite."""
    amax = y.abs().amax(dim=1, keepdim=True)
    # By a tensor: on CUDA torch divides by a number through its reciprocal, which rounds twice.
    scale = amax / torch.full_like(amax, _FP8_MAX)
    scale = torch.where(amax == 0, 1.0, scale.clamp(min=torch.finfo(torch.float32).tiny))
    return (y * (1.0 / scale)).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale


def _dense_fp8(y: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Multiply the same float8 operands in torch alone, to bfloat16."""
    if y.is_cuda:
        return torch._scaled_mm(
            y, w.t(), scale_a=scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return ((y.float() @ w.float().t()) * scale * w_scale.t()).to(torch.bfloat16)


def _equal(name: str, got: Tensor, expected: Tensor) -> Check:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return Check(f"{name} (shape or dtype)", float(max(expected.numel(), 1)), 0.0)
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    return Check(name, float((got.contiguous().view(as_bits) != expected.contiguous().view(as_bits)).sum()), 0.0)


def _within(name: str, got: Tensor, dense: Tensor, exact: Tensor) -> Check:
    """At most twice the error of the dense product of the same dtype, plus a tiny absolute term."""
    bound = 2 * (dense.double() - exact).abs().max() + 1e-6 * exact.abs().max() + 1e-30
    return Check(name, float((got.double() - exact).abs().max()), float(bound))
