"""How many tokens use each feature, counted in a sample of them. Part of `sparse24.ops`."""

import torch
from torch import Tensor

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24._arguments import refuse_non_tensors

_feature_counts = torch.ops.sparse24.feature_counts.default


def feature_counts(values: Tensor, meta: Tensor, samples: int = 1024, fp8_meta: bool = False) -> Tensor:
    """Count in how many of some tokens each feature is not zero.

    ``(X[sample] != 0).sum(0)`` of the dense X, which is not made. The sample is of whole blocks of 16 tokens, evenly
    spread: of ``B = ceil(T / 16)`` blocks those with index ``i * B // n``, ``n = min(ceil(samples / 16), B)``. Which
    features are the densest is clear from a thousand tokens, and to look at all of them is to read the activation once
    more.

    Parameters
    ----------
    values : Tensor [T, F/2]
        bfloat16, float16, float8_e4m3fn; on the CPU also float32. As `compress` with dim=-1 gives it.
    meta : Tensor
        Its positions.
    samples : int
        Tokens to look at, 1 or more; rounded up to blocks of 16. T or more: all of them.
    fp8_meta : bool
        `meta` is in the layout of float8 values, whatever `values` are: of `compress_fp8` or fp8 `linear_compress`. F
        is then a multiple of 32.

    Returns
    -------
    Tensor [F]
        int32: the `counts` of `densest_features`. NaN is not zero.

    Raises
    ------
    RuntimeError
        ``sparse24.feature_counts: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: the counts are integers.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the densest features take a dense product).

    Examples
    --------
    >>> x = torch.tensor([[4.0, 0.0, 2.0, 0.0] * 4, [1.0, 3.0, 0.0, 0.0] * 4])
    >>> values, meta = sparse24.compress(x)
    >>> sparse24.feature_counts(values, meta)[:4]
    tensor([2, 1, 1, 0], dtype=torch.int32)
    """
    try:
        return _feature_counts(values, meta, samples, fp8_meta)
    except RuntimeError:
        refuse_non_tensors(_feature_counts, values, meta)
        raise
