"""How well an activation fits 2:4: what pruning drops, along features and along tokens. Pure torch, on any device."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sparse24.analyze.counts import ORDERS, Counts
from sparse24.errors import dtype_name, fail, type_name


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
    permuted_token_groups_over_2, permuted_token_nonzeros_dropped, permuted_token_energy_dropped : float
        Along tokens where a group is of tokens a quarter apart, as `Recipe.permute_tokens` makes it. A quarter is of
        the tokens that are given, at most of 4,096.
    split_token_groups_over_2, split_token_nonzeros_dropped, split_token_energy_dropped : float
        Along tokens in the given order where the features that the most tokens use are not pruned, as many as the
        default `Recipe.dense_features` says.
    split_permuted_token_groups_over_2, split_permuted_token_nonzeros_dropped, split_permuted_token_energy_dropped
        With both: what the weight gradients of the default recipe drop.
    features_active_8_tokens, features_active_64_tokens, features_active_128_tokens : float
        Share of features that at least one of so many neighbouring tokens lights: what decoding them together reads of
        the second weight, and what a tile of a GEMM needs. Mean over whole tiles; fewer tokens than one are one.
    nonzeros_per_group : tuple of 5 floats
        Share of groups of four features with 0, 1, 2, 3 and 4 non-zeros.
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
    permuted_token_groups_over_2: float
    permuted_token_nonzeros_dropped: float
    permuted_token_energy_dropped: float
    split_token_groups_over_2: float
    split_token_nonzeros_dropped: float
    split_token_energy_dropped: float
    split_permuted_token_groups_over_2: float
    split_permuted_token_nonzeros_dropped: float
    split_permuted_token_energy_dropped: float
    features_active_8_tokens: float
    features_active_64_tokens: float
    features_active_128_tokens: float
    nonzeros_per_group: tuple[float, ...]

    def as_dict(self) -> dict[str, float | tuple[float, ...] | None]:
        """For JSON."""
        return asdict(self)


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
    for name, t in (("y1", y1), ("w2", w2), ("fp8_scale", fp8_scale)):
        if not isinstance(t, Tensor) and (name == "y1" or t is not None):
            fail("activation_stats", f"{name} to be a Tensor", type_name(t))
    if not y1.is_floating_point():
        fail("activation_stats", "y1 to be of a floating dtype", dtype_name(y1.dtype))
    if y1.dim() < 1 or y1.shape[-1] % 4 != 0:
        fail("activation_stats", "y1 to have a multiple of 4 features (last dimension)", list(y1.shape))
    if w2 is not None and (w2.dim() != 2 or w2.shape[1] != y1.shape[-1]):
        fail("activation_stats", f"w2 to have {y1.shape[-1]} columns (features of y1)", list(w2.shape))
    counts = Counts(y1.shape[-1], y1.device)
    counts.add(y1.reshape(-1, y1.shape[-1]), w2, fp8_scale)
    return stats_of(counts, with_output=w2 is not None)


def stats_of(counts: Counts, with_output: bool = True) -> ActivationStats:
    """Turn counts into shares; `with_output`: w2 was given to all of them."""
    never_active = int((counts.active == 0).sum()) / max(1, counts.features)
    return ActivationStats(
        zeros=counts.share("zeros", "entries"),
        feature_groups_over_2=counts.share("feature groups over 2", "groups"),
        feature_nonzeros_dropped=counts.share("feature nonzeros dropped", "nonzeros"),
        feature_energy_dropped=counts.share("feature energy dropped", "energy"),
        output_error=counts.share("output dropped", "output") ** 0.5 if with_output else None,
        fp8_saturated=counts.share("fp8 saturated", "nonzeros"),
        fp8_underflow=counts.share("fp8 underflow", "nonzeros"),
        amax=counts.amax,
        features_never_active=never_active,
        nonzeros_per_group=tuple(counts.share(f"groups of {number}", "groups") for number in range(5)),
        **_along_tokens(counts),
        **{f"features_active_{size}_tokens": tiles.share() for size, tiles in counts.tiles.items()},
    )


def _along_tokens(counts: Counts) -> dict[str, float]:
    found = {}
    for order in (split + name for split in ("", "split_") for name in ORDERS):
        found[f"{order}_groups_over_2"] = counts.share(f"{order} groups over 2", "token groups")
        found[f"{order}_nonzeros_dropped"] = counts.share(f"{order} nonzeros dropped", "kept")
        found[f"{order}_energy_dropped"] = counts.share(f"{order} energy dropped", "kept energy")
    return found
