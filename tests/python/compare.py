"""The two ways in which results are compared: every bit, or twice the error of torch."""

import torch
from oracle import bits
from torch import Tensor


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same shape, dtype and bits; NaN payloads and signs of zeros count."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    different = (bits(actual) != bits(expected)).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} of {actual.numel()} differ, the first at {at}: "
            f"{actual[at].float().item()} (code {bits(actual)[at].item():#x}) instead of "
            f"{expected[at].float().item()} (code {bits(expected)[at].item():#x})"
        )


def assert_accurate(actual: Tensor, torchs: Tensor, exact: Tensor, magnitude: Tensor | float, what: str = "") -> None:
    """The largest error is at most twice that of torch in the same precision, plus one float32 rounding.

    `exact` is in float64; `magnitude` is the sum of the magnitudes of what was added up, whose largest is the unit that
    float32 rounding is measured in.
    """
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    exact = exact.double().cpu()
    error = (actual.detach().double().cpu() - exact).abs().max().item()
    torch_error = (torchs.detach().double().cpu() - exact).abs().max().item()
    largest = magnitude.max().item() if isinstance(magnitude, Tensor) else magnitude
    bound = 2 * torch_error + torch.finfo(torch.float32).eps * largest
    assert error <= bound, f"{what}: error {error:.3e}, torch has {torch_error:.3e}, the bound is {bound:.3e}"
