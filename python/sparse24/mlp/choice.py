"""Which of its ways a call of the network runs: 2:4, dense, or as an op for few tokens. Sizes decide, data do not."""

from math import ceil

import torch
from torch import Tensor

from sparse24 import _C
from sparse24._symbolic import exporting, known, or_false, or_true
from sparse24.ops.few_tokens import MAX_TOKENS
from sparse24.ops.network import MAX_DENSE_TOKENS

#: Multiply-adds of the second GEMM, ``tokens * F * D_out``, below which `relu2_mlp` runs dense on CUDA unless
#: `min_tokens` says otherwise: with fewer, launches and the reading of weights, which 2:4 activations do not shrink,
#: take longer than the products. "fp8" is with a scale per row, where torch's dense product is slower than with one;
#: "fp8_step" a training step whose six products are float8, beside a dense one with our epilogues and quantisation.
#: Chosen by the records of an H200, and a test holds them against these: `pays` is the rule.
DEFAULT_MIN_PRODUCTS = {"16bit": 20e9, "fp8": 10e9, "fp8_one_scale": 20e9, "fp8_step": 100e9}
#: In fp8 with a scale per row, so many tokens run sparse for any size: there torch's dense product for such scales is
#: slowest beside that for one.
FEW_TOKENS = 512

#: Multiply-adds of the first GEMM from which one with a 2:4 weight is faster than `linear_compress` on CUDA.
MIN_WEIGHT_PRODUCTS = 20e9
#: Input features from which that is so in float8, whose products are short beside what is done to their results.
MIN_FP8_DEPTH = 768
#: Output features from which `linear_gradient_packed` is faster than `linear_gradient` there: what it takes longer for
#: each entry of the activation, its product has to win.
MIN_GRADIENT_DEPTH = 2048
#: Output features from which `linear_gradient_fp8_packed` is faster than `linear_gradient_fp8` there.
MIN_FP8_GRADIENT_DEPTH = 2048

# By bits of the weights, d_model and d_ff: the most tokens of relu2_mlp_few, and of relu2_mlp_dense. And what was
# looked up for others.
_rows = {(row["bits"], row["d_model"], row["d_ff"]): row for row in _C.few_tokens_rows()}
_few = {size: row["tokens"] for size, row in _rows.items()}
_dense = {size: row["dense"] for size, row in _rows.items()}
_found: dict[tuple[bool, int, int, int], int] = {}


def pays(tokens: int, d_ff: int, d_out: int, *, fp8: bool = False, one_scale: bool = False, step: bool = False) -> bool:
    """Whether `relu2_mlp` runs sparse by default on CUDA.

    It is the faster of the two within 2 % in fp8, and within 6 % in 16 bits, at every size of the forward pass that
    was measured on an H200 (``bench/results/h200``). Beyond 2 % in 16 bits are 1,400 to 1,536 tokens of single experts,
    which it runs dense: their training steps are faster so.

    Parameters
    ----------
    tokens, d_ff, d_out : int
        Sizes of the second GEMM: the activation [tokens, d_ff], w2 [d_out, d_ff].
    fp8 : bool
        Its precision.
    one_scale : bool
        fp8: the activation and w2 have a single scale each, not one per row.
    step : bool
        fp8: it is a training step whose six products are all float8 (`sparse24.Recipe`).

    Returns
    -------
    bool
    """
    if fp8 and not (one_scale or step) and or_true(tokens <= FEW_TOKENS):
        return True
    precision = "16bit" if not fp8 else "fp8_step" if step else "fp8_one_scale" if one_scale else "fp8"
    return or_true(tokens * d_out * d_ff >= DEFAULT_MIN_PRODUCTS[precision])


def weights_fit(d_ff: int, d_model: int, *, fp8: bool = False) -> bool:
    """Whether a 2:4 weight [d_ff, d_model] can be the operand of `linear_compress_packed`, which has no padding."""
    multiple = 32 if fp8 else 16
    return or_false(d_ff % multiple == 0) and or_false(d_model % multiple == 0)


def weights_pay(tokens: int, d_ff: int, d_model: int, *, fp8: bool = False) -> bool:
    """Whether the first GEMM of a 2:4 weight runs as `linear_compress_packed` on CUDA, and not as `linear_compress`.

    Parameters
    ----------
    tokens, d_ff, d_model : int
        Sizes of the first GEMM: x [tokens, d_model], w1 [d_ff, d_model].
    fp8 : bool
        Its precision.
    """
    deep = not fp8 or or_true(d_model >= MIN_FP8_DEPTH)
    return weights_fit(d_ff, d_model, fp8=fp8) and deep and or_true(tokens * d_ff * d_model >= MIN_WEIGHT_PRODUCTS)


def gradient_weights_pay(tokens: int, d_ff: int, d_out: int, *, fp8: bool = False) -> bool:
    """Whether the product with a 2:4 second weight of the backward pass runs packed on CUDA.

    That is as `linear_gradient_packed`, and in float8 as `linear_gradient_fp8_packed`.
    """
    least = MIN_FP8_GRADIENT_DEPTH if fp8 else MIN_GRADIENT_DEPTH
    fits = weights_fit(d_ff, d_out, fp8=fp8)
    return fits and or_true(d_out >= least) and or_true(tokens * d_ff * d_out >= MIN_WEIGHT_PRODUCTS)


def tokens_that_pay(d_ff: int, d_out: int) -> int:
    """From how many tokens on it `pays` in 16 bits."""
    return ceil(DEFAULT_MIN_PRODUCTS["16bit"] / max(d_ff * d_out, 1))


def few_tokens(d_ff: int, d_out: int, *, fp8: bool = False) -> int:
    """Up to how many tokens `relu2_mlp` with `w2_rows` runs as `relu2_mlp_few` on CUDA.

    Measured on an H200 with 90 % zeros, as ``cpp/heuristics/few_tokens.inc`` says; networks of other sizes have the
    number of the nearest one, by the ratios of d_out and d_ff.

    Parameters
    ----------
    d_ff, d_out : int
        Sizes of the second weight, [d_out, d_ff].
    fp8 : bool
        Whether the weights are float8.

    Returns
    -------
    int
        From 0: then no call does.
    """
    return _most_tokens(_few, 8 if fp8 else 16, d_out, d_ff)


def dense_few_tokens(d_ff: int, d_out: int, *, fp8: bool = False) -> int:
    """Up to how many tokens inference that is not as `few_tokens` says runs as `relu2_mlp_dense` on CUDA.

    Measured as those.

    Parameters
    ----------
    d_ff, d_out : int
        Sizes of the second weight, [d_out, d_ff].
    fp8 : bool
        Whether the weights are float8.

    Returns
    -------
    int
        From 0: then no call does.
    """
    return _most_tokens(_dense, 8 if fp8 else 16, d_out, d_ff)


def _most_tokens(table: dict[tuple[int, int, int], int], bits: int, d_out: int, d_ff: int) -> int:
    tokens = table.get((bits, d_out, d_ff))
    if tokens is not None:
        return tokens
    if torch.compiler.is_compiling():  # sizes may be symbols
        return _nearest(table, bits, d_out, d_ff)
    key = table is _dense, bits, d_out, d_ff
    tokens = _found.get(key)
    if tokens is None:
        tokens = _found[key] = _nearest(table, bits, d_out, d_ff)
    return tokens


def _nearest(table: dict[tuple[int, int, int], int], bits: int, d_out: int, d_ff: int) -> int:
    found, distance = 0, float("inf")
    if d_out > 0 and d_ff > 0:
        for (row_bits, d_model, features), tokens in table.items():
            ratio = max(d_out / d_model, d_model / d_out) * max(d_ff / features, features / d_ff)
            if row_bits == bits and ratio < distance:
                found, distance = tokens, ratio
    return found


def may_be_few(tokens: int) -> bool:
    """Whether so many tokens are few for some network."""
    return _at_most(tokens, MAX_TOKENS)


def runs_few(tokens: int, d_ff: int, d_out: int, *, fp8: bool, is_cuda: bool) -> bool:
    """Whether a call with `w2_rows` and without gradients runs as `relu2_mlp_few`.

    On the CPU it does wherever tokens may be few: there it is the reference.
    """
    return may_be_few(tokens) and (not is_cuda or _at_most(tokens, few_tokens(d_ff, d_out, fp8=fp8)))


def leaves_open(tokens: int, min_tokens: int | None, sparse: bool) -> bool:
    """Whether inference of so many tokens may run dense in any way: nobody asks it to be 2:4."""
    return min_tokens is None or tokens < min_tokens or not sparse


def runs_dense_few(tokens: int, d_model: int, d_ff: int, d_out: int, *, fp8: bool, is_cuda: bool) -> bool:
    """Whether inference of a dense network, or of one that nobody asks to be 2:4, runs as `relu2_mlp_dense`.

    Parameters
    ----------
    tokens, d_model, d_ff, d_out : int
        Sizes: x [tokens, d_model], w1 [d_ff, d_model], w2 [d_out, d_ff].
    fp8 : bool
        Whether the weights are float8.
    is_cuda : bool
        On the CPU nothing does.
    """
    if not is_cuda or not _at_most(tokens, MAX_DENSE_TOKENS):
        return False
    multiple = 16 if fp8 else 8
    fits = or_false(d_model % multiple == 0) and or_false(d_ff % multiple == 0) and or_false(d_model > 0)
    return fits and _at_most(tokens, dense_few_tokens(d_ff, d_out, fp8=fp8))


def least_when_exact(min_tokens: int | None, x: Tensor) -> int | None:
    """Give the `min_tokens` with which few tokens run dense: a call that is to be exact, and has no `w2_rows`."""
    width = x.shape[-1] if x.dim() > 0 else 0
    if width == 0 or not may_be_few(x.numel() // width):
        return min_tokens
    return max(min_tokens or 0, MAX_TOKENS + 1)


def _at_most(tokens: int, most: int) -> bool:
    return known(tokens <= most) if exporting() else or_false(tokens <= most)
