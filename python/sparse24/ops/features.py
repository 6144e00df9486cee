"""Single features of a 2:4 activation: which the most tokens use, and their columns, for dense products."""

import torch
from torch import Tensor

from sparse24.format import WIDE
from sparse24.ops import in_place
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dim,
    check_dtype,
    check_exact_dtype,
    check_kept,
    check_same_dtype,
    check_sizes,
    expect,
    listed,
)
from sparse24.ops.registration import define

__all__ = ["densest_features", "feature_counts", "gather_features", "put_features"]


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
    return run(_feature_counts, values, meta, samples, fp8_meta)


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
    return run(_densest_features, counts, k)


def gather_features(values: Tensor, meta: Tensor, features: Tensor, fp8_meta: bool = False) -> Tensor:
    """Fetch some columns of the dense matrix: ``decompress(values, meta, R, C)[:, features]``.

    The dense matrix is not made.

    Parameters
    ----------
    values : Tensor [R, C/2]
        bfloat16, float16, float8_e4m3fn; on the CPU also float32. As `compress` with dim=-1 gives it.
    meta : Tensor
        Its positions.
    features : Tensor [H]
        int64, from 0 to C - 1, in any order, also repeated. Nothing can refuse what lies on a device: an index outside
        gives a column of NaN.
    fp8_meta : bool
        `meta` is in the layout of float8 values, whatever `values` are: of `compress_fp8` or fp8 `linear_compress`. C
        is then a multiple of 32.

    Returns
    -------
    Tensor [R, H]
        Of the dtype of `values`. fp8 values stay as stored: multiply by their scale.

    Raises
    ------
    RuntimeError
        ``sparse24.gather_features: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: asking for a gradient raises.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the densest features take a dense product).
    """
    return run(_gather_features, values, meta, features, fp8_meta)


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
    run(_put_features, out, parts, features, dim)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _fake_feature_counts(values: Tensor, meta: Tensor, samples: int, fp8_meta: bool) -> Tensor:
    a = check_kept("feature_counts", values, meta, fp8_meta)
    expect(samples >= 1, "feature_counts", "samples to be 1 or more", samples)
    return values.new_empty(a.k, dtype=torch.int32)


def _fake_densest_features(counts: Tensor, k: int) -> Tensor:
    op = "densest_features"
    check_sizes(op, "counts", counts, 1)
    check_exact_dtype(op, "counts", counts, torch.int32)
    features = counts.shape[0]
    rule = f"k to be at least 0 and at most {features} (elements of counts)"
    expect(k >= 0, op, rule, k)
    expect(k <= features, op, rule, k)
    return counts.new_empty(k, dtype=torch.int64)


def _check_features(op: str, features: Tensor, of: str, reference: Tensor) -> int:
    check_device(op, "features", features, of, reference)
    check_sizes(op, "features", features, 1)
    check_exact_dtype(op, "features", features, torch.int64)
    return features.shape[0]


def _fake_gather_features(values: Tensor, meta: Tensor, features: Tensor, fp8_meta: bool) -> Tensor:
    a = check_kept("gather_features", values, meta, fp8_meta)
    return values.new_empty(a.m, _check_features("gather_features", features, "values", values))


def _fake_put_features(out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    op = "put_features"
    check_dim(op, dim)
    check_sizes(op, "out", out, 2)
    check_dtype(op, "out", out, WIDE)
    expect(out.is_contiguous(), op, "out to be contiguous", f"strides {listed(out.stride())}")
    check_device(op, "parts", parts, "out", out)
    check_sizes(op, "parts", parts, 3)
    check_same_dtype(op, "parts", parts, "out", out)
    count = _check_features(op, features, "out", out)
    rows, columns = (out.shape[0], count) if dim == -1 else (count, out.shape[1])
    owners = ("rows of out", "elements of features") if dim == -1 else ("elements of features", "columns of out")
    expect(parts.shape[1] == rows, op, f"parts to have {rows} rows ({owners[0]})", parts.shape[1])
    expect(parts.shape[2] == columns, op, f"parts to have {columns} columns ({owners[1]})", parts.shape[2])


_feature_counts = define("feature_counts", _fake_feature_counts, no_backward="its output is integers")
_densest_features = define("densest_features", _fake_densest_features, no_backward="its input and output are integers")
_gather_features = define("gather_features", _fake_gather_features, no_backward="it is a part of one")
_put_features = define("put_features", _fake_put_features)
in_place.register()
