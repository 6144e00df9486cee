"""Sparse GEMMs against cuBLAS, `_scaled_mm` and cuSPARSELt, on the same 2:4 data.

    python -m bench mm --out bench/results/<gpu>/mm.json

Y = 2:4(relu(pre_activation)^2) [tokens, d_ff] is the sparse operand of three products of an FFN with d_model outputs:

    forward           Y @ W.T      b = W.T, K-major              16-bit and fp8
    input gradient    Y @ W        b MN-major                    16-bit (the shape of dY1 @ W1)
    weight gradient   (Y.T @ G).T  dim = -2, transpose_out       16-bit

The dense rivals multiply the pruned matrix itself: zeros change the clocks of a GPU, so both sides get the same.
TFLOP/s are dense-equivalent: 2 * tokens * d_model * d_ff over the time, for sparse and dense alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import sparse24
from sparse24.bench import reference
from sparse24.bench.ffn import baselines
from sparse24.bench.harness import Case, Options, Problem, attempt, run_bench
from sparse24.bench.inputs import Sparsity, preactivations, recorded, weights, zero_share

# tokens x out x reduction.
SIZES = [
    (8192, 4096, 16384),
    (16384, 4096, 21504),
    (32768, 1664, 6656),
    (16384, 2560, 18432),
    (16384, 8192, 28672),
    (4096, 4096, 16384),
    (1024, 4096, 16384),
    (512, 4096, 16384),
    (128, 4096, 16384),
]
QUICK_SIZES = [SIZES[0], SIZES[2], SIZES[7]]
SMOKE_SIZES = [(48, 32, 64), (33, 48, 96)]
# Gradients are a matter of training, which has many tokens.
MIN_GRADIENT_TOKENS = 4096
# Above what rounding the output to bf16 gives; fp8 accumulates in fewer bits.
BOUNDS = {"bf16": 4e-3, "fp8": 2e-2}
DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    sizes = SMOKE_SIZES if options.smoke else QUICK_SIZES if options.quick else SIZES
    cases = [(size, Sparsity()) for size in sizes]
    if not options.quick:
        cases += [(sizes[0], Sparsity(zeros)) for zeros in (0.5, 0.95)]
    cases += [(sizes[0], s) for s in recorded(options.patterns)]
    for (tokens, out, reduction), sparsity in cases:
        label = f"{tokens} x {out} x {reduction} {sparsity.name} {sparsity.zeros if not sparsity.pattern else ''}"
        yield label, partial(problem, tokens, out, reduction, sparsity, options)


def problem(tokens: int, out: int, reduction: int, sparsity: Sparsity, options: Options) -> Problem:
    pre_activation = preactivations(tokens, reduction, sparsity, device=options.device, seed=options.seed)
    w = weights(out, reduction, device=options.device, seed=options.seed + 1)
    cases = ours(forward_bf16, pre_activation, w, "bf16", "forward") + ours(
        forward_fp8, pre_activation, w, "fp8", "forward"
    )
    if tokens >= MIN_GRADIENT_TOKENS or options.smoke:
        gradient = weights(tokens, out, device=options.device, seed=options.seed + 2)
        cases += ours(input_gradient, pre_activation, w, "bf16", "input gradient")
        cases += ours(weight_gradient, pre_activation, gradient, "bf16", "weight gradient")
    for case in cases:
        case.flops = 2.0 * tokens * out * reduction
        if case.role == "sparse24":
            # The weight gradient is the product of Y.T [d_ff, tokens] and G [tokens, d_model].
            m, k = (reduction, tokens) if case.race == "weight gradient" else (tokens, reduction)
            case.facts |= chosen_config(case.dtype, m, out, k, options.device)
    return Problem(tokens, out, reduction, zero_share(pre_activation), cases, sparsity.name)


def chosen_config(dtype: str, m: int, n: int, k: int, device: torch.device) -> dict[str, str]:
    """The kernel configuration that mm chooses for A [m, k] and b [k, n] on this device, for the record."""
    if device.type != "cuda":
        return {}
    sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    return {"config": sparse24._C.select_mm_config(DTYPES[dtype], m, n, k, sm_count)["text"]}


def ours(build: Callable, pre_activation: torch.Tensor, dense: torch.Tensor, dtype: str, race: str) -> list[Case]:
    """The cases of one product; if they cannot even be built, that is a failure of ours in this race alone."""
    return attempt(
        partial(build, pre_activation, dense), variant="sparse24.mm", dtype=dtype, race=race, role="sparse24"
    )


class Bound:
    """Errors against a float64 product: the rivals' under a fixed bound, ours under twice the first rival's."""

    def __init__(self, dtype: str) -> None:
        self.limit = BOUNDS[dtype]
        self.rival: float | None = None

    def dense(self, output: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
        error = reference.expect_error(output, expected, self.limit)
        self.rival = error if self.rival is None else self.rival
        return {"rel_error": error}

    def ours(self, output: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
        limit = self.limit if self.rival is None else 2 * self.rival + reference.ABSOLUTE_SLACK
        return {"rel_error": reference.expect_error(output, expected, limit)}


def forward_bf16(pre_activation: torch.Tensor, w: torch.Tensor) -> list[Case]:
    values, meta = sparse24.compress(pre_activation, "relu2")
    y = sparse24.decompress(values, meta, *pre_activation.shape)
    expected = reference.product(y, w.t())
    bound = Bound("bf16")

    def cusparselt() -> Case:
        run = baselines.CuSparseLt(y, w.t())
        return Case(
            "cuSPARSELt", "bf16", run, partial(bound.dense, expected=expected), "cusparselt", facts=dict(run.choice)
        )

    return [
        Case("torch.matmul", "bf16", lambda _: torch.matmul(y, w.t()), partial(bound.dense, expected=expected)),
        *attempt(cusparselt, variant="cuSPARSELt", dtype="bf16", role="cusparselt"),
        Case(
            "sparse24.mm",
            "bf16",
            lambda _: sparse24.mm(values, meta, w.t()),
            partial(bound.ours, expected=expected),
            "sparse24",
        ),
    ]


def forward_fp8(pre_activation: torch.Tensor, w: torch.Tensor) -> list[Case]:
    values, meta, scale_y = sparse24.compress_fp8(pre_activation, None, "relu2")
    y = sparse24.decompress(values, meta, *pre_activation.shape)
    wq, scale_w = sparse24.quantize_fp8(w)
    b, scale_b = wq.t(), scale_w.t()
    bits = reference.product(y, b)
    # The same bits under unit scales, for kernels that take one scale per tensor or none: their time is the same.
    one = torch.ones(1, dtype=torch.float32, device=pre_activation.device)
    bound = Bound("fp8")

    def scaled(check, output: torch.Tensor) -> dict[str, float]:
        return check(output, bits * scale_y * scale_b)

    def cusparselt() -> Case:
        run = baselines.CuSparseLt(y, b)
        return Case("cuSPARSELt", "fp8", run, partial(bound.dense, expected=bits), "cusparselt", facts=dict(run.choice))

    return [
        Case(
            "_scaled_mm row-wise",
            "fp8",
            lambda _: baselines.scaled_mm(y, b, scale_y, scale_b),
            partial(scaled, bound.dense),
        ),
        Case(
            "_scaled_mm tensor-wise",
            "fp8",
            lambda _: baselines.scaled_mm(y, b, one, one),
            partial(bound.dense, expected=bits),
        ),
        *attempt(cusparselt, variant="cuSPARSELt", dtype="fp8", role="cusparselt"),
        Case(
            "sparse24.mm row-wise",
            "fp8",
            lambda _: sparse24.mm(values, meta, b, scale_y, scale_w, out_dtype=torch.bfloat16),
            partial(scaled, bound.ours),
            "sparse24",
        ),
    ]


def input_gradient(pre_activation: torch.Tensor, w: torch.Tensor) -> list[Case]:
    values, meta = sparse24.compress(pre_activation, "relu2")
    y = sparse24.decompress(values, meta, *pre_activation.shape)
    b = w.t().contiguous()
    expected = reference.product(y, b)
    bound = Bound("bf16")
    race = "input gradient"
    return [
        Case("torch.matmul", "bf16", lambda _: torch.matmul(y, b), partial(bound.dense, expected=expected), race=race),
        Case(
            "sparse24.mm, b MN-major",
            "bf16",
            lambda _: sparse24.mm(values, meta, b),
            partial(bound.ours, expected=expected),
            "sparse24",
            race,
        ),
    ]


def weight_gradient(pre_activation: torch.Tensor, gradient: torch.Tensor) -> list[Case]:
    values, meta = sparse24.compress(pre_activation, "relu2", -2)
    y = sparse24.decompress(values, meta, *pre_activation.shape, -2)
    expected = reference.product(gradient.t(), y)
    bound = Bound("bf16")
    race = "weight gradient"
    return [
        Case(
            "torch.matmul",
            "bf16",
            lambda _: torch.matmul(gradient.t(), y),
            partial(bound.dense, expected=expected),
            race=race,
        ),
        Case(
            "sparse24.mm, dim=-2",
            "bf16",
            lambda _: sparse24.mm(values, meta, gradient, dim=-2, transpose_out=True),
            partial(bound.ours, expected=expected),
            "sparse24",
            race,
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    return run_bench("mm", problems, __doc__, argv)
