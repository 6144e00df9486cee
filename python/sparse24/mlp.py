"""The squared-ReLU feed-forward network, put together from the ops.

    values, meta = 2:4 of max(x @ w1.T + b1, 0)^2    one kernel: `linear_compress`
    out = 2:4 @ w2.T + b2                            sparse GEMM: `mm`

Then the activation is never stored dense; in fp8 `quantize_fp8` of x comes before, and unless the activation's scale
is given, one pass over the compressed values converts them. Without fusion, which is faster in fp8 so far, a dense GEMM
and a pass over its result (`compress`, `compress_fp8`) take the first line's place.
"""

from contextlib import nullcontext
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24.ops import (
    OutputScaling,
    Scaling,
    compress,
    compress_fp8,
    linear_compress,
    linear_relu2,
    mm,
    quantize_fp8,
)

Precision = Literal["auto", "16bit", "fp8"]

#: Tokens below which `relu2_mlp` runs dense on CUDA unless `min_tokens` says otherwise. With few tokens both GEMMs are
#: bound by reading the weights, which 2:4 activations do not shrink.
DEFAULT_MIN_TOKENS = 1024

_FP8 = torch.float8_e4m3fn
_ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relu2_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    precision: Precision = "auto",
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    scale_y: Tensor | None = None,
    min_tokens: int | None = None,
    fused: bool | None = None,
) -> Tensor:
    """``max(x @ w1.T + b1, 0)^2 @ w2.T + b2`` with the activation pruned to 2:4 along its features.

    Of each four neighbouring features of a token the two largest are kept. At 90 % zeros that drops about 1 % of the
    non-zeros, at random initialisation 19 %: train dense first (`sparse24.analyze` measures it).

    It runs dense, at the same precision and without pruning, where the sparse product does not pay or does not fit:
    with fewer than `min_tokens` tokens, and where F is not a multiple of 16 (16-bit) or 32 (fp8).

    Parameters
    ----------
    x : Tensor [..., D]
        bfloat16 or float16; on the CPU also float32, which the float32 reference ops serve. Under autocast x, weights
        and biases are cast to the autocast dtype, on every device. Any rank from 1, any number of tokens.
    w1 : Tensor [F, D]
        As `torch.nn.Linear` stores it. Any floating dtype: a float32 master weight is cast to x's dtype, and gets its
        gradient in float32. float8_e4m3fn needs `w1_scale`.
    w2 : Tensor [D_out, F]
        Likewise.
    b1, b2 : Tensor [F], Tensor [D_out], optional
        Biases.
    precision : {"auto", "16bit", "fp8"}
        "16bit" computes in x's dtype. "fp8" quantises x, the activation and (unless they are float8) the weights to
        float8_e4m3fn with one scale per row, by the largest magnitude; the pre-activation in between is rounded to
        bfloat16. "auto" is "fp8" for float8 weights, else "16bit". Quantise weights once for inference
        (`sparse24.quantize_fp8`, `sparse24.nn.ReLU2MLP.quantize_`): in the call it costs a pass over both.
    w1_scale, w2_scale : Tensor, optional
        Dequantising multipliers of float8 weights, float32, one per row or a single one.
    scale_y : Tensor, optional
        fp8 only: the dequantising multiplier of the activation, float32, one per token or a single one (see `scale_out`
        of `sparse24.linear_compress`). What exceeds 448 times it saturates. Default: computed per token, which costs a
        pass over the compressed activation.
    min_tokens : int, optional
        Default: `sparse24.mlp.DEFAULT_MIN_TOKENS` on CUDA, 0 on the CPU. The comparison is a Python one on the shape:
        constant for static shapes, one guard for dynamic ones.
    fused : bool, optional
        True: the first GEMM writes the (compressed) activation itself, and the dense one never reaches memory. False:
        GEMM, then a compressing pass. Default: what was faster where it was measured (README), which is True but for
        sparse fp8. In fp8 without `scale_y` False also saves one rounding of the activation, to bfloat16.

    Returns
    -------
    Tensor [..., D_out]
        Of x's dtype (or the autocast dtype).

    Raises
    ------
    RuntimeError
        ``sparse24.relu2_mlp: expected <argument> <rule>, got <value>``. fp8 needs D, F and D_out to be multiples of 16.

    Notes
    -----
    Differentiable in 16-bit precision: the backward pass uses the forward's pattern, so dropped entries get no
    gradient. It is composed of separate ops and dense. fp8 is for inference: its backward raises, so compile it under
    `torch.no_grad` or with weights that need no gradient.

    Source: Haziza et al. 2025, arXiv 2503.16672.
    """
    device_type = x.device.type
    # Not torch.amp.is_autocast_available: Dynamo of torch 2.11 cannot trace it.
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    _check_operands(x, w1, w2, b1, b2, dtype)
    fp8 = _is_fp8(precision, w1, w2, w1_scale, w2_scale)
    if min_tokens is None:
        min_tokens = DEFAULT_MIN_TOKENS if x.is_cuda else 0
    if min_tokens < 0:
        _fail("min_tokens to be at least 0", min_tokens)

    tokens = (x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)).to(dtype)
    _check_scale_y(scale_y, tokens, fp8)
    sparse = tokens.shape[0] >= min_tokens and w1.shape[0] % (32 if fp8 else 16) == 0
    if fused is None:
        fused = not (fp8 and sparse)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        if fp8:
            first = _activation_fp8(tokens, w1, b1, w1_scale, scale_y, sparse, fused)
            out = _down_projection_fp8(*first, w2, w2_scale, b2, dtype)
        else:
            first = _activation_16bit(tokens, w1, b1, sparse, fused)
            out = _down_projection_16bit(*first, w2, b2)
    return out.reshape(*x.shape[:-1], w2.shape[0])


def up_projection(
    x: Tensor, w1: Tensor, b1: Tensor | None = None, *, fp8: bool = False, w1_scale: Tensor | None = None
) -> Tensor:
    """Compute the pre-activation [T, F] of x [T, D]: the first GEMM of `relu2_mlp` alone.

    For analysis and verification: `relu2_mlp` computes exactly this without fusion, and with it the same up to the
    order of summation.
    """
    if not fp8:
        return F.linear(x, w1.to(x.dtype), _cast(b1, x.dtype))
    return _linear_fp8(*quantize_fp8(x), *_fp8_weight(w1, w1_scale, x.dtype), b1)


def _activation_16bit(
    x: Tensor, w1: Tensor, b1: Tensor | None, sparse: bool, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the squared ReLU of the first layer: 2:4 values and metadata, or dense without metadata."""
    if fused and w1.shape[0] % 8 == 0:  # as linear_relu2 needs it; where it is sparse, it is a multiple of 16
        w1, b1 = w1.to(x.dtype), _cast(b1, x.dtype)
        if sparse:
            return linear_compress(x, w1, bias=b1, statistics=False)[:2]
        return linear_relu2(x, w1, bias=b1, statistics=False)[0], None
    y1 = up_projection(x, w1, b1)
    if sparse:
        return compress(y1, "relu2")
    return torch.relu(y1).square(), None


def _down_projection_16bit(y: Tensor, meta: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    w2, b2 = w2.to(y.dtype), _cast(b2, y.dtype)
    return F.linear(y, w2, b2) if meta is None else mm(y, meta, w2.t(), bias=b2)


def _activation_fp8(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w1_scale: Tensor | None,
    scale_y: Tensor | None,
    sparse: bool,
    fused: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute the same in float8, and its scale."""
    if not fused:
        y1 = up_projection(x, w1, b1, fp8=True, w1_scale=w1_scale)
        scaling: Scaling = "row" if scale_y is None or scale_y.numel() != 1 else "tensor"
        if sparse:
            return compress_fp8(y1, scale_y, "relu2", scaling=scaling)
        y, scale = quantize_fp8(torch.relu(y1).square(), scale_y, scaling)
        return y, None, scale
    q, x_scale = quantize_fp8(x)
    w1, w1_scale = _fp8_weight(w1, w1_scale, x.dtype)
    first = q, w1, x_scale, w1_scale, _cast(b1, torch.bfloat16)
    if sparse:
        scaling_out: OutputScaling = "row" if scale_y is None else "given"
        return linear_compress(*first, scale_y, scaling=scaling_out, statistics=False)[:3]
    if scale_y is not None:
        return linear_relu2(*first, scale_y, statistics=False)[0], None, scale_y
    y, scale = quantize_fp8(linear_relu2(*first, out_dtype=torch.bfloat16, statistics=False)[0])
    return y, None, scale


def _down_projection_fp8(
    y: Tensor,
    meta: Tensor | None,
    scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor | None,
    b2: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    w2, w2_scale = _fp8_weight(w2, w2_scale, dtype)
    b2 = _cast(b2, dtype)
    if meta is None:
        return _linear_fp8(y, scale.reshape(-1, 1).expand(y.shape[0], 1).contiguous(), w2, w2_scale, b2).to(dtype)
    return mm(y, meta, w2.t(), scale, w2_scale, b2, out_dtype=dtype)


def _linear_fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x_scale * w_scale * (x @ w.T) + bias`` in bfloat16: x [T, D] with scale [T, 1], w [F, D] with scale [F]."""
    if x.is_cuda:
        return torch._scaled_mm(
            x,
            w.t(),
            scale_a=x_scale,
            scale_b=w_scale.unsqueeze(0),
            bias=_cast(bias, torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    # The reference: dequantise after an fp32 product, as the kernels do.
    out = (x.float() @ w.float().t()) * x_scale * w_scale
    if bias is not None:
        out = out + bias.to(torch.bfloat16)
    return out.to(torch.bfloat16)


def _fp8_weight(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float8 rows and one scale per row [rows], quantising what is not float8 yet."""
    if scale is not None:  # float8 already: _is_fp8 has checked that the two come together
        return w.contiguous(), scale.reshape(-1).expand(w.shape[0]).contiguous()
    values, scale = quantize_fp8(w.to(dtype))
    return values, scale.reshape(-1)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _is_fp8(precision: str, w1: Tensor, w2: Tensor, w1_scale: Tensor | None, w2_scale: Tensor | None) -> bool:
    """Resolve `precision` and check what depends on it."""
    if precision not in ("auto", "16bit", "fp8"):
        _fail('precision to be "auto", "16bit" or "fp8"', f'"{precision}"')
    if (w1.dtype == _FP8) != (w2.dtype == _FP8):
        _fail(f"w2 to be {'float8_e4m3fn' if w1.dtype == _FP8 else 'of 16 or 32 bits'} as w1 is", _name(w2.dtype))
    if precision == "16bit" and w1.dtype == _FP8:
        _fail('precision to be "fp8" or "auto" for float8 weights', '"16bit"')
    for name, w, scale in (("w1", w1, w1_scale), ("w2", w2, w2_scale)):
        if w.dtype != _FP8:
            if scale is not None:
                _fail(f"{name}_scale to be None for a weight that is not float8_e4m3fn", "a tensor")
            continue
        if scale is None:
            _fail(f"{name}_scale to be a tensor for a float8 weight", "None")
        if scale.dtype != torch.float32:
            _fail(f"{name}_scale to be float32", _name(scale.dtype))
        if scale.numel() not in (1, w.shape[0]):
            _fail(f"{name}_scale to have 1 or {w.shape[0]} elements (rows of {name})", scale.numel())
        if scale.device != w.device:
            _fail(f"{name}_scale to be on {w.device} as {name} is", scale.device)
    fp8 = precision == "fp8" or w1.dtype == _FP8
    if fp8:
        rules = (("w1", "columns", w1.shape[1]), ("w1", "rows", w1.shape[0]), ("w2", "rows", w2.shape[0]))
        for name, extent, size in rules:
            if size % 16 != 0:
                _fail(f"{name} to have a multiple of 16 {extent} for fp8", size)
    return fp8


def _check_scale_y(scale_y: Tensor | None, tokens: Tensor, fp8: bool) -> None:
    if scale_y is None:
        return
    if not fp8:
        _fail("scale_y to be None in 16-bit precision", "a tensor")
    if scale_y.dtype != torch.float32:
        _fail("scale_y to be float32", _name(scale_y.dtype))
    if scale_y.numel() not in (1, tokens.shape[0]):
        _fail(f"scale_y to have 1 or {tokens.shape[0]} elements (tokens)", scale_y.numel())
    if scale_y.device != tokens.device:
        _fail(f"scale_y to be on {tokens.device} as x is", scale_y.device)


def _check_operands(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, dtype: torch.dtype
) -> None:
    """Ranks, sizes, dtypes and devices of everything but the scales."""
    if x.dtype not in _ACTIVATION_DTYPES:
        _fail("x to be bfloat16, float16 or (on the CPU) float32", _name(x.dtype))
    if dtype == torch.float32 and x.is_cuda:
        _fail("x to be bfloat16 or float16 on CUDA", _name(dtype))
    if x.dim() < 1:
        _fail("x to have at least 1 dimension", x.dim())
    for name, w in (("w1", w1), ("w2", w2)):
        if w.dim() != 2:
            _fail(f"{name} to have 2 dimensions", w.dim())
        if w.dtype not in (*_ACTIVATION_DTYPES, _FP8):
            _fail(f"{name} to be float32, bfloat16, float16 or float8_e4m3fn", _name(w.dtype))
    if x.shape[-1] != w1.shape[1]:
        _fail(f"x to have {w1.shape[1]} features (columns of w1)", x.shape[-1])
    if w2.shape[1] != w1.shape[0]:
        _fail(f"w2 to have {w1.shape[0]} columns (rows of w1)", w2.shape[1])
    for name, bias, owner, rows in (("b1", b1, "w1", w1.shape[0]), ("b2", b2, "w2", w2.shape[0])):
        if bias is None:
            continue
        if bias.dim() != 1 or bias.shape[0] != rows:
            _fail(f"{name} to have shape [{rows}] (rows of {owner})", list(bias.shape))
        if bias.dtype not in _ACTIVATION_DTYPES:
            _fail(f"{name} to be float32, bfloat16 or float16", _name(bias.dtype))
    for name, t in (("w1", w1), ("w2", w2), ("b1", b1), ("b2", b2)):
        if t is not None and t.device != x.device:
            _fail(f"{name} to be on {x.device} as x is", t.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fail(rule: str, got: object) -> NoReturn:
    raise RuntimeError(f"sparse24.relu2_mlp: expected {rule}, got {got}")
