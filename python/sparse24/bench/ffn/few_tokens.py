"""The variants of the squared-ReLU FFN for few tokens, in bf16 and with float8 weights, in CUDA graphs.

Ours: `sparse24`, a module after `prepare_decode_` (in fp8 after `quantize_` too) as it comes; and what it chooses from,
`sparse24_few` (`relu2_mlp_few`), `sparse24_dense_few` (`relu2_mlp_dense`) and `sparse24_dense` (dense, by products of
torch). Rivals: `eager`, `torch_compile` and `fused_dense` (linear_relu2, and a dense second GEMM); in fp8
`scaled_mm_row` and `scaled_mm_tensor`, which compute the scales of x and of the activation in the call,
`scaled_mm_static`, which has both given, and `fused_dense`. All weights are quantised before.

Every variant is captured in graphs, which are replayed on a cold cache: hosts do not count. One graph is a single call,
of which the graph's own start and end, 4 to 10 us, are a part. The other is a stack, as a step of decoding is: a call
for each of up to 16 layers, each with a copy of the weights, so that all of them come from memory; its time by the
calls is `stack_us`. Copies are as many for all variants of a precision.

Beside it stands what the host spends on a call without a graph (`eager_host_us`); on ours also that of a converted
module of torch's layers, and of the same module before conversion (`converted_host_us`, `before_host_us`).

Verified against a float64 second GEMM of the activation that a first GEMM gives, in each variant's own weights: the
single call, and the first and the last one of the stack. What runs 2:4 is compared with the pruned activation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import sparse24
from sparse24.bench import reference
from sparse24.bench.ffn import baselines
from sparse24.bench.ffn.checks import Expected
from sparse24.bench.ffn.forward import Operands, calibrated
from sparse24.bench.graphs import graphed, host_us
from sparse24.bench.harness import Case, Check, Problem, Stack, attempt, compiled
from sparse24.bench.inputs import Sparsity, biases, step_inputs
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job, Operand
from sparse24.bench.sizes import Size
from sparse24.mlp import arguments, pays, up_projection
from sparse24.mlp.choice import runs_dense_few, runs_few
from sparse24.mlp.forward import activation, output
from sparse24.mlp.inference import dense as dense_by_torch
from sparse24.ops.activation import RELU2
from sparse24.ops.few_tokens import MAX_TOKENS
from sparse24.ops.network import MAX_DENSE_TOKENS

#: Layers of a stack: as many as the bench of `generate` has, fewer where their weights would take more bytes than that.
LAYERS, STACK_BYTES = 16, 4 << 30


class Weights(NamedTuple):
    """One layer in bf16, as all variants take it."""

    w1: torch.Tensor
    w2: torch.Tensor
    w2_rows: torch.Tensor
    module: sparse24.nn.ReLU2MLP


class WeightsFp8(NamedTuple):
    """One layer in float8, as all variants take it: with scales of rows (q1, q2), and with one (t1, t2)."""

    q1: torch.Tensor
    s1: torch.Tensor
    q2: torch.Tensor
    s2: torch.Tensor
    q2_rows: torch.Tensor
    t1: torch.Tensor
    u1: torch.Tensor
    t2: torch.Tensor
    u2: torch.Tensor
    module: sparse24.nn.ReLU2MLP


class Before(nn.Module):
    """An FFN as models have it, which `convert` takes."""

    def __init__(self, ffn: Operands) -> None:
        super().__init__()
        bias = ffn.b1 is not None
        with torch.device("meta"):
            self.up_proj = nn.Linear(*reversed(ffn.w1.shape), bias=bias)
            self.down_proj = nn.Linear(*reversed(ffn.w2.shape), bias=bias)
        fill(self, ffn)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


def fill(module: Any, ffn: Operands) -> None:
    """Give a module the weights of the problem."""
    pairs = ((module.up_proj, ffn.w1, ffn.b1), (module.down_proj, ffn.w2, ffn.b2))
    for layer, weight, bias in pairs:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def prepared(ffn: Operands, fp8: bool) -> sparse24.nn.ReLU2MLP:
    """Make the module that is measured."""
    d_ff, d_model = ffn.w1.shape
    module = sparse24.nn.ReLU2MLP(d_model, d_ff, bias=ffn.b1 is not None, device="meta", dtype=torch.bfloat16)
    fill(module, ffn)
    return (module.quantize_() if fp8 else module).prepare_decode_()


def stacked(first: Any, itemsize: int, options: Options) -> list[Any]:
    """The layers of a stack: these weights, and copies on the device, in which a tensor that is there twice is one."""
    module = first.module
    layer_bytes = itemsize * (module.up_proj.weight.numel() + module.down_proj.weight.numel())
    layers = 2 if options.smoke else min(LAYERS, max(2, STACK_BYTES // layer_bytes))
    return [first, *(copy.deepcopy(first) for _ in range(layers - 1))]


def compilations(tokens: int, d_model: int, d_ff: int, bias: bool) -> list[Job]:
    """What `bf16` and `fp8` have compiled, as they call it."""
    fp8, fp32 = reference.FP8, torch.float32
    x, one = Operand((tokens, d_model)), Operand((1, 1), fp32)
    up, down = (d_ff, d_model), (d_model, d_ff)
    both = (Operand((d_ff,)), Operand((d_model,))) if bias else (None, None)
    rows = (Operand(up, fp8), Operand((d_ff, 1), fp32), Operand(down, fp8), Operand((d_model, 1), fp32))
    tensors = (Operand(up, fp8), one, Operand(down, fp8), one)
    return [
        Job(baselines.mlp, (x, Operand(up), Operand(down), *both)),
        Job(baselines.mlp_fp8_rows, (x, *rows, *both)),
        Job(baselines.mlp_fp8_tensor, (x, *tensors, *both)),
        Job(baselines.mlp_fp8_static, (x, *tensors, one, one, *both)),
    ]


def bf16(ffn: Operands, options: Options) -> list[Case]:
    x, w1, w2, b1, b2, rows = vars(ffn).values()
    run_compiled = compiled(baselines.mlp, options)
    expected = Expected("bf16", F.linear(x, w1, b1), w2, b2, rows)
    layers = stacked(Weights(w1, w2, w2.t().contiguous(), prepared(ffn, fp8=False)), w1.itemsize, options)

    def fused_dense(w: Weights) -> torch.Tensor:
        return F.linear(sparse24.linear_relu2(x, w.w1, bias=b1, statistics=False)[0], w.w2, b2)

    def dense(w: Weights) -> torch.Tensor:
        if x.shape[0] <= MAX_TOKENS:
            return dense_by_torch(x, w.w1, w.w2, b1, b2)
        return by_products(x, w.w1, w.w2, b1, b2, None, None, None, None)

    ops: dict[str, Callable[[Any], torch.Tensor]] = {
        "few": lambda w: sparse24.relu2_mlp_few(x, w.w1, w.w2_rows, b1, b2),
        "dense_few": lambda w: sparse24.relu2_mlp_dense(x, w.w1, w.w2, b1, b2),
    }

    check = expected.check_dense
    cases = [
        case("eager", "bf16", lambda w: baselines.mlp(x, w.w1, w.w2, b1, b2), layers, check),
        case("torch_compile", "bf16", lambda w: run_compiled(x, w.w1, w.w2, b1, b2), layers, check),
        case("fused_dense", "bf16", fused_dense, layers, check),
        case("sparse24_dense", "bf16", dense, layers, check, "part"),
    ]
    checks = {"few": check, "dense_few": check, "dense": check, "2:4": expected.check_sparse}
    return cases + ours(ffn, "bf16", ops, layers, checks)


def fp8(ffn: Operands, options: Options) -> list[Case]:
    x, w1, w2, b1, b2, rows = vars(ffn).values()
    module = prepared(ffn, fp8=True)
    up, down = module.up_proj, module.down_proj
    q1, s1, q2, s2 = up.weight, up.weight_scale, down.weight, down.weight_scale
    (t1, u1), (t2, u2) = baselines.quantize(w1, per_row=False), baselines.quantize(w2, per_row=False)
    layers = stacked(WeightsFp8(q1, s1, q2, s2, q2.t().contiguous(), t1, u1, t2, u2, module), q1.itemsize, options)
    run_rows = compiled(baselines.mlp_fp8_rows, options)
    run_tensor = compiled(baselines.mlp_fp8_tensor, options)
    run_static = compiled(baselines.mlp_fp8_static, options)
    xq, scale_x = sparse24.quantize_fp8(x)
    pre = up_projection(x, q1, b1, fp8=True, w1_scale=s1)
    static, _ = calibrated(pre, xq, scale_x)
    bound = None if b1 is not None else up.scale_y_factor
    expected = Expected("fp8", pre, q2.double() * s2.reshape(-1, 1), b2, rows)
    xt, scale_xt = baselines.quantize(x, per_row=False)
    pre_tensor = baselines.scaled_mm(xt, t1.t(), scale_xt, u1, b1)
    tensor = Expected("fp8", pre_tensor, t2.double() * u2, b2, rows)
    scale_yt = static.reshape(1, 1)
    # Exactly what few tokens give: float8 weights, and no rounding of x and of the activation but to 16 bits.
    wide = (q1.float() * s1.reshape(-1, 1)).double(), q2.double() * s2.reshape(-1, 1)
    exact = Expected("bf16", (x.double() @ wide[0].t() + (0 if b1 is None else b1)).bfloat16(), wide[1], b2, rows)

    def by_row(w: WeightsFp8) -> torch.Tensor:
        return run_rows(x, w.q1, w.s1.reshape(-1, 1), w.q2, w.s2.reshape(-1, 1), b1, b2)

    def fused_dense(w: WeightsFp8) -> torch.Tensor:
        q, s = sparse24.quantize_fp8(x)
        hidden = sparse24.linear_relu2(q, w.q1, s, w.s1, b1, static, statistics=False)[0]
        return baselines.scaled_mm(hidden, w.t2.t(), scale_yt, w.u2, b2)

    def dense(w: WeightsFp8) -> torch.Tensor:
        return by_products(x, w.q1, w.q2, b1, b2, w.s1, w.s2, None, bound)

    def by_tensor(w: WeightsFp8) -> torch.Tensor:
        return run_tensor(x, w.t1, w.u1, w.t2, w.u2, b1, b2)

    def by_static(w: WeightsFp8) -> torch.Tensor:
        return run_static(x, w.t1, w.u1, w.t2, w.u2, scale_xt, scale_yt, b1, b2)

    ops: dict[str, Callable[[Any], torch.Tensor]] = {
        "few": lambda w: sparse24.relu2_mlp_few(x, w.q1, w.q2_rows, b1, b2, w.s1, w.s2),
        "dense_few": lambda w: sparse24.relu2_mlp_dense(x, w.q1, w.q2, b1, b2, w.s1, w.s2, None, bound),
    }

    fused = Expected("fp8", pre, t2.double() * u2, b2, rows)
    cases = [
        case("scaled_mm_row", "fp8", by_row, layers, expected.check_dense),
        case("scaled_mm_tensor", "fp8", by_tensor, layers, tensor.check_dense),
        case("scaled_mm_static", "fp8", by_static, layers, tensor.check_dense),
        case("fused_dense", "fp8", fused_dense, layers, fused.check_dense),
        case("sparse24_dense", "fp8", dense, layers, expected.check_dense, "part"),
    ]
    # The activation's scale bounds it, where there is no bias: small rows have fewer bits, as with one for all.
    sparse = partial(expected.check_sparse, rival=fused if b1 is None else None)
    dense_check = expected.check_dense
    checks = {"few": exact.check_dense, "dense_few": dense_check, "dense": dense_check, "2:4": sparse}
    return cases + ours(ffn, "fp8", ops, layers, checks)


def by_products(*operands: torch.Tensor | None) -> torch.Tensor:
    """Run a network dense as `relu2_mlp` puts it together, where no op has it whole: x, weights, biases and scales."""
    plan = arguments.Plan(RELU2, fp8=operands[5] is not None, fused=True)
    nothing = (None,) * 6  # neither densest features nor packed weights
    a = arguments.Arguments(*operands, *nothing, plan, arguments.DENSE)  # type: ignore[arg-type]
    return output(a, activation(a))


def ours(
    ffn: Operands,
    dtype: str,
    ops: dict[str, Callable[[Any], torch.Tensor]],
    layers: Sequence[Any],
    checks: dict[str, Check],
) -> list[Case]:
    """The module as it runs, and its ops alone where they take so many tokens; checks by what runs."""
    tokens, (d_ff, d_model) = ffn.x.shape[0], ffn.w1.shape
    how = {"fp8": dtype == "fp8"}
    is_few = runs_few(tokens, d_ff, d_model, is_cuda=ffn.x.is_cuda, **how)
    dense = tokens <= MAX_TOKENS or (ffn.x.is_cuda and not pays(tokens, d_ff, d_model, **how))
    is_dense_few = runs_dense_few(tokens, d_model, d_ff, d_model, is_cuda=ffn.x.is_cuda, **how)
    runs = "few" if is_few else "dense_few" if is_dense_few else "dense" if dense else "2:4"
    facts: dict[str, Any] = {"runs": runs}
    before = Before(ffn)
    facts["before_host_us"] = host_us(lambda: before(ffn.x), ffn.x.device)
    config = sparse24.ConvertConfig(dtype=dtype, decode=True)  # type: ignore[arg-type]
    sparse24.convert(before, config, quiet=True)
    facts["converted_host_us"] = host_us(lambda: before(ffn.x), ffn.x.device)
    cases = [case("sparse24", dtype, lambda w: w.module(ffn.x), layers, checks[runs], "sparse24", **facts)]
    for name, most in (("few", MAX_TOKENS), ("dense_few", MAX_DENSE_TOKENS)):
        if tokens <= most:
            cases.append(case(f"sparse24_{name}", dtype, ops[name], layers, checks[name], "part"))
    return cases


def case(
    variant: str,
    dtype: str,
    run: Callable[[Any], torch.Tensor],
    layers: Sequence[Any],
    check: Check,
    role: str = "dense",
    **facts: Any,
) -> Case:
    """A variant in CUDA graphs, with the first layer and with all of them, and the host time of its calls without."""

    def build() -> Case:
        with torch.inference_mode():
            calls = [partial(run, weights) for weights in layers]
            device = calls[0]().device
            facts["eager_host_us"] = host_us(calls[0], device)
            single, stack = graphed(calls[:1], device), Stack(graphed(calls, device), len(calls))
            return Case(variant, dtype, lambda i: single(i)[0], check, role, facts=facts, stack=stack)

    return attempt(build, variant=variant, dtype=dtype, role=role)[0]


def problem(size: Size, sparsity: Sparsity, options: Options) -> Problem:
    """All variants of one size, number of tokens and pattern of zeros."""
    place = {"device": options.device, "seed": options.seed}
    x, w1, w2, _ = step_inputs(*size[:3], sparsity, **place)
    b1, b2 = biases(size.d_ff, size.d_model, **place) if size.bias else (None, None)
    ffn = Operands(x, w1, w2, b1, b2, torch.arange(size.tokens, device=options.device))
    active = F.linear(x, w1, b1) > 0
    cases = []
    for dtype, build in (("bf16", bf16), ("fp8", fp8)):
        cases += attempt(partial(build, ffn, options), variant="sparse24", dtype=dtype, role="sparse24")
    for one in cases:
        one.flops = 4.0 * size.tokens * size.d_model * size.d_ff
    facts: dict[str, Any] = {"graphs": options.device.type == "cuda"}
    facts["union"] = active.any(0).double().mean().item()  # share of neurons that some token uses
    facts |= {"model": size.model} if size.model else {}
    facts |= {"bias": True} if size.bias else {}
    zeros = 1 - active.double().mean().item()
    return Problem(*size[:3], zeros, cases, sparsity.name, facts=facts)
