"""The weight-gradient products ``A.T @ B`` over tokens, with A re-pruned to 2:4 along its tokens.

A [T, F] is the activation or the gradient of the pre-activation, already 2:4 along its features, here dense again. B
[T, N] is the other operand. Groups of four tokens keep two entries of each feature.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from sparse24._symbolic import known, or_false
from sparse24.ops import compress, decompress, densest_features, mm, put_features
from sparse24.ops.token_order import interleave
from sparse24.recipe import Recipe


def weight_gradient(a: Tensor, b: Tensor, recipe: Recipe, hot: Tensor | None, *, transpose: bool = False) -> Tensor:
    """``A.T @ B`` [F, N] of a [T, F] and b [T, N], or its transpose, in their dtype.

    Parameters
    ----------
    a, b : Tensor
        bfloat16, float16; on the CPU also float32. F: a multiple of 8 unless `recipe` says dense.
    recipe : Recipe
        How the tokens are grouped, and what is done about entries that do not fit.
    hot : Tensor, optional
        int64 [H]: features whose product is dense.
    transpose : bool
        Return the transpose, contiguous, [N, F].
    """
    if recipe.weight_gradients == "dense":
        return b.t() @ a if transpose else a.t() @ b
    out = _sparse_product(interleave(a) if recipe.permute_tokens else a, b.contiguous(), recipe, transpose)
    if hot is not None:
        columns = a.index_select(1, hot)
        if transpose:
            out = out.index_copy(1, hot, _product(b.t()[None], columns[None])[0])
        else:
            out = out.index_copy(0, hot, _product(columns.t()[None], b[None])[0])
    return out


def distinct_features(given: Tensor, features: int) -> Tensor:
    """Return as many features as are given [H], ascending and each once, as the products want them.

    Those that are given are among them. Repeated ones, and what is no feature, give their places to the lowest others.
    """
    # One more element for what is no feature: an index of -1 is the last, too.
    marks = given.new_zeros(features + 1, dtype=torch.int32).index_fill_(0, given.clamp(-1, features), 1)
    return densest_features(marks[:features], given.shape[0])


#: Tokens of two parts.
_PAIR = 2048
#: From so many tokens on, whatever their number, parts are worth their rounding.
_MANY = 4096


def put_product(out: Tensor, hot: Tensor, a: Tensor, b: Tensor, *, transpose: bool = False) -> None:
    """Replace the rows `hot` [H] of out [F, N] by ``a @ b``, a [H, T] and b [T, N]; or columns of its transpose.

    cuBLAS takes H x N in tiles, too few for all multiprocessors, and each of them takes all T. So here T is cut into
    equal parts, whose products are rounded and summed up. For a number of tokens that is no multiple of eight it takes
    six times as long: what equal parts of a multiple leave over is a part of its own, if there are many tokens.
    """
    tokens, size = a.shape[1], a.shape[0] * b.shape[1]
    if a.is_cuda and known(tokens >= _MANY) and known(tokens % _PAIR != 0):
        parts = _parts(size, (tokens // _PAIR + 1) * _PAIR)
        whole = tokens // parts // 8 * 8 * parts
        first = a[:, :whole]
        if tokens % 8 != 0:  # its rows do not begin at multiples of 16 bytes
            first = first.contiguous()
        added = _products(first, b[:whole], parts, transpose)
        if whole < tokens:
            added = torch.cat((added, _products(a[:, whole:], b[whole:], 1, transpose)))
    else:
        added = _products(a, b, _parts(size, tokens) if a.is_cuda else 1, transpose)
    _put(out, hot, added, transpose)


def put_rows(out: Tensor, hot: Tensor, rows: Tensor, *, transpose: bool = False) -> None:
    """Replace the rows `hot` [H] of out [F, N] by `rows` [H, N]; or columns of its transpose by rows [N, H]."""
    _put(out, hot, rows[None], transpose)


def _put(out: Tensor, hot: Tensor, added: Tensor, transpose: bool) -> None:
    # Out is new, and nobody has saved it: without a compiler, autograd need not be told.
    with nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowADInplaceOrView():
        put_features(out, added, hot, -1 if transpose else -2)


def _products(a: Tensor, b: Tensor, parts: int, transpose: bool) -> Tensor:
    """Compute ``a @ b`` [P, H, N] of each of P equal parts of the tokens, or its transpose."""
    tokens = a.shape[1] // parts
    rows, columns = a.unflatten(1, (parts, tokens)).transpose(0, 1), b.unflatten(0, (parts, tokens))
    return _product(columns.mT, rows.mT) if transpose else _product(rows, columns)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b`` [P, M, N] in place, which `torch.utils.flop_counter` does not count.

    It counts these features already, as a part of the sparse product beside this one.
    """
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0)


def _parts(size: int, tokens: int) -> int:
    """Count parts of 1,024 tokens or more, so that there are about as many tiles of 128 x 256 as multiprocessors."""
    parts = 1
    while parts < 8 and parts * 2 * size <= 128 * (128 * 256) and or_false(tokens % (parts * _PAIR) == 0):
        parts *= 2
    return parts


def _sparse_product(a: Tensor, b: Tensor, recipe: Recipe, transpose: bool) -> Tensor:
    """Of a with its tokens in the order of their groups, and of b with them in their own."""
    values, meta = compress(a, dim=-2)
    permuted = recipe.permute_tokens
    if not recipe.residual:
        return mm(values, meta, b, dim=-2, transpose_out=transpose, interleaved=permuted)
    # At most two of four are left: a second 2:4 operand holds them all, and the sum is rounded once.
    kept = decompress(torch.ones_like(values), meta, *a.shape, -2)
    rest = compress(torch.where(kept == 0, a, 0), dim=-2)
    first, second = (
        mm(*operand, b, dim=-2, out_dtype=torch.float32, transpose_out=transpose, interleaved=permuted)
        for operand in ((values, meta), rest)
    )
    return (first + second).to(a.dtype)
