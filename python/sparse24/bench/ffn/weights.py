"""The squared-ReLU FFN with 2:4 weights: all variants compute one network, whose weights are 2:4 already.

Variants of the race "forward", weights packed and quantised before on all sides: `sparse24` multiplies the pruned w1 as
a dense matrix, `sparse24_up` packed; in fp8 both have one scale for the activation and for w2, as `fused_dense` has,
and `sparse24_up_row` one for each token, as `scaled_mm_row` has. The first GEMMs alone are in the race "gemm1".

Of the race "training": `sparse24` with dense products of weights, `sparse24_up` and `sparse24_both` with packed ones,
which each step prunes and packs; in fp8 all six products are float8. `sparse24_adapters` is `sparse24_both` with
adapters of rank 64 beside w1, as they are when they are added: they change nothing, and have gradients. The rivals are
those of forward.py and of training.py.

The share of zeros comes from one feature of x that is constant, which stands for a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import sparse24
from sparse24.bench.ffn import forward, training
from sparse24.bench.ffn.checks import BOUNDS, Expected, check_kept, sampled_rows
from sparse24.bench.harness import Case, Problem, attempt
from sparse24.bench.inputs import generator
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job
from sparse24.bench.sizes import Size
from sparse24.mlp.packed_weights import packed_once

#: Rivals that are timed beside ours.
FORWARD = {
    "bf16": ("torch_compile", "fused_dense"),
    "fp8": ("scaled_mm_row", "scaled_mm_tensor", "fused_dense"),
}
TRAINING = ("torch_compile", "fused_dense", "scaled_mm_tensor", "fused_dense_fp8", "sparse24", "sparse24_fp8")
CONSTANT = 2.0
RANK = 64

Tensors = tuple[torch.Tensor, ...]


def compilations(tokens: int, d_model: int, d_ff: int, trains: bool) -> list[Job]:
    """What `problem` has compiled, as it calls it."""
    if trains:
        return training.compilations(tokens, d_model, d_ff, training.FP8_ONLY)
    names = {"mlp", "mlp_fp8_rows", "mlp_fp8_tensor"}
    jobs = forward.compilations(tokens, d_model, d_ff, False)
    return [job for job in jobs if job.function.__name__ in names]


def problem(size: Size, zeros: float, options: Options, trains: bool) -> Problem:
    """All variants of one size, of one pass or of a step."""
    x, w1, w2 = operands(size, zeros, options.device, options.seed)
    measured = 1 - torch.count_nonzero(F.linear(x, w1) > 0).item() / (size.tokens * size.d_ff)
    cases: list[Case] = []
    if trains:
        g = generator(options.device, options.seed + 1)
        dy = torch.randn(size.tokens, size.d_model, generator=g, device=options.device).to(x.dtype)
        step = training.Step(x, w1, w2, dy)
        cases += attempt(partial(training_cases, step, options), variant="sparse24_both", dtype="bf16", role="sparse24")
    else:
        rows = sampled_rows(size.tokens, device=options.device, seed=options.seed)
        ffn = forward.Operands(x, w1, w2, None, None, rows)
        for dtype, build in (("bf16", bf16), ("fp8", fp8)):
            cases += attempt(partial(build, ffn, options), variant="sparse24_up", dtype=dtype, role="sparse24")
    gemm = 2.0 * size.tokens * size.d_model * size.d_ff
    for case in cases:
        case.flops = {"forward": 2, "gemm1": 1, "training": 6}[case.race] * gemm
    return Problem(*size[:3], measured, cases, sustained=("forward", "gemm1", "training"))


def operands(size: Size, zeros: float, device: torch.device, seed: int) -> Tensors:
    """x, w1 and w2 in bf16, both weights 2:4."""
    g = generator(device, seed)

    def normal(rows: int, columns: int, deviation: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g, device=device) * deviation

    x, w1 = normal(size.tokens, size.d_model), normal(size.d_ff, size.d_model, size.d_model**-0.5)
    x[:, 0], w1[:, 0] = CONSTANT, 0
    sample = x[:256] @ sparse24.prune24(w1).t()
    w1[:, 0] = -sample.flatten()[:1_000_000].quantile(zeros) / CONSTANT
    w2 = normal(size.d_model, size.d_ff, size.d_ff**-0.5)
    dtype = torch.bfloat16
    return x.to(dtype), sparse24.prune24(w1).to(dtype), sparse24.prune24(w2, 0).to(dtype)


def rivals(cases: list[Case], races: tuple[str, ...], dtype: str) -> list[Case]:
    return [case for case in cases if case.race in races and case.variant in FORWARD[dtype]]


def bf16(ffn: forward.Operands, options: Options) -> list[Case]:
    x, w1, w2, _, _, rows = vars(ffn).values()
    packed = sparse24.prune_pack24(w1)[1:]
    pre_activation = F.linear(x, w1)
    expected = Expected("bf16", pre_activation, w2, None, rows)
    exact_y = (x[rows].double() @ w1.double().t()).relu().square()

    def check_first(output: Tensors) -> dict[str, float]:
        return check_kept(*output, ffn.hidden_shape, rows, exact_y, BOUNDS["bf16"])

    def network(_: int, **packed_weight: Any) -> torch.Tensor:
        return sparse24.relu2_mlp(x, w1, w2, min_tokens=0, weights_pruned=True, **packed_weight)

    def dense_first(_: int) -> Tensors:
        return sparse24.linear_compress(x, w1, statistics=False)[:2]

    def packed_first(_: int) -> Tensors:
        return sparse24.linear_compress_packed(x, *packed, statistics=False)[:2]

    return [
        *rivals(forward.bf16(ffn, options), ("forward",), "bf16"),
        Case("sparse24", "bf16", network, expected.check_sparse, "sparse24"),
        Case("sparse24_up", "bf16", partial(network, w1_packed=packed), expected.check_sparse, "sparse24"),
        Case("linear_compress", "bf16", dense_first, check_first, "part", "gemm1"),
        Case("linear_compress_packed", "bf16", packed_first, check_first, "part", "gemm1"),
    ]


def fp8(ffn: forward.Operands, options: Options) -> list[Case]:
    x, w1, w2, _, _, rows = vars(ffn).values()
    (q1, s1), (q2, s2), (t2, u2) = (
        *(sparse24.quantize_fp8(w) for w in (w1, w2)),
        sparse24.quantize_fp8(w2, None, "tensor"),
    )
    packed = packed_once(q1)
    xq, scale_x = sparse24.quantize_fp8(x)
    pre_activation = forward.up_projection(x, q1, None, fp8=True, w1_scale=s1)
    static = forward.calibrated(pre_activation, xq, scale_x)[0]
    bound = sparse24.bounding_factor(q1, s1)
    by_row = Expected("fp8", pre_activation, q2.double() * s2, None, rows)
    one = Expected("fp8", pre_activation, t2.double() * u2, None, rows)
    exact_y = ((xq[rows].double() * scale_x[rows]) @ (q1.double() * s1).t()).relu().square()

    def network(second: Tensors, scales: dict[str, torch.Tensor], packs: bool, _: int) -> torch.Tensor:
        options = {"w1_scale": s1, "w2_scale": second[1], "w1_packed": packed if packs else None, **scales}
        return sparse24.relu2_mlp(x, q1, second[0], min_tokens=0, weights_pruned=True, **options)

    def check_first(output: Tensors) -> dict[str, float]:
        return check_kept(*output, ffn.hidden_shape, rows, exact_y / static.double(), BOUNDS["fp8"])

    def first(function: Callable[..., Tensors], *w: torch.Tensor) -> Callable[[int], Tensors]:
        return lambda _: function(xq, *w, scale_x, s1, None, static, statistics=False)[:2]

    of_row, of_one = ((q2, s2), {"scale_y_factor": bound}), ((t2, u2), {"scale_y": static})
    check_row = partial(by_row.check_sparse, rival=one)
    return [
        *rivals(forward.fp8(ffn, options), ("forward",), "fp8"),
        Case("sparse24", "fp8", partial(network, *of_one, False), one.check_sparse, "sparse24"),
        Case("sparse24_up", "fp8", partial(network, *of_one, True), one.check_sparse, "sparse24"),
        Case("sparse24_up_row", "fp8", partial(network, *of_row, True), check_row, "sparse24"),
        Case("linear_compress", "fp8", first(sparse24.linear_compress, q1), check_first, "part", "gemm1"),
        Case(
            "linear_compress_packed",
            "fp8",
            first(sparse24.linear_compress_packed, *packed),
            check_first,
            "part",
            "gemm1",
        ),
    ]


def training_cases(step: training.Step, options: Options) -> list[Case]:
    """Of a step whose weights stay as they are when they are pruned, which every step of ours does."""
    cases = [*training.dense(step, options), *training.sparse(step, options, training.FP8_ONLY)]
    x, w1, _ = step.operands
    dense_dw = training.ffn_of(sparse24.Recipe(weight_gradients="dense"))
    exact = step.exact(training.masks.kept_activation(dense_dw, x, w1))

    def check(output: Tensors) -> dict[str, float]:
        return training.expect(output, exact, [training.BOUNDS["fp8"]] * len(training.NAMES))

    for name in ("up", "both"):
        ffn = training.ffn_of(sparse24.Recipe(sparse_weights=name))
        cases += step.cases(f"sparse24_{name}", "bf16", "sparse24", ffn, check)
        float8 = training.delayed_fp8(step, partial(_float8, name))
        cases += step.cases(f"sparse24_{name}", "fp8", "sparse24", float8, check)
    adapted = AdaptedStep(*step.plain, step.dy, options)
    for dtype, both in (("bf16", ffn), ("fp8", float8)):
        ffn = partial(_adapted, both)
        cases += adapted.cases("sparse24_adapters", dtype, "sparse24", ffn, check)
    names = (*TRAINING, "sparse24_up", "sparse24_both", "sparse24_adapters")
    return [case for case in cases if case.race == "training" and case.variant in names]


class AdaptedStep(training.Step):
    """A step that has adapters and their gradients too: zeros on the left, as `add_adapters_` makes them."""

    def __init__(self, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, dy: torch.Tensor, options: Options) -> None:
        super().__init__(x, w1, w2, dy)
        right = torch.randn(RANK, x.shape[1], generator=generator(options.device, options.seed), device=options.device)
        adapters = w1.new_zeros(w1.shape[0], RANK), right.to(w1.dtype)
        self.operands += tuple(t.requires_grad_() for t in adapters)


def _adapted(
    ffn: Callable[..., torch.Tensor], x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, *adapters: torch.Tensor
) -> torch.Tensor:
    return ffn(x, w1, w2, adapters=adapters)


def _float8(
    name: Any,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    scales: torch.Tensor,
    known: bool = True,
    **more: Any,
) -> torch.Tensor:
    recipe = sparse24.Recipe(sparse_weights=name, fp8_weight_gradients=True)
    options: dict[str, Any] = {"precision": "fp8", "min_tokens": 0, "recipe": recipe, **more}
    return sparse24.relu2_mlp(x, w1, w2, delayed_scales=scales, scales_known=known, **options)
