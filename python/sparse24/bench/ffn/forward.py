"""The variants of the squared-ReLU FFN forward on one set of operands, in bf16 and fp8: what runs, what it must give.

Variants: `sparse24` (relu2_mlp as it comes, but sparse for any number of tokens), `sparse24_fallback` (the same run
dense, on both sides of the threshold of `sparse24.mlp.pays`), `sparse24_fused` (the first GEMM compresses in its
epilogue), `sparse24_composed` (GEMM, compress, GEMM), `torch_compile` and `eager` in bf16, `scaled_mm_row` and
`scaled_mm_tensor` (torch.compile around `_scaled_mm`, x and the activation quantised inside), `fused_dense`:
linear_relu2, which has the activation and the fp8 cast in its epilogue as linear_compress has, and a dense second GEMM;
and `cusparselt`: torch's first GEMM, relu^2 and pruning in one compiled pass, then torch's own compression and sparse
GEMM. Weights are quantised before on all sides. torch.compile has its default mode (max-autotune was not timed) and
static shapes, so each size is compiled anew.

In fp8 `sparse24` is given the factor of |x_row|^2 that bounds the activation (`bounding_factor`, from the weights
alone, where there is no bias), `sparse24_fused_predicted` a factor from calibration, and the others compute exact
scales, but for those with one scale for the activation, as calibration or a delayed maximum gives it, and one for w2:
`sparse24_fused_static` (`sparse24_fallback_static` run dense), `fused_dense` and `cusparselt`. The GEMMs
alone are in the races gemm1 (records of bench "gemm1") and gemm2; cuSPARSELt's gemm2 is without its compression.

Verified against a float64 second GEMM of the activation that the same first GEMM gives: the dense variants against the
whole activation, the sparse ones against its 2:4 pruned form. `pruning_error` is the distance between those two
references. With many tokens a random sample of them is compared (checks.py).

At the large sizes networks and first GEMMs are also timed back to back (`sustained_us`), as a GPU at its power limit
runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

import sparse24
from sparse24.bench import reference
from sparse24.bench.ffn import baselines
from sparse24.bench.ffn.checks import BOUNDS, Expected, check_kept, expect_rows, sampled_rows
from sparse24.bench.harness import Case, Check, Problem, attempt, compiled
from sparse24.bench.inputs import biases, mlp_inputs
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job, Operand
from sparse24.bench.sizes import Size
from sparse24.mlp import up_projection

RELU2 = "relu2"
#: Multiply-adds of the second GEMM up to which dense of ours is timed beside sparse.
DENSE_UP_TO = 100e9


@dataclass
class Operands:
    """One FFN in bf16, its input [tokens, d_model], and the tokens that are verified."""

    x: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None
    b2: torch.Tensor | None
    rows: torch.Tensor

    @property
    def hidden_shape(self) -> torch.Size:
        return torch.Size((self.x.shape[0], self.w1.shape[0]))

    def run_dense(self, name: str, dtype: str, ours: Callable[..., torch.Tensor], dense: Check) -> list[Case]:
        """`ours` where it runs dense, on both sides of the threshold: `sparse24.mlp.pays` is chosen by these."""
        if self.x.shape[0] * self.w1.shape[0] * self.w2.shape[0] > DENSE_UP_TO:
            return []
        return [Case(name, dtype, partial(ours, min_tokens=1 << 30), dense, "part")]


def compilations(tokens: int, d_model: int, d_ff: int, bias: bool) -> list[Job]:
    """What `bf16` and `fp8` have compiled, as they call it; `pruned_relu2` first, which all sizes share."""
    fp8, fp32 = reference.FP8, torch.float32
    x, pre_activation, one = Operand((tokens, d_model)), Operand((tokens, d_ff)), Operand((1, 1), fp32)
    up, down = (d_ff, d_model), (d_model, d_ff)
    biases = (Operand((d_ff,)), Operand((d_model,))) if bias else (None, None)
    rows = (Operand(up, fp8), Operand((d_ff, 1), fp32), Operand(down, fp8), Operand((d_model, 1), fp32))
    tensors = (Operand(up, fp8), one, Operand(down, fp8), one)
    # The output, and [tokens, d_ff] in 16 bits twice, in fp8 twice.
    workspace = x.bytes + 3 * pre_activation.bytes
    return [
        Job(baselines.pruned_relu2, (pre_activation,), workspace, dynamic=True),
        Job(baselines.pruned_relu2, (pre_activation, Operand((1,), fp32)), workspace, dynamic=True),
        Job(baselines.mlp, (x, Operand(up), Operand(down), *biases), workspace),
        Job(baselines.mlp_fp8_rows, (x, *rows, *biases), workspace),
        Job(baselines.mlp_fp8_tensor, (x, *tensors, *biases), workspace),
    ]


def bf16(ffn: Operands, options: Options) -> list[Case]:
    x, w1, w2, b1, b2, rows = vars(ffn).values()
    weights = (w1, w2, b1, b2)
    run_compiled = compiled(baselines.mlp, options)
    pre_activation = F.linear(x, w1, b1)
    y = F.relu(pre_activation).square()
    values, meta = sparse24.compress(pre_activation, RELU2)
    exact = reference.product(x[rows], w1.t()) + (0 if b1 is None else b1.double())
    exact_y = exact.relu().square()
    expected = Expected("bf16", pre_activation, w2, b2, rows)
    limit = BOUNDS["bf16"]

    def check_first(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": expect_rows(output, rows, exact, limit)}

    def check_relu2(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": expect_rows(output, rows, exact_y, limit)}

    def check_compress(output: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        return check_kept(*output, ffn.hidden_shape, rows, exact_y, limit)

    def ours(_: int, fused: bool = True, min_tokens: int | None = 0) -> torch.Tensor:
        return sparse24.relu2_mlp(x, *weights, precision="16bit", min_tokens=min_tokens, fused=fused)

    def first_relu2(_: int) -> torch.Tensor:
        return sparse24.linear_relu2(x, w1, bias=b1, statistics=False)[0]

    def first_compress(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse24.linear_compress(x, w1, bias=b1, statistics=False)[:2]

    def cusparselt() -> list[Case]:
        prune = compiled(baselines.pruned_relu2, options, dynamic=True)
        second = baselines.CuSparseLt(prune(pre_activation), w2.t())

        def forward(_: int) -> torch.Tensor:
            return baselines.dequantise(second.compress_and_multiply(prune(F.linear(x, w1, b1))), None, b2)

        def gemm2(_: int) -> torch.Tensor:
            return baselines.dequantise(second(), None, b2)

        return cusparselt_cases("bf16", forward, gemm2, expected, second)

    dense, sparse = expected.check_dense, expected.check_sparse
    return [
        Case("torch_compile", "bf16", lambda _: run_compiled(x, *weights), dense),
        Case("eager", "bf16", lambda _: baselines.mlp(x, *weights), dense),
        Case("fused_dense", "bf16", lambda i: F.linear(first_relu2(i), w2, b2), dense),
        *attempt(cusparselt, variant="cusparselt", dtype="bf16", role="cusparselt"),
        Case("sparse24", "bf16", ours, sparse, "sparse24"),
        Case("sparse24_fused", "bf16", partial(ours, fused=True), sparse, "part"),
        Case("sparse24_composed", "bf16", partial(ours, fused=False), sparse, "part"),
        *ffn.run_dense("sparse24_fallback", "bf16", ours, dense),
        Case("dense", "bf16", lambda _: F.linear(x, w1, b1), check_first, "part", "gemm1"),
        Case("linear_relu2", "bf16", first_relu2, check_relu2, "part", "gemm1"),
        Case("linear_compress", "bf16", first_compress, check_compress, "part", "gemm1"),
        Case("dense", "bf16", lambda _: F.linear(y, w2, b2), dense, "part", "gemm2"),
        Case("sparse", "bf16", lambda _: sparse24.mm(values, meta, w2.t(), bias=b2), sparse, "part", "gemm2"),
    ]


def fp8(ffn: Operands, options: Options) -> list[Case]:
    x, w1, w2, b1, b2, rows = vars(ffn).values()
    (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    (t1, u1), (t2, u2) = baselines.quantize(w1, per_row=False), baselines.quantize(w2, per_row=False)
    run_rows = compiled(baselines.mlp_fp8_rows, options)
    run_tensor = compiled(baselines.mlp_fp8_tensor, options)
    xq, scale_x = sparse24.quantize_fp8(x)
    pre_activation = up_projection(x, q1, b1, fp8=True, w1_scale=s1)
    values, meta, scale_y = sparse24.compress_fp8(pre_activation, None, RELU2)
    static, factor = calibrated(pre_activation, xq, scale_x)
    # As nn.ReLU2MLP has it from its weights; it does not hold with a bias.
    bound = sparse24.bounding_factor(q1, s1) if b1 is None else None
    exact = reference.product(xq.bfloat16()[rows], q1.t()) * scale_x[rows] * s1.t() + (0 if b1 is None else b1.double())
    exact_y = exact.relu().square()
    expected = Expected("fp8", pre_activation, q2.double() * s2, b2, rows)
    # One scale per tensor makes other weights and another pre_activation-activation.
    xt, scale_xt = baselines.quantize(x, per_row=False)
    pre_tensor = baselines.scaled_mm(xt, t1.t(), scale_xt, u1, b1)
    expected_tensor = Expected("fp8", pre_tensor, t2.double() * u2, b2, rows)
    expected_static = Expected("fp8", pre_activation, t2.double() * u2, b2, rows)
    yq, scale_yq = baselines.quantize(F.relu(pre_activation).square(), per_row=True)
    yt, scale_yt = baselines.quantize(F.relu(pre_tensor).square(), per_row=False)
    del pre_tensor, xt
    limit = BOUNDS["fp8"]

    def check_first(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": expect_rows(output, rows, exact, BOUNDS["bf16"])}

    def check_relu2(output: torch.Tensor) -> dict[str, float]:
        return {"rel_error": expect_rows(output, rows, exact_y / static.double(), limit)}

    def check_compress(output: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        return check_kept(*output, ffn.hidden_shape, rows, exact_y / static.double(), limit)

    def ours(_: int, fused: bool = True, min_tokens: int | None = 0, **scale: torch.Tensor | None) -> torch.Tensor:
        scales = {"w1_scale": s1, "w2_scale": s2} | scale
        return sparse24.relu2_mlp(x, q1, q2, b1, b2, precision="fp8", min_tokens=min_tokens, fused=fused, **scales)

    def one_scale(_: int, min_tokens: int | None = 0) -> torch.Tensor:
        scales = {"w1_scale": s1, "w2_scale": u2, "scale_y": static}
        return sparse24.relu2_mlp(x, q1, t2, b1, b2, precision="fp8", min_tokens=min_tokens, **scales)

    def predicted(_: int) -> torch.Tensor:
        q, s, scale = sparse24.quantize_fp8_predict(x, factor)
        kept, places, scale, *_ = sparse24.linear_compress(q, q1, s, s1, b1, scale, statistics=False)
        return sparse24.mm(kept, places, q2.t(), scale, s2, b2, out_dtype=torch.bfloat16)

    def first_dense(_: int) -> torch.Tensor:
        return baselines.scaled_mm(xq, q1.t(), scale_x, s1.t(), b1)

    def first_relu2(_: int) -> torch.Tensor:
        return sparse24.linear_relu2(xq, q1, scale_x, s1, b1, static, statistics=False)[0]

    def first_compress(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse24.linear_compress(xq, q1, scale_x, s1, b1, static, statistics=False)[:2]

    def fused_dense(_: int) -> torch.Tensor:
        q, s = sparse24.quantize_fp8(x)
        hidden = sparse24.linear_relu2(q, q1, s, s1, b1, static, statistics=False)[0]
        return baselines.scaled_mm(hidden, t2.t(), static.reshape(1, 1), u2, b2)

    def second_dense(_: int) -> torch.Tensor:
        return baselines.scaled_mm(yq, q2.t(), scale_yq, s2.t(), b2)

    def second_tensor(_: int) -> torch.Tensor:
        return baselines.scaled_mm(yt, t2.t(), scale_yt, u2, b2)

    def second_sparse(_: int) -> torch.Tensor:
        return sparse24.mm(values, meta, q2.t(), scale_y, s2, b2, out_dtype=torch.bfloat16)

    def cusparselt() -> list[Case]:
        prune = compiled(baselines.pruned_relu2, options, dynamic=True)
        second = baselines.CuSparseLt(prune(pre_activation, static), t2.t())
        scale = static * u2.reshape(1)

        def forward(_: int) -> torch.Tensor:
            q, s = sparse24.quantize_fp8(x)
            hidden = prune(baselines.scaled_mm(q, q1.t(), s, s1.t(), b1), static)
            return baselines.dequantise(second.compress_and_multiply(hidden), scale, b2)

        def gemm2(_: int) -> torch.Tensor:
            return baselines.dequantise(second(), scale, b2)

        return cusparselt_cases("fp8", forward, gemm2, expected_static, second)

    dense, sparse, dense_tensor = expected.check_dense, expected.check_sparse, expected_tensor.check_dense
    # A scale that is not the row's own leaves small rows fewer bits, for dense and sparse alike.
    sparse_given = partial(expected.check_sparse, rival=expected_static)
    return [
        Case("scaled_mm_row", "fp8", lambda _: run_rows(x, q1, s1, q2, s2, b1, b2), dense),
        Case("scaled_mm_tensor", "fp8", lambda _: run_tensor(x, t1, u1, t2, u2, b1, b2), dense_tensor),
        Case("fused_dense", "fp8", fused_dense, expected_static.check_dense),
        *attempt(cusparselt, variant="cusparselt", dtype="fp8", role="cusparselt"),
        Case(
            "sparse24", "fp8", partial(ours, scale_y_factor=bound), sparse_given if b1 is None else sparse, "sparse24"
        ),
        Case("sparse24_composed", "fp8", partial(ours, fused=False), sparse, "part"),
        *ffn.run_dense("sparse24_fallback", "fp8", partial(ours, scale_y_factor=bound), dense),
        Case("sparse24_fused", "fp8", partial(ours, fused=True), sparse, "part"),
        Case("sparse24_fused_static", "fp8", one_scale, expected_static.check_sparse, "part"),
        *ffn.run_dense("sparse24_fallback_static", "fp8", one_scale, expected_static.check_dense),
        Case("sparse24_fused_predicted", "fp8", predicted, sparse_given, "part"),
        Case("dense", "fp8", first_dense, check_first, "part", "gemm1"),
        Case("linear_relu2", "fp8", first_relu2, check_relu2, "part", "gemm1"),
        Case("linear_compress", "fp8", first_compress, check_compress, "part", "gemm1"),
        Case("dense", "fp8", second_dense, dense, "part", "gemm2"),
        Case("dense_tensor", "fp8", second_tensor, dense_tensor, "part", "gemm2"),
        Case("sparse", "fp8", second_sparse, sparse, "part", "gemm2"),
    ]


def calibrated(
    pre_activation: torch.Tensor, xq: torch.Tensor, scale_x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a calibration on this very batch finds: one scale of the activation, and the factor of |x_row|^2."""
    scale_rows = pre_activation.amax(dim=1, keepdim=True).float().relu().square() / reference.FP8_MAX
    squares = (xq.bfloat16() * scale_x).square().sum(dim=1, keepdim=True)
    return scale_rows.amax().reshape(1), (scale_rows / squares).amax().reshape(1)


def cusparselt_cases(
    dtype: str,
    forward: Callable[[int], torch.Tensor],
    gemm2: Callable[[int], torch.Tensor],
    expected: Expected,
    second: baselines.CuSparseLt,
) -> list[Case]:
    """The whole FFN, and its second GEMM with a compressed activation."""
    check = expected.check_sparse_rival
    return [
        Case("cusparselt", dtype, forward, check, "cusparselt", facts=dict(second.choice)),
        Case("cusparselt", dtype, gemm2, check, "part", "gemm2", facts=dict(second.choice)),
    ]


def problem(
    size: Size, zeros: float, options: Options, name: str = "", precisions: tuple[str, ...] = ("bf16", "fp8")
) -> Problem:
    """All variants of one size, in the precisions; those of the set "large" are timed back to back too.

    `name` is the set of sizes that this one is from.
    """
    place = {"device": options.device, "seed": options.seed}
    x, w1, w2 = mlp_inputs(*size[:3], zeros, **place)
    b1, b2 = biases(size.d_ff, size.d_model, **place) if size.bias else (None, None)
    ffn = Operands(x, w1, w2, b1, b2, sampled_rows(size.tokens, **place))
    measured = 1 - torch.count_nonzero(F.linear(x, w1, b1) > 0).item() / (size.tokens * size.d_ff)
    cases = []
    builders = {"bf16": bf16, "fp8": fp8}
    for dtype in precisions:
        build = builders[dtype]
        cases += attempt(partial(build, ffn, options), variant="sparse24", dtype=dtype, role="sparse24")
    gemm = 2.0 * size.tokens * size.d_model * size.d_ff
    for case in cases:
        case.flops = {"forward": 2 * gemm, "gemm1": gemm, "gemm2": gemm}[case.race]
    facts = {"sizes": name, "verified_rows": len(ffn.rows)}
    facts |= {"model": size.model} if size.model else {}
    facts |= {"bias": True} if size.bias else {}
    sustained = ("forward", "gemm1") if name in ("large", "smoke") else ()
    return Problem(*size[:3], measured, cases, sustained=sustained, facts=facts)
