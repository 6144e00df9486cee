"""How a 2:4 weight is pruned and packed.

The sparse operand of the tensor cores is the first one, so that the product of a 2:4 weight is ``h.T = w @ x.T``, whose
rows are features. A weight is packed as `compress` packs a matrix, but with the features of each 16 in an order in
which a kernel's lanes hold neighbours: row 8 i + r of the operand is feature 2 r + i.
"""

import torch
from torch import Tensor

from sparse24.format import FP8, VALUES, Operand, feature_alignment
from sparse24.ops.arguments import Dim, Scaling, run
from sparse24.ops.checks import check_dtype, check_sizes, expect, name_of
from sparse24.ops.compression import compress, compress_fp8, decompress
from sparse24.ops.registration import define

__all__ = ["pack24", "pack24_fp8", "prune_pack24", "unpack24"]

#: Features are a multiple of this: those of one warp.
PACKED_FEATURES = 16


def pack24(w: Tensor, dim: Dim = -1) -> tuple[Tensor, Tensor]:
    """Prune a weight to two of four, and pack it as the sparse operand of a product whose rows are its features.

    Each group of four keeps its two largest magnitudes, by the rule of `compress`: a weight that is 2:4 already stays
    as it is.

    Parameters
    ----------
    w : Tensor [R, C]
        bfloat16, float16; on the CPU also float32. Groups of four lie along `dim`, features F along the other.
        F: a multiple of 16. The other size: a multiple of 16.
    dim : {-1, -2}
        -1: w is [F, D], as the first layer has it, for `linear_compress_packed`. -2: w is [D, F], as the second layer
        has it, for `linear_gradient_packed`, whose operand is the transpose.

    Returns
    -------
    values : Tensor [F, D/2]
        Of w's dtype, for both `dim`.
    meta : Tensor
        uint8, 1-dimensional.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or sizes.

    Notes
    -----
    Composed of a copy and `compress`, which is for weights that are packed once. `prune_pack24` is one pass.
    There is no gradient: what is trained is the dense weight.

    Source: the method's description, Haziza et al. 2025, arXiv 2503.16672; weights: Mozaffari et al. 2024 (SLoPe),
    arXiv 2405.16325.

    Examples
    --------
    >>> w = torch.randint(-2, 3, (16, 32)).float()
    >>> values, meta = sparse24.pack24(w)
    >>> pruned = sparse24.unpack24(values, meta, 16, 32)
    >>> assert torch.equal(pruned, sparse24.decompress(*sparse24.compress(w), 16, 32))
    """
    _check_weight("pack24", w, dim, w.dtype if isinstance(w, Tensor) else None)
    return compress(_operand_of(w.detach(), dim))


def prune_pack24(w: Tensor, dim: Dim = -1, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a weight to two of four, and pack it as `pack24` does: in one pass, which is once a step of training.

    Parameters
    ----------
    w : Tensor [R, C]
        bfloat16, float16 or float32, which masters are; with ``dim=-1`` also float8_e4m3fn, whose codes are compared
        and moved as they are. F: a multiple of 16. The other size: a multiple of 16, for float8 of 32.
    dim : {-1, -2}
        As in `pack24`.
    dtype : torch.dtype, optional
        What is kept is rounded to it, after the choice: of float32 bfloat16 or float16. Default: that of w, which on
        CUDA devices is not float32.

    Returns
    -------
    pruned : Tensor [R, C]
        w with zeros where nothing is kept, for products whose other operand is sparse.
    values : Tensor [F, D/2]
    meta : Tensor
        As of `pack24`.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or sizes.

    Notes
    -----
    There is no gradient: `relu2_mlp` passes that of the pruned weight straight through.

    Source: as `pack24`, arXiv 2405.16325.

    Examples
    --------
    >>> w = torch.randn(16, 32)
    >>> pruned, *packed = sparse24.prune_pack24(w, dtype=torch.bfloat16)
    >>> assert torch.equal(pruned, sparse24.prune24(w).bfloat16())
    >>> assert torch.equal(pruned, sparse24.unpack24(*packed, 16, 32))
    """
    return run(_prune_pack24, w, dim, dtype=dtype)


def pack24_fp8(
    w: Tensor, scale: Tensor | None = None, dim: Dim = -1, scaling: Scaling = "row"
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a weight of 16 bits to two of four, and pack it in float8.

    Parameters
    ----------
    w : Tensor [R, C]
        bfloat16, float16; on the CPU also float32. F: a multiple of 16 (dim=-2: 16). The other size: a multiple of 32.
    scale : Tensor, optional
        float32, the dequantising multiplier: one a feature, in their own order, or one element. Default: that of the
        largest magnitude.
    dim : {-1, -2}
        As in `pack24`.
    scaling : {"row", "tensor"}
        Whether there is one scale a feature, or one.

    Returns
    -------
    values : Tensor [F, D/2]
        float8_e4m3fn, for both `dim`.
    meta : Tensor
        uint8, 1-dimensional.
    scale : Tensor
        float32, [F, 1] or [1]: `scale_w` of `linear_compress_packed`.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or sizes; a scale that does not fit.

    Notes
    -----
    Source: as `pack24`; the rule of the scale is that of `compress_fp8`, arXiv 2503.16672.

    Examples
    --------
    >>> values, meta, scale = sparse24.pack24_fp8(torch.randn(32, 64))
    >>> assert values.shape == (32, 32) and scale.shape == (32, 1)
    """
    op = "pack24_fp8"
    _check_weight(op, w, dim, FP8)
    reorders = scaling == "row" and dim == -1
    if scale is not None and scaling == "row":
        features = w.shape[0 if dim == -1 else 1]
        expect(scale.numel() == features, op, f"scale to have {features} elements (features of w)", scale.numel())
        scale = _in_packed_order(scale.reshape(-1, 1)) if reorders else scale
    values, meta, used = compress_fp8(_operand_of(w.detach(), dim), scale, scaling=scaling)
    return values, meta, _in_own_order(used) if reorders else used


def unpack24(values: Tensor, meta: Tensor, rows: int, cols: int, dim: Dim = -1) -> Tensor:
    """Unpack a weight: the dense matrix, with zeros where it was pruned.

    Parameters
    ----------
    values, meta : Tensor
        Of `pack24` or `pack24_fp8`.
    rows, cols : int
        The weight's sizes.
    dim : {-1, -2}
        As in `pack24`.

    Returns
    -------
    Tensor [rows, cols]
        Of the values' dtype.

    Raises
    ------
    RuntimeError
        Wrong dtype or sizes.

    Notes
    -----
    What the other products of a network multiply, which need the same weight dense.

    Source: as `pack24`, arXiv 2503.16672.

    Examples
    --------
    >>> w = torch.randn(16, 32)
    >>> assert (sparse24.unpack24(*sparse24.pack24(w), 16, 32) != 0).sum() == 16 * 16
    """
    features = rows if dim == -1 else cols
    rule = f"{'rows' if dim == -1 else 'cols'} to be a multiple of {PACKED_FEATURES}"
    expect(features % PACKED_FEATURES == 0, "unpack24", rule, features)
    if dim == -1:
        return _in_own_order(decompress(values, meta, rows, cols))
    return decompress(values, meta, cols, rows).t().contiguous()


def _check_weight(op: str, w: Tensor, dim: Dim, stored: torch.dtype | None) -> None:
    expect(isinstance(w, Tensor), op, "w to be a tensor", type(w).__name__)
    expect(dim in (-1, -2), op, "dim to be -1 or -2", dim)
    check_sizes(op, "w", w, 2)
    check_dtype(op, "w", w, tuple(t for t in VALUES if t != FP8))
    names = ("rows", "columns") if dim == -1 else ("columns", "rows")
    features, depth = (w.shape[0], w.shape[1]) if dim == -1 else (w.shape[1], w.shape[0])
    expect(features % PACKED_FEATURES == 0, op, f"w to have a multiple of {PACKED_FEATURES} {names[0]}", features)
    multiple = feature_alignment(stored, -1)
    expect(depth % multiple == 0, op, f"w to have a multiple of {multiple} {names[1]}", depth)


def _operand_of(w: Tensor, dim: Dim) -> Tensor:
    """Return the matrix that is compressed: mm, which multiplies the second weight, wants no order of its features."""
    return _in_packed_order(w) if dim == -1 else w.t().contiguous()


def _in_packed_order(w: Tensor) -> Tensor:
    """Put the features of each 16 in the order of the operand's rows."""
    return w.reshape(w.shape[0] // PACKED_FEATURES, 8, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _in_own_order(w: Tensor) -> Tensor:
    """Undo `_in_packed_order`."""
    return w.reshape(w.shape[0] // PACKED_FEATURES, 2, 8, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _fake_prune_pack24(w: Tensor, dim: Dim, *, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    op = "prune_pack24"
    expect(dim in (-1, -2), op, "dim to be -1 or -2", dim)
    check_sizes(op, "w", w, 2)
    allowed = (torch.bfloat16, torch.float16, FP8, torch.float32)
    expect(w.dtype in allowed, op, "w to be bfloat16, float16, float8_e4m3fn or float32", name_of(w.dtype))
    stored = w.dtype if dtype is None else dtype
    master, own = w.dtype == torch.float32, w.dtype != torch.float32 or not w.is_cuda
    wanted = "bfloat16 or float16" if master else name_of(w.dtype)
    rule = f"dtype to be {wanted}{' or float32' if master and own else ''} (w is {name_of(w.dtype)})"
    expect(master and stored in allowed[:2] or own and stored == w.dtype, op, rule, name_of(stored))
    expect(dim == -1 or stored != FP8, op, "dim to be -1 (float8_e4m3fn)", dim)
    features, depth = w.shape if dim == -1 else (w.shape[1], w.shape[0])
    names = ("rows", "columns") if dim == -1 else ("columns", "rows")
    expect(features % PACKED_FEATURES == 0, op, f"w to have a multiple of {PACKED_FEATURES} {names[0]}", features)
    multiple = feature_alignment(stored, -1)
    expect(depth % multiple == 0, op, f"w to have a multiple of {multiple} {names[1]} ({name_of(stored)})", depth)
    a = Operand.of(features, depth, stored, -1)
    return (
        w.new_empty(w.shape, dtype=stored),
        w.new_empty(a.values_shape, dtype=stored),
        w.new_empty(a.meta_bytes, dtype=torch.uint8),
    )


_prune_pack24 = define("prune_pack24", _fake_prune_pack24, no_backward="relu2_mlp passes the gradient straight through")
