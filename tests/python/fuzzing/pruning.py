"""The ops of 2:4 weights: generators of their calls, and rules."""

from collections.abc import Callable
from typing import Any

import torch
from compare import assert_same_bits
from oracle import FP8, Pattern, meta_bytes
from torch import Tensor

import sparse24
from fuzzing import contract, products
from fuzzing.calls import ROOT_DTYPES, alignment
from fuzzing.contract import FLOATS, FLOATS_AND_FP8, Check, is_huge, is_legal_meta, is_ordinary, need, tensor
from fuzzing.dice import Dice

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _weight(d: Dice, dim: int, multiples: tuple[int, int], dtype: torch.dtype) -> Any:
    """Features and depth, as w has them with dim=-1."""
    features, depth = (d.columns(m) for m in multiples)
    contents = d.choice(("normal", "integers", "activations", "specials", "bits", "zeros"))
    return d.draw((features, depth) if dim == -1 else (depth, features), dtype, contents)


def _prune_pack24(d: Dice) -> dict[str, Any]:
    w_dtype = d.choice((*SIXTEEN_BIT, torch.float32, FP8))
    dtype = d.choice(SIXTEEN_BIT) if w_dtype == torch.float32 and (d.device == "cuda" or d.chance(0.6)) else None
    dim = -1 if w_dtype == FP8 else d.dim()
    return {"w": _weight(d, dim, (16, alignment(dtype or w_dtype, -1)), w_dtype), "dim": dim, "dtype": dtype}


def _prune_quantize_fp8_both(d: Dice) -> dict[str, Any]:
    dim = d.dim()
    w = d.draw((d.columns(4) if dim == -2 else d.rows(), d.columns(16)), d.dtype())
    return {"w": w, "scale": d.scale(1, d.choice(("powers", "small"))) if d.chance(0.5) else None, "dim": dim}


def _prune_pack_fp8_both(d: Dice) -> dict[str, Any]:
    dim = d.dim()
    scale = d.scale(1, d.choice(("powers", "small"))) if d.chance(0.5) else None
    return {"w": _weight(d, dim, (16, 32), d.dtype()), "scale": scale, "dim": dim}


def _linear_gradient_packed(d: Dice) -> dict[str, Any]:
    dtype, fp8_meta, tokens_too = d.dtype(), d.chance(0.3), d.chance(0.8)
    layout = FP8 if fp8_meta else dtype
    tokens, depth, features = d.product((0, alignment(dtype, -1), alignment(layout, -1)))
    hot = None
    if tokens_too and d.chance(0.4):
        contents = d.choice(("ascending", "indices", "wild"))
        hot = d.draw((d.randint(0, min(features, 20)),), torch.int64, contents, limit=features)
    contents = d.contents()
    return {
        "grad": d.draw((tokens, depth), dtype, contents),
        "w": d.draw((features, depth // 2), dtype, "integers" if contents == "integers" else None),
        "w_meta": d.meta(meta_bytes(features, depth, dtype, -1)),
        "values": d.draw((tokens, features // 2), dtype, d.choice(("squares", "squares", "zeros", "specials"))),
        "meta": d.meta(meta_bytes(tokens, features, layout, -1)),
        "interleaved": d.chance(0.5),
        "tokens": tokens_too,
        "fp8_meta": fp8_meta,
        "hot": hot,
        "roots": dtype in ROOT_DTYPES and d.chance(0.3),
    }


#: As `fuzzing.calls.GENERATORS`.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "prune_pack24": (_prune_pack24, 2),
    "prune_quantize_fp8_both": (_prune_quantize_fp8_both, 2),
    "prune_pack_fp8_both": (_prune_pack_fp8_both, 2),
    "linear_gradient_packed": (_linear_gradient_packed, 2),
}


def packs_float32_on_cuda(dtype: Any) -> bool:
    """Masters are packed there as what they are rounded to."""
    return dtype in SIXTEEN_BIT


def _same_numbers(actual: Tensor, expected: Tensor, what: str) -> None:
    """But for codes of NaN, which torch rounds to another one."""
    actual, expected = actual.float(), expected.float()
    assert torch.equal(actual.isnan(), expected.isnan()), what
    assert_same_bits(actual.nan_to_num(7.0), expected.nan_to_num(7.0), what)


def prune_pack24(w, dim, dtype) -> Check | None:
    contract.dim_of(dim)
    tensor(w, 2, FLOATS_AND_FP8)
    contract.out_dtype_of(dtype, FLOATS_AND_FP8)
    stored = w.dtype if dtype is None else dtype
    need(stored == w.dtype or w.dtype == torch.float32 and stored in SIXTEEN_BIT, "dtype")
    need(dim == -1 or stored != FP8, "float8 along columns")
    features, depth = w.shape if dim == -1 else (w.shape[1], w.shape[0])
    need(features % 16 == 0 and depth % alignment(stored, -1) == 0, "sizes")
    if is_huge(w):
        return None

    def check(results) -> None:
        pruned, values, meta = results
        expected = sparse24.prune24(w.detach().contiguous(), dim)
        assert pruned.dtype == values.dtype == stored and pruned.is_contiguous()
        _same_numbers(pruned, expected.to(stored), "pruned")
        _same_numbers(sparse24.unpack24(values, meta, *w.shape, dim), expected.to(stored), "unpacked")
        if stored == w.dtype != FP8:
            for name, a, e in zip(("values", "meta"), (values, meta), sparse24.pack24(expected, dim), strict=True):
                assert_same_bits(a, e, name)

    return check


def _check_scale(scale) -> None:
    contract.one_of_scale(scale, 1, True)


def _is_comparable(w: Tensor, scale: Tensor | None) -> bool:
    """NaN that is pruned beside others may leave out what is the largest number of w."""
    return not is_huge(w) and is_ordinary(scale) and not w.detach().isnan().any()


def prune_quantize_fp8_both(w, scale, dim) -> Check | None:
    contract.dim_of(dim)
    tensor(w, 2, FLOATS)
    need(w.shape[1] % 16 == 0 and (dim == -1 or w.shape[0] % 4 == 0), "sizes")
    _check_scale(scale)
    if not _is_comparable(w, scale):
        return None

    def expected() -> tuple[Tensor, ...]:
        return sparse24.quantize_fp8_both(sparse24.prune24(w.detach().contiguous(), dim), scale)

    return contract.same_bits(expected)


def prune_pack_fp8_both(w, scale, dim) -> Check | None:
    contract.dim_of(dim)
    tensor(w, 2, FLOATS)
    features, depth = w.shape if dim == -1 else (w.shape[1], w.shape[0])
    need(features % 16 == 0 and depth % 32 == 0, "sizes")
    _check_scale(scale)
    if not _is_comparable(w, scale):
        return None

    def check(results) -> None:
        values, meta, other, used, amax = results
        own = w.detach().contiguous()
        codes, transposed, *of_scale = sparse24.quantize_fp8_both(sparse24.prune24(own, dim), scale)
        for name, a, e in (
            ("the other order", other, transposed if dim == -1 else codes),
            ("scale", used, of_scale[0]),
            ("amax", amax, of_scale[1]),
        ):
            assert_same_bits(a, e, name)
        assert is_legal_meta(meta), "metadata that no pattern has"
        _same_numbers(sparse24.unpack24(values, meta, *w.shape, dim), codes, "unpacked")

    return check


def linear_gradient_packed(grad, w, w_meta, values, meta, interleaved, tokens, fp8_meta, hot, roots) -> Check | None:
    tensor(grad, 2, FLOATS)
    tensor(w, 2, [grad.dtype])
    depth, features = grad.shape[1], w.shape[0]
    need(depth % alignment(grad.dtype, -1) == 0 and 2 * w.shape[1] == depth, "sizes")
    contract.metadata(w_meta, features, depth, grad.dtype, -1)
    if is_huge(w):
        return None
    dense = Pattern.of_meta(w_meta, features, depth, grad.dtype, -1).scatter(w.detach())
    check = products.linear_gradient(grad, dense.t(), values, meta, interleaved, tokens, fp8_meta, hot, roots)
    # What is not kept of the weight multiplies nothing.
    return check if is_legal_meta(w_meta) and not is_huge(grad) and grad.detach().isfinite().all() else None
