"""Rows or columns of a weight gradient, from the parts of a product over tokens. Part of `sparse24.ops`."""

import torch
from torch import Tensor

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24._arguments import refuse_non_tensors

_put_features = torch.ops.sparse24.put_features.default


def put_features(out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    """Replace some columns (dim=-1) or rows (dim=-2) of a matrix, in place, by a sum of parts.

    ``out[:, features[h]] = sum_p parts[p, :, h]``, or ``out[features[h], :] = sum_p parts[p, h, :]``: sums in float32,
    in order, rounded once. In one pass, where ``out.index_copy_(dim, features, parts.sum(0))`` takes two.

    Parameters
    ----------
    out : Tensor [R, C]
        bfloat16 or float16; on the CPU also float32. Contiguous, and apart from the memory of the others.
    parts : Tensor [P, R, H] or [P, H, C]
        Of out's dtype.
    features : Tensor [H]
        int64, each at most once. Nothing can refuse what lies on a device: what is not from 0 to C - 1 or R - 1 is left
        out.
    dim : {-1, -2}
        What `features` counts: columns or rows.

    Returns
    -------
    None

    Raises
    ------
    RuntimeError
        ``sparse24.put_features: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: for backward passes. Where gradients are recorded, `out` and `parts` that require one are
    refused; whoever saved `out` for a backward pass is told that it has changed, as by torch's own in-place ops.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the densest features take a dense product).

    Examples
    --------
    >>> out = torch.zeros(2, 4)
    >>> parts = torch.tensor([[[1.0, 2], [3, 4]], [[10, 20], [30, 40]]])
    >>> sparse24.put_features(out, parts, torch.tensor([0, 3]), -1)
    >>> out
    tensor([[11.,  0.,  0., 22.],
            [33.,  0.,  0., 44.]])
    """
    try:
        _put_features(out, parts, features, dim)
    except RuntimeError:
        refuse_non_tensors(_put_features, out, parts, features)
        raise
