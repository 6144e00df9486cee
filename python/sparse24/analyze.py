"""How well an activation fits 2:4: what pruning drops, along features and along tokens. Pure torch, on any device."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sparse24.errors import fail
from sparse24.format import LARGEST_FP8

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# Half a unit in the last place above: what is larger saturates, what is not rounds to the largest value.
_FP8_SATURATES = 464.0


@dataclass(frozen=True)
class ActivationStats:
    """Shares are fractions of 1. Y2 = max(y1, 0)^2 [tokens, features], energy = sum of Y2^2.

    Attributes
    ----------
    zeros : float
        Share of entries of Y2 that are zero.
    feature_groups_over_2 : float
        Share of groups of four features with more than two non-zeros.
    feature_nonzeros_dropped, feature_energy_dropped : float
        Share of non-zeros and of energy that pruning to 2:4 along features drops: the forward pass.
    output_error : float or None
        ``|dropped @ w2.T| / |Y2 @ w2.T|`` (Frobenius norms); None without w2.
    token_groups_over_2, token_nonzeros_dropped, token_energy_dropped : float
        The same along tokens, of what the feature mask kept: the weight gradients' reduction, tokens in the given
        order.
    fp8_saturated : float
        Share of non-zeros that the largest float8_e4m3fn value clips under the scale; none under finite row scales.
    fp8_underflow : float
        Share of non-zeros that become zero in float8_e4m3fn.
    amax : float
        Largest Y2.
    features_never_active : float
        Share of features without a non-zero in any token.
    """

    zeros: float
    feature_groups_over_2: float
    feature_nonzeros_dropped: float
    feature_energy_dropped: float
    output_error: float | None
    token_groups_over_2: float
    token_nonzeros_dropped: float
    token_energy_dropped: float
    fp8_saturated: float
    fp8_underflow: float
    amax: float
    features_never_active: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


def top2_mask(y: Tensor, dim: int = -1) -> Tensor:
    """Mark an entry True where it is among the two largest magnitudes of its group of four along `dim`.

    The rule of the ops, written independently of them: NaN is larger than everything, of equals the lower index wins.

    Parameters
    ----------
    y : Tensor
        The activated values, or for squared ReLU their roots; `dim` has a multiple of 4 entries.
    dim : int
        Along which dimension the groups lie.

    Returns
    -------
    Tensor
        bool, of y's shape; exactly two of four are True.
    """
    groups = y.movedim(dim, -1).unflatten(-1, (-1, 4))
    # NaN sorts as the largest value, which is what the rule says; stable keeps the lower index first among equals.
    order = groups.float().abs().sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return mask.flatten(-2).movedim(-1, dim)


@torch.no_grad()
def activation_stats(y1: Tensor, w2: Tensor | None = None, fp8_scale: Tensor | None = None) -> ActivationStats:
    """Measure how 2:4 pruning would change the squared ReLU of a pre-activation.

    Parameters
    ----------
    y1 : Tensor [..., F]
        Pre-activation ``x @ w1.T + b1``; F a multiple of 4. Leading dimensions are tokens, neighbours in order.
    w2 : Tensor [D_out, F], optional
        Second weight, for `output_error`.
    fp8_scale : Tensor, optional
        Dequantising scale to judge fp8 with, one element or one per token. Default: the row maximum / 448.

    Returns
    -------
    ActivationStats
    """
    if y1.dim() < 1 or y1.shape[-1] % 4 != 0:
        fail("activation_stats", "y1 to have a multiple of 4 features (last dimension)", list(y1.shape))
    if w2 is not None and (w2.dim() != 2 or w2.shape[1] != y1.shape[-1]):
        fail("activation_stats", f"w2 to have {y1.shape[-1]} columns (features of y1)", list(w2.shape))
    y2 = torch.relu(y1.reshape(-1, y1.shape[-1]).float()).square()
    kept = y2 * top2_mask(y2)
    # Tokens are padded with zeros to whole groups, as the ops do.
    padded = torch.nn.functional.pad(kept, (0, 0, 0, -kept.shape[0] % 4))
    kept_by_tokens = padded * top2_mask(padded, dim=0)

    output_error = None
    if w2 is not None:
        weight = w2.float().t()
        output_error = _ratio(((y2 - kept) @ weight).norm(), (y2 @ weight).norm())

    nonzero = y2 > 0
    amax = y2.amax() if y2.numel() else y2.new_zeros(())
    if fp8_scale is None:
        scale = _row_scale(y2)
    else:  # as `sparse24.ops` has it
        scale = fp8_scale.to(y2).reshape(-1, 1)
        scale = torch.where(scale.abs() < _SMALLEST_NORMAL, _SMALLEST_NORMAL, scale)
    scaled = y2 / scale
    quantized = scaled.clamp(max=LARGEST_FP8).to(torch.float8_e4m3fn).float()
    return ActivationStats(
        zeros=_ratio((y2 == 0).sum(), y2.numel()),
        feature_groups_over_2=_share_over_2(nonzero),
        feature_nonzeros_dropped=_ratio((nonzero & (kept == 0)).sum(), nonzero.sum()),
        feature_energy_dropped=_energy_dropped(y2, kept),
        output_error=output_error,
        token_groups_over_2=_share_over_2((padded > 0).t()),
        token_nonzeros_dropped=_ratio(((padded > 0) & (kept_by_tokens == 0)).sum(), (padded > 0).sum()),
        token_energy_dropped=_energy_dropped(padded, kept_by_tokens),
        fp8_saturated=_ratio((scaled > _FP8_SATURATES).sum(), nonzero.sum()),
        fp8_underflow=_ratio((nonzero & (quantized == 0)).sum(), nonzero.sum()),
        amax=float(amax),
        features_never_active=_ratio((~nonzero.any(dim=0)).sum(), y2.shape[1]),
    )


def _row_scale(y: Tensor) -> Tensor:
    """Compute the scale of `compress_fp8` for finite rows."""
    if y.shape[1] == 0:
        return y.new_ones(y.shape[0], 1)
    amax = y.amax(dim=1, keepdim=True)
    scale = amax / torch.full_like(amax, LARGEST_FP8)
    return torch.where(amax == 0, 1.0, scale.clamp(min=_SMALLEST_NORMAL))


def _share_over_2(nonzero: Tensor) -> float:
    counts = nonzero.unflatten(-1, (-1, 4)).sum(dim=-1)
    return _ratio((counts > 2).sum(), counts.numel())


def _energy_dropped(y: Tensor, kept: Tensor) -> float:
    # float64: the fourth power of a pre-activation spans more than fp32 sums keep.
    return _ratio((y - kept).double().square().sum(), y.double().square().sum())


def _ratio(part: Tensor | float, whole: Tensor | float) -> float:
    return float(part) / float(whole) if float(whole) != 0.0 else 0.0
