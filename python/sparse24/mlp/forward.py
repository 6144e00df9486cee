"""The two halves of the network: x to the activation, and the activation to the output.

They only compute: weights and biases come in the dtype that they are multiplied in, or as float8 with a scale.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse24._symbolic import or_true
from sparse24.ops import (
    OutputScaling,
    Scaling,
    compress,
    compress_fp8,
    linear_compress,
    linear_relu2,
    mm,
    quantize_fp8,
    quantize_fp8_predict,
)


@dataclass(frozen=True)
class Mode:
    """Which of the paths it takes."""

    fp8: bool
    sparse: bool
    fused: bool
    #: The activation is stored as its root, relu(h): training in float16, where squares of small ones underflow.
    roots: bool = False


class Hidden(NamedTuple):
    """The activation [T, F]: 2:4 values with metadata, or dense values without; with a scale where they are float8."""

    values: Tensor
    meta: Tensor | None
    scale: Tensor | None


class OutScale(NamedTuple):
    """What is known of the activation's scale: itself, or the factor that predicts it from x, or nothing."""

    given: Tensor | None = None
    factor: Tensor | None = None


class Weight(NamedTuple):
    """A weight [rows, columns], and the scale of its rows where it is float8."""

    values: Tensor
    scale: Tensor | None


def activation(x: Tensor, w1: Weight, b1: Tensor | None, scale_y: OutScale, mode: Mode) -> Hidden:
    """Compute the squared ReLU of the first layer of x [T, D], or its root."""
    return _activation_fp8(x, w1, b1, scale_y, mode) if mode.fp8 else _activation_16bit(x, w1.values, b1, mode)


def squared(hidden: Hidden, mode: Mode) -> Hidden:
    """Return the activation that the second layer takes, of one that may be stored as its root."""
    return hidden._replace(values=hidden.values.square()) if mode.roots else hidden


def down_projection(hidden: Hidden, w2: Weight, b2: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply the activation with the second weight: [T, D_out] of `dtype`."""
    values, meta, scale = hidden
    if scale is None:
        w = w2.values
        return F.linear(values, w, b2) if meta is None else mm(values, meta, w.t(), bias=b2)
    w, w_scale = float8_weight(w2)
    if meta is None:
        return linear_fp8(values, scale, w, w_scale, b2).to(dtype)
    return mm(values, meta, w.t(), scale, w_scale, b2, out_dtype=dtype)


def linear_fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x_scale * w_scale * (x @ w.T) + bias`` in bfloat16: x [T, D], w [F, D], each with a scale per row or one."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    if x.is_cuda and w.shape[1] == 0:  # torch's product over nothing forgets the bias
        out = x.new_zeros(x.shape[0], w.shape[0], dtype=torch.bfloat16)
        return out if bias is None else out + bias
    if not x.is_cuda:
        # The reference: dequantise after an fp32 product, as the kernels do.
        out = (x.float() @ w.float().t()) * x_scale.reshape(-1, 1) * w_scale
        return (out if bias is None else out + bias).to(torch.bfloat16)
    if w_scale.numel() != 1 or or_true(x_scale.numel() != 1):
        # torch has a kernel for a scale per row of both. With one each it is cuBLAS, which is faster with few tokens.
        x_scale = x_scale.reshape(-1, 1).expand(x.shape[0], 1)
        w_scale = w_scale.expand(w.shape[0]).unsqueeze(0)
    x, x_scale, w, w_scale = (_aligned(t) for t in (x, x_scale, w, w_scale))
    bias = None if bias is None else _aligned(bias)
    return torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _aligned(t: Tensor) -> Tensor:
    """Return t, or a copy: `torch._scaled_mm` reads all operands as if they were contiguous and began at 16 bytes.

    A compiler makes operands of its own, whose addresses are not known while tracing.
    """
    t = t.contiguous()
    return t if torch.compiler.is_compiling() or t.data_ptr() % 16 == 0 else t.clone()


def float8_weight(weight: Weight) -> tuple[Tensor, Tensor]:
    """float8 rows and one scale per row [rows] or of all [1], quantising what is not float8 yet."""
    w, scale = weight
    if scale is not None:
        return w.contiguous(), scale.reshape(-1)
    values, scale = quantize_fp8(w)
    return values, scale.reshape(-1)


def _activation_16bit(x: Tensor, w1: Tensor, b1: Tensor | None, mode: Mode) -> Hidden:
    kind: Literal["relu", "relu2"] = "relu" if mode.roots else "relu2"
    if mode.fused and w1.shape[0] % 8 == 0:  # as linear_relu2 needs it; where it is sparse, it is a multiple of 16
        if mode.sparse:
            values, meta, *_ = linear_compress(x, w1, bias=b1, activation=kind, statistics=False)
            return Hidden(values, meta, None)
        return Hidden(linear_relu2(x, w1, bias=b1, activation=kind, statistics=False)[0], None, None)
    y1 = F.linear(x, w1, b1)
    if mode.sparse:
        return Hidden(*compress(y1, kind), None)
    root = torch.relu(y1)
    return Hidden(root if mode.roots else root.square(), None, None)


def _activation_fp8(x: Tensor, weight: Weight, b1: Tensor | None, out_scale: OutScale, mode: Mode) -> Hidden:
    if out_scale.factor is None:
        scale_y = out_scale.given
        q, x_scale = quantize_fp8(x)
    else:
        q, x_scale, scale_y = quantize_fp8_predict(x, out_scale.factor)
    w1, w1_scale = float8_weight(weight)
    if not mode.fused:
        y1 = linear_fp8(q, x_scale, w1, w1_scale, b1)
        scaling: Scaling = "row" if scale_y is None or or_true(scale_y.numel() != 1) else "tensor"
        if mode.sparse:
            return Hidden(*compress_fp8(y1, scale_y, "relu2", scaling=scaling))
        y, scale = quantize_fp8(torch.relu(y1).square(), scale_y, scaling)
        return Hidden(y, None, scale)
    first = q, w1, x_scale, w1_scale, b1
    if mode.sparse:
        scaling_out: OutputScaling = "row" if scale_y is None else "given"
        values, meta, scale, *_ = linear_compress(*first, scale_y, scaling=scaling_out, statistics=False)
        # The predicted scale is [T, 1] for any T, where the op's copy of a single token's is [1].
        return Hidden(values, meta, scale if out_scale.factor is None else scale_y)
    if scale_y is not None:
        return Hidden(linear_relu2(*first, scale_y, statistics=False)[0], None, scale_y)
    y, scale = quantize_fp8(linear_relu2(*first, out_dtype=torch.bfloat16, statistics=False)[0])
    return Hidden(y, None, scale)
