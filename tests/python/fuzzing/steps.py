"""The ops of a whole float8 step: generators of their calls, and rules: the bits of their ops, where it ran."""

from collections.abc import Callable
from typing import Any

import torch
from compare import assert_same_bits
from oracle import FP8, meta_bytes, round_up
from step_fp8_ops import backward, forward
from torch import Tensor

from fuzzing import contract
from fuzzing.contract import FLOATS, Check, is_huge, is_legal_meta, is_ordinary, need, tensor
from fuzzing.dice import Dice

DELAYED, PLACES = 4, (7, 4)


def _sizes(d: Dice, sparse: bool) -> tuple[int, int, int, int]:
    """Tokens, D, F and D_out: none of the features is zero in a legal call."""
    tokens, columns, features = d.product((0, 16, 32 if sparse else 16))
    return tokens, columns or 16, features or 32, d.columns(16) or 16


def _relu2_mlp_fp8(d: Dice) -> dict[str, Any]:
    sparse, dtype, contents = d.chance(0.7), d.dtype(), d.contents()
    tokens, columns, features, out = _sizes(d, sparse)
    weights = "integers" if contents == "integers" else None
    codes = [d.chance(0.3) for _ in range(2)]
    return {
        "x": d.draw((tokens, columns), dtype, contents),
        "w1": d.draw((features, columns), FP8 if codes[0] else dtype, weights),
        "w2": d.draw((out, features), FP8 if codes[1] else dtype, weights),
        "scales": d.draw((DELAYED,), torch.float32, d.choice(("powers", "small"))),
        "b1": d.draw((features,), torch.bfloat16, d.choice(("integers", "normal"))) if d.chance(0.5) else None,
        "b2": d.draw((out,), dtype, d.choice(("integers", "normal"))) if d.chance(0.4) else None,
        "w1_scale": d.scale(1) if codes[0] else None,
        "w2_scale": d.scale(1) if codes[1] else None,
        "sparse": sparse,
        "interleaved": d.chance(0.5),
        "threshold": d.choice((0.0, 0.0, 1.0, 2.5)),
    }


def _relu2_mlp_fp8_gradients(d: Dice) -> dict[str, Any]:
    sparse, contents = d.chance(0.7), d.contents()
    tokens, columns, features, out = _sizes(d, sparse)
    codes = "integers" if contents == "integers" else None
    padded = [round_up(size, 32) for size in (tokens, features, out)]
    count = 16 * d.randint(0, features // 16) if sparse else 0
    hot = d.draw((count,), torch.int64, "ascending", limit=features) if d.chance(0.3) else None
    return {
        "grad": d.draw((tokens, out), d.dtype(), contents),
        "x_transposed": d.draw((columns, padded[0]), FP8, codes),
        "w1_transposed": d.draw((columns, padded[1]), FP8, codes),
        "w2_transposed": d.draw((features, padded[2]), FP8, codes),
        "values": d.draw((tokens, features // 2 if sparse else features), FP8, d.choice(("squares", "zeros"))),
        "meta": d.meta(meta_bytes(tokens, features, FP8, -1) if sparse else 0),
        "places": d.draw(PLACES, torch.float32, d.choice(("powers", "small"))),
        "scales": d.draw((DELAYED,), torch.float32, d.choice(("powers", "small"))),
        "hot": hot,
        "dense_features": count if hot is None or d.chance(0.5) else 0,
        "sparse": sparse,
        "interleaved": d.chance(0.5),
        "need_x": d.chance(0.8),
        "need_dh": d.chance(0.5),
    }


#: As `fuzzing.calls.GENERATORS`.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "relu2_mlp_fp8": (_relu2_mlp_fp8, 3),
    "relu2_mlp_fp8_gradients": (_relu2_mlp_fp8_gradients, 3),
}


def _weight(w, scale, like: Tensor, columns: int) -> None:
    tensor(w, 2, [like.dtype, FP8])
    need(w.shape[1] == columns, "columns of a weight")
    need((scale is not None) == (w.dtype == FP8), "a scale is for float8")
    contract.one_of_scale(scale, 1, True)


def _bias(bias, dtype: torch.dtype, elements: int) -> None:
    if bias is not None:
        tensor(bias, 1, [dtype])
        need(bias.shape[0] == elements, "bias")


def _there(device: str, *values: Any) -> list[Any]:
    return [v.detach().contiguous().to(device) if isinstance(v, Tensor) else v for v in values]


def _same(name: str, actual: Tensor, expected: Tensor) -> None:
    assert_same_bits(actual.cpu(), expected.cpu(), name)


def relu2_mlp_fp8(
    device, x, w1, w2, scales, b1, b2, w1_scale, w2_scale, sparse, interleaved, threshold
) -> Check | None:
    contract.flag(sparse)
    contract.flag(interleaved)
    contract.threshold_of(threshold)
    tensor(x, 2, FLOATS)
    tokens, columns = x.shape
    need(columns > 0 and columns % 16 == 0, "columns of x")
    _weight(w1, w1_scale, x, columns)
    features = w1.shape[0]
    need(features > 0 and features % (32 if sparse else 16) == 0, "rows of w1")
    _weight(w2, w2_scale, x, features)
    out = w2.shape[0]
    need(out > 0 and out % 16 == 0, "rows of w2")
    tensor(scales, 1, [torch.float32])
    need(scales.shape[0] == DELAYED, "scales")
    _bias(b1, torch.bfloat16, features)
    _bias(b2, x.dtype, out)
    operands = x, w1, w2, scales, b1, b2, w1_scale, w2_scale
    if any(is_huge(t) for t in operands) or not is_ordinary(scales, w1_scale, w2_scale):
        return None

    def check(results) -> None:
        *actual, places = results
        assert tuple(places.shape) == PLACES and actual[0].shape == (tokens, out) and actual[0].dtype == x.dtype
        if tokens == 0:
            return
        x_, w1_, w2_, scales_, b1_, b2_, *of_weights = _there(device, *operands)
        of_weights = [None if s is None else s.reshape(1) for s in of_weights]
        how = sparse, interleaved, threshold
        expected, used, seen = forward(x_, w1_, w2_, scales_, b1_, b2_, *of_weights, *how)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            if e is None:
                assert a.numel() == 0
            else:
                _same(f"result {i}", a, e)
        _same("delayed scales", places[:DELAYED, 0], scales)
        _same("scales", places[DELAYED:, 0], torch.cat((used[2].reshape(1), used[3].reshape(1), used[0])))
        _same("largest", places[:2, 1], torch.cat(seen))

    return check


def _codes(t, rows: int | None, columns: int) -> None:
    tensor(t, 2, [FP8])
    need((rows is None or t.shape[0] == rows) and t.shape[1] == columns, "shape of codes")


def _is_ascending(hot: Tensor | None, features: int) -> bool:
    """Whether each index is there once: of the others any may win."""
    if hot is None or hot.numel() == 0:
        return True
    return not is_huge(hot) and bool((hot[1:] > hot[:-1]).all()) and 0 <= hot[0] and hot[-1] < features


def relu2_mlp_fp8_gradients(
    device,
    grad,
    x_transposed,
    w1_transposed,
    w2_transposed,
    values,
    meta,
    places,
    scales,
    hot,
    dense_features,
    sparse,
    interleaved,
    need_x,
    need_dh,
) -> Check | None:
    for option in (sparse, interleaved, need_x, need_dh):
        contract.flag(option)
    tensor(grad, 2, FLOATS)
    tokens, out = grad.shape
    need(out > 0 and out % 16 == 0, "columns of grad")
    _codes(x_transposed, None, round_up(tokens, 32))
    columns = x_transposed.shape[0]
    need(columns > 0 and columns % 16 == 0, "rows of x_transposed")
    _codes(w2_transposed, None, round_up(out, 32))
    features = w2_transposed.shape[0]
    need(features > 0 and features % (32 if sparse else 16) == 0, "rows of w2_transposed")
    _codes(w1_transposed, columns, round_up(features, 32))
    kept = features // 2 if sparse else features
    _codes(values, tokens, kept)
    tensor(meta)
    if sparse:
        contract.metadata(meta, tokens, features, FP8, -1)
    else:
        need(meta.numel() == 0, "no metadata")
    tensor(places, 2, [torch.float32])
    need(places.numel() == PLACES[0] * PLACES[1], "places")
    tensor(scales, 1, [torch.float32])
    need(scales.shape[0] == DELAYED, "scales")
    if hot is not None:
        tensor(hot, 1, [torch.int64])
        need(hot.shape[0] <= features and hot.shape[0] % 16 == 0, "elements of hot")
    need(0 <= contract.integer(dense_features) <= features and dense_features % 16 == 0, "dense_features")
    operands = grad, x_transposed, w1_transposed, w2_transposed, values, meta, places, scales, hot
    if any(is_huge(t) for t in operands) or not is_ordinary(places, scales):
        return None
    if sparse and not (is_legal_meta(meta) and _is_ascending(hot, features)):
        return None

    def check(results) -> None:
        *actual, found = results
        shapes = (tokens if need_x else 0, columns), (features, columns), (out, features), (tokens * need_dh, kept)
        assert tuple(tuple(t.shape) for t in actual) == shapes and found.shape == (DELAYED,)
        if tokens == 0:
            return
        grad_, x, w1, w2, y, meta_, places_, now, hot_ = _there(device, *operands)
        of = places_.reshape(PLACES)[:, 0].clone().unbind()
        used = [of[i].reshape(1).clone() for i in (6, 1, 4, 5)]
        seen = places_.reshape(PLACES)[:2, 1].clone().split(1)
        before = places_.reshape(PLACES)[:DELAYED, 0].clone()
        how = now, hot_ if sparse else None, dense_features if sparse else 0, sparse, interleaved
        expected, next_scales = backward(grad_, (None, x, w1, w2, y, meta_), used, seen, before, *how)
        wanted = need_x, True, True, need_dh
        for i, (a, e, there) in enumerate(zip(actual, expected, wanted, strict=True)):
            if there:
                _same(f"result {i}", a, e)
        _same("next scales", found, next_scales)

    return check
