"""A scale of the activation that depends on no data."""

import torch
from torch import Tensor

from sparse24.errors import dtype_name, fail, type_name
from sparse24.format import LARGEST_FP8

# h is summed in the tensor cores' accumulators and rounded to bfloat16: its square may exceed the bound by that.
_ROUNDING = 1.01


@torch.no_grad()
def bounding_factor(w: Tensor, scale: Tensor | None = None) -> Tensor:
    """Find the `scale_y_factor` of `relu2_mlp` with which no activation of a first weight saturates.

    ``1.01 * max_f |w_f|^2 / 448``: by Cauchy and Schwarz ``relu(x @ w_f)^2 <= |x|^2 |w_f|^2``; 1.01 is for rounding.

    It needs no calibration, and unlike an exact scale no pass over the activation. It is loose, the more so the more
    columns w has: with random weights hundreds of times at D = 1024, beyond a thousand at D = 8192. float8 has its
    three bits of mantissa down to a 28,672nd of its largest number, so values that matter keep theirs, and small ones
    lose some: docs/performance has the error of the output beside that of exact scales.

    Parameters
    ----------
    w : Tensor [F, D]
        The first weight, of any floating dtype; float8_e4m3fn with its `scale`.
    scale : Tensor, optional
        Dequantising multipliers, float32, one per row or a single one.

    Returns
    -------
    Tensor [1]
        float32, on w's device. Compute it once for weights that stay: it reads all of w.

    Raises
    ------
    RuntimeError
        ``sparse24.bounding_factor: expected <argument> <rule>, got <value>``.

    Notes
    -----
    It does not hold with a bias.

    Examples
    --------
    >>> w1, w1_scale = sparse24.quantize_fp8(torch.randn(64, 32))
    >>> factor = sparse24.bounding_factor(w1, w1_scale)
    """
    for name, t in (("w", w), ("scale", scale)):
        if not isinstance(t, Tensor) and (name == "w" or t is not None):
            fail("bounding_factor", f"{name} to be a Tensor", type_name(t))
    if w.dim() != 2:
        fail("bounding_factor", "w to have 2 dimensions", w.dim())
    if not w.dtype.is_floating_point:
        fail("bounding_factor", "w to be of a floating dtype", dtype_name(w.dtype))
    if (w.dtype == torch.float8_e4m3fn) != (scale is not None):
        fail("bounding_factor", "scale beside a float8_e4m3fn w, and only there", "none" if scale is None else "one")
    if w.numel() == 0:
        return torch.ones(1, device=w.device)
    norms = w.float().norm(dim=1)
    if scale is not None:
        if scale.numel() not in (1, w.shape[0]):
            fail("bounding_factor", f"scale to have 1 or {w.shape[0]} elements (rows of w)", scale.numel())
        norms = norms * scale.reshape(-1)
    return (norms.amax().square() * (_ROUNDING / LARGEST_FP8)).reshape(1)


def factor_of(layer: object, scale_y: Tensor | None) -> Tensor | None:
    """Return the factor that a first layer bounds its activation with: None where a scale is given, or with a bias."""
    if scale_y is not None or getattr(layer, "bias", None) is not None:
        return None
    return getattr(layer, "scale_y_factor", None)
