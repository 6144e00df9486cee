"""The six GEMMs of a training step alone, dense and sparse, on the same data.

Races: "up" (x w1.T, and with the activation in its epilogue), "down" (y w2.T), "dy2" (dy w2, and with all that the
sparse products multiply in its epilogue, or with a dense dh), "dx" (dh w1), "dw2" (dy.T y) and "dw1" (dh.T x). "up"
and "dy2" have the ops for 2:4 weights too, of which these are the only products with no sparse activation. The
operands of the sparse ones are 2:4 on both sides, so that all multiply the same zeros: y and dh along features, in the
last two along interleaved tokens, as the default recipe has them. These two have float8 products beside them
(weight_gradients_fp8.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

import sparse24
from bench.cases import weight_gradients_fp8
from sparse24.bench import reference
from sparse24.bench.ffn import masks
from sparse24.bench.harness import Case
from sparse24.ops.token_order import deinterleave, interleave

BOUND = 1e-2
DTYPE = "bf16"


def gemm_cases(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, dy: torch.Tensor) -> list[Case]:
    """Cases of all races; rates are dense-equivalent."""
    pre_activation = F.linear(x, w1)
    values, meta = sparse24.compress(pre_activation, "relu2")
    y = sparse24.decompress(values, meta, *pre_activation.shape)
    dh = ((dy @ w2).float() * (2 * y.float().sqrt())).to(dy.dtype)
    dh_values = sparse24.compress_like(dh, meta)
    y_values, y_meta = sparse24.compress(interleave(y), "none", -2)
    y_tokens = deinterleave(sparse24.decompress(y_values, y_meta, *pre_activation.shape, -2))
    dh_by_tokens = sparse24.compress_like(interleave(dh), y_meta, -2)
    dh_tokens = deinterleave(sparse24.decompress(dh_by_tokens, y_meta, *pre_activation.shape, -2))
    hot = sparse24.densest_features(
        sparse24.feature_counts(values, meta), sparse24.Recipe().hot_features(pre_activation.shape[1])
    )
    del pre_activation

    def compress_in_epilogue(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse24.linear_compress(x, w1, statistics=False)[:2]

    def gradient_in_epilogue(_: int) -> tuple[torch.Tensor, ...]:
        return sparse24.linear_gradient(dy, w2, values, meta, interleaved=True, hot=hot)

    def dense_gradient_in_epilogue(_: int) -> torch.Tensor:
        return sparse24.linear_relu2_gradient(dy, w2, y)

    def check_gradient(output: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """dh against float64; along tokens the bits of the separate steps."""
        kept_dh, *along_tokens, _, y_hot, dh_hot = output
        dense_dh = sparse24.decompress(kept_dh, meta, *y.shape)
        steps = *sparse24.compress(interleave(dense_dh), dim=-2), *sparse24.compress(interleave(y), dim=-2)
        for got, expected in zip(along_tokens, steps, strict=True):
            reference.expect_equal("what is kept along tokens", got, expected)
        reference.expect_equal("the hot features of y", y_hot, y[:, hot].t())
        reference.expect_equal("the hot features of dh", dh_hot, dense_dh[:, hot].t())
        return check_dense_gradient(dense_dh)

    def check_dense_gradient(output: torch.Tensor) -> dict[str, float]:
        exact_dh = reference.product(dy, w2).mul_(2 * y.double().sqrt())
        return {"rel_error": reference.expect_error(output, exact_dh, BOUND)}

    packed1, packed2 = sparse24.pack24(w1), sparse24.pack24(w2, -2)
    pruned1 = sparse24.unpack24(*packed1, *w1.shape)
    pruned2 = sparse24.unpack24(*packed2, *w2.shape, -2)

    def check_packed_gradient(output: tuple[torch.Tensor, ...]) -> dict[str, float]:
        exact_dh = reference.product(dy, pruned2).mul_(2 * y.double().sqrt())
        got = sparse24.decompress(output[0], meta, *y.shape)
        return {"rel_error": reference.expect_error(got, exact_dh, BOUND)}

    def check_packed(output: tuple[torch.Tensor, ...]) -> dict[str, float]:
        return check_kept(*output, reference.product(x, pruned1.t()).relu_().square_())

    exact_y = reference.product(x, w1.t()).relu_().square_()
    cases = [
        *race("up", x, w1.t(), lambda _: F.linear(x, w1)),
        Case("linear_compress", DTYPE, compress_in_epilogue, lambda o: check_kept(*o, exact_y), "part", "up"),
        Case(
            "linear_compress_packed",
            DTYPE,
            lambda _: sparse24.linear_compress_packed(x, *packed1, statistics=False)[:2],
            check_packed,
            "part",
            "up",
        ),
        *race("down", y, w2.t(), lambda _: F.linear(y, w2), lambda _: sparse24.mm(values, meta, w2.t())),
        *race("dy2", dy, w2, lambda _: dy @ w2),
        Case("linear_gradient", DTYPE, gradient_in_epilogue, check_gradient, "part", "dy2"),
        Case(
            "linear_gradient_packed",
            DTYPE,
            lambda _: sparse24.linear_gradient_packed(dy, *packed2, values, meta, interleaved=True, hot=hot),
            check_packed_gradient,
            "part",
            "dy2",
        ),
        Case("linear_relu2_gradient", DTYPE, dense_gradient_in_epilogue, check_dense_gradient, "part", "dy2"),
        *race("dx", dh, w1, lambda _: dh @ w1, lambda _: sparse24.mm(dh_values, meta, w1)),
        *race(
            "dw2",
            dy.t(),
            y_tokens,
            lambda _: dy.t() @ y_tokens,
            lambda _: sparse24.mm(y_values, y_meta, dy, dim=-2, transpose_out=True, interleaved=True),
        ),
        *weight_gradients_fp8.cases("dw2", values, meta, dy, transpose=True),
        *race(
            "dw1",
            dh_tokens.t(),
            x,
            lambda _: dh_tokens.t() @ x,
            lambda _: sparse24.mm(dh_by_tokens, y_meta, x, dim=-2, interleaved=True),
        ),
        *weight_gradients_fp8.cases("dw1", dh_values, meta, x, transpose=False),
    ]
    for case in cases:
        case.flops = 2.0 * x.shape[0] * w1.shape[0] * w1.shape[1]
    return cases


def race(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    dense: Callable[[int], torch.Tensor],
    sparse: Callable[[int], torch.Tensor] | None = None,
) -> list[Case]:
    """A dense product of `a` and `b`, and the sparse one, which may have twice its error."""
    rival: list[float] = []

    def check_dense(output: torch.Tensor) -> dict[str, float]:
        # The exact product is made again by the other check: kept, six of them would not fit beside the operands.
        rival.append(reference.expect_error(output, reference.product(a, b), BOUND))
        return {"rel_error": rival[0]}

    def check_sparse(output: torch.Tensor) -> dict[str, float]:
        limit = 2 * rival[0] + reference.ABSOLUTE_SLACK if rival else BOUND
        return {"rel_error": reference.expect_error(output, reference.product(a, b), limit)}

    cases = [Case("dense", DTYPE, dense, check_dense, "dense", name)]
    return cases + ([Case("sparse", DTYPE, sparse, check_sparse, "sparse24", name)] if sparse else [])


def check_kept(values: torch.Tensor, meta: torch.Tensor, exact_y: torch.Tensor) -> dict[str, float]:
    """Kept values against float64 y at their own places, which must hold the energy of the two largest."""
    places = sparse24.decompress(torch.ones_like(values), meta, *exact_y.shape) != 0
    masks.check_features(places, exact_y)
    kept = sparse24.decompress(values, meta, *exact_y.shape)
    return {"rel_error": reference.expect_error(kept, exact_y * places, BOUND)}
