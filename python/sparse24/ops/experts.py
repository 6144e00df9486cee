"""The first products of experts: rows that are sorted by expert, each with the weight of its expert, in one launch.

``offsets`` [E] says where the rows of each expert end. It is data: the host does not wait for it, and no size depends
on it. What does not ascend counts as the largest before it, and what leaves the rows as their number.

A 2:4 activation of experts has padded rows: each expert begins at a multiple of 128, behind the ``ceil(rows / 128)``
blocks of those before it. There are ``128 * (S // 128 + min(S, E))`` of them, as many as any offsets need.
"""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, VALUES, Operand, feature_alignment
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_exact_dtype,
    check_optional_scale,
    check_same_dtype,
    check_sizes,
    expect,
    listed,
    name_of,
)
from sparse24.ops.linear import OutputActivation
from sparse24.ops.registration import define

__all__ = ["experts_linear_compress", "experts_linear_relu2"]

#: Why these ops have no backward pass.
INFERENCE = "it is for inference"
#: What a multiprocessor keeps a table of.
MOST_EXPERTS = 1024


def padded_rows(rows: int, experts: int) -> int:
    """Return how many rows the 2:4 activation of experts has."""
    return 128 * (rows // 128 + torch.sym_min(rows, experts))


def experts_linear_compress(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    *,
    activation: OutputActivation = "relu2",
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `linear_compress` of the rows of each expert with its weight.

    Parameters
    ----------
    x : Tensor [S, D]
        Rows sorted by expert, those of no expert last: bfloat16; on the CPU also float16, float32 and float8_e4m3fn.
        D: a multiple of 16 bytes.
    w : Tensor [E, F, D]
        Of x's dtype; F as `linear_compress` wants it. E: 1 to 1024.
    offsets : Tensor [E]
        int32: where the rows of each expert end.
    scale_x : Tensor, optional
        float32, 1 or S elements.
    scale_w : Tensor, optional
        float32 [E] or [E, F].
    activation, threshold
        As in `linear_compress`.

    Returns
    -------
    values, meta : Tensor
        Of ``padded_rows`` x F, of x's dtype. On CUDA, values of padding are not written, nor metadata of 64 rows that
        all are padding, nor anything behind the last expert.
    scale : Tensor
        float8: of each padded row, [.., 1]; else empty.

    Raises
    ------
    RuntimeError
        ``sparse24.experts_linear_compress: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: `relu2_experts` is.

    Source: Haziza et al. 2025, arXiv 2503.16672, for each expert.
    """
    tensors = x, w, offsets, scale_x, scale_w
    return run(_experts_linear_compress, *tensors, activation=activation, threshold=threshold)


def experts_linear_relu2(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    scale_x: Tensor | None = None,
    scale_w: Tensor | None = None,
    *,
    activation: OutputActivation = "relu2",
    threshold: float = 0.0,
) -> Tensor:
    """Compute `linear_relu2` of the rows of each expert with its weight.

    Parameters
    ----------
    x, w, offsets, scale_x, scale_w, activation, threshold
        As in `experts_linear_compress`; F: a multiple of 8.

    Returns
    -------
    Tensor [S, F]
        Of x's dtype, bfloat16 for float8. On CUDA, rows of no expert are not written.

    Raises
    ------
    RuntimeError
        ``sparse24.experts_linear_relu2: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: `relu2_experts` is.

    Source: So et al. 2021, arXiv 2109.08668 (squared ReLU), for each expert.
    """
    tensors = x, w, offsets, scale_x, scale_w
    return run(_experts_linear_relu2, *tensors, activation=activation, threshold=threshold)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def check_experts(op: str, offsets: Tensor, name: str, w: Tensor, first: Tensor) -> None:
    check_device(op, name, w, "x", first)
    check_sizes(op, name, w, 3)
    check_offsets(op, offsets, first)
    experts = offsets.shape[0]
    expect(w.shape[0] == experts, op, f"{name} to have {experts} experts (elements of offsets)", w.shape[0])


def check_offsets(op: str, offsets: Tensor, first: Tensor) -> None:
    check_device(op, "offsets", offsets, "x", first)
    check_sizes(op, "offsets", offsets, 1)
    check_exact_dtype(op, "offsets", offsets, torch.int32)
    experts = offsets.shape[0]
    rule = f"offsets to have 1 to {MOST_EXPERTS} elements"
    expect(experts >= 1, op, rule, experts)
    expect(experts <= MOST_EXPERTS, op, rule, experts)


def check_weight_scale(op: str, name: str, scale: Tensor | None, experts: int, n: int, first: Tensor) -> None:
    if scale is None:
        return
    check_device(op, name, scale, "x", first)
    check_exact_dtype(op, name, scale, torch.float32)
    rule = f"{name} to be [{experts}] or [{experts}, {n}]"
    expect(scale.dim() in (1, 2), op, rule, listed(scale.shape))
    expect(scale.shape[0] == experts, op, rule, listed(scale.shape))
    expect(scale.dim() == 1 or scale.shape[1] == n, op, rule, listed(scale.shape))


def check_features(op: str, x: Tensor) -> None:
    if x.dtype != torch.float32:
        multiple = 16 // x.dtype.itemsize
        expect(
            x.shape[1] % multiple == 0,
            op,
            f"x to have a multiple of {multiple} columns ({name_of(x.dtype)})",
            x.shape[1],
        )
    expect(x.shape[1] > 0, op, "x to have columns", x.shape[1])


def _check_linear(
    op: str,
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    activation: OutputActivation,
    threshold: float,
) -> None:
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, VALUES)
    check_experts(op, offsets, "w", w, x)
    check_same_dtype(op, "w", w, "x", x)
    expect(w.shape[2] == x.shape[1], op, f"w to have {x.shape[1]} columns (columns of x)", w.shape[2])
    check_features(op, x)
    check_optional_scale(op, "scale_x", scale_x, x.shape[0], "rows of x", "x", x)
    check_weight_scale(op, "scale_w", scale_w, w.shape[0], w.shape[1], x)
    ActivationFunction(activation, threshold).check(op, ("relu2", "relu"))


def _fake_linear_relu2(x: Tensor, w: Tensor, *others: Any, **options: Any) -> Tensor:
    op = "experts_linear_relu2"
    _check_linear(op, x, w, *others, **options)
    expect(w.shape[1] % 8 == 0, op, "w to have a multiple of 8 rows", w.shape[1])
    return x.new_empty((x.shape[0], w.shape[1]), dtype=torch.bfloat16 if x.dtype == FP8 else x.dtype)


def _fake_linear_compress(x: Tensor, w: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    op = "experts_linear_compress"
    _check_linear(op, x, w, *others, **options)
    multiple = feature_alignment(x.dtype, -1)
    expect(w.shape[1] % multiple == 0, op, f"w to have a multiple of {multiple} rows ({name_of(x.dtype)})", w.shape[1])
    a = Operand.of(padded_rows(x.shape[0], w.shape[0]), w.shape[1], x.dtype, -1)
    scale = x.new_empty((a.m, 1) if x.dtype == FP8 else (0,), dtype=torch.float32)
    return x.new_empty(a.values_shape), x.new_empty(a.meta_bytes, dtype=torch.uint8), scale


def linear_flops(x: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 2 * x[0] * x[1] * w[1]


_experts_linear_compress = define(
    "experts_linear_compress", _fake_linear_compress, no_backward=INFERENCE, flops=linear_flops
)
_experts_linear_relu2 = define("experts_linear_relu2", _fake_linear_relu2, no_backward=INFERENCE, flops=linear_flops)
