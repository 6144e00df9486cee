"""What the network gives, in float64, and how large the terms are that its errors come from."""

from dataclasses import dataclass

import torch
from oracle import select
from torch import Tensor


@dataclass
class Expected:
    """A result.

    `scale` is, of each element, the root of the sum of the squares of its terms: errors of the terms that know nothing
    of each other are in proportion to it, and to the result only where the terms do not cancel. `known` is where
    nothing overflows.
    """

    exact: Tensor
    scale: Tensor
    known: Tensor

    def check(self, actual: Tensor, tolerance: float | None, what: str) -> None:
        """What overflows may be anything; the rest is finite, and its error at most a share of its norm or its scale's.

        Errors are looked at where a `tolerance` is given, of matrices large enough for one pruned entry more or less
        not to be all that there is.
        """
        known = self.known.expand(actual.shape)
        assert actual.isfinite()[known].all(), f"{what} is not finite"
        if tolerance is None or actual.numel() < 64:
            return
        norm, scale = self.exact[known].norm().item(), self.scale[known].norm().item()
        error = (actual.double() - self.exact)[known].norm().item()
        assert error <= tolerance * max(norm, scale) + 1e-3, f"{what}: error {error:.3e}, norm {norm:.3e}, {scale:.3e}"


@dataclass
class Reference:
    """The network of `leaves`, float64 tensors by the names of relu2_mlp's arguments, x [tokens, D].

    `tolerance` is the relative error of h that decides whether a feature may be there, `dtype` what can overflow, in
    which `stores_fp8` leaves the activation out.
    """

    leaves: dict[str, Tensor]
    sparse: bool
    dtype: torch.dtype
    stores_fp8: bool
    tolerance: float

    def __post_init__(self) -> None:
        x, w1, w2 = (self.leaves[name] for name in ("x", "w1", "w2"))
        b1, b2 = (self.leaves.get(name, torch.zeros(1, dtype=torch.float64)) for name in ("b1", "b2"))
        h = x @ w1.t() + b1
        self.mask = self._mask(h.detach())
        y = h.clamp(min=0).square() * self.mask
        self.result = y @ w2.t() + b2
        with torch.no_grad():
            spread = _rms(x, w1.t(), b1)
            self.reach = (h + self.tolerance * spread).clamp(min=0) * self.mask
            self.limit = torch.finfo(self.dtype).max / 2  # half, because of errors
            self.too_large = (y > self.limit).any(1, keepdim=True)
            lost = self.result.abs() > self.limit
            if not self.stores_fp8:
                lost = lost | self.too_large
            self.out = Expected(self.result.detach(), _rms(self.reach.square(), w2.t(), b2), ~lost)

    def _mask(self, h: Tensor) -> Tensor:
        if not self.sparse or h.numel() == 0:
            return torch.ones_like(h)
        kept = select(h.float().to(self.dtype).float().clamp(min=0))
        groups = torch.zeros(h.shape[0], h.shape[1] // 4, 4, dtype=h.dtype)
        return groups.scatter_(2, kept, 1.0).reshape(h.shape)

    def gradients(self, grad: Tensor, names: list[str]) -> dict[str, Expected]:
        """Those of `names`, with the gradient of the output [tokens, D_out]."""
        exact = torch.autograd.grad(self.result, [self.leaves[name] for name in names], grad)
        x, w1, w2 = (self.leaves[name].detach() for name in ("x", "w1", "w2"))
        one = torch.ones(grad.shape[0], 1, dtype=grad.dtype)
        dy = grad @ w2
        dh = torch.maximum(dy.abs(), _rms(grad, w2)) * 2 * self.reach
        lost = self.too_large | (dh > self.limit).any(1, keepdim=True)
        lost = lost | (dy.abs() > self.limit).any(1, keepdim=True)
        scales = {
            "x": _rms(dh, w1),
            "w1": _rms(dh.t(), x),
            "w2": _rms(grad.t(), self.reach.square()),
            "b1": _rms(dh.t(), one).flatten(),
            "b2": _rms(grad.t(), one).flatten(),
        }
        expected = {}
        for name, e in zip(names, exact, strict=True):
            gone = lost if name == "x" else lost.any()
            expected[name] = Expected(e, scales[name], ~(gone | (e.abs() > self.limit)))
        return expected


def _rms(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The root of the sum of the squares of the terms of ``a @ b + bias``."""
    squares = a.square() @ b.square()
    return (squares if bias is None else squares + bias.square()).sqrt()
