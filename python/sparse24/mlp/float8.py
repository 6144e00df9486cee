"""Dense products of float8 operands."""

import torch
from torch import Tensor

from sparse24._symbolic import known, or_true
from sparse24.mlp.arguments import Weight
from sparse24.ops import quantize_fp8
from sparse24.ops.few_tokens import MAX_TOKENS


def float8_weight(weight: Weight) -> tuple[Tensor, Tensor]:
    """float8 rows and one scale per row [rows] or of all [1], quantising what is not float8 yet."""
    w, scale = weight
    if scale is not None:
        return w.contiguous(), scale.reshape(-1)
    values, scale = quantize_fp8(w)
    return values, scale.reshape(-1)


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


def down_projection_fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_fp8`, where there are few tokens with the scales applied behind the product.

    Reading w takes longer then than anything else, and torch's kernel for a scale per row reads it at half of the speed
    of cuBLAS's for one.
    """
    few = known(0 < x.shape[0]) and known(x.shape[0] <= MAX_TOKENS)
    if not (few and x.is_cuda and w_scale.numel() != 1 and w.shape[1] > 0):
        return linear_fp8(x, x_scale, w, w_scale, bias)
    one = w_scale.new_ones(1)
    single = known(x_scale.numel() == 1)
    x, w, scale = _aligned(x), _aligned(w), _aligned(x_scale.reshape(1)) if single else one
    out = torch._scaled_mm(x, w.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)
    if not single:
        out = out * x_scale.reshape(-1, 1)
    out = out * w_scale
    return (out if bias is None else out + bias).to(torch.bfloat16)


def cast(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what an autograd function returns.

    A cast to the dtype that it has is the same tensor. A function that returns one twice, as Dynamo of torch 2.11
    returns all that it makes, gets the gradient of the other: zeros.
    """
    return out if out.dtype == dtype else out.to(dtype)


def _aligned(t: Tensor) -> Tensor:
    """Return t, or a copy: `torch._scaled_mm` reads all operands as if they were contiguous and began at 16 bytes.

    A compiler makes operands of its own, whose addresses are not known while tracing.
    """
    t = t.contiguous()
    return t if torch.compiler.is_compiling() or t.data_ptr() % 16 == 0 else t.clone()
