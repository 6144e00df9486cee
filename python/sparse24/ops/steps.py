"""The forward pass of a training step in float8 as one op: what the host does for it is done once."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE, Operand, feature_alignment, token_padding, up
from sparse24.ops.activation import ActivationFunction
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_exact_dtype,
    check_scale,
    check_sizes,
    check_vector,
    expect,
    name_of,
)
from sparse24.ops.registration import define

__all__ = ["relu2_mlp_fp8"]

#: Rows of `places`: the scales of x, y, grad and dh as they were given, of both weights, and of x as it was used. Of a
#: row the first number is the scale, and the second the largest magnitude that was seen.
PLACES = (7, 4)
OF_X, OF_Y, OF_GRAD, OF_DH, OF_W1, OF_W2, USED_OF_X = range(PLACES[0])
#: How many scales are delayed.
DELAYED = 4


def relu2_mlp_fp8(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scales: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    sparse: bool = True,
    interleaved: bool = False,
    threshold: float = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass of a training step in float8, with one known scale a matrix, in one call.

    The bits are those of `quantize_fp8_both`, `linear_compress` and `mm` one after another, for less than half of what
    they cost the host.

    Parameters
    ----------
    x : Tensor [T, D]
        bfloat16 or float16; on the CPU also float32. D: a multiple of 16.
    w1 : Tensor [F, D]
        Of x's dtype, or codes of float8_e4m3fn. F: a multiple of 32; dense of 16.
    w2 : Tensor [D_out, F]
        Likewise. D_out: a multiple of 16.
    scales : Tensor [4]
        Dequantising multipliers of x, y, and for the backward pass of grad and dh; float32.
    b1 : Tensor [F], optional
        bfloat16.
    b2 : Tensor [D_out], optional
        Of x's dtype.
    w1_scale, w2_scale : Tensor [1]
        Of a weight that is float8, and of such a one only.
    sparse : bool
        False: nothing is pruned, as `linear_relu2` computes it.
    interleaved : bool
        As in `quantize_fp8_both`, of x; for 2:4 products alone.
    threshold : float
        Finite and at least 0.

    Returns
    -------
    out : Tensor [T, D_out]
        Of x's dtype.
    x_transposed : Tensor [D, P]
        Codes of x; P is T rounded up to a multiple of 32.
    w1_transposed, w2_transposed : Tensor
        Codes of the weights [D, F], [F, D_out] with columns rounded up likewise; [0, 0] of a weight that is float8.
    values, meta : Tensor
        The activation as `linear_compress` gives it; values [T, F] and meta [0] without pruning.
    places : Tensor [7, 4]
        The scales, and the largest magnitudes of x and y.

    Raises
    ------
    RuntimeError
        Wrong dtype, device or rank; sizes that do not fit each other; backward: see `relu2_mlp_fp8_gradients`.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w1, w2 = torch.eye(16), torch.ones(32, 16), torch.ones(16, 32)
    >>> out, *saved = sparse24.relu2_mlp_fp8(x, w1, w2, torch.full((4,), 0.5))
    >>> assert (out == 16).all()  # of each four features two are kept
    """
    return run(_relu2_mlp_fp8, x, w1, w2, scales, b1, b2, w1_scale, w2_scale, sparse, interleaved, threshold)


def _transposed(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], up(x.shape[0], token_padding(FP8)), dtype=FP8)


def check_multiple(op: str, name: str, of: str, size: int, multiple: int) -> None:
    """Check a size, of ``of`` such as columns."""
    rule = f"{name} to have a multiple of {multiple} {of} above 0"
    expect(size > 0, op, rule, size)
    expect(size % multiple == 0, op, rule, size)


def _check_weight(op: str, name: str, w: Tensor, scale: Tensor | None, x: Tensor) -> None:
    check_device(op, name, w, "x", x)
    check_sizes(op, name, w, 2)
    rule = f"{name} to be {name_of(x.dtype)} (the dtype of x) or float8_e4m3fn"
    expect(w.dtype in (x.dtype, FP8), op, rule, name_of(w.dtype))
    codes = w.dtype == FP8
    is_codes = f"({name} is {'' if codes else 'not '}float8_e4m3fn)"
    rule = f"{name}_scale to be {'a tensor' if codes else 'None'} {is_codes}"
    expect(codes == (scale is not None), op, rule, "None" if codes else "a tensor")
    if scale is not None:
        check_device(op, f"{name}_scale", scale, "x", x)
        check_scale(op, f"{name}_scale", scale, 1, "one scale")


def _check_bias(
    op: str, name: str, bias: Tensor | None, x: Tensor, dtype: torch.dtype, elements: int, meaning: str
) -> None:
    if bias is not None:
        check_device(op, name, bias, "x", x)
        check_exact_dtype(op, name, bias, dtype)
        check_vector(op, name, bias, elements, meaning)


def check_scales(op: str, scales: Tensor, of: str, reference: Tensor) -> None:
    """Check the delayed scales."""
    check_device(op, "scales", scales, of, reference)
    check_sizes(op, "scales", scales, 1)
    check_scale(op, "scales", scales, DELAYED, "of x, y, grad and dh", one_allowed=False)


def _fake_relu2_mlp_fp8(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scales: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    sparse: bool,
    interleaved: bool,
    threshold: float,
) -> tuple[Tensor, ...]:
    op = "relu2_mlp_fp8"
    check_sizes(op, "x", x, 2)
    check_dtype(op, "x", x, WIDE)
    tokens, columns = x.shape
    check_multiple(op, "x", "columns", columns, 16)
    _check_weight(op, "w1", w1, w1_scale, x)
    expect(w1.shape[1] == columns, op, f"w1 to have {columns} columns (columns of x)", w1.shape[1])
    features = w1.shape[0]
    check_multiple(op, "w1", "rows", features, feature_alignment(FP8, -1) if sparse else 16)
    _check_weight(op, "w2", w2, w2_scale, x)
    expect(w2.shape[1] == features, op, f"w2 to have {features} columns (rows of w1)", w2.shape[1])
    out = w2.shape[0]
    check_multiple(op, "w2", "rows", out, 16)
    check_scales(op, scales, "x", x)
    _check_bias(op, "b1", b1, x, torch.bfloat16, features, "rows of w1")
    _check_bias(op, "b2", b2, x, x.dtype, out, "rows of w2")
    ActivationFunction("relu2", threshold).check(op)
    transposes = (w.new_empty(0, 0) if w.dtype == FP8 else _transposed(w) for w in (w1, w2))
    if sparse:
        a = Operand.of(tokens, features, FP8, -1)
        kept = x.new_empty(a.values_shape, dtype=FP8), x.new_empty(a.meta_bytes, dtype=torch.uint8)
    else:
        kept = x.new_empty(tokens, features, dtype=FP8), x.new_empty(0, dtype=torch.uint8)
    places = x.new_empty(PLACES, dtype=torch.float32)
    return x.new_empty(tokens, out), _transposed(x), *transposes, *kept, places


def _flops(x: torch.Size, w1: torch.Size, w2: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count both products."""
    return 2 * x[0] * (w1[0] * w1[1] + w2[0] * w2[1])


_relu2_mlp_fp8 = define("relu2_mlp_fp8", _fake_relu2_mlp_fp8, no_backward="relu2_mlp has one", flops=_flops)
