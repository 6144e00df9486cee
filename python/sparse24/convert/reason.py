"""Find out why a module is not the network: what else it computes between its two layers.

Weights of zeros and ones let the activation be read off: each output is the activation of one input. Inputs from a
small grid tell whether that is all, since equal inputs then have equal outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse24.convert.replica import Network, device_of, make_replica, replace_bias, replace_weight, run

_GRID = (-8.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 8.0)
_SHAPE = (4, 64)
OTHER = "it does not compute W2 relu(W1 x)^2"
IN_TRAINING = "it computes something else in training than in evaluation, as dropout does"
MORE = "it computes more than an activation of each feature between its layers, as with a norm"
NEGATIVE = "its activation is not zero for negative inputs, as that of a leaky or smoothed variant"


class Mismatch(NamedTuple):
    """Why a module is not the network, and whether it is two layers with another activation of the ReLU family.

    Those are ReLU and its powers, scaled, clipped or leaky ones, also where something is dropped or added.
    """

    reason: str
    is_relu: bool


def reason(module: nn.Module, network: Network, dtype: torch.dtype, x_dtype: torch.dtype, tolerance: float) -> Mismatch:
    """Say what a module that is not `network` computes, as far as that can be told from outside.

    Parameters
    ----------
    module : Module
        It runs with weights of `dtype` and an input of `x_dtype`.
    network : Network
        With the sizes that it runs with.
    tolerance : float
        Of a relative error.
    """
    try:
        with torch.device("cpu"):  # whatever the default is, such as the meta device
            return _reason(module, network, dtype, x_dtype, tolerance)
    except Exception:  # of the module, and it may be anything: it is that of a call that differs in nothing
        return Mismatch(OTHER, False)


def _reason(
    module: nn.Module, network: Network, dtype: torch.dtype, x_dtype: torch.dtype, tolerance: float
) -> Mismatch:
    device = device_of(module)
    generator = torch.Generator().manual_seed(0)
    d, f, d_out = network.d, network.f, network.d_out
    read = torch.arange(f).remainder(d)[torch.randperm(f, generator=generator)]  # feature of x that each hidden one is
    shown = torch.arange(d_out).remainder(f)  # hidden feature that each output is
    replica = make_replica(module)
    replace_weight(replica, network.up, _ones(read, d), dtype, device)
    replace_weight(replica, network.down, _ones(shown, f), dtype, device)
    for layer, size in ((network.up, f), (network.down, d_out)):
        replace_bias(replica, layer, torch.zeros(size, dtype=torch.float64), x_dtype, device)
    grid = torch.tensor(_GRID, dtype=torch.float64)
    index = torch.randint(len(_GRID), (*_SHAPE, d), generator=generator)
    x = grid[index].to(x_dtype).to(device)

    def compute(x: Tensor, training: bool = False, seed: int = 0) -> Tensor:
        out = run(replica, x.clone(), training, seed)
        assert isinstance(out, Tensor)
        return out.double().cpu()

    def differ(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs() > tolerance * (1 + a.abs())).any())

    in_training, residual, added = "", "", torch.zeros(())
    out = compute(x)
    if differ(out, compute(x, seed=1)):
        return Mismatch("its output is random", False)
    if module.training and any(differ(out, compute(x, True, seed)) for seed in (0, 1)):
        in_training = IN_TRAINING
    elif differ(out, compute(x.flip(0, 1)).flip(0, 1)):
        return Mismatch("its tokens depend on each other", False)
    inputs = index[..., read[shown]]  # which entry of the grid each output is the activation of
    if d == d_out:
        share = _share_of(x.double().cpu(), out, inputs)
        if abs(share) > tolerance:
            times = "" if abs(share - 1) <= tolerance else f"{share:.3g} times "
            residual = f"it adds {times}its input to its output, as a residual connection inside of it does"
            added = share * x.double().cpu()
            out = out - added
    counts, sums = _sums(inputs, out)
    values = sums / counts
    spread = (out - values[inputs]).abs()
    if bool((spread > tolerance * (1 + out.abs())).any()):
        return Mismatch(in_training or MORE, False)
    replace_weight(replica, network.down, -_ones(shown, f), dtype, device)
    sums = out + compute(x) - added
    if differ(sums, sums.flatten()[0]):
        return Mismatch(residual or in_training or "its output is not linear in its second layer", False)
    found = _activation(grid, values, tolerance)
    # Dropout can be switched off: it is the reason only if there is no other.
    return Mismatch(residual or (in_training if found.reason == OTHER else "") or found.reason, found.is_relu)


def _activation(grid: Tensor, values: Tensor, tolerance: float) -> Mismatch:
    """Name the activation that has `values` on the grid."""
    relu = grid.clamp(min=0)
    largest = values[-1]

    def is_near(expected: Tensor) -> bool:
        return bool(((values - expected).abs() <= tolerance * expected.abs()).all())

    if is_near(relu.square()):
        return Mismatch(OTHER, True)  # with these weights it does: of biases, of rounding
    if is_near(grid * (largest / grid[-1])):
        return Mismatch("it has no activation between its layers", False)
    if values[grid < 0].count_nonzero() > 0:
        added = values[0]
        if added.abs() > tolerance and is_near(relu.square() + added):
            return Mismatch(f"it adds {added:.3g} to its activation or its output", True)
        return Mismatch(NEGATIVE, _is_leaky(grid, values, tolerance))
    if is_near(relu * (largest / relu[-1])):
        return Mismatch("its activation is ReLU, not the square of it", True)
    if is_near(relu.square() * (largest / relu[-1].square())):
        return Mismatch(f"its result is {largest / relu[-1].square():.6g} times W2 relu(W1 x)^2", True)
    power = (largest / values[-2]).log2() / (relu[-1] / relu[-2]).log2()
    if is_near(relu**power):
        return Mismatch(f"its activation is ReLU to the power of {power:.3g}", True)
    return Mismatch("its activation is zero for negative inputs, but not the square of positive ones", True)


def _is_leaky(grid: Tensor, values: Tensor, tolerance: float) -> bool:
    """Whether each side of zero is a power, and they are not each other's mirror image."""
    sides = values[grid > 0], values[grid < 0].flip(0)
    x = grid[grid > 0]
    for side in sides:
        power = (side[-1] / side[0]).log2() / (x[-1] / x[0]).log2()
        expected = side[-1] * (x / x[-1]) ** power
        if not bool(((side - expected).abs() <= tolerance * expected.abs()).all()):
            return False
    return bool(((sides[0].abs() - sides[1].abs()).abs() > tolerance * sides[0].abs()).all())


def _ones(columns: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(columns, size).double()


def _sums(groups: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Count and add up the values of each group."""
    zeros = torch.zeros(len(_GRID), dtype=torch.float64)
    counts = zeros.index_add(0, groups.flatten(), torch.ones_like(values).flatten())
    return counts, zeros.index_add(0, groups.flatten(), values.flatten())


def _share_of(x: Tensor, out: Tensor, groups: Tensor) -> float:
    """Find how much of x is added to `out`: by regression within groups of equal activation."""

    def centred(values: Tensor) -> Tensor:
        counts, sums = _sums(groups, values)
        return values - (sums / counts)[groups]

    x = centred(x)
    return float((x * centred(out)).sum() / x.square().sum())
