"""The squared-ReLU FFN forward: sparse24.relu2_mlp against the dense FFNs that users run and the best that could be.

    python bench/ffn_forward.py --out bench/results/<gpu>/ffn_forward.json

Variants: `sparse24` (relu2_mlp as it comes), `sparse24_fused` (the first GEMM compresses in its epilogue, the default
in bf16), `sparse24_composed` (GEMM, compress, GEMM: the default in fp8), `torch_compile` and `eager` in bf16,
`scaled_mm_row` and `scaled_mm_tensor` (torch.compile around `_scaled_mm`, x and the activation quantised inside), and
`fused_dense`: linear_relu2, which has the activation and the fp8 cast in its epilogue as linear_compress has, and a
dense second GEMM. Weights are quantised before on all sides. In fp8 `sparse24_fused_static` and `fused_dense` are given
one scale for the activation, as calibration or a delayed maximum gives it; the others compute
exact scales. The GEMMs alone are in the races gemm1 (records of bench "gemm1") and gemm2.

Verified against a float64 second GEMM of the activation that the same first GEMM gives: the dense variants against the
whole activation, sparse24 against its 2:4 pruned form. `pruning_error` is the distance between those two references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import baselines
import reference
import torch
from data import mlp_inputs
from harness import Case, Options, Problem, attempt, compiled, main
from torch.nn import functional as F

import sparse24
from sparse24.mlp import up_projection

# T, D, F: large first, then the region where 2:4 has less and less to save.
SIZES = [
    (8192, 4096, 16384),
    (16384, 4096, 21504),
    (32768, 1664, 6656),
    (16384, 2560, 18432),
    (2048, 4096, 16384),
    (1024, 4096, 16384),
    (512, 4096, 16384),
    (128, 4096, 16384),
]
QUICK_SIZES = [SIZES[0], SIZES[2], SIZES[6]]
SMOKE_SIZES = [(48, 64, 128), (33, 64, 96)]
ZEROS = 0.9
# Relative errors of a correct variant: bf16 rounds the activation and the result, fp8 the activation to 3 bits.
BOUNDS = {"bf16": 1e-2, "fp8": 1e-1}
RELU2 = "relu2"


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    sizes = SMOKE_SIZES if options.smoke else QUICK_SIZES if options.quick else SIZES
    for tokens, d_model, d_ff in sizes:
        yield f"T {tokens}, D {d_model}, F {d_ff}", partial(problem, tokens, d_model, d_ff, options)


def problem(tokens: int, d_model: int, d_ff: int, options: Options) -> Problem:
    x, w1, w2 = mlp_inputs(tokens, d_model, d_ff, ZEROS, device=options.device, seed=options.seed)
    zeros = 1 - torch.count_nonzero(F.linear(x, w1) > 0).item() / (tokens * d_ff)
    cases = []
    for build, dtype in ((bf16, "bf16"), (fp8, "fp8")):
        names = {"variant": "sparse24", "dtype": dtype, "role": "sparse24"}
        cases += attempt(partial(build, x, w1, w2, options), **names)
    gemm = 2.0 * tokens * d_model * d_ff
    for case in cases:
        case.flops = {"forward": 2 * gemm, "gemm1": gemm, "gemm2": gemm}.get(case.race, 0.0)
    return Problem(tokens, d_model, d_ff, zeros, cases)


class Expected:
    """The float64 results of one precision: what the dense second GEMM gives, and the sparse one."""

    def __init__(self, dtype: str, pre: torch.Tensor, w2: torch.Tensor) -> None:
        """`pre` is the first GEMM's 16-bit output, `w2` the second weight as this precision stores it, dequantised."""
        y = reference.relu2(pre)
        self.limit = BOUNDS[dtype]
        self.rival: float | None = None
        self.dense = reference.product(y, w2.t())
        self.sparse = reference.product(reference.prune24(y, -1), w2.t())
        self.pruning_error = reference.relative_error(self.sparse, self.dense)

    def check_dense(self, output: torch.Tensor) -> dict[str, float]:
        error = reference.expect_error(output, self.dense, self.limit)
        self.rival = error if self.rival is None else self.rival
        return {"rel_error": error}

    def check_sparse(self, output: torch.Tensor) -> dict[str, float]:
        limit = self.limit if self.rival is None else 2 * self.rival + reference.ABSOLUTE_SLACK
        error = reference.expect_error(output, self.sparse, limit)
        return {"rel_error": error, "pruning_error": self.pruning_error}


def check_kept(values: torch.Tensor, meta: torch.Tensor, y: torch.Tensor, scale: float, limit: float) -> dict:
    """Kept values against float64 y at their own places, which must hold the energy of the two largest."""
    kept = sparse24.decompress(values, meta, *y.shape).double() * scale
    ones = torch.ones(values.shape, device=values.device).to(values.dtype)
    places = sparse24.decompress(ones, meta, *y.shape).double()
    best = reference.prune24(y, -1).square().sum()
    share = ((y * places).square().sum() / best).item()
    if not share > 1 - 1e-3:
        raise reference.Unverified(f"expected the kept entries to hold the energy of the two largest, got {share:.6f}")
    return {"rel_error": reference.expect_error(kept, y * places, limit)}


def bf16(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, options: Options) -> list[Case]:
    run_compiled = compiled(baselines.mlp, options)
    pre = F.linear(x, w1)
    y = F.relu(pre).square()
    values, meta = sparse24.compress(pre, RELU2)
    exact = reference.product(x, w1.t())
    exact_y = exact.relu().square()
    expected = Expected("bf16", pre, w2)
    limit = BOUNDS["bf16"]

    def check_first(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": reference.expect_error(output, exact, limit)}

    def check_relu2(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": reference.expect_error(output, exact_y, limit)}

    def ours(_: int, fused: bool = True) -> torch.Tensor:
        return sparse24.relu2_mlp(x, w1, w2, precision="16bit", min_tokens=0, fused=fused)

    def first_relu2(_: int) -> torch.Tensor:
        return sparse24.linear_relu2(x, w1, statistics=False)[0]

    def first_compress(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse24.linear_compress(x, w1, statistics=False)[:2]

    dense, sparse = expected.check_dense, expected.check_sparse
    return [
        Case("torch_compile", "bf16", lambda _: run_compiled(x, w1, w2), dense),
        Case("eager", "bf16", lambda _: baselines.mlp(x, w1, w2), dense),
        Case("fused_dense", "bf16", lambda i: F.linear(first_relu2(i), w2), dense),
        Case("sparse24", "bf16", ours, sparse, "sparse24"),
        Case("sparse24_composed", "bf16", partial(ours, fused=False), sparse, "part"),
        Case("dense", "bf16", lambda _: F.linear(x, w1), check_first, "part", "gemm1"),
        Case("linear_relu2", "bf16", first_relu2, check_relu2, "part", "gemm1"),
        Case("linear_compress", "bf16", first_compress, lambda o: check_kept(*o, exact_y, 1.0, limit), "part", "gemm1"),
        Case("dense", "bf16", lambda _: F.linear(y, w2), dense, "part", "gemm2"),
        Case("sparse", "bf16", lambda _: sparse24.mm(values, meta, w2.t()), sparse, "part", "gemm2"),
    ]


def fp8(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, options: Options) -> list[Case]:
    (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    (t1, u1), (t2, u2) = baselines.quantize(w1, per_row=False), baselines.quantize(w2, per_row=False)
    run_rows = compiled(baselines.mlp_fp8_rows, options)
    run_tensor = compiled(baselines.mlp_fp8_tensor, options)
    xq, scale_x = sparse24.quantize_fp8(x)
    pre = up_projection(x, q1, fp8=True, w1_scale=s1)
    values, meta, scale_y = sparse24.compress_fp8(pre, None, RELU2)
    static = (F.relu(pre.float()).square().amax() / 448).reshape(1)  # what calibration would find
    exact = reference.product(xq, q1.t()) * scale_x * s1.t()
    exact_y = exact.relu().square()
    expected = Expected("fp8", pre, q2.double() * s2)
    # One scale per tensor makes other weights and another pre-activation.
    xt, scale_xt = baselines.quantize(x, per_row=False)
    expected_tensor = Expected("fp8", baselines.scaled_mm(xt, t1.t(), scale_xt, u1), t2.double() * u2)
    expected_static = Expected("fp8", pre, t2.double() * u2)
    limit = BOUNDS["fp8"]

    def check_first(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": reference.expect_error(output, exact, BOUNDS["bf16"])}

    def check_relu2(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": reference.expect_error(output.double() * static, exact_y, limit)}

    def check_compress(output: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        return check_kept(*output, exact_y, static.item(), limit)

    def ours(_: int, fused: bool | None = True, scale: torch.Tensor | None = None) -> torch.Tensor:
        scales = {"w1_scale": s1, "w2_scale": s2, "scale_y": scale}
        return sparse24.relu2_mlp(x, q1, q2, precision="fp8", min_tokens=0, fused=fused, **scales)

    def first_relu2(_: int) -> torch.Tensor:
        return sparse24.linear_relu2(xq, q1, scale_x, s1, None, static, statistics=False)[0]

    def first_compress(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse24.linear_compress(xq, q1, scale_x, s1, None, static, statistics=False)[:2]

    def fused_dense(_: int) -> torch.Tensor:
        q, s = sparse24.quantize_fp8(x)
        yq = sparse24.linear_relu2(q, q1, s, s1, None, static, statistics=False)[0]
        return baselines.scaled_mm(yq, t2.t(), static.reshape(1, 1), u2)

    dense, sparse, dense_tensor = expected.check_dense, expected.check_sparse, expected_tensor.check_dense
    return [
        Case("scaled_mm_row", "fp8", lambda _: run_rows(x, q1, s1, q2, s2), dense),
        Case("scaled_mm_tensor", "fp8", lambda _: run_tensor(x, t1, u1, t2, u2), dense_tensor),
        Case("fused_dense", "fp8", fused_dense, expected_static.check_dense),
        Case("sparse24", "fp8", partial(ours, fused=None), sparse, "sparse24"),
        Case("sparse24_fused", "fp8", ours, sparse, "part"),
        Case("sparse24_fused_static", "fp8", partial(ours, scale=static), sparse, "part"),
        Case("dense", "fp8", lambda _: baselines.scaled_mm(xq, q1.t(), scale_x, s1.t()), check_first, "part", "gemm1"),
        Case("linear_relu2", "fp8", first_relu2, check_relu2, "part", "gemm1"),
        Case("linear_compress", "fp8", first_compress, check_compress, "part", "gemm1"),
        Case(
            "sparse",
            "fp8",
            lambda _: sparse24.mm(values, meta, q2.t(), scale_y, s2, out_dtype=torch.bfloat16),
            sparse,
            "part",
            "gemm2",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main("ffn_forward", problems, __doc__))
