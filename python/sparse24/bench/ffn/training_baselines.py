"""The rivals in training: FFNs with a backward pass, in bf16 and in fp8."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import sparse24
from sparse24.bench.reference import FP8

# Gradients need range more than digits: their largest magnitude is scaled to this format's largest number.
FP8_GRADIENT = torch.float8_e5m2


class FusedDense(torch.autograd.Function):
    """The dense FFN with relu^2 in the first GEMM's epilogue, which saves x and y and never the pre-activation.

    Its derivative, 2 sqrt(y), is in the epilogue of the GEMM that gives the gradient of y.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        y = sparse24.linear_relu2(x, w1, statistics=False)[0]
        ctx.save_for_backward(x, w1, w2, y)
        return F.linear(y, w2)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, w1, w2, y = ctx.saved_tensors
        dh = sparse24.linear_relu2_gradient(grad, w2, y)
        return dh @ w1, dh.t() @ x, grad.t() @ y


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """X in an fp8 format with one dequantising scale for all of it."""
    largest = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).clamp(min=1e-12)
    return (x.float() * scale.reciprocal()).clamp(-largest, largest).to(dtype), scale


class Float8Linear(torch.autograd.Function):
    """x @ w.T with all three GEMMs in fp8, tensor-wise: e4m3 forward, e5m2 gradients, saved in fp8.

    `torch._scaled_mm` wants its operands K-major: the backward products need transposed copies, which torch.compile
    fuses with the quantisation where it can.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        xq, scale_x = quantize(x, FP8)
        wq, scale_w = quantize(w, FP8)
        ctx.save_for_backward(xq, scale_x, wq, scale_w)
        return _scaled(xq, wq.t(), scale_x, scale_w, fast=True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        xq, scale_x, wq, scale_w = ctx.saved_tensors
        gq, scale_g = quantize(grad, FP8_GRADIENT)
        dx = _scaled(gq, _columns(wq), scale_g, scale_w, fast=False)
        dw = _scaled(gq.t().contiguous(), _columns(xq), scale_g, scale_x, fast=False)
        return dx, dw


def mlp_float8(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The FFN of two such layers; compile it."""
    return Float8Linear.apply(F.relu(Float8Linear.apply(x, w1)).square(), w2)


def _columns(x: torch.Tensor) -> torch.Tensor:
    """X with its columns contiguous."""
    return x.t().contiguous().t()


def _scaled(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, fast: bool) -> torch.Tensor:
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)
