"""float8 of weights that are pruned to two of four in the same pass, and packed: what steps in float8 multiply."""

import torch
from torch import Tensor

from sparse24.format import FP8, WIDE, Operand, feature_alignment
from sparse24.ops.arguments import Dim, run
from sparse24.ops.checks import check_dim, check_dtype, check_sizes, expect
from sparse24.ops.packing import PACKED_FEATURES
from sparse24.ops.quantization import both_orders, check_quantized
from sparse24.ops.registration import define

__all__ = ["prune_pack_fp8_both", "prune_quantize_fp8_both"]


def prune_quantize_fp8_both(
    w: Tensor, scale: Tensor | None = None, dim: Dim = -1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convert a weight to float8_e4m3fn in both orders as `quantize_fp8_both` does, pruned to two of four before.

    What is kept is what `prune24` keeps of w's own numbers, in the pass that rounds them.

    Parameters
    ----------
    w : Tensor [R, C]
        bfloat16 or float16; on the CPU also float32. C: a multiple of 16.
    scale : Tensor, optional
        As in `quantize_fp8_both`.
    dim : {-1, -2}
        Along which dimension the groups of four lie. -2: R is a multiple of 4.

    Returns
    -------
    values, transposed, scale, amax : Tensor
        As of `quantize_fp8_both`; `amax` is that of w.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or sizes; a scale that does not fit.

    Notes
    -----
    There is no gradient: `relu2_mlp` passes it straight through.

    Source: Haziza et al. 2025, arXiv 2503.16672; weights: Mozaffari et al. 2024 (SLoPe), arXiv 2405.16325.

    Examples
    --------
    >>> w = torch.randn(32, 16)
    >>> values, transposed, scale, amax = sparse24.prune_quantize_fp8_both(w)
    >>> assert torch.equal(values.float(), sparse24.quantize_fp8_both(sparse24.prune24(w))[0].float())
    """
    return run(_prune_quantize_fp8_both, w, scale, dim)


def prune_pack_fp8_both(
    w: Tensor, scale: Tensor | None = None, dim: Dim = -1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convert a weight to float8_e4m3fn as `prune_quantize_fp8_both` does, and pack what stays in the same pass.

    A training step multiplies the packed codes with what is dense, x or the output's gradient, and the dense ones with
    what is sparse.

    Parameters
    ----------
    w : Tensor [R, C]
        bfloat16 or float16; on the CPU also float32. Groups of four lie along `dim`, features F along the other. F: a
        multiple of 16. The other size: a multiple of 32.
    scale : Tensor, optional
        As in `quantize_fp8_both`.
    dim : {-1, -2}
        As in `pack24`: w is [F, D] as the first layer has it, or [D, F] as the second one has it.

    Returns
    -------
    values : Tensor [F, D/2]
    meta : Tensor
        As of ``pack24_fp8(w, scale, dim, scaling="tensor")``.
    transposed : Tensor [D, P]
        The transpose of the codes that `values` has, with ``dim=-1`` as of `prune_quantize_fp8_both`; with ``dim=-2``
        it is [D, F], w's own order.
    scale, amax : Tensor
        As of `prune_quantize_fp8_both`.

    Raises
    ------
    RuntimeError
        Wrong dtype, rank or sizes; a scale that does not fit.

    Notes
    -----
    There is no gradient: `relu2_mlp` passes it straight through.

    Source: Haziza et al. 2025, arXiv 2503.16672; weights: Mozaffari et al. 2024 (SLoPe), arXiv 2405.16325.

    Examples
    --------
    >>> w = torch.randn(32, 64)
    >>> values, meta, transposed, scale, amax = sparse24.prune_pack_fp8_both(w)
    >>> codes = sparse24.prune_quantize_fp8_both(w)[0]
    >>> assert torch.equal(sparse24.unpack24(values, meta, 32, 64).float(), codes.float())
    """
    return run(_prune_pack_fp8_both, w, scale, dim)


def _fake_prune_quantize_fp8_both(w: Tensor, scale: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "prune_quantize_fp8_both"
    check_dim(op, dim)
    check_quantized(op, w, "w")
    expect(dim == -1 or w.shape[0] % 4 == 0, op, "w to have a multiple of 4 rows", w.shape[0])
    return both_orders(op, "w", w, scale)


def _fake_prune_pack_fp8_both(
    w: Tensor, scale: Tensor | None, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "prune_pack_fp8_both"
    check_dim(op, dim)
    check_sizes(op, "w", w, 2)
    check_dtype(op, "w", w, WIDE)
    depth = feature_alignment(FP8, -1)
    rows, columns = (PACKED_FEATURES, depth) if dim == -1 else (depth, 16)
    expect(w.shape[1] % columns == 0, op, f"w to have a multiple of {columns} columns", w.shape[1])
    expect(w.shape[0] % rows == 0, op, f"w to have a multiple of {rows} rows", w.shape[0])
    a = Operand.of(*(w.shape if dim == -1 else w.shape[::-1]), FP8, -1)
    codes, transposed, *others = both_orders(op, "w", w, scale)
    packed = w.new_empty(a.values_shape, dtype=FP8), w.new_empty(a.meta_bytes, dtype=torch.uint8)
    return *packed, transposed if dim == -1 else codes, *others


_prune_quantize_fp8_both = define(
    "prune_quantize_fp8_both",
    _fake_prune_quantize_fp8_both,
    no_backward="relu2_mlp passes the gradient straight through",
)
_prune_pack_fp8_both = define(
    "prune_pack_fp8_both", _fake_prune_pack_fp8_both, no_backward="relu2_mlp passes the gradient straight through"
)
