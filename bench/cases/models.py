"""Real models before and after `sparse24.convert`: prefill and training of a stack of their layers.

    python -m bench models --out bench/results/<gpu>/models.json --budget 150
    python -m bench models --out models.json --compile-cache graphs --resume models.json    # the rest

Two layers each of Nemotron-Mini-4B, Persimmon-8B and nanochat d26, with attention and norms, in the modules of the
transformers library, bfloat16. Weights are random, made so that the activations are 90 % zeros (model_stacks.py).
Variants: `dense` (the model as it is), `sparse24` (converted, as it comes) and, for prefill, `sparse24_fp8` (converted,
with float8 weights in the FFNs; attention stays in bfloat16). `dense` is the only rival here: ffn_forward compares
FFNs with the best dense ones, of fp8 too. Layers are compiled one by one, with static shapes; what is between them is
eager. Prefill runs in inference mode; training is a forward and a backward pass without checkpointing and without an
optimizer.

Verified against float32: the dense model, with the 2:4 mask on its activations for the sparse variants. The output, and
in training the gradients of the input and of all parameters, may have twice the error of that model in bfloat16 (or
twice the median of these errors); an fp8 output has a bound of its own. The default recipe prunes the weight gradients
of FFNs along tokens too: they are compared coarsely (`ffn_gradient_error` is the largest distance), after all gradients
of a conversion with dense weight gradients have passed. After `sparse24.revert` a converted model must give the dense
model's bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import sparse24
from bench.cases import model_stacks
from bench.cases.model_stacks import Stack
from sparse24.bench import reference
from sparse24.bench.harness import Case, Options, Problem, attempt, run_bench
from sparse24.bench.inputs import generator

ZEROS = 0.9
LAYERS = 2
# Relative errors of a correct result: of an output with fp8 FFNs, and of weight gradients that are pruned along tokens.
BOUND_FP8 = 1.5e-1
BOUND_PRUNED = 0.25

Tensors = dict[str, torch.Tensor]
Step = Callable[[nn.Module], Tensors]


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    stacks = model_stacks.SMOKE if options.smoke else model_stacks.STACKS
    for phase in (prefill, training):
        for stack in stacks[:1] if options.quick else stacks:
            label = f"{stack.name} {phase.__name__}, T {stack.tokens}, D {stack.d_model}, F {stack.d_ff}"
            yield label, partial(problem, stack, phase, options)


def problem(stack: Stack, phase: Callable[..., list[Case]], options: Options) -> Problem:
    model, x, zeros = model_stacks.with_zeros(stack, LAYERS, ZEROS, device=options.device, seed=options.seed)
    names = {"variant": "sparse24", "dtype": "bf16", "role": "sparse24", "race": phase.__name__}
    cases = attempt(partial(phase, stack, model, x, options), **names)
    facts = {"model": stack.name, "layers": LAYERS, "batch": stack.batch}
    return Problem(stack.tokens, stack.d_model, stack.d_ff, zeros, cases, facts=facts)


def prefill(stack: Stack, model: nn.Module, x: torch.Tensor, options: Options) -> list[Case]:
    @torch.inference_mode()
    def step(model: nn.Module) -> Tensors:
        return {"out": model_stacks.run(model, x.to(dtype_of(model)))}

    def case(variant: str, dtype: str, role: str, copy: nn.Module, expected: Expected) -> Case:
        def check(output: torch.Tensor) -> dict[str, float]:
            pruning = reference.relative_error(expected.exact["out"], dense.exact["out"])
            return expected.check({"out": output}) | ({"pruning_error": pruning} if pruning else {})

        compile_layers(copy, options)
        return Case(variant, dtype, lambda _: step(copy)["out"], check, role, "prefill")

    model.eval()
    with torch.inference_mode():
        x = x.clone()  # an inference tensor, as what the layers give each other: one graph
    dense, masked = Expected(step, model), Expected(step, model, stack)
    check_revert(stack, model, step)
    ours, quantised = model_stacks.shared_copy(model), model_stacks.quantised_copy(stack, model)
    convert(ours)
    convert(quantised)
    return [
        case("dense", "bf16", "dense", model, dense),
        case("sparse24", "bf16", "sparse24", ours, masked),
        case("sparse24_fp8", "fp8", "sparse24", quantised, masked.with_limits(lambda _: BOUND_FP8)),
    ]


def training(stack: Stack, model: nn.Module, x: torch.Tensor, options: Options) -> list[Case]:
    dy = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator(x.device, options.seed + 3))

    def step(model: nn.Module) -> Tensors:
        """The output, and the gradients of x and of all parameters but those of the embedding, which is not used."""
        dtype = dtype_of(model)
        operands = {"x": x.to(dtype, copy=True).requires_grad_()}
        operands |= {n: p for n, p in model.named_parameters() if not n.startswith("embed_tokens")}
        out = model_stacks.run(model, operands["x"])
        gradients = torch.autograd.grad(out, list(operands.values()), dy.to(dtype))
        return {"out": out.detach(), **dict(zip(operands, gradients, strict=True))}

    last = [f"layers.{LAYERS - 1}.mlp.{name}.weight" for name in stack.ffn]

    def case(variant: str, role: str, copy: nn.Module, expected: Expected) -> Case:
        compile_layers(copy, options)

        def run(_: int) -> tuple[torch.Tensor, ...]:
            # Attention's backward pass may add up in any order: bits repeat only in what comes before it.
            results = step(copy)
            return tuple(results[name] for name in ("out", *last))

        def check(output: tuple[torch.Tensor, ...]) -> dict[str, float]:
            expected.check(dict(zip(("out", *last), output, strict=True)))
            return expected.check(step(copy))

        return Case(variant, "bf16", run, check, role, "training")

    model.train()
    dense, masked = Expected(step, model), Expected(step, model, stack)
    check_revert(stack, model, step)
    unpruned = model_stacks.shared_copy(model)
    convert(unpruned, sparse24.ConvertConfig(recipe=sparse24.Recipe(weight_gradients="dense")))
    masked.check(step(unpruned))
    ours = model_stacks.shared_copy(model)
    convert(ours)
    pruned = {f"layers.{i}.mlp.{name}.weight" for i in range(LAYERS) for name in stack.ffn}
    return [
        case("dense", "dense", model, dense),
        case("sparse24", "sparse24", ours, masked.with_limits(lambda name: BOUND_PRUNED if name in pruned else None)),
    ]


class Expected:
    """Results in float32, of the dense model or (given the stack) of the masked one, and limits of their errors."""

    def __init__(self, step: Step, model: nn.Module, stack: Stack | None = None) -> None:
        def copy(dtype: torch.dtype) -> nn.Module:
            return model_stacks.masked_copy(stack, model, dtype) if stack else model_stacks.cast_copy(model, dtype)

        self.exact = step(copy(torch.float32))
        errors = {
            name: reference.relative_error(actual, self.exact[name])
            for name, actual in step(copy(torch.bfloat16)).items()
        }
        # The error of a small gradient, as of a norm, is a matter of luck: others tell what bfloat16 costs.
        usual = statistics.median(errors.values())
        self.limits = {name: 2 * max(error, usual) + reference.ABSOLUTE_SLACK for name, error in errors.items()}

    def with_limits(self, limit: Callable[[str], float | None]) -> Expected:
        """The same with other limits, where `limit` gives one."""
        other = object.__new__(Expected)
        other.exact = self.exact
        other.limits = {name: limit(name) or before for name, before in self.limits.items()}
        return other

    def check(self, results: Tensors) -> dict[str, float]:
        errors = {}
        for name, actual in results.items():
            try:
                errors[name] = reference.expect_error(actual, self.exact[name], self.limits[name])
            except reference.Unverified as error:
                raise reference.Unverified(f"{name}: {error}") from error
        facts = {"rel_error": errors.pop("out")}
        ffn = [error for name, error in errors.items() if ".mlp." in name]
        others = [error for name, error in errors.items() if ".mlp." not in name]
        facts |= {"ffn_gradient_error": max(ffn)} if ffn else {}
        return facts | ({"gradient_error": max(others)} if others else {})


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def convert(model: nn.Module, config: sparse24.ConvertConfig | None = None) -> None:
    report = sparse24.convert(model, config, quiet=True)
    if len(report.converted) != LAYERS:
        raise reference.Unverified(f"expected {LAYERS} networks to be converted: {report}")


def check_revert(stack: Stack, model: nn.Module, step: Step) -> None:
    """A model that was converted, ran and was reverted gives the bits of one that was not, and ran otherwise before."""
    copy = model_stacks.shared_copy(model)
    convert(copy)
    sparse, dense = step(copy)["out"], step(model)["out"]
    if reference.same_bits(sparse, dense):
        raise reference.Unverified("expected a converted model to drop something, got the dense model's bits")
    sparse24.revert(copy)
    reference.expect_equal("the output after revert", step(copy)["out"], dense)


def compile_layers(model: nn.Module, options: Options) -> None:
    """One graph for all layers; none in the smoke run, which must not need a compiler."""
    if not options.smoke:
        for layer in model.layers:
            layer.compile(dynamic=False, fullgraph=True)


def main(argv: list[str] | None = None) -> int:
    return run_bench("models", problems, __doc__, argv)
