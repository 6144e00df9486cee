"""The products of experts: how their arguments are made, and what must come of them, expert by expert."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from oracle import FP8, Pattern, meta_atom, meta_bytes, round_up
from torch import Tensor

from fuzzing import contract, products
from fuzzing.calls import alignment
from fuzzing.contract import FLOATS, FLOATS_AND_FP8, Check, Unsettled, is_huge, is_legal_meta, is_ordinary, need, tensor
from fuzzing.dice import Dice
from fuzzing.rounding import product
from fuzzing.tensors import Draw

MOST = 1024
#: Rows of a tile: a 2:4 activation has those of each expert from a multiple of them on.
TILE = 128
#: Of metadata, what keeps the first two of each four.
META_PADDING = 0x44


def padded_rows(rows: int, experts: int) -> int:
    return TILE * (rows // TILE + min(rows, experts))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _offsets(d: Dice, rows: int) -> Draw:
    """Mostly some that ascend; all of them are legal."""
    experts = d.choice((1, 2, 3, 5, 9, 40))
    contents = d.choice(("ends", "ends", "ends", "ends", "zeros", "bits"))
    return d.draw((experts,), torch.int32, contents, limit=d.choice((rows, rows, rows // 2, rows + 9)))


def _sizes(d: Dice, dtype: torch.dtype, features: int) -> tuple[int, int, int, Draw]:
    """Rows, columns and features of a product, and offsets."""
    columns = {FP8: 16, torch.float32: 1}.get(dtype, 8)
    while True:
        rows, depth, width = d.product((0, columns, features))
        offsets = _offsets(d, rows)
        if depth > 0 and offsets.shape[0] * depth * width <= 2**20:
            return rows, depth, width, offsets


def _dtype(d: Dice) -> torch.dtype:
    return d.choice((torch.bfloat16, FP8)) if d.device == "cuda" and d.chance(0.9) else d.dtype(fp8=True)


def _weight(d: Dice, shape: tuple[int, ...], like: Draw) -> Draw:
    return d.draw(shape, like.dtype, "integers" if like.contents == "integers" else None)


def _scale_of_weight(d: Dice, experts: int, width: int) -> Draw | None:
    kind = d.choice(("none", "none", "one", "each"))
    return None if kind == "none" else d.draw((experts, width)[: 1 + (kind == "each")], torch.float32, "powers")


def _products_of_x(d: Dice, multiple: Callable[[torch.dtype], int]) -> dict[str, Any]:
    """What is multiplied where x is dense; features are a multiple that depends on its dtype."""
    dtype = _dtype(d)
    rows, depth, width, offsets = _sizes(d, dtype, multiple(dtype))
    x = d.draw((rows, depth), dtype, d.contents())
    return {
        "x": x,
        "w": _weight(d, (offsets.shape[0], width, depth), x),
        "offsets": offsets,
        "scale_x": d.maybe_scale(rows),
        "scale_w": _scale_of_weight(d, offsets.shape[0], width),
    }


def _first(d: Dice, multiple: Callable[[torch.dtype], int]) -> dict[str, Any]:
    return _products_of_x(d, multiple) | {
        "activation": d.choice(("relu2", "relu2", "relu")),
        "threshold": d.choice((0.0, 0.0, 1.0, 0.3)),
    }


def _linear_relu2(d: Dice) -> dict[str, Any]:
    return _first(d, lambda _: 8)


def _linear_compress(d: Dice) -> dict[str, Any]:
    return _first(d, lambda dtype: alignment(dtype, -1))


def _out_dtype(d: Dice) -> torch.dtype | None:
    return d.choice((None, torch.bfloat16, torch.float16, torch.float32)[: 3 if d.device == "cuda" else 4])


def _linear(d: Dice) -> dict[str, Any]:
    args = _products_of_x(d, lambda _: 8)
    return args | {
        "row_scale": d.scale(args["x"].shape[0]) if d.chance(0.6) else None,
        "out_dtype": _out_dtype(d),
    }


def _mm(d: Dice) -> dict[str, Any]:
    dtype = _dtype(d)
    while True:
        rows, width, depth, offsets = _sizes(d, dtype, alignment(dtype, -1))
        width = round_up(width, 8)
        if depth > 0:
            break
    experts, padded = offsets.shape[0], padded_rows(rows, offsets.shape[0])
    values = d.draw((padded, depth // 2), dtype, d.contents())
    return {
        "values": values,
        "meta": d.meta(meta_bytes(padded, depth, dtype, -1)),
        "b": _weight(d, (experts, depth, width), values),
        "offsets": offsets,
        "scale_a": d.maybe_scale(padded),
        "scale_b": _scale_of_weight(d, experts, width),
        "row_scale": d.scale(rows) if d.chance(0.6) else None,
        "rows": rows,
        "out_dtype": _out_dtype(d),
    }


def _linear_gradient(d: Dice) -> dict[str, Any]:
    dtype = _dtype(d)
    rows, depth, width, offsets = _sizes(d, dtype, alignment(dtype, -1))
    experts, padded = offsets.shape[0], padded_rows(rows, offsets.shape[0])
    grad = d.draw((rows, depth), dtype, d.contents())
    scaled = dtype == FP8 or d.chance(0.02)
    return {
        "grad": grad,
        "w": _weight(d, (experts, depth, width), grad),
        "values": d.draw((padded, width // 2), dtype, d.choice(("squares", "squares", "zeros", "specials"))),
        "meta": d.meta(meta_bytes(padded, width, dtype, -1)),
        "offsets": offsets,
        "row_scale": d.scale(rows) if d.chance(0.6) else None,
        "scale_grad": d.maybe_scale(rows) if scaled else None,
        "scale_w": _scale_of_weight(d, experts, width) if scaled else None,
        "scale_y": d.scale(padded) if scaled and d.chance(0.7) else None,
        "dense": d.chance(0.6),
    }


def _weight_gradient(d: Dice) -> dict[str, Any]:
    dtype = torch.bfloat16 if d.device == "cuda" and d.chance(0.9) else d.dtype()
    while True:
        m, n, rows = d.product((8, 8, 0))
        offsets = _offsets(d, rows)
        if offsets.shape[0] * m * n <= 2**20:
            break
    a = d.draw((rows, m), dtype, d.contents())
    return {"a": a, "b": _weight(d, (rows, n), a), "offsets": offsets}


#: Of every op, how its arguments are made, and how often it is tried.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "experts_linear_relu2": (_linear_relu2, 1),
    "experts_linear_compress": (_linear_compress, 2),
    "experts_linear": (_linear, 1),
    "experts_mm": (_mm, 2),
    "experts_linear_gradient": (_linear_gradient, 2),
    "experts_weight_gradient": (_weight_gradient, 1),
}


# ---- rules -----------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """The rows of one expert, and where its padded ones begin."""

    expert: int
    rows: slice
    padded: int

    @property
    def padded_rows(self) -> slice:
        return slice(self.padded, self.padded + self.rows.stop - self.rows.start)


def groups(offsets: Tensor, rows: int) -> Iterator[Group]:
    """Of experts that have rows. What does not ascend counts as the largest before it."""
    begin = padded = 0
    for expert, end in enumerate(offsets.tolist()):
        end = max(begin, min(end, rows))
        if end > begin:
            yield Group(expert, slice(begin, end), padded)
        padded += round_up(end - begin, TILE)
        begin = end


def _operands(first, w, offsets, scale_w) -> None:
    tensor(first, 2, FLOATS_AND_FP8)
    tensor(w, 3, [first.dtype])
    tensor(offsets, 1, [torch.int32])
    experts = offsets.shape[0]
    need(1 <= experts <= MOST and w.shape[0] == experts, "experts")
    if scale_w is not None:
        tensor(scale_w, None, [torch.float32])
        need(tuple(scale_w.shape) in ((experts,), (experts, w.shape[1])), "scale of w")


def _columns(x) -> None:
    multiple = 1 if x.dtype == torch.float32 else 16 // x.dtype.itemsize
    need(x.shape[1] > 0 and x.shape[1] % multiple == 0, "columns of x")


def _of_group(scale: Tensor | None, rows: slice, many: int) -> Tensor | None:
    """Scales of rows, or one for all."""
    return scale if scale is None or scale.numel() == 1 and many != 1 else scale.reshape(-1)[rows]


def _of_expert(scale: Tensor | None, expert: int) -> Tensor | None:
    return None if scale is None else scale[expert]


def _check_first(x, w, offsets, scale_x, scale_w, activation, threshold) -> bool:
    """Whether results are looked at."""
    tensor(x, 2, FLOATS_AND_FP8)
    _operands(x, w, offsets, scale_w)
    need(w.shape[2] == x.shape[1], "columns of w")
    _columns(x)
    contract.one_of_scale(scale_x, x.shape[0], True)
    contract.word(activation, ("relu2", "relu"))
    contract.threshold_of(threshold)
    return not any(is_huge(t) for t in (x, w)) and is_ordinary(scale_x, scale_w)


def experts_linear_relu2(x, w, offsets, scale_x, scale_w, activation, threshold) -> Check | None:
    looked_at = _check_first(x, w, offsets, scale_x, scale_w, activation, threshold)
    need(w.shape[1] % 8 == 0, "rows of w")
    return _each_first(products.linear_relu2, x, w, offsets, scale_x, scale_w, activation, threshold, looked_at)


def experts_linear_compress(x, w, offsets, scale_x, scale_w, activation, threshold) -> Check | None:
    looked_at = _check_first(x, w, offsets, scale_x, scale_w, activation, threshold)
    need(w.shape[1] % alignment(x.dtype, -1) == 0, "rows of w")
    return _each_first(products.linear_compress, x, w, offsets, scale_x, scale_w, activation, threshold, looked_at)


def _each_first(rule, x, w, offsets, scale_x, scale_w, activation, threshold, looked_at: bool) -> Check | None:
    if not looked_at:
        return None
    compressed = rule is products.linear_compress
    fp8 = x.dtype == FP8
    extra: dict[str, Any] = {"scaling": "row" if fp8 else "given"} if compressed else {}
    stored = (FP8 if compressed else torch.bfloat16) if fp8 else None
    none = torch.empty(0), torch.empty(0, dtype=torch.int32)

    def check(results) -> None:
        shape = (padded_rows(x.shape[0], w.shape[0]), w.shape[1] // 2) if compressed else (x.shape[0], w.shape[1])
        assert tuple(results[0].shape) == shape
        for group in groups(offsets, x.shape[0]):
            of_rows = rule(
                x[group.rows],
                w[group.expert],
                _of_group(scale_x, group.rows, x.shape[0]),
                _of_expert(scale_w, group.expert),
                None,
                scale_out=None,
                out_dtype=stored,
                statistics=False,
                activation=activation,
                threshold=threshold,
                **extra,
            )
            if of_rows is None:
                continue
            if not compressed:
                of_rows((results[0][group.rows], *none))
                continue
            values, meta, scale = results
            part = _meta_of(meta, values.shape[0], group, x.dtype)
            of_rows((values[group.padded_rows], part, scale[group.padded_rows] if fp8 else scale, *none))

    return check


def _meta_of(meta: Tensor, padded: int, group: Group, dtype: torch.dtype) -> Tensor:
    """Metadata of one expert, as that of an operand of its own. Half a tile without rows has none: kernels skip it."""
    width = meta_atom(dtype) // 8
    rows = group.rows.stop - group.rows.start
    atoms = meta.view(-1, padded * width) if meta.numel() else meta.view(0, padded * width)
    of_tiles = atoms[:, group.padded * width : (group.padded + round_up(rows, TILE)) * width].clone()
    of_tiles[:, round_up(rows, TILE // 2) * width :] = META_PADDING
    return of_tiles.reshape(-1)


def _second(first, w, offsets, scale_a, scale_w, row_scale, rows: int, out_dtype) -> bool:
    """Whether results are looked at; w [E, N, K]."""
    _operands(first, w, offsets, scale_w)
    need(w.shape[1] % 8 == 0, "outputs")
    contract.one_of_scale(scale_a, first.shape[0], True)
    contract.one_of_scale(row_scale, rows, False)
    contract.out_dtype_of(out_dtype, FLOATS)
    return not any(is_huge(t) for t in (first, w)) and is_ordinary(scale_a, scale_w, row_scale)


def _check_second(result: Tensor, a: Tensor, mask, w, offsets, scales, rows: int, out_dtype, padded: bool) -> None:
    scale_a, scale_w, row_scale = scales
    assert result.dtype == (out_dtype or (torch.bfloat16 if a.dtype == FP8 else a.dtype))
    assert tuple(result.shape) == (rows, w.shape[1]) and result.is_contiguous()
    end = 0
    for group in groups(offsets, rows):
        of_a = group.padded_rows if padded else group.rows
        end, factor = group.rows.stop, _of_group(scale_a, of_a, a.shape[0])
        if row_scale is not None:
            factor = row_scale.reshape(-1)[group.rows] * (1 if factor is None else factor.reshape(-1))
        expected = product(
            a[of_a], w[group.expert].t(), factor, _of_expert(scale_w, group.expert), None, mask and mask()[of_a]
        )
        expected.check(result[group.rows])
    assert not result[end:].any(), "rows of no expert"


def experts_linear(x, w, offsets, scale_x, scale_w, row_scale, out_dtype) -> Check | None:
    tensor(x, 2, FLOATS_AND_FP8)
    _columns(x)
    looked_at = _second(x, w, offsets, scale_x, scale_w, row_scale, x.shape[0], out_dtype)
    need(w.shape[2] == x.shape[1], "columns of w")
    scales = scale_x, scale_w, row_scale
    check = lambda out: _check_second(out[0], x, None, w, offsets, scales, x.shape[0], out_dtype, False)  # noqa: E731
    return check if looked_at else None


def experts_mm(values, meta, b, offsets, scale_a, scale_b, row_scale, rows, out_dtype) -> Check | None:
    tensor(values, 2, FLOATS_AND_FP8)
    tensor(b, 3)
    need(contract.integer(rows) >= 0, "rows")
    k = 2 * values.shape[1]
    need(k > 0 and k % alignment(values.dtype, -1) == 0, "columns of values")
    looked_at = _second(values, b.mT, offsets, scale_a, scale_b, row_scale, rows, out_dtype)
    need(b.shape[1] == k, "rows of b")
    need(values.shape[0] == padded_rows(rows, offsets.shape[0]), "rows of values")
    contract.metadata(meta, values.shape[0], k, values.dtype, -1)
    if not looked_at or not is_legal_meta(meta):
        return None

    def check(results) -> None:
        pattern = Pattern.of_meta(meta, values.shape[0], k, values.dtype, -1)
        a, scales = pattern.scatter(values.detach()), (scale_a, scale_b, row_scale)
        _check_second(results[0], a, pattern.mask, b.mT, offsets, scales, rows, out_dtype, True)

    return check


def on_cuda(first: Tensor, values: dict[str, Any]) -> None:
    """Kernels are for bfloat16 and float8: others are refused where there is anything to multiply."""
    need(values.get("out_dtype") != torch.float32, "16 bits of results")
    if first.dtype not in (torch.bfloat16, FP8):
        raise Unsettled
