"""The ops that are a whole network: generators of their calls, and their rules.

One that is 2:4 has the bits of its ops, where it ran. Of a dense one the second product is near what its activation
says, where the first one is exact.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from oracle import FP8
from torch import Tensor

import sparse24
from fuzzing import contract
from fuzzing.contract import FLOATS, Check, Unsettled, is_huge, is_ordinary, need, tensor
from fuzzing.dice import Dice
from fuzzing.rounding import product, round_to
from sparse24.format import feature_alignment

#: What columns and rows of the first weight are multiples of, by its type; 0: any, as rows are.
Multiples = Callable[[torch.dtype], tuple[int, int]]
#: The most tokens of a dense one on CUDA.
MOST = 128


def _of_groups(kind: torch.dtype) -> tuple[int, int]:
    return 16 if kind == FP8 else 0, feature_alignment(kind, -1)


def _of_16_bytes(kind: torch.dtype) -> tuple[int, int]:
    return 16 // kind.itemsize, 16 // kind.itemsize


def _network(d: Dice, multiples: Multiples, most: int) -> dict[str, Any]:
    dtype = d.dtype()
    fp8 = d.chance(0.5)
    kind = FP8 if fp8 else dtype
    tokens, depth, features = d.product((0, *multiples(kind)))
    tokens, columns = min(tokens, most), d.columns(d.choice((1, 8)))
    contents = d.contents()
    weights = "integers" if contents == "integers" else None
    given = d.choice(("scale_y", "scale_y_factor", None)) if fp8 else None
    return {
        "x": d.draw(d.choice(((tokens, depth), (1, tokens, depth))), dtype, contents),
        "w1": d.draw((features, depth), kind, weights),
        "w2": d.draw((columns, features), kind, weights),
        "b1": d.draw((features,), torch.bfloat16 if fp8 else dtype, "normal") if d.chance(0.5) else None,
        "b2": d.draw((columns,), d.choice((dtype, torch.float32)), "normal") if d.chance(0.4) else None,
        "w1_scale": d.scale(features) if fp8 else None,
        "w2_scale": d.scale(columns) if fp8 else None,
        "scale_y": d.scale(tokens) if given == "scale_y" else None,
        "scale_y_factor": d.scale(1) if given == "scale_y_factor" else None,
        "threshold": d.choice((0.0, 0.0, 1.5)),
    }


#: As `fuzzing.calls.GENERATORS`.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "relu2_mlp_dense": (lambda d: _network(d, _of_16_bytes, MOST), 2),
    "relu2_mlp_sparse": (lambda d: _network(d, _of_groups, 2**31), 2),
}


def one_after_another(x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold) -> Tensor:
    """What the op computes in one call, of x [T, D]."""
    options = {"threshold": threshold, "statistics": False}
    if w1.dtype != FP8:
        values, meta, *_ = sparse24.linear_compress(x, w1, bias=b1, **options)
        return sparse24.mm(values, meta, w2.contiguous().t(), bias=b2)
    if scale_y_factor is None:
        q, x_scale = sparse24.quantize_fp8(x)
    else:
        q, x_scale, scale_y = sparse24.quantize_fp8_predict(x, scale_y_factor)
    scaling = "row" if scale_y is None else "given"
    values, meta, scale, *_ = sparse24.linear_compress(
        q, w1, x_scale, w1_scale, b1, scale_y, scaling=scaling, **options
    )
    return sparse24.mm(values, meta, w2.contiguous().t(), scale, w2_scale, b2, out_dtype=x.dtype)


def _refuse(multiples, x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold) -> None:
    """What both ops refuse."""
    tensor(x)
    need(x.dtype in FLOATS and x.dim() >= 1, "x")
    if not isinstance(threshold, float):
        raise Unsettled
    tensor(w1, 2, [x.dtype, FP8])
    fp8 = w1.dtype == FP8
    of_columns, of_rows = multiples(w1.dtype)
    need(w1.shape[1] == x.shape[-1] and x.shape[-1] % max(of_columns, 1) == 0, "columns of w1")
    need(w1.shape[0] % of_rows == 0, "rows of w1")
    tensor(w2, 2, [w1.dtype])
    need(w2.shape[1] == w1.shape[0], "columns of w2")
    tokens = math.prod(x.shape[:-1])
    for bias, dtypes, elements in (
        (b1, [torch.bfloat16 if fp8 else x.dtype], w1.shape[0]),
        (b2, [x.dtype, torch.float32], w2.shape[0]),
    ):
        if bias is not None:
            tensor(bias, 1, dtypes)
            need(bias.shape[0] == elements, "bias")
    for scale, needed, elements in (
        (w1_scale, True, w1.shape[0]),
        (w2_scale, True, w2.shape[0]),
        (scale_y, False, tokens),
        (scale_y_factor, False, 1),
    ):
        need((scale is not None) == fp8 if needed else scale is None or fp8, "a scale is for float8")
        contract.one_of_scale(scale, elements, True)
    need(scale_y is None or scale_y_factor is None, "one of them")
    need(math.isfinite(threshold) and threshold >= 0, "threshold")


def relu2_mlp_sparse(device, x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold) -> Check | None:
    arguments = x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold
    _refuse(_of_groups, *arguments)
    tokens = math.prod(x.shape[:-1])

    def check(results) -> None:
        (result,) = results
        assert result.dtype == x.dtype and result.shape == (*x.shape[:-1], w2.shape[0]) and result.is_contiguous()
        there = [None if t is None else t.detach().to(device) for t in arguments[:-1]]
        there[0] = there[0].reshape(tokens, x.shape[-1])
        expected = one_after_another(*there, threshold)
        contract.assert_same_bits(result.detach().reshape(expected.shape).cpu(), expected.cpu())

    return check


def relu2_mlp_dense(device, x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold) -> Check | None:
    arguments = x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, scale_y_factor, threshold
    _refuse(_of_16_bytes, *arguments)
    tokens = math.prod(x.shape[:-1])
    need(device != "cuda" or tokens <= MOST, "tokens")
    fp8 = w1.dtype == FP8
    if any(is_huge(t) for t in arguments[:-1]) or not is_ordinary(w1_scale, w2_scale, scale_y, scale_y_factor):
        return None

    def check(results) -> None:
        (result,) = results
        assert result.dtype == x.dtype and result.shape == (*x.shape[:-1], w2.shape[0]) and result.is_contiguous()
        rows, scale_x, scale = x.detach().reshape(tokens, x.shape[-1]), None, scale_y
        if fp8 and scale_y_factor is not None:
            rows, scale_x, scale = sparse24.quantize_fp8_predict(rows, scale_y_factor.detach())
        elif fp8:
            rows, scale_x = sparse24.quantize_fp8(rows)
        h = product(rows, w1.detach().t(), scale_x, w1_scale, b1)
        if not h.is_exact:
            return
        hidden = torch.bfloat16 if fp8 else x.dtype
        root = h.rounded(hidden).float()
        y = torch.where(root <= threshold, 0, root).square()
        if fp8 and scale is not None:
            y = sparse24.quantize_fp8(y, scale.detach().reshape(-1, 1).expand(tokens, 1).contiguous())[0]
        elif fp8:
            y, scale = sparse24.quantize_fp8(y.to(hidden))
        else:
            y = round_to(y, hidden)
        product(y, w2.detach().t(), scale, w2_scale, b2).check(result.detach().reshape(tokens, w2.shape[0]).cpu())

    return check
