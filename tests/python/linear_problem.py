"""Problems for linear_relu2 and linear_compress whose sums are exact, and what the ops must make of them."""

from dataclasses import dataclass

import oracle
import torch
from compare import assert_same_bits
from data import integers
from oracle import FP8
from torch import Tensor

import sparse24


def hidden_of(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == FP8 else dtype


@dataclass
class Problem:
    """Operands whose products and sums are exact in float32, and the pre-activation that they have."""

    x: Tensor
    w: Tensor
    scale_x: Tensor | None = None
    scale_w: Tensor | None = None
    bias: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor | None, ...]:
        return self.x, self.w, self.scale_x, self.scale_w, self.bias

    def h(self) -> Tensor:
        """Rounded once, on the CPU."""
        h = self.x.cpu().double() @ self.w.cpu().double().t()
        for scale, shape in ((self.scale_x, (-1, 1)), (self.scale_w, (1, -1))):
            if scale is not None:
                h = h * scale.cpu().double().reshape(shape)
        h = h if self.bias is None else h + self.bias.cpu().double()
        return h.float().to(hidden_of(self.x.dtype))

    def y(self, activation: str = "relu2") -> Tensor:
        """In float32."""
        return oracle.activate(self.h(), activation)


def powers(count: int, device: str, seed: int) -> Tensor:
    exponents = torch.randint(-2, 3, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.exp2(exponents.float()).to(device)


def problem(tokens, depth, features, dtype, device, *, extras="none", seed=0) -> Problem:
    """`extras`: "none", "rows" (a scale for each row, bias) or "one" (a single scale each)."""
    x = integers(tokens, depth, dtype=dtype, limit=2, seed=seed).to(device)
    w = integers(features, depth, dtype=dtype, limit=2, seed=seed + 1).to(device)
    if extras == "none":
        return Problem(x, w)
    if extras == "one":
        return Problem(x, w, powers(1, device, 1), powers(1, device, 2).reshape(1, 1))
    bias = integers(features, dtype=hidden_of(dtype), limit=9, seed=seed + 2).to(device)
    return Problem(x, w, powers(tokens, device, 1).reshape(-1, 1), powers(features, device, 2), bias)


def output_scale(tokens: int, kind: str, device: str) -> Tensor:
    """Some so small that large values saturate."""
    if kind == "one":
        return torch.full((1,), 0.37, device=device)
    return (0.11 * (1 + torch.arange(tokens, device=device) % 17)).reshape(-1, 1)


def count_saturated(y: Tensor, scale: Tensor) -> int:
    return int((y * (1 / scale.cpu().reshape(-1, 1)) > 448).sum())


def check_statistics(amax: Tensor, saturated: Tensor, y: Tensor, expected_saturated: int) -> None:
    largest = y[~y.isnan()].amax() if (~y.isnan()).any() else torch.zeros(())
    assert_same_bits(amax, largest.reshape(1), "amax")
    assert saturated.dtype == torch.int32 and saturated.tolist() == [expected_saturated]


def check_compress(
    p: Problem, scale: Tensor | None = None, out_dtype: torch.dtype | None = None, activation: str = "relu2"
) -> None:
    values, meta, used, amax, saturated = sparse24.linear_compress(
        *p.args, scale, out_dtype=out_dtype, activation=activation
    )
    h = p.h()
    if scale is None:
        expected = *oracle.compress(h, activation), torch.empty(0)
        over = 0
    else:
        scaling = "tensor" if scale.numel() == 1 else "row"
        expected = oracle.compress_fp8(h, scale, activation, scaling=scaling)
        over = count_saturated(oracle.compress(h.float(), activation)[0], scale)
    for name, a, e in zip(("values", "meta", "scale"), (values, meta, used), expected, strict=True):
        assert_same_bits(a, e, name)
        assert a.device == p.x.device and a.is_contiguous()
    check_statistics(amax, saturated, p.y(activation), over)


def check_relu2(
    p: Problem, scale: Tensor | None = None, out_dtype: torch.dtype | None = None, activation: str = "relu2"
) -> None:
    y, amax, saturated = sparse24.linear_relu2(*p.args, scale, out_dtype=out_dtype, activation=activation)
    exact = p.y(activation)
    if scale is None:
        codes = torch.where(exact.isnan(), oracle._NAN_CODE[y.dtype], oracle.bits(exact.to(y.dtype)).to(torch.int64))
        expected, over = oracle.from_bits(codes, y.dtype), 0
    else:
        expected = oracle.to_e4m3(exact * (1 / scale.cpu().reshape(-1, 1)))
        over = count_saturated(exact, scale)
    assert_same_bits(y, expected, "y")
    assert y.device == p.x.device and y.is_contiguous()
    check_statistics(amax, saturated, exact, over)
