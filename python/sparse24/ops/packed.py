"""The first GEMM with a 2:4 weight, which `sparse24.ops.packing` packs."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import VALUES, Operand, feature_alignment
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import run
from sparse24.ops.checks import check_device, check_dtype, check_meta, check_same_dtype, check_sizes, expect, name_of
from sparse24.ops.linear import OutputActivation, OutputScaling
from sparse24.ops.linear_shapes import check_bias_and_scales, check_output_scaling, compressed_output
from sparse24.ops.packing import PACKED_FEATURES
from sparse24.ops.registration import define

__all__ = ["linear_compress_packed"]


def linear_compress_packed(
    x: Tensor,
    w: Tensor,
    meta: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    bias: Tensor | None = None,
    scale_out: Tensor | None = None,
    *,
    activation: OutputActivation = "relu2",
    scaling: OutputScaling = "given",
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
    threshold: float = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear_compress` does, with a 2:4 weight as the sparse operand.

    Given the same h the results are bit for bit those of `linear_compress`; h is that of the pruned weight, but for the
    order of summation.

    Parameters
    ----------
    x : Tensor [T, D]
        bfloat16, float16 or float8_e4m3fn; on the CPU also float32. T: any. D: a multiple of 16, for float8 of 32.
    w : Tensor [F, D/2]
        The values of `pack24` or `pack24_fp8` of the weight [F, D], of x's dtype. F: as in `linear_compress`.
    meta : Tensor
        Their metadata.
    scale_x, scale_w, bias, scale_out : Tensor, optional
        As in `linear_compress`, in the features' own order.
    activation, scaling, out_dtype, statistics, threshold
        As in `linear_compress`.

    Returns
    -------
    values, meta, scale, amax, saturated : Tensor
        As of `linear_compress`.

    Raises
    ------
    RuntimeError
        As in `linear_compress`; sizes of w, meta and x that do not fit each other. On CUDA: an output of another dtype
        than that of x, for which no kernel is compiled.

    Notes
    -----
    There is no backward pass of its own: training differentiates the network (`relu2_mlp`).

    Source: Haziza et al. 2025, arXiv 2503.16672; 2:4 weights: Mozaffari et al. 2024 (SLoPe), arXiv 2405.16325.

    Examples
    --------
    >>> x, w = torch.randint(-2, 3, (3, 16)).float(), torch.randint(-2, 3, (32, 16)).float()
    >>> packed = sparse24.pack24(w)
    >>> values, meta, *_ = sparse24.linear_compress_packed(x, *packed)
    >>> expected = sparse24.linear_compress(x, sparse24.unpack24(*packed, 32, 16))
    >>> assert torch.equal(values, expected[0]) and torch.equal(meta, expected[1])
    """
    options = {"out_dtype": out_dtype, "statistics": statistics, "activation": activation, "threshold": threshold}
    return run(_linear_compress_packed, x, w, meta, scale_x, scale_w, bias, scale_out, scaling=scaling, **options)


def _fake_linear_compress_packed(
    x: Tensor,
    w: Tensor,
    meta: Tensor,
    *others: Tensor | None,
    activation: OutputActivation,
    scaling: str,
    out_dtype: torch.dtype | None,
    statistics: bool,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "linear_compress_packed"
    check_output_scaling(op, scaling)
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, VALUES)
    check_device(op, "w", w, "x", x)
    check_sizes(op, "w", w, 2)
    check_same_dtype(op, "w", w, "x", x)
    columns, rows = x.shape[1], w.shape[0]
    multiple = feature_alignment(x.dtype, -1)
    expect(columns % multiple == 0, op, f"x to have a multiple of {multiple} columns ({name_of(x.dtype)})", columns)
    rule = f"w to have {columns // 2} columns (half of those of x)"
    expect(2 * w.shape[1] == columns, op, rule, w.shape[1])
    expect(rows % PACKED_FEATURES == 0, op, f"w to have a multiple of {PACKED_FEATURES} rows", rows)
    check_device(op, "meta", meta, "x", x)
    check_meta(op, meta, Operand.of(rows, columns, x.dtype, -1))
    *scales_and_bias, scale_out = others
    stored = check_bias_and_scales(op, x, rows, *scales_and_bias, out_dtype)
    ActivationFunction(activation, threshold).check(op, ("relu2", "relu"))
    return compressed_output(op, x, w, scale_out, stored, scaling, statistics)


def _flops(x: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count the dense ``x @ w.T`` that it stands for."""
    return 2 * x[0] * x[1] * w[0]


_linear_compress_packed = define(
    "linear_compress_packed",
    _fake_linear_compress_packed,
    no_backward="it is part of the network's, relu2_mlp",
    flops=_flops,
)
