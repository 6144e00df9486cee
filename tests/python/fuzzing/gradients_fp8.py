"""The gradients of float8 operands: generators of their calls, and rules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import torch
from compare import assert_same_bits
from oracle import FP8, Pattern, meta_bytes, round_up
from torch import Tensor
from training_reference import token_order

from fuzzing import contract
from fuzzing.contract import Check, columns_or_nan, is_legal_meta, is_ordinary, need, tensor
from fuzzing.dice import Dice
from fuzzing.rounding import Product, near, product


def scale(d: Dice) -> Any:
    return d.scale(1, d.choice(("powers", "small")))


def _scales(d: Dice) -> dict[str, Any]:
    return {name: scale(d) for name in ("scale_grad", "scale_w", "scale_y", "scale_dh")}


def _squares(d: Dice) -> str:
    return d.choice(("squares", "squares", "zeros", "specials"))


def _linear_gradient_fp8(d: Dice, packed: bool = False) -> dict[str, Any]:
    tokens, depth, features = d.product((0, 32 if packed else 16, 32))
    contents = d.contents()
    hot = None
    if d.chance(0.4):
        of_hot = d.choice(("ascending", "ascending", "indices", "wild"))
        hot = d.draw((d.randint(0, min(features, 20)),), torch.int64, of_hot, limit=features)
    shape, weights = (features, depth // 2 if packed else depth), "integers" if contents == "integers" else None
    return {
        "grad": d.draw((tokens, depth), FP8, contents),
        "w": d.draw(shape, FP8, weights),
        **({"w_meta": d.meta(meta_bytes(features, depth, FP8, -1))} if packed else {}),
        "values": d.draw((tokens, features // 2), FP8, _squares(d)),
        "meta": d.meta(meta_bytes(tokens, features, FP8, -1)),
        **_scales(d),
        "interleaved": d.chance(0.5),
        "hot": hot,
    }


def _linear_gradient_fp8_packed(d: Dice) -> dict[str, Any]:
    return _linear_gradient_fp8(d, packed=True)


def _linear_relu2_gradient_fp8(d: Dice) -> dict[str, Any]:
    tokens, depth, features = d.product((0, 16, 16))
    contents = d.contents()
    return {
        "grad": d.draw((tokens, depth), FP8, contents),
        "w": d.draw((features, depth), FP8, "integers" if contents == "integers" else None),
        "y": d.draw((tokens, features), FP8, _squares(d)),
        **_scales(d),
    }


#: As `fuzzing.calls.GENERATORS`.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "linear_gradient_fp8": (_linear_gradient_fp8, 3),
    "linear_gradient_fp8_packed": (_linear_gradient_fp8_packed, 2),
    "linear_relu2_gradient_fp8": (_linear_relu2_gradient_fp8, 2),
}


def _check_operands(grad, w, columns: int, multiple: int) -> tuple[int, int]:
    """Check grad and w, whose columns are so many times `columns` of grad's; tokens and features."""
    tensor(grad, 2, [FP8])
    need(grad.shape[1] % (16 * columns) == 0, "columns of grad")
    tensor(w, 2, [FP8])
    need(w.shape[1] * columns == grad.shape[1] and w.shape[0] % multiple == 0, "shape of w")
    return grad.shape[0], w.shape[0]


def _check_scales(*scales) -> None:
    for one in scales:
        tensor(one, None, [torch.float32])
        contract.one_of_scale(one, 1, True)


def _root(t: Tensor) -> Tensor:
    """Correctly rounded, which torch's is not everywhere."""
    return torch.from_numpy(np.asarray(np.sqrt(t.numpy())))


def _check_dh(dh: Tensor, statistics, p: Product, y: Tensor, scales) -> None:
    """Codes of ``dy * 2 sqrt(y)``, where p is dy, and what is seen of them."""
    scale_grad, scale_w, scale_y, scale_dh = (s.detach().reshape(()) for s in scales)
    amax, saturated = statistics
    root = 2 * _root(y.detach().float())
    to_dh = scale_grad * scale_w * _root(scale_y)
    factor = to_dh * scale_dh.reciprocal()
    if p.is_exact:
        made = p.rounded(torch.bfloat16).float() * root
        scaled = made * factor
        assert_same_bits(dh, oracle.to_e4m3(scaled), "dh")
        largest = made.abs().nan_to_num(nan=0.0)
        assert_same_bits(amax, (largest.max().reshape(1) if made.numel() else torch.zeros(1)) * to_dh, "amax")
        assert saturated.tolist() == [int((scaled.abs() > 448).sum())], "saturated"
        return
    of_dy = p.bound + torch.finfo(torch.bfloat16).eps * p.exact.abs() + torch.finfo(torch.bfloat16).tiny
    exact, bound = p.exact * root.double() * factor.double(), of_dy * root.double() * factor.double()
    settled = (p.exact.abs() + of_dy < 1e30) & exact.isfinite() & bound.isfinite()
    got = torch.where(settled, dh.double(), 0.0).float()
    wanted = torch.where(settled, exact.clamp(-448.0, 448.0), 0.0)
    near(got, wanted, torch.where(settled, bound + wanted.abs() / 16 + 2.0**-10, 0.0))


def _gradient(tokens, features, dy: Callable[[], Product], values, meta, scales, interleaved, hot) -> Check | None:
    tensor(values, 2, [FP8])
    need(tuple(values.shape) == (tokens, features // 2), "shape of values")
    contract.metadata(meta, tokens, features, FP8, -1)
    _check_scales(*scales)
    contract.flag(interleaved)
    if hot is not None:
        tensor(hot, 1, [torch.int64])
        need(hot.shape[0] <= features, "elements of hot")
    if not is_legal_meta(meta) or not is_ordinary(*scales):
        return None

    def check(results) -> None:
        pattern = Pattern.of_meta(meta, tokens, features, FP8, -1)
        dh, *along_tokens, y_hot, dh_hot, amax, saturated = results
        codes = values.detach()
        if not (codes.float() < 0).any():  # no square
            p = dy()
            kept = Product(*(pattern.gather(t) for t in (p.exact, p.magnitude)), p.is_exact, p.fp8)
            _check_dh(dh, (amax, saturated), kept, codes, scales)
        order, one = token_order(tokens, interleaved), torch.ones(1)
        dense = [pattern.scatter(t) for t in (dh, codes)]
        expected = []
        for of in dense:
            kept = oracle.compress_fp8(of.float()[order], one, "none", -2, "tensor")[1]
            turned = Pattern.of_meta(kept, tokens, features, FP8, -2).gather(of[order])  # a NaN keeps its code
            expected += [turned, kept]
        for i, (a, e) in enumerate(zip(along_tokens, expected, strict=True)):
            assert_same_bits(a, e, f"result {i + 1}")
        chosen = torch.empty(0, dtype=torch.int64) if hot is None else hot
        before = torch.cat((chosen.new_tensor([-1]), chosen)).cummax(0).values[:-1]
        bad = (chosen <= before) | (chosen >= features) | (chosen < 0)
        for name, of, rows in (("dh_hot", dense[0], dh_hot), ("y_hot", dense[1], y_hot)):
            assert tuple(rows.shape) == (len(chosen), round_up(tokens, 32)), name
            assert_same_bits(rows[:, :tokens], columns_or_nan(of[order], chosen, bad).t().contiguous(), name)
            padding = rows[:, tokens:].float()[~bad]
            assert not padding.isnan().any() and not padding.any(), f"padding of {name}"

    return check


def linear_gradient_fp8(
    grad, w, values, meta, scale_grad, scale_w, scale_y, scale_dh, interleaved, hot
) -> Check | None:
    sizes = _check_operands(grad, w, 1, 32)
    scales = scale_grad, scale_w, scale_y, scale_dh
    return _gradient(*sizes, lambda: product(grad, w.t()), values, meta, scales, interleaved, hot)


def linear_gradient_fp8_packed(
    grad, w, w_meta, values, meta, scale_grad, scale_w, scale_y, scale_dh, interleaved, hot
) -> Check | None:
    sizes = _check_operands(grad, w, 2, 32)
    depth = grad.shape[1]
    contract.metadata(w_meta, sizes[1], depth, FP8, -1)

    def dy() -> Product:
        pattern = Pattern.of_meta(w_meta, sizes[1], depth, FP8, -1)
        p = product(pattern.scatter(w.detach()), grad.t(), mask=pattern.mask())
        return Product(p.exact.t(), p.magnitude.t(), p.is_exact, p.fp8)

    scales = scale_grad, scale_w, scale_y, scale_dh
    check = _gradient(*sizes, dy, values, meta, scales, interleaved, hot)
    return check if is_legal_meta(w_meta) else None


def linear_relu2_gradient_fp8(grad, w, y, scale_grad, scale_w, scale_y, scale_dh) -> Check | None:
    tokens, features = _check_operands(grad, w, 1, 16)
    tensor(y, 2, [FP8])
    need(tuple(y.shape) == (tokens, features), "shape of y")
    scales = scale_grad, scale_w, scale_y, scale_dh
    _check_scales(*scales)
    if not is_ordinary(*scales):
        return None

    def check(results) -> None:
        dh, dh_transposed, y_transposed, *statistics = results
        codes = y.detach()
        if not (codes.float() < 0).any():
            _check_dh(dh, statistics, product(grad, w.t()), codes, scales)
        for name, of, made in (("dh", dh, dh_transposed), ("y", codes, y_transposed)):
            assert tuple(made.shape) == (features, round_up(tokens, 32)), f"{name}, transposed"
            assert_same_bits(made[:, :tokens], of.t().contiguous(), f"{name}, transposed")
            padding = made[:, tokens:].float()
            assert not padding.isnan().any() and not padding.any(), f"padding of {name}"

    return check
