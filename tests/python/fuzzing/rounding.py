"""A product in float64, and how far from it a result may be."""

from dataclasses import dataclass

import oracle
import torch
from compare import assert_same_bits
from oracle import FP8
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps
#: float8 products on CUDA are accumulated with 14 bits.
_EPS_FP8 = 2.0**-10


@dataclass
class Product:
    """Results in float64, the sum of the magnitudes of their terms, and whether float32 has no rounding to do."""

    exact: Tensor
    magnitude: Tensor
    is_exact: bool
    fp8: bool

    @property
    def bound(self) -> Tensor:
        """Of the error before the last rounding."""
        return (_EPS_FP8 if self.fp8 else 64 * _EPS) * self.magnitude + 1e-35

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The one result, where it is exact."""
        return round_to(self.exact.float() + 0.0, dtype)

    def check(self, actual: Tensor) -> None:
        """A matrix that was rounded once."""
        assert actual.shape == self.exact.shape, f"{tuple(actual.shape)} instead of {tuple(self.exact.shape)}"
        if self.is_exact:
            assert_same_bits(actual + 0.0, self.rounded(actual.dtype))
        else:
            near(actual, self.exact, self.bound)


def near(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """One rounding from something within `bound` of what is exact; what nearly overflows may overflow."""
    info = torch.finfo(actual.dtype)
    got = actual.detach().double()
    bound = bound + info.eps * exact.abs() + 2 * info.smallest_normal * info.eps
    skipped = (exact.abs() + bound > 0.98 * min(info.max, 1e38)) & ~exact.isnan() & ~exact.isinf() | bound.isnan()
    finite = exact.isfinite()
    wrong = torch.where(finite, ~((got - exact).abs() <= bound), got.isfinite()) & ~skipped
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are wrong, the first at {at}: {got[at].item()} instead of "
            f"{exact[at].item()}, the bound is {bound[at].item()}"
        )


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to the nearest number of `dtype`; one code for NaN."""
    codes = torch.where(x.isnan(), oracle._NAN_CODE[dtype], oracle.bits(x.to(dtype)).to(torch.int64))
    return oracle.from_bits(codes, dtype)


def product(a: Tensor, b: Tensor, scale_a=None, scale_b=None, bias=None, mask: Tensor | None = None) -> Product:
    """``a @ b`` with scales of rows and columns; of a, what `mask` leaves."""
    fp8 = a.dtype == FP8
    a, b = a.detach().double(), b.detach().double()
    whole = bool((a == a.round()).all() and (b == b.round()).all())
    blocked = None
    if mask is not None and not b.isfinite().all():  # what is not kept does not multiply
        blocked = mask.double() @ (~b.isfinite()).double() > 0
        b = torch.where(b.isfinite(), b, 0.0)
    exact, magnitude = a @ b, a.abs() @ b.abs()
    if blocked is not None:
        exact = torch.where(blocked, torch.nan, exact)
    # NaN stands for sums that float32 may not hold: nothing is known of them.
    magnitude = torch.where(magnitude > 1e37, torch.nan, magnitude)
    magnitude = torch.where(exact.isfinite(), magnitude, 0.0)
    small = not exact.numel() or bool(magnitude.max() < (2**12 if fp8 else 2**22))
    powers = True
    for scale, shape in ((scale_a, (-1, 1)), (scale_b, (1, -1))):
        if scale is not None:
            factor = scale.double().reshape(shape)
            exact, magnitude = exact * factor, magnitude * factor.abs()
            powers = powers and bool((torch.frexp(factor).mantissa.abs() == 0.5).all())
    if bias is not None:
        exact, magnitude = exact + bias.detach().double(), magnitude + bias.detach().double().abs()
    known = bool((exact.float().double() == exact).all()) and bool((magnitude < 2**22).all())
    return Product(exact, magnitude, whole and small and powers and known, fp8)
