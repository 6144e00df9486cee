"""A whole network in one op, for inference, 2:4 or dense: what the host does for it is done once."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE, feature_alignment
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_scale,
    check_sizes,
    check_tensor,
    check_vector,
    expect,
    name_of,
)
from sparse24.ops.registration import define

__all__ = ["relu2_mlp_dense", "relu2_mlp_sparse"]

#: The most tokens of a call of `relu2_mlp_dense` on CUDA.
MAX_DENSE_TOKENS = 128


def relu2_mlp_sparse(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_y_factor: Tensor | None = None,
    threshold: float = 0,
) -> Tensor:
    """Run a squared-ReLU network 2:4 for inference, in one call.

    The bits are those of `linear_compress` and `mm`; with float8 weights of `quantize_fp8` or `quantize_fp8_predict`
    before them. One call costs the host less than half of what the calls one after another do. It runs 2:4 whatever the
    number of tokens: `relu2_mlp` and `sparse24.nn.ReLU2MLP` choose.

    Parameters
    ----------
    x : Tensor [..., D]
        bfloat16 or float16; on the CPU also float32. D: any; for float8 weights a multiple of 16.
    w1 : Tensor [F, D]
        Of x's dtype, F a multiple of 16; or float8_e4m3fn, F a multiple of 32. Weights that are not contiguous are
        copied in each call; on CUDA so are x and w1 where a row is not a multiple of 16 bytes.
    w2 : Tensor [D_out, F]
        Of w1's dtype.
    b1 : Tensor [F], optional
        Of x's dtype; of bfloat16 beside float8 weights.
    b2 : Tensor [D_out], optional
        x's dtype or float32.
    w1_scale, w2_scale : Tensor
        Of float8 weights, and of these only: dequantising multipliers, float32, 1 or F, 1 or D_out elements.
    scale_y, scale_y_factor : Tensor, optional
        Of float8 weights, at most one of them: the dequantising multiplier of the activation, float32, 1 element or one
        for each token; or the factor [1] that predicts it, as `quantize_fp8_predict` takes it. Default: computed for
        each token, in a pass over the activation.
    threshold : float
        Finite and at least 0.

    Returns
    -------
    Tensor [..., D_out]
        Contiguous, of x's dtype.

    Raises
    ------
    RuntimeError
        ``sparse24.relu2_mlp_sparse: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Not differentiable: it is for inference, and raises in backward.

    Source: Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w1, w2 = torch.eye(2), torch.ones(16, 2), torch.ones(1, 16)
    >>> sparse24.relu2_mlp_sparse(x, w1, w2)  # of each four features two are kept
    tensor([[8.],
            [8.]])
    """
    return run(_relu2_mlp_sparse, x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold)


def relu2_mlp_dense(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_y_factor: Tensor | None = None,
    threshold: float = 0,
) -> Tensor:
    """Run a squared-ReLU network of up to 128 tokens dense for inference, in one call.

    So few tokens are bound by the weights, each of which is read once: the second one from before the first product is
    complete. With float8 weights x is quantised, and the activation where it is made.

    Parameters
    ----------
    x : Tensor [..., D]
        bfloat16 or float16; on the CPU also float32. Tokens: up to 128 on CUDA, any on the CPU.
    w1 : Tensor [F, D]
        Of x's dtype, or float8_e4m3fn. D and F: multiples of 16 bytes. Weights that are not contiguous are copied in
        each call.
    w2 : Tensor [D_out, F]
        Of w1's dtype. D_out: any.
    b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold
        As in `relu2_mlp_sparse`. Without a scale of the activation that of each token is computed, in a pass over it.

    Returns
    -------
    Tensor [..., D_out]
        Contiguous, of x's dtype.

    Raises
    ------
    RuntimeError
        ``sparse24.relu2_mlp_dense: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Sums are in float32, in an order that depends on sizes of weights alone; a token's result does not depend on the
    other tokens, nor on their number. Not differentiable: it is for inference, and raises in backward.

    Source: Haziza et al. 2025, arXiv 2503.16672 (the network).

    Examples
    --------
    >>> x, w1, w2 = torch.eye(4), torch.ones(8, 4), torch.ones(1, 8)
    >>> sparse24.relu2_mlp_dense(x, w1, w2).T
    tensor([[8., 8., 8., 8.]])
    """
    return run(_relu2_mlp_dense, x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold)


def _check_weight(op: str, name: str, w: Tensor, x: Tensor, dtype: torch.dtype, meaning: str) -> None:
    check_device(op, name, w, "x", x)
    check_sizes(op, name, w, 2)
    expect(w.dtype == dtype, op, f"{name} to be {name_of(dtype)}{meaning}", name_of(w.dtype))


def _check_bias(
    op: str, name: str, bias: Tensor | None, x: Tensor, dtype: torch.dtype, or_float: bool, elements: int, meaning: str
) -> None:
    if bias is None:
        return
    check_device(op, name, bias, "x", x)
    or_float = or_float and dtype != torch.float32
    allowed = (dtype, torch.float32) if or_float else (dtype,)
    expect(bias.dtype in allowed, op, f"{name} to be {' or '.join(map(name_of, allowed))}", name_of(bias.dtype))
    check_vector(op, name, bias, elements, meaning)


def _check_scale_of(
    op: str, name: str, scale: Tensor | None, fp8: bool, needed: bool, x: Tensor, elements: int, meaning: str
) -> None:
    if scale is None:
        expect(not needed, op, f"{name} to be a tensor (w1 is float8_e4m3fn)", "None")
        return
    expect(fp8, op, f"{name} to be None (w1 is not float8_e4m3fn)", "a tensor")
    check_device(op, name, scale, "x", x)
    check_scale(op, name, scale, elements, meaning)


def _of_groups(stored: torch.dtype) -> tuple[int, int]:
    return 16 if stored == FP8 else 1, feature_alignment(stored, -1)


def _of_16_bytes(stored: torch.dtype) -> tuple[int, int]:
    return 16 // stored.itemsize, 16 // stored.itemsize


def _check_network(
    op: str,
    multiples: Callable[[torch.dtype], tuple[int, int]],
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    scale_y: Tensor | None,
    scale_y_factor: Tensor | None,
) -> Tensor:
    """Check all but the threshold, and return an empty result; `multiples`: of columns and of rows of w1."""
    check_tensor(op, "x", x)
    expect(x.dim() >= 1, op, "x to have at least 1 dimension", "0 with shape ()")
    check_dtype(op, "x", x, WIDE)
    *tokens, columns = x.shape
    check_tensor(op, "w1", w1)
    fp8 = w1.dtype == FP8
    if not fp8:
        _check_weight(op, "w1", w1, x, x.dtype, " (the dtype of x) or float8_e4m3fn")
    _check_weight(op, "w1", w1, x, w1.dtype, "")
    expect(w1.shape[1] == columns, op, f"w1 to have {columns} columns (columns of x)", w1.shape[1])
    features, stored = w1.shape[0], name_of(w1.dtype)
    of_columns, of_rows = multiples(w1.dtype)
    expect(columns % of_columns == 0, op, f"x to have a multiple of {of_columns} columns ({stored} weights)", columns)
    expect(features % of_rows == 0, op, f"w1 to have a multiple of {of_rows} rows ({stored})", features)
    _check_weight(op, "w2", w2, x, w1.dtype, " (the dtype of w1)")
    expect(w2.shape[1] == features, op, f"w2 to have {features} columns (rows of w1)", w2.shape[1])
    out = w2.shape[0]
    _check_bias(op, "b1", b1, x, torch.bfloat16 if fp8 else x.dtype, False, features, "rows of w1")
    _check_bias(op, "b2", b2, x, x.dtype, True, out, "rows of w2")
    _check_scale_of(op, "w1_scale", w1_scale, fp8, fp8, x, features, "rows of w1")
    _check_scale_of(op, "w2_scale", w2_scale, fp8, fp8, x, out, "rows of w2")
    _check_scale_of(op, "scale_y", scale_y, fp8, False, x, prod(tokens), "tokens of x")
    _check_scale_of(op, "scale_y_factor", scale_y_factor, fp8, False, x, 1, "one factor")
    both = scale_y is not None and scale_y_factor is not None
    expect(not both, op, "scale_y_factor to be None beside scale_y", "a tensor")
    return x.new_empty(*tokens, out)


def _fake_relu2_mlp_sparse(x: Tensor, *others: Any) -> Tensor:
    op, (*operands, threshold) = "relu2_mlp_sparse", others
    out = _check_network(op, _of_groups, x, *operands)
    ActivationFunction("relu2", threshold).check(op)
    return out


def _fake_relu2_mlp_dense(x: Tensor, *others: Any) -> Tensor:
    op, (*operands, threshold) = "relu2_mlp_dense", others
    out = _check_network(op, _of_16_bytes, x, *operands)
    if x.device.type == "cuda":
        tokens = prod(x.shape[:-1])
        expect(tokens <= MAX_DENSE_TOKENS, op, f"x to have at most {MAX_DENSE_TOKENS} rows on a CUDA device", tokens)
    ActivationFunction("relu2", threshold).check(op)
    return out


def _flops(x: torch.Size, w1: torch.Size, w2: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``x @ w1.T`` and ``y @ w2.T``."""
    return 2 * prod(x[:-1]) * (prod(w1) + prod(w2))


_FOR_INFERENCE = {"no_backward": "it is for inference", "flops": _flops}
_relu2_mlp_sparse = define("relu2_mlp_sparse", _fake_relu2_mlp_sparse, **_FOR_INFERENCE)
_relu2_mlp_dense = define("relu2_mlp_dense", _fake_relu2_mlp_dense, **_FOR_INFERENCE)
