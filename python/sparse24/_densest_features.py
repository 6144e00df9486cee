"""The features that the most tokens use: those whose products over tokens are dense. Part of `sparse24.ops`."""

import torch
from torch import Tensor

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24._arguments import refuse_non_tensors

_densest_features = torch.ops.sparse24.densest_features.default


def densest_features(counts: Tensor, k: int) -> Tensor:
    """Find the k features with the largest counts, of equals the lower: their indices, in ascending order.

    What gathers or scatters them in this order finds neighbours in memory. The result is a pure function of the input,
    which `torch.topk` is not where counts are equal, and takes no synchronisation: the indices stay on the device.

    Parameters
    ----------
    counts : Tensor [F]
        int32: numbers of tokens that use a feature, as `feature_counts` and `linear_gradient` count them. Negative ones
        are ordered too.
    k : int
        From 0 to F.

    Returns
    -------
    Tensor [k]
        int64: the `hot` features of `linear_gradient`, or the `features` of `gather_features`.

    Raises
    ------
    RuntimeError
        ``sparse24.densest_features: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: all are integers.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the densest features take a dense product).

    Examples
    --------
    >>> counts = torch.tensor([3, 9, 0, 3, 3, 7], dtype=torch.int32)
    >>> sparse24.densest_features(counts, 4)
    tensor([0, 1, 3, 5])
    """
    try:
        return _densest_features(counts, k)
    except RuntimeError:
        refuse_non_tensors(_densest_features, counts)
        raise
