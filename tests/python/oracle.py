"""The contract in plain torch and NumPy, on the CPU: what every op must return, bit for bit.

Nothing here comes from the library: the metadata order is computed from the bit offsets of CUTLASS's E layout.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAN_CODE = {torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.float32: 0x7FC00000}


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def bits(t: Tensor) -> Tensor:
    """The codes of a tensor as integers."""
    return t.contiguous().view(_INT_OF_SIZE[t.element_size()])


def from_bits(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(_INT_OF_SIZE[dtype.itemsize]).contiguous().view(dtype)


# ---- the sparse operand A [M, K] of X [R, C] -------------------------------------------------------------------------


def token_padding(values_dtype: torch.dtype) -> int:
    return 32 if values_dtype == FP8 else 4


def operand(x: Tensor, values_dtype: torch.dtype, dim: int) -> Tensor:
    """A [M, K], with K padded with zeros as the values are."""
    if dim == -1:
        return x
    a = x.t()
    padding = round_up(a.shape[1], token_padding(values_dtype)) - a.shape[1]
    return torch.cat([a, a.new_zeros(a.shape[0], padding)], dim=1)


def store_values(kept: Tensor, dim: int) -> Tensor:
    """Kept values [M, K/2] in the order of memory: 16-bit values along tokens are M-contiguous."""
    return kept.t().contiguous() if dim == -2 and kept.dtype != FP8 else kept.contiguous()


def load_values(values: Tensor, dim: int) -> Tensor:
    """The inverse of `store_values`."""
    return values.t() if dim == -2 and values.dtype != FP8 else values


# ---- metadata --------------------------------------------------------------------------------------------------------


def meta_atom(values_dtype: torch.dtype) -> int:
    return 128 if values_dtype == FP8 else 64


def meta_bytes(rows: int, cols: int, values_dtype: torch.dtype, dim: int) -> int:
    m, k = (rows, cols) if dim == -1 else (cols, rows)
    return round_up(m, 128) * round_up(k, meta_atom(values_dtype)) // 8


def bit_offsets(m: np.ndarray, g: np.ndarray, m_padded: int, values_dtype: torch.dtype) -> np.ndarray:
    """Bit at which the nibble of group g of row m starts."""
    k = 4 * g
    atom = meta_atom(values_dtype)
    if values_dtype == FP8:
        return (k // atom) * m_padded * atom + m * atom + k % atom
    blocks = atom // 32
    return (
        (k // atom) * m_padded * atom
        + (m // 64) * 64 * atom
        + k % 16
        + 16 * ((m // 8) % 2)
        + 32 * ((k % atom) // 32)
        + 32 * blocks * (m % 8)
        + 256 * blocks * ((k // 16) % 2)
        + 512 * blocks * ((m % 64) // 16)
    )


def _places(m: int, groups: int, values_dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.meshgrid(np.arange(m, dtype=np.int64), np.arange(groups, dtype=np.int64), indexing="ij")
    offsets = bit_offsets(rows, cols, round_up(m, 128), values_dtype)
    return offsets // 8, offsets % 8


def pack_meta(nibbles: np.ndarray, values_dtype: torch.dtype) -> np.ndarray:
    """Nibbles [M, G] to bytes; the padding holds nibble 4."""
    m, groups = nibbles.shape
    m_padded, groups_padded = round_up(m, 128), round_up(4 * groups, meta_atom(values_dtype)) // 4
    padded = np.full((m_padded, groups_padded), 4, dtype=np.uint8)
    padded[:m, :groups] = nibbles
    out = np.zeros(m_padded * groups_padded // 2, dtype=np.uint8)
    byte, shift = _places(m_padded, groups_padded, values_dtype)
    for s in (0, 4):  # the two nibbles of a byte, one after the other: an indexed |= takes each index once
        at = shift == s
        out[byte[at]] |= padded[at] << s
    return out


def unpack_meta(meta: np.ndarray, m: int, groups: int, values_dtype: torch.dtype) -> np.ndarray:
    """Bytes to nibbles [M, G]."""
    byte, shift = _places(m, groups, values_dtype)
    return (meta[byte] >> shift & 0xF).astype(np.uint8)


# ---- the ops ---------------------------------------------------------------------------------------------------------


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation in float32."""
    x = x.float()
    if activation == "none":
        return x
    y = torch.where((x > 0) | x.isnan(), x, torch.zeros(()))
    return y if activation == "relu" else y * y


def above(x: Tensor, threshold: float, activation: str = "relu2") -> Tensor:
    """x, zero where it does not exceed the threshold, compared in float32."""
    if activation == "none" or threshold == 0:
        return x
    return torch.where(x.float() <= min(threshold, 3.4e38), torch.zeros((), dtype=x.dtype), x)


def ordering(activation: str) -> str:
    """What magnitudes are compared after: squares order as their roots do, but for underflow and overflow."""
    return "relu" if activation == "relu2" else activation


def selection_key(y: Tensor) -> Tensor:
    """Integers ordered as the magnitudes of float32 y; every NaN is the same, largest one."""
    return torch.where(y.isnan(), 0x7FFFFFFF, bits(y) & 0x7FFFFFFF)


def select(y: Tensor) -> Tensor:
    """Positions [M, G, 2] in ascending order of the two largest of each four of y [M, K]."""
    key = selection_key(y).unflatten(1, (-1, 4)) if y.numel() else torch.zeros(y.shape[0], y.shape[1] // 4, 4)
    # A stable sort keeps the lower index first among equals.
    order = torch.sort(key, dim=2, descending=True, stable=True).indices
    return order[..., :2].sort(dim=2).values


def nibbles_of(kept: Tensor) -> np.ndarray:
    return (kept[..., 0] | kept[..., 1] << 2).numpy().astype(np.uint8)


def gather(a: Tensor, kept: Tensor) -> Tensor:
    """A [M, K] at positions [M, G, 2]: [M, K/2], bits untouched."""
    codes = bits(a).reshape(a.shape[0], a.shape[1] // 4, 4)
    return from_bits(codes.gather(2, kept).reshape(a.shape[0], a.shape[1] // 2), a.dtype)


def compress(x: Tensor, activation: str = "none", dim: int = -1) -> tuple[Tensor, Tensor]:
    x = x.cpu()
    a = operand(x, x.dtype, dim)
    y = activate(a, activation)
    kept = select(activate(a, ordering(activation)))
    stored = a
    if activation == "relu":
        stored = torch.where(y == 0, torch.zeros((), dtype=x.dtype), a)
    elif activation == "relu2":
        codes = torch.where(y.isnan(), _NAN_CODE[x.dtype], bits(y.to(x.dtype)).to(torch.int64))
        stored = from_bits(codes, x.dtype)
    meta = torch.from_numpy(pack_meta(nibbles_of(kept), x.dtype))
    return store_values(gather(stored, kept), dim), meta


def to_e4m3(y: Tensor) -> Tensor:
    """float32 to e4m3: nearest even, saturating, one code for NaN."""
    q = bits(y.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-448, 448).to(FP8))
    return from_bits(torch.where(y.isnan(), 0x7F, q.to(torch.int64)), FP8)


def scale_of(y: Tensor, scaling: str) -> Tensor:
    """Computed scales of the rows [M, 1] of y [M, K], or of all of it [1]."""
    magnitudes = torch.where(y.isnan(), 0.0, y.abs())
    if scaling == "row":
        amax = magnitudes.amax(1, keepdim=True) if y.shape[1] else torch.zeros(y.shape[0], 1)
    else:
        amax = magnitudes.amax().reshape(1) if y.numel() else torch.zeros(1)
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, 1.0, torch.maximum(amax / torch.tensor(448.0), smallest))


def used_scale(given: Tensor, scaling: str) -> Tensor:
    """What counts of a given scale: a magnitude below the smallest normal number counts as that."""
    given = given.cpu().reshape((-1, 1) if scaling == "row" else (1,))
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(given.abs() < smallest, smallest, given)


def compress_fp8(
    x: Tensor, scale: Tensor | None = None, activation: str = "none", dim: int = -1, scaling: str = "row"
) -> tuple[Tensor, Tensor, Tensor]:
    a = operand(x.cpu(), FP8, dim)
    y = activate(a, activation)
    if scale is None:
        scale = scale_of(y, scaling)
    else:
        scale = used_scale(scale, scaling)
    kept = select(activate(a, ordering(activation)))
    q = to_e4m3(y * (1 / scale))
    meta = torch.from_numpy(pack_meta(nibbles_of(kept), FP8))
    return store_values(gather(q, kept), dim), meta, scale


def quantize_fp8(x: Tensor, scale: Tensor | None = None, scaling: str = "row") -> tuple[Tensor, Tensor]:
    y = x.cpu().float()
    if scale is None:
        scale = scale_of(y, scaling)
    else:
        scale = used_scale(scale, scaling)
    return to_e4m3(y * (1 / scale)), scale


@dataclass
class Pattern:
    """Where the kept values of X [R, C] are."""

    kept: Tensor  # [M, G, 2]
    rows: int
    cols: int
    dim: int

    @staticmethod
    def of_meta(meta: Tensor, rows: int, cols: int, values_dtype: torch.dtype, dim: int) -> "Pattern":
        m, k = (rows, cols) if dim == -1 else (cols, round_up(rows, token_padding(values_dtype)))
        nibbles = torch.from_numpy(unpack_meta(meta.cpu().numpy(), m, k // 4, values_dtype)).to(torch.int64)
        return Pattern(torch.stack([nibbles & 3, nibbles >> 2], 2), rows, cols, dim)

    def mask(self) -> Tensor:
        """True in X [R, C] where an entry is kept."""
        m, groups, _ = self.kept.shape
        mask = torch.zeros(m, groups, 4, dtype=torch.bool).scatter_(2, self.kept, True).reshape(m, 4 * groups)
        return mask if self.dim == -1 else mask.t()[: self.rows]

    def gather(self, x: Tensor) -> Tensor:
        """compress_like."""
        x = x.cpu()
        return store_values(gather(operand(x, x.dtype, self.dim), self.kept), self.dim)

    def scatter(self, values: Tensor) -> Tensor:
        """decompress."""
        m, groups, _ = self.kept.shape
        codes = bits(load_values(values.cpu(), self.dim)).reshape(m, groups, 2)
        a = torch.zeros(m, groups, 4, dtype=codes.dtype)
        for slot in (1, 0):  # the first one counts if both are at the same place
            a.scatter_(2, self.kept[..., slot, None], codes[..., slot, None])
        a = a.reshape(m, 4 * groups)
        return from_bits(a if self.dim == -1 else a.t()[: self.rows], values.dtype)


def mm_active(y: Tensor, w: Tensor, scale_w: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """In float32: the neurons of 128 slices, without zeros of y; sixteen slices; the eight sums."""
    y, w = y.float().cpu(), w.float().cpu()
    features = y.shape[1]
    total = torch.zeros(y.shape[0], w.shape[1])
    for first in range(0, 128, 16):
        of_part = torch.zeros_like(total)
        for index in range(first, first + 16):
            chain = torch.zeros_like(total)
            for f in range(features * index // 128, features * (index + 1) // 128):
                used = y[:, f] != 0
                chain[used] += y[used, f, None] * w[f]
            of_part += chain
        total += of_part
    if scale_w is not None:
        total = total * scale_w.cpu().reshape(-1)
    return total if bias is None else total + bias.float().cpu()
