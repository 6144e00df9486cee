"""The ops for few tokens: generators of their calls, and rules: every bit, but for products that float32 does not
hold, and for those that add otherwise.
"""

import math
from collections.abc import Callable
from typing import Any

import oracle
import torch
from oracle import FP8
from torch import Tensor

from fuzzing import contract
from fuzzing.contract import FLOATS, Check, Unsettled, is_huge, is_ordinary, need, tensor
from fuzzing.dice import Dice
from fuzzing.rounding import product, round_to

#: The most tokens on CUDA.
MOST = 64


def _mm_active(d: Dice) -> dict[str, Any]:
    dtype = d.dtype()
    w_dtype = d.choice((dtype, FP8))
    tokens, features, columns = d.product((0, 0, 0))
    if d.device == "cuda" and d.chance(0.9):
        tokens = min(tokens, 64)
    return {
        "y": d.draw((tokens, features), dtype, d.choice(("squares", "zeros", "specials", "integers", "activations"))),
        "w": d.draw((features, columns), w_dtype),
        "scale_w": d.maybe_scale(columns) if w_dtype == FP8 else None,
        "bias": d.draw((columns,), d.choice((dtype, torch.float32)), "normal") if d.chance(0.4) else None,
        "out_dtype": d.choice((None, torch.bfloat16, torch.float16, torch.float32)),
    }


def _relu2_mlp_few(d: Dice) -> dict[str, Any]:
    dtype = d.dtype()
    first, second = d.choice((dtype, FP8)), d.choice((dtype, FP8))
    tokens, depth, features = d.product((0, 0, 0))
    if d.device == "cuda" and d.chance(0.9):
        tokens = min(tokens, 64)
    columns = d.columns(d.choice((1, 8)))
    contents = d.contents()
    weights = "integers" if contents == "integers" else None
    return {
        "x": d.draw(d.choice(((tokens, depth), (1, tokens, depth))), dtype, contents),
        "w1": d.draw((features, depth), first, weights),
        "w2_rows": d.draw((features, columns), second, weights),
        "b1": d.draw((features,), dtype, d.choice(("integers", "normal"))) if d.chance(0.5) else None,
        "b2": d.draw((columns,), d.choice((dtype, torch.float32)), "normal") if d.chance(0.4) else None,
        "w1_scale": d.maybe_scale(features) if first == FP8 else None,
        "w2_scale": d.maybe_scale(columns) if second == FP8 else None,
        "threshold": d.choice((0.0, 0.0, 1.5)),
    }


#: As `fuzzing.calls.GENERATORS`.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "mm_active": (_mm_active, 2),
    "relu2_mlp_few": (_relu2_mlp_few, 2),
}


def _weight(w, like: Tensor) -> None:
    tensor(w, 2, [like.dtype, FP8])


def _scale(scale, w: Tensor, elements: int) -> None:
    need(scale is None or w.dtype == FP8, "a scale is for float8")
    contract.one_of_scale(scale, elements, True)


def _bias(bias, dtypes: list[torch.dtype], elements: int) -> None:
    if bias is not None:
        tensor(bias, 1, dtypes)
        need(bias.shape[0] == elements, "bias")


def _is_tame(*tensors: Tensor) -> bool:
    """Products neither overflow nor vanish: a multiply-add then rounds as a product and a sum."""
    for t in tensors:
        if is_huge(t):
            return False
        magnitude = t.detach().float().abs()
        if (((magnitude < 2**-60) & (magnitude != 0)) | ((magnitude > 2**60) & magnitude.isfinite())).any():
            return False
    return True


def mm_active(y, w, scale_w, bias, out_dtype) -> Check | None:
    tensor(y, 2, FLOATS)
    _weight(w, y)
    need(w.shape[0] == y.shape[1], "rows of w")
    _scale(scale_w, w, w.shape[1])
    _bias(bias, [y.dtype, torch.float32], w.shape[1])
    contract.out_dtype_of(out_dtype, FLOATS)
    if is_huge(y) or is_huge(w) or is_huge(scale_w) or is_huge(bias) or not is_ordinary(scale_w):
        return None
    out = out_dtype or y.dtype

    def check(results) -> None:
        (result,) = results
        assert result.dtype == out and result.shape == (y.shape[0], w.shape[1]) and result.is_contiguous()
        if _is_tame(y, w):
            expected = round_to(oracle.mm_active(y.detach(), w.detach(), scale_w, bias), out)
            contract.assert_same_bits(round_to(result.detach().cpu().float(), out), expected)

    return check


def relu2_mlp_few(x, w1, w2_rows, b1, b2, w1_scale, w2_scale, threshold) -> Check | None:
    tensor(x)
    need(x.dtype in FLOATS and x.dim() >= 1, "x")
    if not isinstance(threshold, float):
        raise Unsettled
    _weight(w1, x)
    need(w1.shape[1] == x.shape[-1], "columns of w1")
    features = w1.shape[0]
    _weight(w2_rows, x)
    need(w2_rows.shape[0] == features, "rows of w2_rows")
    out = w2_rows.shape[1]
    _bias(b1, [x.dtype], features)
    _bias(b2, [x.dtype, torch.float32], out)
    _scale(w1_scale, w1, features)
    _scale(w2_scale, w2_rows, out)
    need(math.isfinite(threshold) and threshold >= 0, "threshold")
    if any(is_huge(t) for t in (x, w1, w2_rows, b1, b2, w1_scale, w2_scale)) or not is_ordinary(w1_scale, w2_scale):
        return None

    def check(results) -> None:
        (result,) = results
        assert result.dtype == x.dtype and result.shape == (*x.shape[:-1], out) and result.is_contiguous()
        rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        h = product(rows, w1.detach().t(), None, w1_scale, b1)
        if not h.is_exact:
            return
        h = h.rounded(x.dtype).float()
        y = round_to(torch.where(h <= threshold, 0, h).square(), x.dtype)
        if result.is_cuda and y.shape[0] > 8 and out * w2_rows.element_size() % 16 == 0:  # not by chains
            product(y, w2_rows.detach(), None, w2_scale, b2, mask=y != 0).check(result.detach().reshape(-1, out).cpu())
        elif _is_tame(y, w2_rows):
            expected = round_to(oracle.mm_active(y, w2_rows.detach(), w2_scale, b2), x.dtype)
            contract.assert_same_bits(
                round_to(result.detach().cpu().float().reshape(expected.shape), x.dtype), expected
            )

    return check
