"""The backward pass of experts: what must come of its products, expert by expert."""

import torch
from compare import assert_same_bits
from oracle import FP8, Pattern
from torch import Tensor

from fuzzing import contract, products
from fuzzing.calls import alignment
from fuzzing.contract import FLOATS, FLOATS_AND_FP8, Check, is_huge, is_legal_meta, is_ordinary, need, tensor
from fuzzing.experts import MOST, _columns, _of_expert, _of_group, _operands, groups, padded_rows
from fuzzing.rounding import Product, near, product, round_to


def experts_linear_gradient(
    grad, w, values, meta, offsets, row_scale, scale_grad, scale_w, scale_y, dense
) -> Check | None:
    tensor(grad, 2, FLOATS_AND_FP8)
    _columns(grad)
    _operands(grad, w, offsets, None)
    rows, experts, features = grad.shape[0], offsets.shape[0], w.shape[2]
    need(w.shape[1] == grad.shape[1] and features % alignment(grad.dtype, -1) == 0, "sizes of w")
    tensor(values, 2, [grad.dtype])
    padded = padded_rows(rows, experts)
    need(tuple(values.shape) == (padded, features // 2), "shape of values")
    contract.metadata(meta, padded, features, grad.dtype, -1)
    contract.one_of_scale(row_scale, rows, False)
    scales = scale_grad, scale_w, scale_y
    need(grad.dtype == FP8 or all(scale is None for scale in scales), "scales without float8")
    contract.one_of_scale(scale_grad, rows, True)
    contract.one_of_scale(scale_y, padded, False)
    if scale_w is not None:
        tensor(scale_w, None, [torch.float32])
        need(tuple(scale_w.shape) in ((experts,), (experts, features)), "scale of w")
    contract.flag(dense)
    if any(is_huge(t) for t in (grad, w, values, meta)) or not is_legal_meta(meta):
        return None
    if not is_ordinary(row_scale, *scales):
        return None
    dtype = torch.bfloat16 if grad.dtype == FP8 else grad.dtype

    def check(results) -> None:
        pattern = Pattern.of_meta(meta, padded, features, grad.dtype, -1)
        dh, *spread, sums = results
        assert sums.dtype == torch.float32 and tuple(sums.shape) == (rows,)
        factors = torch.ones(rows) if row_scale is None else row_scale.reshape(-1)
        of_y = torch.ones(padded) if scale_y is None else scale_y.reshape(-1)
        whole = values if dtype == grad.dtype else round_to(values.detach().float() * of_y[:, None], dtype)
        end = 0
        for group in groups(offsets, rows):
            of_group = Pattern(pattern.kept[group.padded_rows], group.rows.stop - group.rows.start, features, -1)
            of_rows, of_columns = _of_group(scale_grad, group.rows, rows), _of_expert(scale_w, group.expert)
            p = product(grad[group.rows], w[group.expert], of_rows, of_columns)
            y, end = whole[group.padded_rows], group.rows.stop
            kept = Product(*(of_group.gather(t) for t in (p.exact, p.magnitude)), p.is_exact, p.fp8)
            factor = factors[group.rows, None]
            products.check_dh(dh[group.padded_rows], kept, y, dtype, False, factor)
            scaled = round_to(y.detach().float() * factor, dtype)
            for actual, part in zip(spread if dense else (), (dh[group.padded_rows], scaled), strict=False):
                assert_same_bits(actual[group.rows], of_group.scatter(part))
            if features:
                _check_sums(sums[group.rows], kept, y, dtype)
        assert not sums[end:].any(), "rows of no expert"

    return check


def experts_weight_gradient(a, b, offsets) -> Check | None:
    for t in (a, b):
        tensor(t, 2, FLOATS)
        need(t.shape[1] % 8 == 0, "multiples of 8 columns")
    need(a.dtype == b.dtype and a.shape[0] == b.shape[0], "operands alike")
    tensor(offsets, 1, [torch.int32])
    experts = offsets.shape[0]
    need(1 <= experts <= MOST, "experts")
    if is_huge(a) or is_huge(b):
        return None

    def check(results) -> None:
        (result,) = results
        assert tuple(result.shape) == (experts, a.shape[1], b.shape[1]) and result.dtype == a.dtype
        empty = set(range(experts))
        for group in groups(offsets, a.shape[0]):
            product(a[group.rows].t(), b[group.rows]).check(result[group.expert])
            empty.discard(group.expert)
        assert not result[sorted(empty)].any(), "experts without rows"

    return check


def _check_sums(sums: Tensor, dy: Product, y: Tensor, dtype: torch.dtype) -> None:
    """Of y times dy, which was rounded."""
    y = y.detach().double()
    slack = dy.bound + torch.finfo(dtype).eps * dy.exact.abs() + torch.finfo(dtype).tiny
    terms, bounds = y * dy.exact, y.abs() * slack
    settled = (dy.exact.abs() + dy.bound < 0.98 * min(torch.finfo(dtype).max, 1e37)).all(1) & terms.isfinite().all(1)
    settled &= (terms.abs().sum(1) < 1e37) & bounds.isfinite().all(1)
    exact, bound = terms.sum(1), bounds.sum(1) + 1e-5 * terms.abs().sum(1) + 1e-30
    near(torch.where(settled, sums, 0.0), torch.where(settled, exact, 0.0), torch.where(settled, bound, 0.0))
