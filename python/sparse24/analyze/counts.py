"""Counts of an activation, chunk by chunk: what the shares of `ActivationStats` are made of."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse24.analyze.pruning import top2_mask
from sparse24.analyze.tiles import Tiles
from sparse24.format import LARGEST_FP8
from sparse24.ops.token_order import interleave
from sparse24.recipe import Recipe

#: Tokens of a chunk. Groups along tokens and dense features are those of a chunk, as of a training step of that size.
CHUNK = 4096
#: Entries that are looked at together: a few of such matrices in float32 are what is needed beside the activation.
SLAB = 1 << 22
#: Numbers of neighbouring tokens whose active features are counted together.
TILES = (8, 64, 128)
#: How groups of tokens are made: neighbours, or what `Recipe.permute_tokens` makes.
ORDERS = {"token": lambda y: y, "permuted_token": interleave}

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# Half a unit in the last place above: what is larger saturates, what is not rounds to the largest value.
_FP8_SATURATES = 464.0


class Counts:
    """Sums over the tokens seen so far, in float64: counts, and energies, which span more than fp32 sums keep.

    Attributes
    ----------
    tokens, features : int
        Sizes.
    amax : float
        Largest activation.
    active : Tensor [F]
        Of each feature the number of tokens that it is not zero for.
    tiles : dict of int to Tiles
        Features that so many neighbouring tokens light.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens, self.features, self.amax = 0, features, 0.0
        self.active = torch.zeros(features, dtype=torch.int64, device=device)
        self.tiles = {size: Tiles(size, features, device) for size in TILES}
        self._sums: dict[str, Tensor] = {}

    def share(self, part: str, whole: str) -> float:
        """Divide a sum by another; 0 where that is 0."""
        divisor = self.sum(whole)
        return self.sum(part) / divisor if divisor != 0.0 else 0.0

    def sum(self, name: str) -> float:
        """Give one of the sums."""
        return float(self._sums.get(name, 0.0))

    def add(self, y1: Tensor, w2: Tensor | None = None, fp8_scale: Tensor | None = None) -> None:
        """Add the tokens of a pre-activation [T, F]; w2 [D_out, F] and fp8_scale as `activation_stats` takes them."""
        scales = [None] * (-(-y1.shape[0] // CHUNK) or 1)
        if fp8_scale is not None:
            each = fp8_scale.reshape(-1, 1)
            scales = [each] * len(scales) if each.shape[0] == 1 else each.split(CHUNK)
        for chunk, scale in zip(y1.split(CHUNK), scales, strict=True):
            self._add_chunk(chunk, w2, scale)

    def _add(self, name: str, value: Tensor | int) -> None:
        value = torch.as_tensor(value, device=self.active.device).double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _add_chunk(self, y1: Tensor, w2: Tensor | None, fp8_scale: Tensor | None) -> None:
        tokens, features = y1.shape
        self.tokens += tokens
        self._add("entries", y1.numel())
        amax = _squared_relu(y1.amax(1, keepdim=True)) if features else y1.new_zeros(tokens, 1, dtype=torch.float32)
        self.amax = max(self.amax, float(amax.amax()) if tokens else 0.0)
        scale = _row_scale(amax) if fp8_scale is None else _at_least_normal(fp8_scale.to(amax))
        along_tokens: dict[str, list[Tensor]] = {}
        out = dropped_out = y1.new_zeros((), dtype=torch.float32)
        for columns in _slabs(tokens, features):
            y2 = _squared_relu(y1[:, columns])
            kept = torch.where(top2_mask(y2), y2, 0)
            self._add_entries(y2, kept, columns)
            self._add_fp8(y2, scale)
            if w2 is not None:
                weight = w2[:, columns].float().t()
                out, dropped_out = out + y2 @ weight, dropped_out + (y2 - kept) @ weight
            for name, values in _along_tokens(kept):
                along_tokens.setdefault(name, []).append(values)
        for tiles in self.tiles.values():
            tiles.end(tokens)
        if w2 is not None:
            self._add("output", out.double().square().sum())
            self._add("output dropped", dropped_out.double().square().sum())
        self._add_along_tokens({name: torch.cat(parts) for name, parts in along_tokens.items()})

    def _add_entries(self, y2: Tensor, kept: Tensor, columns: slice) -> None:
        nonzero = y2 > 0
        counts = nonzero.view(torch.int8).unflatten(-1, (-1, 4)).sum(dim=-1, dtype=torch.int8)
        active = _count(nonzero, 0)
        self.active[columns] += active
        self._add("zeros", _count(y2 == 0))
        self._add("nonzeros", active.sum())
        self._add("feature nonzeros dropped", _count(nonzero & (kept == 0)))
        energy_dropped, energy = _energies(y2, kept)
        self._add("energy", energy)
        self._add("feature energy dropped", energy_dropped)
        self._add("groups", counts.numel())
        self._add("feature groups over 2", _count(counts > 2))
        for number in range(5):
            self._add(f"groups of {number}", _count(counts == number))
        for tiles in self.tiles.values():
            tiles.add(nonzero, columns)

    def _add_fp8(self, y2: Tensor, scale: Tensor) -> None:
        scaled = y2 / scale
        quantized = scaled.clamp(max=LARGEST_FP8).to(torch.float8_e4m3fn).float()
        self._add("fp8 saturated", _count(scaled > _FP8_SATURATES))
        self._add("fp8 underflow", _count((y2 > 0) & (quantized == 0)))

    def _add_along_tokens(self, of_features: dict[str, Tensor]) -> None:
        """Add sums of each feature; with the split, of all but those that the most tokens use."""
        if not of_features:
            return
        kept = of_features["kept"]
        # Of equals the lower, as `sparse24.densest_features` has it.
        order = kept.sort(descending=True, stable=True).indices
        dense = order[: Recipe().hot_features(self.features)]
        rest = torch.ones_like(kept, dtype=torch.float64).index_fill_(0, dense, 0)
        for name, values in of_features.items():
            self._add(name, values.sum(dtype=torch.float64))
            if " " in name:
                self._add(f"split_{name}", values.double() @ rest)


def _along_tokens(kept: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tell what 2:4 along tokens drops of each feature of what 2:4 along features kept, [T, F]; named as sums are."""
    yield "kept", _count(kept > 0, 0)
    yield "kept energy", kept.double().square().sum(0)
    yield "token groups", torch.full((kept.shape[1],), -(-len(kept) // 4), device=kept.device)
    for order, arrange in ORDERS.items():
        # Tokens are padded with zeros to whole groups, as the ops do.
        padded = torch.nn.functional.pad(arrange(kept), (0, 0, 0, -len(kept) % 4))
        dropped = torch.where(top2_mask(padded, dim=0), 0, padded)
        counts = (padded > 0).view(torch.int8).unflatten(0, (-1, 4)).sum(1, dtype=torch.int8)
        yield f"{order} groups over 2", _count(counts > 2, 0)
        yield f"{order} nonzeros dropped", _count(dropped > 0, 0)
        yield f"{order} energy dropped", dropped.double().square().sum(0)


def _count(mask: Tensor, dim: int | None = None) -> Tensor:
    """Count what is True, all or along a dimension. A plain sum of a mask would make a matrix of int64 first."""
    return mask.count_nonzero() if dim is None else mask.view(torch.int8).sum(dim, dtype=torch.int32)


def _slabs(tokens: int, features: int) -> Iterator[slice]:
    width = max(4, SLAB // max(1, tokens) // 4 * 4)
    return (slice(start, min(start + width, features)) for start in range(0, features, width))


def _squared_relu(h: Tensor) -> Tensor:
    return torch.relu(h.float()).square()


def _row_scale(amax: Tensor) -> Tensor:
    """Compute the scale of `compress_fp8` for finite rows."""
    scale = amax / torch.full_like(amax, LARGEST_FP8)
    return torch.where(amax == 0, 1.0, scale.clamp(min=_SMALLEST_NORMAL))


def _at_least_normal(scale: Tensor) -> Tensor:
    """Take a given scale as `sparse24.ops` has it."""
    return torch.where(scale.abs() < _SMALLEST_NORMAL, _SMALLEST_NORMAL, scale)


def _energies(y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    # float64: the fourth power of a pre-activation spans more than fp32 sums keep.
    return (y - kept).double().square().sum(), y.double().square().sum()
