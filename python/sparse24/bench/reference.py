"""Plain torch references and the comparisons that decide whether a case may be timed."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Slack beside "twice the error of torch's own path", for sizes where that error is zero.
ABSOLUTE_SLACK = 1e-6


class Unverified(Exception):
    """An output differs from its reference."""


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 in float32."""
    y = x.float().relu_()
    return y.mul_(y)


def prune24(y: torch.Tensor, dim: int) -> torch.Tensor:
    """`y` with the two largest magnitudes of each four along `dim`, zeros elsewhere; the lower index wins ties.

    Written by ranks, not by sorting: entry i stays if fewer than two others beat it.
    """
    rows, cols = y.shape
    if dim == -2:
        pad = -rows % 4
        y = torch.nn.functional.pad(y, (0, 0, 0, pad)) if pad else y
        groups, axis = y.view(-1, 4, cols), 1
    else:
        groups, axis = y.view(rows, cols // 4, 4), 2
    keys = [k.abs() for k in groups.unbind(axis)]
    ranks = [torch.zeros(keys[0].shape, dtype=torch.int8, device=y.device) for _ in range(4)]
    for i in range(4):
        for j in range(i + 1, 4):
            later_wins = keys[j] > keys[i]
            ranks[i] += later_wins
            ranks[j] += ~later_wins
    pruned = torch.zeros_like(groups)
    for i in range(4):
        kept = groups.select(axis, i)
        pruned.select(axis, i).copy_(torch.where(ranks[i] < 2, kept, torch.zeros_like(kept)))
    return pruned.view(y.shape)[:rows]


def fp8_scale(amax: torch.Tensor) -> torch.Tensor:
    """The dequantising scale for values up to `amax`: amax / 448, 1 where everything is zero.

    Divides by a tensor: torch turns a division by a Python number into a product with its reciprocal.
    """
    scale = (amax / torch.full_like(amax, FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3(y * (1 / scale)), saturating."""
    return (y * (torch.ones_like(scale) / scale)).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float64."""
    return a.double() @ b.double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives NaN."""
    difference = torch.linalg.vector_norm(actual.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected))


def expect_error(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> float:
    """The relative error, if shape and error are right."""
    if actual.shape != expected.shape:
        raise Unverified(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    error = relative_error(actual, expected)
    if not error <= bound:  # written so that NaN fails
        raise Unverified(f"expected a relative error of at most {bound:.2e}, got {error:.2e}")
    return error


def expect_equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit the same."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Unverified(
            f"expected {what} to be {expected.dtype} {tuple(expected.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    if not same_bits(actual, expected):
        wrong = (as_bytes(actual) != as_bytes(expected)).sum().item()
        raise Unverified(f"expected {what} to be bit-identical to the reference, got {wrong} different bytes")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
