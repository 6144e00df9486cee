"""Rules of the ops that multiply: every bit where sums are exact, else within what rounding allows."""

import numpy as np
import oracle
import torch
from compare import assert_same_bits
from oracle import FP8, Pattern, round_up, token_padding
from torch import Tensor
from training_reference import token_order

from fuzzing import contract
from fuzzing.calls import ROOT_DTYPES, alignment
from fuzzing.contract import (
    FLOATS,
    FLOATS_AND_FP8,
    Check,
    columns_or_nan,
    is_huge,
    is_legal_meta,
    is_ordinary,
    need,
    tensor,
)
from fuzzing.rounding import Product, near, product, round_to


def mm(values, meta, b, scale_a, scale_b, bias, dim, out_dtype, transpose_out, interleaved) -> Check | None:
    contract.dim_of(dim)
    contract.flag(transpose_out)
    need(not contract.flag(interleaved) or dim == -2, "interleaved")
    tensor(values, 2, FLOATS_AND_FP8)
    dtype = values.dtype
    tensor(b, 2, [dtype])
    k, n = b.shape
    along_tokens = dim == -2 and dtype != FP8
    m, stored = (values.shape[1], values.shape[0]) if along_tokens else tuple(values.shape)
    if dim == -1:
        need((2 * stored) % alignment(dtype, -1) == 0 and k == 2 * stored, "rows of b")
    else:
        padding = token_padding(dtype)
        need(m % 8 == 0 and (2 * stored) % padding == 0 and round_up(k, padding) == 2 * stored, "rows of b")
    rows, cols = (m, k) if dim == -1 else (k, m)
    contract.metadata(meta, rows, cols, dtype, dim)
    need(dtype != FP8 or b.numel() == 0 or k == 1 or b.stride(0) == 1, "K-major b")
    contract.one_of_scale(scale_a, m, True)
    contract.one_of_scale(scale_b, n, True)
    contract.out_dtype_of(out_dtype, FLOATS)
    out = out_dtype or (torch.bfloat16 if dtype == FP8 else dtype)
    if bias is not None:
        tensor(bias, 1, [out, torch.float32])
        need(bias.shape[0] == n, "bias")
    if not is_legal_meta(meta) or not is_ordinary(scale_a, scale_b):
        return None
    if dim == -2 and k % 4 != 0 and not values.detach().float().isfinite().all():
        return None  # what the last group keeps of the padding multiplies zero

    def check(results) -> None:
        pattern = Pattern.of_meta(meta, rows, cols, dtype, dim)
        a, mask = pattern.scatter(values.detach()), pattern.mask()
        if dim == -2:
            a, mask = a.t(), mask.t()
        order = token_order(k, True) if interleaved else slice(None)
        (d,) = results
        assert d.dtype == out and d.is_contiguous()
        product(a, b[order], scale_a, scale_b, bias, mask).check(d.t() if transpose_out else d)

    return check


def _hidden(x, w, scale_x, scale_w, bias) -> torch.dtype:
    """Check the operands of a first layer; the type of its pre-activation."""
    tensor(x, 2, FLOATS_AND_FP8)
    tensor(w, 2, [x.dtype])
    need(x.dtype != FP8 or x.shape[1] % 16 == 0, "columns of x")
    need(w.shape[1] == x.shape[1], "columns of w")
    contract.one_of_scale(scale_x, x.shape[0], True)
    contract.one_of_scale(scale_w, w.shape[0], True)
    hidden = torch.bfloat16 if x.dtype == FP8 else x.dtype
    if bias is not None:
        tensor(bias, 1, [hidden])
        need(bias.shape[0] == w.shape[0], "bias")
    return hidden


def _scale_out(scale_out, tokens: int, wanted: bool) -> None:
    need((scale_out is not None) == wanted, "scale_out")
    contract.one_of_scale(scale_out, tokens, True)


def _inverse(scale: Tensor | None) -> Tensor:
    return torch.ones(1, 1) if scale is None else 1 / oracle.used_scale(scale, "row")


def _check_statistics(results, y: Tensor, saturated: int | None, wanted: bool) -> None:
    amax, count = results
    assert (amax.dtype, count.dtype) == (torch.float32, torch.int32)
    assert amax.numel() == count.numel() == int(wanted)
    if wanted and saturated is not None:
        largest = y[~y.isnan()].amax() if (~y.isnan()).any() else torch.zeros(())
        assert_same_bits(amax, largest.reshape(1), "amax")
        assert count.tolist() == [saturated], f"{count.tolist()} saturated instead of {saturated}"


def _near_activation(
    actual: Tensor, p: Product, hidden: torch.dtype, inverse: Tensor, activation: str, twice: bool = False
) -> None:
    """Of y as stored: of h, which was rounded, the square or the root of that; float8 saturates.

    `twice`: y is rounded to h's dtype before it is rounded to float8.
    """
    h, slack = p.exact, p.bound + torch.finfo(hidden).eps * p.exact.abs() + torch.finfo(hidden).tiny
    positive = torch.where(h.isnan(), h, h.clamp(min=0))
    y, bound = positive, slack
    if activation == "relu2":
        y, bound = positive.square(), 2 * positive * slack + slack.square()
    if twice:  # where y is subnormal, the first rounding is the coarser one
        info = torch.finfo(hidden)
        bound = bound + info.eps * (y + bound) + info.smallest_normal * info.eps
    y, bound = y * inverse, bound * inverse
    if actual.dtype == FP8:
        finite = h.isfinite() & (y.abs() + bound < 1e37) & (inverse > 0)
        got = torch.where(finite, actual.double(), 0.0)
        near(got.float(), torch.where(finite, y.clamp(max=448.0), 0.0), bound + y.clamp(max=448.0) / 16 + 2.0**-10)
    else:
        # A negative infinity is zero, and what overflows in h may overflow.
        settled = h.abs() < 0.9 * min(torch.finfo(hidden).max, 1e18)
        near(torch.where(settled, actual.double(), 0.0).to(actual.dtype), torch.where(settled, y, 0.0), bound)


def linear_relu2(x, w, scale_x, scale_w, bias, scale_out, out_dtype, statistics, activation, threshold) -> Check | None:
    hidden = _hidden(x, w, scale_x, scale_w, bias)
    contract.word(activation, ("relu2", "relu"))
    contract.threshold_of(threshold)
    contract.out_dtype_of(out_dtype, (hidden, FP8))
    out = out_dtype or x.dtype
    need(w.shape[0] % (16 if out == FP8 else 8) == 0, "rows of w")
    contract.flag(statistics)
    _scale_out(scale_out, x.shape[0], out == FP8)
    if is_huge(scale_out) or not is_ordinary(scale_x, scale_w):
        return None

    def check(results) -> None:
        p = product(x, w.t(), scale_x, scale_w, bias)
        assert results[0].dtype == out and results[0].shape == p.exact.shape
        if not p.is_exact:
            if is_ordinary(scale_out) and threshold == 0:  # else h may lie on either side of it
                _near_activation(results[0], p, hidden, _inverse(scale_out).double(), activation)
            return _check_statistics(results[1:], p.exact, None, statistics)
        y = oracle.activate(oracle.above(p.rounded(hidden), threshold), activation)
        scaled = y * _inverse(scale_out)
        assert_same_bits(results[0], oracle.to_e4m3(scaled) if out == FP8 else round_to(y, out))
        saturated = int((scaled.abs() > 448).sum()) if out == FP8 else 0
        return _check_statistics(results[1:], y, saturated, statistics)

    return check


def linear_compress_packed(
    x, w, meta, scale_x, scale_w, bias, scale_out, activation, scaling, out_dtype, statistics, threshold
) -> Check | None:
    tensor(x, 2, FLOATS_AND_FP8)
    tensor(w, 2, [x.dtype])
    (rows, half), columns = w.shape, x.shape[1]
    need(columns % alignment(x.dtype, -1) == 0 and 2 * half == columns and rows % 16 == 0, "sizes")
    contract.metadata(meta, rows, columns, x.dtype, -1)
    if is_huge(w):
        return None
    # What it decodes to, in the features' own order.
    dense = Pattern.of_meta(meta, rows, columns, x.dtype, -1).scatter(w)
    dense = dense.reshape(rows // 16, 2, 8, columns).transpose(1, 2).reshape(rows, columns)
    others = scale_x, scale_w, bias, scale_out, activation, scaling, out_dtype, statistics, threshold
    check = linear_compress(x, dense, *others)
    return check if is_legal_meta(meta) else None


def linear_compress(
    x, w, scale_x, scale_w, bias, scale_out, activation, scaling, out_dtype, statistics, threshold
) -> Check | None:
    contract.word(scaling, ("given", "row"))
    hidden = _hidden(x, w, scale_x, scale_w, bias)
    contract.word(activation, ("relu2", "relu"))
    contract.threshold_of(threshold)
    contract.out_dtype_of(out_dtype, (hidden, FP8))
    out = out_dtype or x.dtype
    need(w.shape[0] % alignment(out, -1) == 0, "rows of w")
    need(out == FP8 or scaling == "given", "scaling")
    contract.flag(statistics)
    _scale_out(scale_out, x.shape[0], out == FP8 and scaling == "given")
    if is_huge(scale_out) or not is_ordinary(scale_x, scale_w):
        return None

    def check(results) -> None:
        p = product(x, w.t(), scale_x, scale_w, bias)
        values, meta, scale, *rest = results
        shape = tuple(p.exact.shape)
        assert is_legal_meta(meta), "metadata that no pattern has"
        if not p.is_exact:
            pattern = Pattern.of_meta(meta, *shape, out, -1)
            kept = Product(*(pattern.gather(t) for t in (p.exact, p.magnitude)), False, p.fp8)
            inverse = _inverse(scale if out == FP8 else None).double()
            if is_ordinary(scale_out) and threshold == 0:
                _near_activation(values, kept, hidden, inverse, activation, scaling == "row")
            return _check_statistics(rest, p.exact, None, statistics)
        h = oracle.above(p.rounded(hidden), threshold)
        y, over = oracle.activate(h, activation), 0
        if out != FP8:
            expected = *oracle.compress(h, activation), torch.empty(0)
        elif scaling == "row":
            wide = oracle.compress(h, activation)[0]
            q, computed = oracle.quantize_fp8(wide)
            expected = q, oracle.compress_fp8(h, computed, activation)[1], computed
        else:
            one = scale_out.numel() == 1
            expected = oracle.compress_fp8(h, scale_out, activation, scaling="tensor" if one else "row")
            over = int((oracle.compress(h.float(), activation)[0] * _inverse(scale_out)).abs().gt(448).sum())
        for i, (a, e) in enumerate(zip(results, expected, strict=False)):
            assert_same_bits(a, e, f"result {i}")
        return _check_statistics(rest, y, over, statistics)

    return check


def _times_root(dy: Tensor, y: Tensor, roots: bool, factor: Tensor | float) -> Tensor:
    root = y.detach().float() if roots else torch.from_numpy(np.sqrt(y.detach().float().numpy()))
    return round_to(dy.float() * (2 * root) * factor, dy.dtype)


def check_dh(dh: Tensor, p: Product, y: Tensor, dtype: torch.dtype, roots: bool, factor: Tensor | float = 1.0) -> None:
    """``dy * 2 sqrt(y)``, or with `roots` ``dy * 2 y``, times a factor, where p is dy."""
    if p.is_exact:
        return assert_same_bits(dh, _times_root(p.rounded(dtype), y, roots, factor), "dh")
    derivative = 2 * (y.detach().double() if roots else y.detach().double().sqrt())
    root = derivative * factor
    slack = (p.bound + torch.finfo(dtype).eps * p.exact.abs() + torch.finfo(dtype).tiny) * root.abs()
    # In float32 dy comes times the derivative before it comes times the factor.
    overflows = (p.exact.abs() + p.bound > 0.98 * min(torch.finfo(dtype).max, 1e38)) | (root.abs() > 1e38)
    overflows |= (p.exact.abs() + p.bound) * derivative.abs() > 1e38
    near(torch.where(overflows, 0.0, dh), torch.where(overflows, 0.0, p.exact * root), slack)


def _check_grad_and_w(grad, w, multiple: int) -> tuple[int, int]:
    tensor(grad, 2, FLOATS)
    tensor(w, 2, [grad.dtype])
    need(w.shape[0] == grad.shape[1], "rows of w")
    need(w.shape[1] % multiple == 0, "columns of w")
    return grad.shape[0], w.shape[1]


def linear_relu2_gradient(grad, w, y, roots) -> Check:
    shape = _check_grad_and_w(grad, w, 8)
    tensor(y, 2, [grad.dtype])
    need(tuple(y.shape) == shape, "shape of y")
    need(not contract.flag(roots) or grad.dtype in ROOT_DTYPES, "roots")
    return lambda results: check_dh(results[0], product(grad, w), y, grad.dtype, roots)


def linear_gradient(grad, w, values, meta, interleaved, tokens, fp8_meta, hot, roots) -> Check | None:
    tensor(grad)
    layout = FP8 if contract.flag(fp8_meta) else grad.dtype
    rows, cols = _check_grad_and_w(grad, w, alignment(layout, -1))
    tensor(values, 2, [grad.dtype])
    need(tuple(values.shape) == (rows, cols // 2), "shape of values")
    contract.metadata(meta, rows, cols, layout, -1)
    contract.flag(interleaved)
    contract.flag(tokens)
    need(not contract.flag(roots) or grad.dtype in ROOT_DTYPES, "roots")
    if hot is not None:
        need(tokens, "tokens with hot")
        tensor(hot, 1, [torch.int64])
        need(hot.shape[0] <= cols, "elements of hot")
    if is_huge(meta):
        return None

    def check(results) -> None:
        pattern = Pattern.of_meta(meta, rows, cols, layout, -1)
        p = product(grad, w)
        kept = Product(*(pattern.gather(t) for t in (p.exact, p.magnitude)), p.is_exact, p.fp8)
        dh, *along_tokens, counts, y_hot, dh_hot = results
        check_dh(dh, kept, values, grad.dtype, roots)
        stored = values.detach()
        y = pattern.scatter(round_to(stored.float().square(), stored.dtype) if roots else stored)
        dense_dh = pattern.scatter(dh)
        order = token_order(rows, interleaved)
        nothing = grad.new_empty(0).detach(), torch.empty(0, dtype=torch.uint8)
        expected = [*nothing, *nothing]
        if tokens:
            expected = [*oracle.compress(dense_dh[order], dim=-2), *oracle.compress(y[order], dim=-2)]
        counted = (y.float() != 0).sum(0, dtype=torch.int32) if tokens and hot is None else counts.new_empty(0)
        chosen = torch.empty(0, dtype=torch.int64) if hot is None else hot
        before = torch.cat((chosen.new_tensor([-1]), chosen)).cummax(0).values[:-1]
        bad = (chosen <= before) | (chosen >= cols) | (chosen < 0)
        hot_columns = [columns_or_nan(t, chosen, bad).t() for t in (y, dense_dh)]
        for i, (a, e) in enumerate(
            zip((*along_tokens, counts, y_hot, dh_hot), (*expected, counted, *hot_columns), strict=True)
        ):
            assert_same_bits(a, e, f"result {i + 1}")

    return check
