"""What speed to expect of a network, from sizes that were measured; the table is one of records of the benches."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sparse24._options import positive_number
from sparse24.format import FEATURES
from sparse24.mlp.choice import few_tokens, pays

PRECISIONS = ("bf16", "fp8")
#: By how much a size may differ from one that was measured.
_FACTOR = 4


@dataclass(frozen=True)
class Calls:
    """Tokens that the feed-forward networks get in one call, by what the model is doing."""

    prefill: int = 8192
    decode: int = 8
    training: int = 16384

    def __post_init__(self) -> None:
        for name in ("prefill", "decode", "training"):
            object.__setattr__(self, name, positive_number("ModelReport.at", name, getattr(self, name)))


PHASES = ("prefill", "decode", "training")


class _Row(NamedTuple):
    race: str
    dtype: str
    size: tuple[int, ...]  # tokens, d_model, d_ff
    speedup: float


@cache
def _table() -> tuple[str, tuple[_Row, ...]]:
    """Name the device, and give the rows."""
    content = json.loads(Path(__file__).with_name("measured.json").read_text())
    return content["gpu"], tuple(_Row(race, dtype, tuple(size), gain) for race, dtype, *size, gain in content["rows"])


def device() -> str:
    """Name the device that was measured."""
    return _table()[0]


def speedup(phase: str, dtype: str, tokens: int, d_model: int, d_ff: int, d_out: int) -> float | None:
    """How many times as fast as with torch.compile in the same precision a network of these sizes is by default.

    1.0 where `relu2_mlp` runs it dense. Else that of the nearest size that was measured, which differs by a factor of
    four at most; None if there is none. Decoding: of a network that is prepared for it, where that was measured.
    """
    fp8, size = dtype == "fp8", (tokens, d_model, d_ff)
    if phase == "decode" and 0 < tokens <= few_tokens(d_ff, d_out, fp8=fp8):
        prepared = _nearest("decode", dtype, size)
        if prepared is not None:
            return prepared
    if d_ff % FEATURES[fp8] or not pays(tokens, d_ff, d_out, fp8=fp8):
        return 1.0
    return _nearest("training" if phase == "training" else "forward", dtype, size)


def speedup_of_experts(phase: str, dtype: str, tokens: int, d_model: int, d_ff: int, d_out: int) -> float | None:
    """How many times as fast as torch's grouped products the experts of a mixture are, for so many tokens."""
    if d_ff % FEATURES[dtype == "fp8"]:
        return 1.0
    return _nearest("experts_training" if phase == "training" else "experts", dtype, (tokens, d_model, d_ff))


def _nearest(race: str, dtype: str, size: tuple[int, ...]) -> float | None:
    rows = [r for r in _table()[1] if (r.race, r.dtype) == (race, dtype)]
    near = min(rows, key=lambda r: _distance(r.size, size), default=None)
    if near is None or any(abs(math.log(a / b, _FACTOR)) > 1 for a, b in zip(near.size, size, strict=True)):
        return None
    return near.speedup


def speedups(layer: Mapping[str, Any], calls: Calls) -> dict[str, float | None]:
    """Give all of them, by name, for a layer with `d_model`, `d_ff` and `d_out`."""
    size = (layer["d_model"], layer["d_ff"], layer["d_out"])
    known = speedup_of_experts if "experts" in layer else speedup
    return {
        f"{phase}_speedup{'' if dtype == 'bf16' else '_fp8'}": known(phase, dtype, getattr(calls, phase), *size)
        for dtype in PRECISIONS
        for phase in PHASES
    }


def of_all(layers: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """How many times as fast all networks together are; those that stay dense take their time, too.

    A network's time is taken to be its products.
    """
    before = after = 0.0
    for layer in layers:
        products = layer["d_ff"] * (layer["d_model"] + layer["d_out"])
        gain = layer[name] if layer["convert"] else 1.0
        if gain is None:
            return None
        before, after = before + products, after + products / gain
    return before / after if after else None


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.hypot(*(math.log2(x / y) for x, y in zip(a, b, strict=True)))
