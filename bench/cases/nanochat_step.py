"""Whole training steps of nanochat's own GPT: forward, backward and its own optimizer, before and after conversion.

    SPARSE24_NANOCHAT=CHECKOUT python -m bench nanochat_step --widths 1664 --out bench/results/<gpu>/nanochat_step.json
    python -m bench nanochat_step --nanochat CHECKOUT --layers 6 --widths 1280,1664,2048 --budget 400 --out new.json
    python -m bench report new.json

Variants: `bf16`, the model as it is; `fp8`, with nanochat's float8 layers wherever its script has them;
`sparse24_bf16`, converted; `sparse24_fp8`, converted with fp8 networks, all six products of each
(`Recipe.fp8_weight_gradients`), and nanochat's float8 layers elsewhere; `sparse24_fp8_16bit_dw`, the same with 16-bit
weight gradients. Each is compiled as a whole with static shapes, as its script does it, and takes its steps in turn
with the others: 16 sequences of 2,048 random tokens. A step ends with its gradients set to None.

All share one set of weights and one optimizer at a learning rate of 0: it does all of its work, and every step of every
variant is computed from the same weights. `peak_gb` is what a variant would take alone: weights, the optimizer's state,
and the most that a step allocates beside them. `tokens_per_s` is of the median; `sustained_us` of steps without pauses.

Verified against the dense model in bfloat16, not compiled: the loss, and the gradients of all weights in the layers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import sparse24
from bench.cases import nanochat_model
from bench.cases.model_stacks import shared_copy
from bench.cases.nanochat_model import Checkout, Size
from sparse24.bench import inputs, reference, timing
from sparse24.bench.harness import Case, Options, Problem, attempt, run_bench

VARIABLE = "SPARSE24_NANOCHAT"
GIVEN = os.environ.get(VARIABLE)
WIDTHS = (1280, 1664, 2048)
SMOKE = Size(128, 2, batch=2, length=32, vocabulary=256, head=32)
# Relative distances to the dense bfloat16 model: of the loss, and of the gradients of all weights of the networks, or
# of all others in the layers. Those of nanochat's own float8 layers have 0.2 with two layers, and more with many.
LOSS_BOUND = 1e-2
GRADIENT_BOUND = {"bf16": 0.2, "fp8": 0.5}

#: dtype, role; what the library converts the networks to, with which recipe; whether other layers are nanochat's fp8.
VARIANTS = {
    "bf16": ("bf16", "dense", None, None, False),
    "sparse24_bf16": ("bf16", "sparse24", "bf16", None, False),
    "fp8": ("fp8", "dense", None, None, True),
    "sparse24_fp8": ("fp8", "sparse24", "fp8", sparse24.Recipe(fp8_weight_gradients=True), True),
    "sparse24_fp8_16bit_dw": ("fp8", "sparse24", "fp8", sparse24.Recipe(fp8_weight_gradients=False), True),
}


def checkout(text: str) -> Path:
    path = Path(text)
    if not (path / "nanochat" / "gpt.py").is_file():
        raise argparse.ArgumentTypeError(f"expected a checkout of nanochat, got {text}, which has no nanochat/gpt.py")
    return path


def variants(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    return names


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nanochat", type=checkout, default=GIVEN, required=not GIVEN, help=f"a checkout of it (default: ${VARIABLE})"
    )
    parser.add_argument(
        "--widths",
        type=lambda text: [int(width) for width in text.split(",")],
        default=WIDTHS,
        help="default: " + ",".join(map(str, WIDTHS)),
    )
    parser.add_argument("--layers", type=int, default=6, help="default: 6")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 2,048 tokens (default: 16)")
    parser.add_argument("--zeros", type=float, default=0.9, help="share of zeros in the activations (default: 0.9)")
    parser.add_argument("--variants", type=variants, default=list(VARIANTS), help="default: " + ",".join(VARIANTS))
    parser.set_defaults(rounds=timing.MIN_ROUNDS)


def problems(options: Options) -> Iterator[tuple[str, Callable[[], Problem]]]:
    asked = options.extra
    sizes = [SMOKE] if options.smoke else [Size(width, asked.layers, asked.batch) for width in asked.widths]
    for size in sizes:
        label = f"{size.width} wide, {size.layers} layers, {size.tokens} tokens"
        yield label, partial(problem, size, options)


def problem(size: Size, options: Options) -> Problem:
    nanochat = nanochat_model.load(options.extra.nanochat)
    # What its script sets: the optimizer multiplies in TF32 where it multiplies float32.
    torch.set_float32_matmul_precision("high")
    model = nanochat_model.build(nanochat, size, options.device, options.seed)
    gen = inputs.generator(options.device, options.seed)
    x, y = torch.randint(
        size.vocabulary, (2, size.batch, size.length), dtype=torch.int64, device=options.device, generator=gen
    )
    zeros = nanochat_model.give_zeros(model, x, options.extra.zeros, options.seed)
    step = Step(model, x, y, options)
    cases = []
    for name in options.extra.variants:
        dtype, role, *_ = VARIANTS[name]
        build = partial(case, name, size, nanochat, model, step)
        cases += attempt(build, variant=name, dtype=dtype, role=role, race="step")
    facts = {"layers": size.layers, "model": "nanochat"}
    # A step reads and writes more than any L2 holds.
    sustained = () if options.smoke else ("step",)
    return Problem(size.tokens, size.width, 4 * size.width, zeros, cases, evict=False, sustained=sustained, facts=facts)


class Step:
    """A step of any variant of a model, and what the dense one computes."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, options: Options) -> None:
        self.model, self.x, self.y, self.options = model, x, y, options
        self.optimizer = nanochat_model.optimizer_of(model)
        self.checked = {f"h.{name}": p for name, p in model.transformer.h.named_parameters()}
        self.loss, self.gradients = self.computed(model)

    def run(self, model: nn.Module) -> tuple[torch.Tensor, ...]:
        """Loss and, of one layer, gradients that depend on no order in which attention's backward pass adds up."""
        if self.options.smoke:  # its optimizer is compiled
            with torch.compiler.set_stance("force_eager"):
                return self._run(model)
        return self._run(model)

    def _run(self, model: nn.Module) -> tuple[torch.Tensor, ...]:
        loss = model(self.x, self.y)
        loss.backward()
        gradients = [p.grad for p in self.model.transformer.h[-1].mlp.parameters()]
        self.optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach(), *gradients

    def computed(self, model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and the gradients of all weights in the layers."""
        loss = model(self.x, self.y)
        loss.backward()
        gradients = {name: p.grad for name, p in self.checked.items()}
        model.zero_grad(set_to_none=True)
        return loss.detach(), gradients

    def check(self, model: nn.Module, output: tuple[torch.Tensor, ...], dtype: str) -> dict[str, float]:
        loss, gradients = self.computed(model)
        difference = max(reference.expect_error(one, self.loss, LOSS_BOUND) for one in (output[0], loss))
        facts = {"loss": float(loss), "loss_difference": difference}
        for fact, ffn in (("ffn_gradient_error", True), ("gradient_error", False)):
            names = [name for name in self.checked if (".mlp." in name) == ffn]
            actual, expected = (torch.cat([of[n].flatten() for n in names]) for of in (gradients, self.gradients))
            try:
                facts[fact] = reference.expect_error(actual, expected, GRADIENT_BOUND[dtype])
            except reference.Unverified as error:
                raise reference.Unverified(f"{fact}: {error}") from error
        return facts

    def state_bytes(self) -> int:
        """Weights, buffers, and what the optimizer keeps."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in kept)


def case(name: str, size: Size, nanochat: Checkout, dense: nn.Module, step: Step) -> Case:
    dtype, role, converted_to, recipe, fp8_elsewhere = VARIANTS[name]
    model = shared_copy(dense)
    if converted_to:
        convert(model, sparse24.ConvertConfig(dtype=converted_to, recipe=recipe), size.layers)
    if fp8_elsewhere:
        nanochat_model.use_fp8(nanochat, model, but=".mlp." if converted_to else None)
    if recipe:
        # Before it is compiled: the first step finds the scales of the second.
        step.computed(model)
        sparse24.Schedule(total_steps=2, dense_warmup_steps=0).apply(model, 1)
    started = time.perf_counter()
    run = model if step.options.smoke else torch.compile(model, dynamic=False, fullgraph=True)
    # Delayed scales of a layer, two in the forward pass, settle after those of the layers before it.
    for _ in range(2 * size.layers + 4 if recipe else 1):
        step.run(run)
    if step.x.is_cuda:
        torch.cuda.synchronize()
    facts = {"compile_s": time.perf_counter() - started}

    def check(output: tuple[torch.Tensor, ...]) -> dict[str, float]:
        peak = made.facts.get("peak_bytes")
        memory = {"peak_gb": (step.state_bytes() + peak) / 1e9} if peak else {}
        return step.check(run, output, dtype) | memory

    made = Case(name, dtype, lambda _: step.run(run), check, role, "step", facts=facts, tokens=size.tokens)
    return made


def convert(model: nn.Module, config: sparse24.ConvertConfig, layers: int) -> None:
    report = sparse24.convert(model, config, quiet=True)
    if len(report.converted) != layers:
        raise reference.Unverified(f"expected {layers} networks to be converted: {report}")


def main(argv: list[str] | None = None) -> int:
    return run_bench("nanochat_step", problems, __doc__, argv, arguments=arguments)
