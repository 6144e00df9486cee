"""The squared-ReLU experts of a mixture, for rows that are sorted by expert: forward and training, in bf16 and fp8.

Variants: `sparse24` (relu2_experts as it comes, which runs dense with few rows per expert) and `sparse24_compiled` (the
same as part of a compiled model), `grouped_mm` (torch.compile around torch._grouped_mm, in fp8 around
torch._scaled_grouped_mm with a scale per row, x and the activation quantised inside), `fused_dense` (relu2_experts run
dense), `always_sparse` (2:4, where it comes dense), and `loop` (relu2_mlp, expert by expert, with numbers of rows that
the host knows). Float8 weights are quantised before on all sides. Every variant multiplies rows with their router's
factors.

Steps in float8 quantise the weights inside, or run in 16 bits where that is faster (`trains`). `sparse24_kept` is what
micro-batches run after the first of an optimizer step, with its codes. torch has no float8 step of experts.

Verified against float64 on some rows, and in training on all rows and the weights of two experts. What runs 2:4 is
compared with the pruned activation; its weight gradients may be pruned along the rows, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

import sparse24
from sparse24.bench import reference
from sparse24.bench.ffn import baselines
from sparse24.bench.ffn.checks import BOUNDS
from sparse24.bench.ffn.experts_data import Mixture, Size
from sparse24.bench.harness import Case, Problem, attempt, compiled
from sparse24.bench.inputs import Sparsity
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job, Operand
from sparse24.experts import experts_network, step_fp8
from sparse24.experts.products import by_expert, by_expert_fp8
from sparse24.mlp.arguments import Plan
from sparse24.mlp.kept_weights import BothOrders, both_orders
from sparse24.ops.activation import RELU2

#: Rows that are compared.
ROWS = 64
#: Relative errors of gradients of a correct variant; those of weights where rows are pruned too.
BOUND_GRADIENT, BOUND_PRUNED, BOUND_FP8 = 2e-2, 3e-1, 2e-1
#: Tokens from which problems are also timed back to back, as a GPU at its power limit runs them.
HOT = 8192
NAMES = ("out", "dx", "dw1", "dw2")
Tensors = tuple[torch.Tensor, ...]


# ---- what runs -------------------------------------------------------------------------------------------------------


def grouped_mm(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, row_scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The experts as users write them with torch."""
    y = F.relu(torch._grouped_mm(x, w1.mT, offs=offsets)).square()
    return (torch._grouped_mm(y, w2.mT, offs=offsets) * row_scale.unsqueeze(1)).to(x.dtype)


def scaled_grouped_mm(
    x: torch.Tensor,
    w1: torch.Tensor,
    scale1: torch.Tensor,
    w2: torch.Tensor,
    scale2: torch.Tensor,
    row_scale: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """The experts in fp8 by row: weights are quantised already, x and the activation are here."""
    xq, scale_x = baselines.quantize(x, per_row=True)
    y = F.relu(by_expert_fp8(xq, scale_x, w1, scale1, offsets)).square()
    yq, scale_y = baselines.quantize(y, per_row=True)
    return (by_expert_fp8(yq, scale_y, w2, scale2, offsets) * row_scale.unsqueeze(1)).to(x.dtype)


def default_experts(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, row_scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """No closure, for the processes that compile it to find it."""
    return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale)


def always_sparse(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, row_scale: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> torch.Tensor:
    """2:4 with any number of rows."""
    how = {"precision": "auto", "w1_scale": None, "w2_scale": None, "recipe": None, "sparse": True, "min_rows": 0}
    return experts_network(x, w1, w2, offsets, row_scale=row_scale, **how | options)


def default_experts_fp8(
    x: torch.Tensor,
    w1: torch.Tensor,
    scale1: torch.Tensor,
    w2: torch.Tensor,
    scale2: torch.Tensor,
    row_scale: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, w1_scale=scale1, w2_scale=scale2)


def loop(m: Mixture, *operands: torch.Tensor, fp8: bool = False) -> torch.Tensor:
    """relu2_mlp for each expert."""
    x, row_scale = operands[0], operands[-1]
    parts = []
    for expert in range(len(m.ends)):
        rows = m.rows_of(expert)
        if rows.stop > rows.start:
            scales = {"w1_scale": operands[2][expert], "w2_scale": operands[4][expert]} if fp8 else {}
            w1, w2 = (operands[1], operands[3]) if fp8 else operands[1:3]
            parts.append(sparse24.relu2_mlp(x[rows], w1[expert], w2[expert], **scales))
    return (torch.cat(parts) * row_scale.unsqueeze(1)).to(x.dtype)


def compilations(size: Size, training: bool) -> list[Job]:
    """What a problem has compiled, as it calls it: ours once for all numbers of tokens of a model, the rivals for each.

    With static sizes: torch's kernels between grouped products take half as long again if sizes may change.
    """
    rows, fp8, fp32 = size.tokens * size.top_k, reference.FP8, torch.float32
    up, down = (size.experts, size.d_ff, size.d_model), (size.experts, size.d_model, size.d_ff)
    x, tail = Operand((rows, size.d_model)), (Operand((rows,), fp32), Operand((size.experts,), torch.int32))
    work = 4 * Operand((rows, size.d_ff)).bytes
    bf16 = (x, Operand(up), Operand(down), *tail)
    if training:
        learned = (*(o._replace(requires_grad=True) for o in bf16[:4]), bf16[4])
        work = 2 * work + sum(o.bytes for o in learned)
        return [Job(grouped_mm, learned, work), Job(default_experts, learned, work, dynamic=True)]
    quantised = (x, Operand(up, fp8), Operand(up[:2], fp32), Operand(down, fp8), Operand(down[:2], fp32), *tail)
    jobs = [Job(grouped_mm, bf16, work), Job(default_experts, bf16, work, dynamic=True)]
    return [*jobs, Job(scaled_grouped_mm, quantised, work), Job(default_experts_fp8, quantised, work, dynamic=True)]


# ---- what it must give -----------------------------------------------------------------------------------------------


class Expected:
    """Some rows of the output in float64, dense and pruned, in one precision."""

    def __init__(self, m: Mixture, dtype: str) -> None:
        self.limit = BOUNDS[dtype]
        count = min(ROWS, len(m.x))
        self.rows = torch.arange(count, device=m.x.device) * len(m.x) // max(count, 1)
        if dtype == "fp8":
            (w1, s1), (w2, s2) = m.fp8
            h = by_expert_fp8(*sparse24.quantize_fp8(m.x), w1, s1, m.offsets)[self.rows]
        else:
            h, w2 = by_expert(m.x, m.w1.mT, m.offsets)[self.rows], m.w2
        y = reference.relu2(h)
        expert = torch.searchsorted(m.offsets, self.rows.int(), right=True).tolist()
        dense, sparse = [], []
        for i, e in enumerate(expert):
            w = w2[e].double() if dtype == "bf16" else w2[e].double() * s2[e].unsqueeze(1).double()
            factor = m.row_scale[self.rows[i]].double()
            dense.append(factor * (w @ y[i].double()))
            sparse.append(factor * (w @ reference.prune24(y[i : i + 1], -1)[0].double()))
        self.dense, self.sparse = torch.stack(dense), torch.stack(sparse)

    def check(self, sparse: bool) -> Callable[[torch.Tensor], dict[str, float]]:
        def compare(output: torch.Tensor) -> dict[str, float]:
            if not bool(output.isfinite().all()):
                raise reference.Unverified("expected finite values, got others")
            expected = self.sparse if sparse else self.dense
            return {"rel_error": reference.expect_error(output[self.rows], expected, self.limit)}

        return compare


def gradients_of(m: Mixture, expert: int, sparse: bool) -> Tensors:
    """out, dx, dw1 and dw2 of one expert in float64; sparse: under the mask of its activation."""
    rows = m.rows_of(expert)
    x, w1, w2 = (t.double() for t in (m.x[rows], m.w1[expert], m.w2[expert]))
    scale = m.row_scale[rows].double().unsqueeze(1)
    root = F.relu(x @ w1.t())
    if sparse:
        root = root * (reference.prune24(root.float().square(), -1) > 0)
    g = m.grad[rows].double() * scale
    dh = (g @ w2) * (2 * root)
    return scale * (root.square() @ w2.t()), dh @ w1, dh.t() @ x, g.t() @ root.square()


def check_training(m: Mixture, sparse: bool, bound: float = BOUND_GRADIENT) -> Callable[[Tensors], dict[str, float]]:
    def compare(output: Tensors) -> dict[str, float]:
        out, dx, dw1, dw2, _ = output
        found: dict[str, float] = {}
        learned = m.learned()
        for expert in m.largest():
            rows, place = m.rows_of(expert), learned.index(expert)
            actual = out[rows], dx[rows], dw1[place], dw2[place]
            for name, a, e in zip(NAMES, actual, gradients_of(m, expert, sparse), strict=True):
                limit = max(bound, BOUND_PRUNED) if sparse and name.startswith("dw") else bound
                error = reference.expect_error(a, e, limit)
                found[f"{name}_rel_error"] = max(error, found.get(f"{name}_rel_error", 0.0))
        return found

    return compare


# ---- problems --------------------------------------------------------------------------------------------------------


def forward(m: Mixture, options: Options) -> Iterator[Case]:
    tail = m.row_scale, m.offsets
    bf16 = m.x, m.w1, m.w2, *tail
    expected = Expected(m, "bf16")
    ours = {"role": "sparse24", "facts": {"runs": "2:4" if m.sparse("bf16") else "dense"}}
    rival = compiled(grouped_mm, options)
    inside = compiled(default_experts, options, dynamic=True)
    dense = partial(sparse24.relu2_experts, m.x, m.w1, m.w2, m.offsets, row_scale=m.row_scale, sparse=False)
    yield Case("grouped_mm", "bf16", lambda _: rival(*bf16), expected.check(False))
    yield Case("fused_dense", "bf16", lambda _: dense(), expected.check(False))
    yield Case("sparse24", "bf16", lambda _: default_experts(*bf16), expected.check(m.sparse("bf16")), **ours)
    yield Case("sparse24_compiled", "bf16", lambda _: inside(*bf16), expected.check(m.sparse("bf16")), **ours)
    if m.x.is_cuda:
        yield Case("loop", "bf16", lambda _: loop(m, *bf16[:4]), lambda out: {}, "part")
    if m.fits("bf16") and not m.sparse("bf16"):
        yield Case("always_sparse", "bf16", lambda _: always_sparse(*bf16), expected.check(True), "part")

    (w1, s1), (w2, s2) = m.fp8
    fp8 = m.x, w1, s1, w2, s2, *tail
    expected_fp8 = Expected(m, "fp8")
    ours = {"role": "sparse24", "facts": {"runs": "2:4" if m.sparse("fp8") else "dense"}}
    rival_fp8 = compiled(scaled_grouped_mm, options)
    inside_fp8 = compiled(default_experts_fp8, options, dynamic=True)
    scales = {"w1_scale": s1, "w2_scale": s2, "row_scale": m.row_scale}
    dense_fp8 = partial(sparse24.relu2_experts, m.x, w1, w2, m.offsets, **scales, sparse=False)
    check = expected_fp8.check(m.sparse("fp8"))
    yield Case("grouped_mm", "fp8", lambda _: rival_fp8(*fp8), expected_fp8.check(False))
    yield Case("fused_dense", "fp8", lambda _: dense_fp8(), expected_fp8.check(False))
    yield Case("sparse24", "fp8", lambda _: default_experts_fp8(*fp8), check, **ours)
    yield Case("sparse24_compiled", "fp8", lambda _: inside_fp8(*fp8), check, **ours)
    if m.fits("fp8") and not m.sparse("fp8"):
        of_weights = {"w1_scale": s1, "w2_scale": s2}
        run = partial(always_sparse, m.x, w1, w2, *tail, **of_weights)
        yield Case("always_sparse", "fp8", lambda _: run(), expected_fp8.check(True), "part")


def training(m: Mixture, options: Options) -> Iterator[Case]:
    leaves = tuple(t.detach().requires_grad_() for t in (m.x, m.w1, m.w2, m.row_scale))

    learned = m.learned()

    def step(run: Callable[..., torch.Tensor]) -> Tensors:
        out = run(*leaves, m.offsets)
        dx, dw1, dw2, drow = torch.autograd.grad(out, leaves, m.grad)
        if len(learned) < m.size.experts:
            dw1, dw2 = dw1[learned], dw2[learned]
        return out.detach(), dx, dw1, dw2, drow

    def dense_experts(x: Any, w1: Any, w2: Any, row_scale: Any, offsets: Any) -> torch.Tensor:
        return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, sparse=False)

    def fp8_experts(x: Any, w1: Any, w2: Any, row_scale: Any, offsets: Any, sparse: bool = True) -> torch.Tensor:
        return sparse24.relu2_experts(x, w1, w2, offsets, row_scale=row_scale, precision="fp8", sparse=sparse)

    def kept_codes(x: Any, w1: Any, w2: Any, row_scale: Any, offsets: Any) -> torch.Tensor:
        return step_fp8.ExpertsFp8.apply(*step_fp8.StepArguments(x, w1, w2, row_scale, offsets, codes(), plan))

    @cache
    def codes() -> tuple[BothOrders, BothOrders]:
        return both_orders(m.w1), both_orders(m.w2)

    plan = Plan(RELU2, fp8=True, sparse=True)
    exact = check_training(m, False)
    kept = check_training(m, m.sparse("bf16"))
    rival = compiled(grouped_mm, options)
    inside = compiled(default_experts, options, dynamic=True)
    rest: dict[str, Any] = {"race": "training"}
    yield Case("grouped_mm", "bf16", lambda _: step(rival), exact, **rest)
    yield Case("fused_dense", "bf16", lambda _: step(dense_experts), exact, **rest)
    ours = rest | {"role": "sparse24", "facts": {"runs": "2:4" if m.sparse("bf16") else "dense"}}
    yield Case("sparse24", "bf16", lambda _: step(default_experts), kept, **ours)
    yield Case("sparse24_compiled", "bf16", lambda _: step(inside), kept, **ours)
    if m.fits("bf16") and not m.sparse("bf16"):
        yield Case("always_sparse", "bf16", lambda _: step(always_sparse), check_training(m, True), "part", **rest)
    float8 = m.trains_in_float8()
    in_16_bits = {"trains": "16bit", "runs": "2:4" if m.sparse("bf16") else "dense"}
    ours = rest | {"role": "sparse24", "facts": {"trains": "fp8", "runs": "2:4"} if float8 else in_16_bits}
    roughly = check_training(m, True, BOUND_FP8)
    yield Case("sparse24", "fp8", lambda _: step(fp8_experts), roughly if float8 else kept, **ours)
    dense_fp8 = partial(fp8_experts, sparse=False)
    yield Case("fused_dense", "fp8", lambda _: step(dense_fp8), check_training(m, False, BOUND_FP8), **rest)
    if m.fits("fp8"):
        facts = {"trains": "fp8", "runs": "2:4"}
        yield Case("sparse24_kept", "fp8", lambda _: step(kept_codes), roughly, "part", facts=facts, **rest)


def problem(size: Size, sparsity: Sparsity, options: Options, trains: bool) -> Problem:
    """All variants of one size and routing; `trains`: those of a training step."""
    m = Mixture(size, sparsity, options)
    cases: list[Case] = []
    build, race = (training, "training") if trains else (forward, "forward")
    cases += attempt(lambda: list(build(m, options)), variant="sparse24", dtype="bf16", role="sparse24", race=race)
    for case in cases:
        case.flops = (12.0 if trains else 4.0) * len(m.x) * size.d_model * size.d_ff
    first = m.largest()[0]
    active = torch.count_nonzero(F.linear(m.x[m.rows_of(first)], m.w1[first]) > 0).item()
    zeros = 1 - active / max(1, (m.rows_of(first).stop - m.rows_of(first).start) * size.d_ff)
    counts = torch.tensor([0, *m.ends]).diff()
    facts: dict[str, Any] = {"experts": size.experts, "top_k": size.top_k, "routing": size.routing}
    facts |= {"rows_of_largest": int(counts.max()), "empty_experts": int((counts == 0).sum())}
    facts |= {"model": size.model} if size.model else {}
    sustained = (race,) if size.tokens >= HOT else ()
    return Problem(size.tokens, size.d_model, size.d_ff, zeros, cases, sparsity.name, sustained=sustained, facts=facts)
