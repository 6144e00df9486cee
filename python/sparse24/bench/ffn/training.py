"""The squared-ReLU FFN in training: forward and backward, and the memory they take.

Variants of the races "training" (forward and backward) and "forward" (with what backward needs saved): `sparse24`
(relu2_mlp with the default recipe), `sparse24_compiled` (the same as part of a compiled model), `sparse24_no_split`
(without the densest features' dense product), `sparse24_large_split` (with that of 5 % of them, not 2 %),
`sparse24_dense_dw` (weight gradients by dense GEMMs), `sparse24_fp8` (all six GEMMs in fp8, with the scales of the step
before, weights quantised inside, as each optimizer step makes it necessary), `sparse24_fp8_compiled` (the same as part
of a compiled model), `sparse24_fp8_16bit_dw` (the weight gradients in bf16, and scales of rows), `torch_compile`,
`fused_dense` (relu^2 and its derivative in epilogues of GEMMs, only y saved), `fused_dense_fp8` (the dense step with
our quantisation and scales: relu^2, its derivative and the transposes of y and dh in epilogues) and `scaled_mm_tensor`
(torch.compile, all six GEMMs in fp8, weights quantised inside too).

Verified against float64 with the mask held fixed: outputs and gradients of sparse24 may have twice the error of torch's
bf16 under the same mask, and in fp8 what its mantissa costs. masks.py finds the masks; the weight gradients of
`sparse24` are compared with products of what it keeps along tokens: `dw1_error` and `dw2_error` are their distances
from those without that pruning.

`saved_bytes` is what autograd holds between forward and backward: x and fp8 copies of weights included, weights not.
`peak_bytes` is the most that a forward and backward allocate beside their inputs.

With `FP8_ONLY` a problem has the race "training" of the variants in fp8 and of bf16's `torch_compile`, `fused_dense`
and `sparse24`, the last one without a look at what it drops along tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import sparse24
from sparse24.bench import reference
from sparse24.bench.ffn import baselines, masks, training_baselines
from sparse24.bench.ffn.masks import FFN
from sparse24.bench.harness import Case, Problem, attempt, compiled
from sparse24.bench.inputs import Sparsity, step_inputs
from sparse24.bench.options import Options
from sparse24.bench.precompile import Job, Operand

# Relative errors of a correct rival: bf16 rounds what it saves, fp8 has two or three bits of mantissa.
BOUNDS = {"bf16": 2e-2, "fp8": 2e-1}
NAMES = ("out", "dx", "dw1", "dw2")

SIX_PRODUCTS = sparse24.Recipe(fp8_weight_gradients=True)

Tensors = tuple[torch.Tensor, ...]


#: Which variants a problem has.
ALL, NO_ABLATIONS, FP8_ONLY = "all", "no ablations", "fp8 only"


def compilations(tokens: int, d_model: int, d_ff: int, variants: str = ALL) -> list[Job]:
    """What `problem` has compiled, as it calls it."""
    operands = tuple(
        Operand(shape, requires_grad=True) for shape in ((tokens, d_model), (d_ff, d_model), (d_model, d_ff))
    )
    # Gradients, and of [tokens, d_ff] in 16 bits what is saved, its gradient, and copies.
    workspace = 2 * sum(operand.bytes for operand in operands) + 8 * Operand((tokens, d_ff)).bytes
    jobs = [
        Job(baselines.mlp, operands, workspace),
        Job(training_baselines.mlp_float8, operands, workspace),
        Job(delayed_ffn, (*operands, Operand((4,), torch.float32)), workspace),
    ]
    return jobs if variants == FP8_ONLY else [*jobs, Job(default_ffn, operands, workspace)]


def problem(
    tokens: int,
    d_model: int,
    d_ff: int,
    sparsity: Sparsity,
    options: Options,
    products: Callable[..., list[Case]] | None = None,
    variants: str = ALL,
) -> Problem:
    """The variants of one size; `products` makes cases of its GEMMs alone from x, w1, w2, dy."""
    step = Step(*step_inputs(tokens, d_model, d_ff, sparsity, device=options.device, seed=options.seed))
    x, w1, w2 = step.plain
    zeros = 1 - torch.count_nonzero(F.linear(x, w1) > 0).item() / (tokens * d_ff)
    cases: list[Case] = []
    for build, names in (
        (partial(dense, step, options), {"variant": "torch_compile", "dtype": "bf16"}),
        (partial(sparse, step, options, variants), {"variant": "sparse24", "dtype": "bf16", "role": "sparse24"}),
    ):
        cases += attempt(build, **names, race="training")
    gemm = 2.0 * tokens * d_model * d_ff
    if variants == FP8_ONLY:
        cases = [case for case in cases if case.race == "training"]
    for case in cases:
        case.flops = (6 if case.race == "training" else 2) * gemm
    if products:
        build = partial(products, x, w1, w2, step.dy)
        cases += attempt(build, variant="sparse", dtype="bf16", role="sparse24", race="gemms")
    return Problem(tokens, d_model, d_ff, zeros, cases, sparsity.name, sustained=("training",))


class Step:
    """Operands of one training step of an FFN, and its float64 results."""

    def __init__(self, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, dy: torch.Tensor) -> None:
        self.plain = (x, w1, w2)
        self.operands = tuple(t.detach().requires_grad_() for t in self.plain)
        self.dy = dy

    def forward(self, ffn: FFN) -> torch.Tensor:
        """The output; what was saved for backward lives until then."""
        return ffn(*self.operands).detach()

    def training(self, ffn: FFN) -> Tensors:
        out = ffn(*self.operands)
        return out.detach(), *torch.autograd.grad(out, self.operands, self.dy)

    def exact_hidden(self) -> Tensors:
        """Y and dh in float64, nothing pruned."""
        x, w1, w2 = (t.double() for t in self.plain)
        root = F.linear(x, w1).relu_()
        return root.square(), (self.dy.double() @ w2).mul_(root).mul_(2)

    def exact(self, features: torch.Tensor | None = None, tokens: Tensors | None = None) -> Tensors:
        """In float64: masks of what is kept everywhere, and of what is kept of y and dh in the weight gradients."""
        x, w1, w2 = (t.double() for t in self.plain)
        return equations(x, w1, w2, self.dy.double(), features, tokens)

    def errors_of_torch(
        self, exact: Tensors, features: torch.Tensor | None = None, tokens: Tensors | None = None
    ) -> list[float]:
        """Of bf16 torch, under the same masks."""
        return errors(equations(*self.plain, self.dy, features, tokens), exact)

    def cases(self, variant: str, dtype: str, role: str, ffn: FFN, check: Callable[[Tensors], dict]) -> list[Case]:
        """Forward alone, and forward and backward. `check` takes (out,) or (out, dx, dw1, dw2)."""

        def check_training(output: Tensors) -> dict[str, Any]:
            return check(output) | self.memory(ffn)

        return [
            Case(variant, dtype, lambda _: self.training(ffn), check_training, role, "training"),
            Case(variant, dtype, lambda _: self.forward(ffn), lambda out: check((out,)), role, "forward"),
        ]

    def memory(self, ffn: FFN) -> dict[str, int]:
        """Bytes in the storages that autograd saves, and the peak of a step on a GPU."""
        weights = {t.untyped_storage().data_ptr() for t in self.plain[1:]}
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.forward(ffn)
        facts = {"saved_bytes": sum(sizes.values())}
        if self.dy.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.training(ffn)
            facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return facts


def equations(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    dy: torch.Tensor,
    features: torch.Tensor | None,
    tokens: Tensors | None,
) -> Tensors:
    """out, dx, dw1, dw2 in the operands' dtype."""
    root = F.relu(F.linear(x, w1))
    root = root if features is None else root * features
    y, dh = root.square(), (dy @ w2) * (2 * root)
    del root
    out, dx = F.linear(y, w2), dh @ w1
    if tokens is not None:
        y, dh = y * tokens[0], dh * tokens[1]
    return out, dx, dh.t() @ x, dy.t() @ y


def errors(output: Tensors, exact: Tensors) -> list[float]:
    return [reference.relative_error(a, e) for a, e in zip(output, exact, strict=True)]


def expect(output: Tensors, exact: Tensors, limits: list[float]) -> dict[str, float]:
    """The relative error of each, if all are within their limits; `output` may be (out,) alone."""
    found = {}
    for name, actual, expected, limit in zip(NAMES, output, exact, limits, strict=False):
        try:
            found[f"{name}_rel_error"] = reference.expect_error(actual, expected, limit)
        except reference.Unverified as error:
            raise reference.Unverified(f"{name}: {error}") from error
    return found


def dense(step: Step, options: Options) -> list[Case]:
    exact = step.exact()

    def check(dtype: str) -> Callable[[Tensors], dict[str, float]]:
        return lambda output: expect(output, exact, [BOUNDS[dtype]] * len(NAMES))

    return [
        *step.cases("torch_compile", "bf16", "dense", compiled(baselines.mlp, options), check("bf16")),
        *step.cases("fused_dense", "bf16", "dense", training_baselines.FusedDense.apply, check("bf16")),
        *step.cases("scaled_mm_tensor", "fp8", "dense", compiled(training_baselines.mlp_float8, options), check("fp8")),
        *step.cases("fused_dense_fp8", "fp8", "dense", delayed_fp8(step, dense_delayed_ffn), check("fp8")),
    ]


def sparse(step: Step, options: Options, variants: str) -> list[Case]:
    no_split, large_split = (ffn_of(sparse24.Recipe(dense_features=share)) for share in (0.0, 0.05))
    dense_dw = ffn_of(sparse24.Recipe(weight_gradients="dense"))

    x, w1, _ = step.operands
    features = masks.kept_activation(dense_dw, x, w1)
    exact = step.exact(features)
    limits = [2 * e + reference.ABSOLUTE_SLACK for e in step.errors_of_torch(exact, features)]
    hidden = step.exact_hidden()
    masks.check_features(features, hidden[0])

    def roughly(output: Tensors) -> dict[str, float]:
        return expect(output, exact, [BOUNDS["fp8"]] * len(NAMES))

    cases = [
        case
        for variant, ffn in (
            ("sparse24_fp8", delayed_fp8(step, delayed_ffn)),
            ("sparse24_fp8_compiled", delayed_fp8(step, compiled(delayed_ffn, options))),
            ("sparse24_fp8_16bit_dw", fp8_ffn),
        )
        for case in step.cases(variant, "fp8", "sparse24", ffn, roughly)
    ]
    if variants == FP8_ONLY:
        return [*step.cases("sparse24", "bf16", "sparse24", default_ffn, roughly), *cases]
    check, *others = (
        check_tokens(step, ffn, features, hidden, exact)
        for ffn in (default_ffn, *((no_split, large_split) if variants == ALL else ()))
    )
    del hidden
    cases = [
        *step.cases("sparse24", "bf16", "sparse24", default_ffn, check),
        *step.cases("sparse24_compiled", "bf16", "sparse24", compiled(default_ffn, options), check),
        *cases,
    ]
    if variants == NO_ABLATIONS:
        return cases
    check_no_split, check_large_split = others
    return [
        *cases,
        *step.cases("sparse24_no_split", "bf16", "sparse24", no_split, check_no_split),
        *step.cases("sparse24_large_split", "bf16", "sparse24", large_split, check_large_split),
        *step.cases("sparse24_dense_dw", "bf16", "sparse24", dense_dw, lambda out: expect(out, exact, limits)),
    ]


def ffn_of(recipe: sparse24.Recipe) -> FFN:
    def ffn(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, **more: Any) -> torch.Tensor:
        return sparse24.relu2_mlp(x, w1, w2, precision="16bit", min_tokens=0, recipe=recipe, **more)

    return ffn


def default_ffn(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """With the default recipe; no closure, for the processes that compile it to find it."""
    return sparse24.relu2_mlp(x, w1, w2, precision="16bit", min_tokens=0)


def fp8_ffn(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    recipe = sparse24.Recipe(fp8_weight_gradients=False)
    return sparse24.relu2_mlp(x, w1, w2, precision="fp8", min_tokens=0, recipe=recipe)


def delayed_ffn(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, scales: torch.Tensor, known: bool = True, sparse: bool = True
) -> torch.Tensor:
    """All six products in float8; `scales` are those of the step before, if they are known."""
    options: dict[str, Any] = {"precision": "fp8", "min_tokens": 0, "recipe": SIX_PRODUCTS, "sparse": sparse}
    return sparse24.relu2_mlp(x, w1, w2, delayed_scales=scales, scales_known=known, **options)


def dense_delayed_ffn(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, scales: torch.Tensor, known: bool = True
) -> torch.Tensor:
    return delayed_ffn(x, w1, w2, scales, known, sparse=False)


def delayed_fp8(step: Step, ffn: Callable[..., torch.Tensor]) -> FFN:
    """With the scales that a first, exact step leaves; each step replaces them."""
    scales = torch.zeros(4, device=step.dy.device)
    first = dense_delayed_ffn if ffn is dense_delayed_ffn else delayed_ffn
    step.training(lambda *operands: first(*operands, scales, known=False))
    return lambda x, w1, w2, **more: ffn(x, w1, w2, scales, **more)


def check_tokens(
    step: Step, ffn: FFN, features: torch.Tensor, hidden: Tensors, exact: Tensors
) -> Callable[[Tensors], dict[str, float]]:
    """A check of an FFN with sparse weight gradients, against what it keeps along tokens on top of `features`."""
    x, w1, w2 = step.operands
    tokens = (
        masks.kept_activation(ffn, x, w1),
        masks.kept_gradient(ffn, x.detach(), w1.detach(), w2, step.dy),
    )
    dropped = {}
    for what, mask, dense_values in zip(("y", "dh"), tokens, hidden, strict=True):
        dropped |= masks.check_tokens(what, mask, features, dense_values)
    pruned = step.exact(features, tokens)
    limits = [2 * e + reference.ABSOLUTE_SLACK for e in step.errors_of_torch(pruned, features, tokens)]

    def check(output: Tensors) -> dict[str, float]:
        facts = expect(output, pruned, limits)
        if len(output) > 1:
            facts |= {f"{name}_error": e for name, e in zip(NAMES[2:], errors(output[2:], exact[2:]), strict=True)}
            facts |= dropped
        return facts

    return check
