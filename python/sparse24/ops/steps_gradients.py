"""The backward pass of a training step in float8 as one op, which finds the scales of the next step too."""

from typing import Any

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE, Operand, feature_alignment, token_padding, up
from sparse24.ops.arguments import run
from sparse24.ops.checks import (
    check_device,
    check_dtype,
    check_exact_dtype,
    check_meta,
    check_scale,
    check_sizes,
    expect,
    listed,
)
from sparse24.ops.registration import define
from sparse24.ops.steps import DELAYED, PLACES, check_multiple, check_scales

__all__ = ["relu2_mlp_fp8_gradients"]


def relu2_mlp_fp8_gradients(
    grad: Tensor,
    x_transposed: Tensor,
    w1_transposed: Tensor,
    w2_transposed: Tensor,
    values: Tensor,
    meta: Tensor,
    places: Tensor,
    scales: Tensor,
    hot: Tensor | None = None,
    dense_features: int = 0,
    sparse: bool = True,
    interleaved: bool = False,
    need_x: bool = True,
    need_dh: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward pass of `relu2_mlp_fp8`, and find the scales of the next step.

    The bits are those of `quantize_fp8_both`, `feature_counts`, `densest_features`, `linear_gradient_fp8`, `mm` and
    `put_features` one after another.

    Parameters
    ----------
    grad : Tensor [T, D_out]
        The gradient of the output: bfloat16 or float16; on the CPU also float32.
    x_transposed, w1_transposed, w2_transposed, values, meta, places
        Of `relu2_mlp_fp8`; of a weight that was float8 there, the transpose that `quantize_fp8_both` gave.
    scales : Tensor [4]
        The delayed scales as they are now: where another step has replaced those that this one used, the larger ones
        are those of the next step.
    hot : Tensor [H], optional
        int64: features whose weight gradients are dense products, ascending; H is a multiple of 16.
    dense_features : int
        How many to choose where `hot` is not given, a multiple of 16: those that the most tokens of a sample use.
    sparse, interleaved : bool
        As in `relu2_mlp_fp8`.
    need_x : bool
        Whether dx is computed.
    need_dh : bool
        Whether dh is returned. If not, its memory is free before the gradients of the weights are there.

    Returns
    -------
    dx : Tensor [T, D]
        Of grad's dtype, as the next two; [0, D] unless `need_x`.
    dw1 : Tensor [F, D]
    dw2 : Tensor [D_out, F]
    dh : Tensor
        Codes of the gradient of the pre-activation, as `linear_gradient_fp8` or `linear_relu2_gradient_fp8` gives them;
        without rows unless `need_dh`.
    next_scales : Tensor [4]
        What the largest magnitudes ask for, twice, and not less than half of what was used; what was used where there
        is no magnitude, or none that is finite.

    Raises
    ------
    RuntimeError
        Wrong dtype, device or rank; sizes that do not fit each other; backward, which is not defined.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672.

    Examples
    --------
    >>> x, w1, w2, scales = torch.eye(16), torch.ones(32, 16), torch.ones(16, 32), torch.full((4,), 0.5)
    >>> _, *saved = sparse24.relu2_mlp_fp8(x, w1, w2, scales)
    >>> dx, *_ = sparse24.relu2_mlp_fp8_gradients(torch.ones(16, 16), *saved, scales)
    >>> assert (dx == 512).all()
    """
    of_forward = x_transposed, w1_transposed, w2_transposed, values, meta, places
    options = hot, dense_features, sparse, interleaved, need_x, need_dh
    return run(_relu2_mlp_fp8_gradients, grad, *of_forward, scales, *options)


def _check_codes(op: str, name: str, t: Tensor, grad: Tensor, shape: tuple[int | None, int], meaning: str) -> None:
    check_device(op, name, t, "grad", grad)
    check_sizes(op, name, t, 2)
    check_exact_dtype(op, name, t, FP8)
    for size, wanted in zip(t.shape, shape, strict=True):
        if wanted is not None:
            expect(size == wanted, op, f"{name} to have shape {meaning}", listed(t.shape))


def _check_count(op: str, name: str, what: str, count: int, features: int) -> None:
    rule = f"{name} to be a multiple of 16 {what} up to {features} (rows of w2_transposed)"
    for ok in (count >= 0, count <= features, count % 16 == 0):
        expect(ok, op, rule, count)


def _fake_relu2_mlp_fp8_gradients(
    grad: Tensor,
    x_transposed: Tensor,
    w1_transposed: Tensor,
    w2_transposed: Tensor,
    values: Tensor,
    meta: Tensor,
    places: Tensor,
    scales: Tensor,
    hot: Tensor | None,
    dense_features: int,
    sparse: bool,
    interleaved: bool,
    need_x: bool,
    need_dh: bool,
) -> tuple[Tensor, ...]:
    op, padding = "relu2_mlp_fp8_gradients", token_padding(FP8)
    check_sizes(op, "grad", grad, 2)
    check_dtype(op, "grad", grad, WIDE)
    tokens, out = grad.shape
    check_multiple(op, "grad", "columns", out, 16)
    meaning = "[D, T] with T padded to a multiple of 32"
    _check_codes(op, "x_transposed", x_transposed, grad, (None, up(tokens, padding)), meaning)
    columns = x_transposed.shape[0]
    check_multiple(op, "x_transposed", "rows", columns, 16)
    _check_codes(op, "w2_transposed", w2_transposed, grad, (None, up(out, padding)), "[F, columns of grad, padded]")
    features = w2_transposed.shape[0]
    check_multiple(op, "w2_transposed", "rows", features, feature_alignment(FP8, -1) if sparse else 16)
    _check_codes(op, "w1_transposed", w1_transposed, grad, (columns, up(features, padding)), "[D, F] with F padded")
    kept = features // 2 if sparse else features
    _check_codes(op, "values", values, grad, (tokens, kept), "[T, F / 2]" if sparse else "[T, F] (sparse=False)")
    check_device(op, "meta", meta, "grad", grad)
    if sparse:
        check_meta(op, meta, Operand.of(tokens, features, FP8, -1))
    else:
        expect(meta.numel() == 0, op, "meta to have 0 elements (sparse=False)", meta.numel())
    check_device(op, "places", places, "grad", grad)
    check_sizes(op, "places", places, 2)
    check_scale(op, "places", places, PLACES[0] * PLACES[1], "of relu2_mlp_fp8", one_allowed=False)
    check_scales(op, scales, "grad", grad)
    if hot is not None:
        check_device(op, "hot", hot, "grad", grad)
        check_sizes(op, "hot", hot, 1)
        check_exact_dtype(op, "hot", hot, torch.int64)
        rule = f"hot to have at most {features} elements (rows of w2_transposed)"
        expect(hot.shape[0] <= features, op, rule, hot.shape[0])
        _check_count(op, "hot", "elements", hot.shape[0], features)
    _check_count(op, "dense_features", "in number", dense_features, features)
    return (
        grad.new_empty(tokens if need_x else 0, columns),
        grad.new_empty(features, columns),
        grad.new_empty(out, features),
        grad.new_empty(tokens if need_dh else 0, kept, dtype=FP8),
        grad.new_empty(DELAYED, dtype=torch.float32),
    )


def _flops_of_gradients(
    grad: torch.Size,
    x_transposed: torch.Size,
    _w1: torch.Size,
    w2: torch.Size,
    *_args: Any,
    need_x: bool = True,
    **_kwargs: Any,
) -> int:
    """Count ``grad @ w2``, dw1, dw2, and dx where it is computed."""
    need_x = _args[8] if len(_args) > 8 else need_x
    return 2 * grad[0] * w2[0] * (2 * grad[1] + (2 if need_x else 1) * x_transposed[0])


_relu2_mlp_fp8_gradients = define(
    "relu2_mlp_fp8_gradients",
    _fake_relu2_mlp_fp8_gradients,
    no_backward="second derivatives are not defined",
    flops=_flops_of_gradients,
)
