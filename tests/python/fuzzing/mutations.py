"""What is done to a legal call: sometimes it stays legal, mostly it has to be refused, and never may it crash."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from oracle import FP8

from fuzzing.calls import Call
from fuzzing.dice import ALL_DTYPES, Dice
from fuzzing.tensors import LAYOUTS, Draw

#: Sizes that do not fit 31, 32 or 63 bits in one way or another; expanded tensors have them without memory.
HUGE = (2**31 - 1, 2**31 - 128, 2**31, 2**31 + 16, 2**32, 2**32 + 16, 2**40, 2**62)
NO_TENSORS = (3.0, 7, "x", [], [1.0, 2.0], np.float32(1.0), np.zeros((2, 32), np.float32), True, {})
INTEGERS = (0, 1, 2, -3, -4, 7, 16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**32 - 1, 2**62, 2**63 - 1, -(2**63), 2**63)
WORDS = (
    "",
    "RELU",
    "relu ",
    "relu2\0",
    "Relu2",
    "rows",
    "row\n",
    "tensor ",
    "none",
    "relu",
    "x" * 3000,
    "reluµ",
    "given",
)
NO_OPTIONS = (None, 1.5, "x", torch.float32, [], -1, 2, True)
OUT_DTYPES = (*ALL_DTYPES, None, "float32", 2**20, -1)


def _tensors(call: Call, *, forgetful: bool = False) -> list[str]:
    """Arguments that are tensors; `forgetful`: or that could be."""
    could_be = {name for name, kind in call.arguments if "Tensor" in kind}
    return [name for name, value in call.args.items() if isinstance(value, Draw) or forgetful and name in could_be]


def _changed(shape: tuple[int, ...], d: Dice, sizes: Callable[[int], int]) -> tuple[int, ...]:
    at = d.randrange(len(shape))
    return tuple(max(sizes(size), 0) if i == at else size for i, size in enumerate(shape))


def dtype(t: Draw, d: Dice) -> Draw:
    contents = "bits" if t.contents in ("ascending", "permuted", "indices", "wild", "pattern") else t.contents
    new = d.choice(ALL_DTYPES)
    return replace(t, dtype=new, contents=contents if new.is_floating_point else "bits")


def rank(t: Draw, d: Dice) -> Draw:
    shapes = [(), (1, *t.shape), (*t.shape, 1), (2, *t.shape), t.shape[1:], t.shape[:-1], (1, 1, 1, *t.shape)]
    return replace(t, shape=d.choice(shapes), layout=_flat(t), contents=_loose(t))


def size(t: Draw, d: Dice) -> Draw:
    if not t.shape:
        return replace(t, shape=(d.choice((0, 2, 3)),), layout=_flat(t))
    change = d.choice((1, -1, 4, -4, 16, 128, -128))
    sizes = d.choice((lambda s: s + change, lambda s: 2 * s, lambda s: s // 2, lambda s: 0, lambda s: 1))
    return replace(t, shape=_changed(t.shape, d, sizes), layout=_flat(t), contents=_loose(t))


def transposed(t: Draw, d: Dice) -> Draw:
    return replace(t, shape=t.shape[::-1], contents=_loose(t))


def huge(t: Draw, d: Dice) -> Draw:
    shape = t.shape or (1,)
    shape = _changed(shape, d, lambda _: d.choice(HUGE))
    return replace(t, shape=shape, layout="broadcast", contents=_loose(t), form="plain")


def layout(t: Draw, d: Dice) -> Draw:
    if not t.shape or t.layout == "broadcast":
        return t
    return replace(
        t, layout=d.choice(LAYOUTS if len(t.shape) > 1 else ("offset", "strided", "gaps")), contents=_loose(t)
    )


def contents(t: Draw, d: Dice) -> Draw:
    if t.dtype == torch.uint8:
        return replace(t, contents="bits")
    if t.dtype == torch.int64:
        return replace(t, contents="wild")
    return replace(t, contents=d.choice(("specials", "bits", "hostile")) if t.dtype.is_floating_point else "bits")


def form(t: Draw, d: Dice) -> Draw:
    if t.layout == "broadcast" or t.dtype == FP8:
        return replace(t, form="parameter")
    chosen = d.choice(("parameter", "negated", "zerotensor", "sparse"))
    return replace(t, form=chosen, layout="contiguous" if chosen in ("zerotensor", "sparse") else t.layout)


def device(t: Draw, d: Dice) -> Draw:
    return replace(t, device="meta" if d.device == "cpu" else d.choice(("cpu", "cpu", "meta")))


def _flat(t: Draw) -> str:
    """A layout that any shape can have."""
    return t.layout if t.layout == "broadcast" else "contiguous"


def _loose(t: Draw) -> str:
    """Contents that any shape can have."""
    return "indices" if t.contents in ("ascending", "permuted") else t.contents


#: Of one tensor, and how often.
OF_TENSORS: dict[Callable[[Draw, Dice], Draw], int] = {
    dtype: 4,
    rank: 3,
    size: 6,
    transposed: 1,
    huge: 3,
    layout: 2,
    contents: 5,
    form: 2,
    device: 1,
}


def _no_tensor(call: Call, d: Dice) -> tuple[str, Any]:
    name = d.choice(_tensors(call, forgetful=True))
    return name, None if d.chance(0.6) else d.choice(NO_TENSORS)


def _missing_or_spare(call: Call, d: Dice) -> tuple[str, Any]:
    """An optional tensor that is left out, or one that nobody asked for."""
    names = [name for name, kind in call.arguments if kind == "Optional[Tensor]"]
    if not names:
        return _option(call, d)
    name = d.choice(names)
    given = call.args[name]
    return name, d.scale(d.choice((0, 1, 1, 2, 8, 128)), "powers") if given is None else None


def _option(call: Call, d: Dice) -> tuple[str, Any]:
    arguments = [(name, kind) for name, kind in call.arguments if "Tensor" not in kind]
    if not arguments:
        return _no_tensor(call, d)
    name, kind = d.choice(arguments)
    if d.chance(0.1):
        return name, d.choice(NO_OPTIONS)
    if "ScalarType" in kind:
        return name, d.choice(OUT_DTYPES)
    if kind in ("int", "SymInt"):
        old = call.args[name]
        near = (old + 1, old - 1, old + 16, 2 * old) if isinstance(old, int) else INTEGERS
        return name, d.choice(INTEGERS if d.chance(0.7) else near)
    if kind == "float":
        return name, d.choice((-0.0, -1e-30, 1e300, math.nan, math.inf, 2.0))
    if kind == "str":
        return name, d.choice(WORDS)
    return name, d.choice((True, False, None, "x", 1.5))


def mutate(call: Call, d: Dice) -> Call:
    """One change of a call."""
    if not call.arguments:
        return call
    kind = d.weighted({"tensor": 70, "none": 8, "spare": 8, "option": 14})
    names = _tensors(call)
    if kind == "tensor" and names:
        name = d.choice(names)
        change = d.weighted(OF_TENSORS)
        value, what = change(call.args[name], d), change.__name__
        if math.prod(value.shape) >= 2**63:  # torch has no such tensor
            return call
    else:
        pick = {"none": _no_tensor, "spare": _missing_or_spare}.get(kind, _option)
        name, value = pick(call, d)
        what = kind
    return replace(call, args=call.args | {name: value}, mutations=(*call.mutations, f"{what} of {name}"))
