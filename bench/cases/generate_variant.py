"""One variant of a model that `generate` compares: built, verified, and timed when it is its turn."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

import sparse24
from bench.cases import model_stacks
from bench.cases.model_stacks import Stack
from bench.cases.models import BOUND_FP8, Expected
from sparse24.bench.harness import describe
from sparse24.bench.options import Options

VOCABULARY, PROMPT = 8, 16
ZEROS = 0.9
#: New tokens of the two calls whose difference is timed.
NEW = {"eager": (2, 10), "static": (4, 28)}
CONFIGS = {
    "dense": None,
    "sparse24": sparse24.ConvertConfig(dtype="bf16", decode=True),
    "sparse24_fp8": sparse24.ConvertConfig(dtype="fp8", decode=True),
}
MODES: dict[str, dict[str, Any]] = {"eager": {}, "static": {"cache_implementation": "static"}}


class Variant:
    """A model as it is, or converted. All variants of a model have the same weights, from the same seed.

    Copies of the weights in float32, which it is verified with, are there one at a time: while `lock` is held.
    """

    @torch.no_grad()  # not in inference mode: no copies are kept of weights that count no changes
    def __init__(
        self, lock: AbstractContextManager, stack: Stack, layers: int, name: str, batches: list[int], options: Options
    ) -> None:
        self.name, self.options = name, options
        self.checks: dict[int, dict[str, Any]] = {}
        self.model, states, self.zeros = built(stack, layers, options)
        with lock:
            expected = {batch: self.expected(states[:batch, :1]) for batch in batches}
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
        convert(self.model, name, layers)
        for batch in batches:
            self.checks[batch] = self.verified(expected[batch], states[:batch, :1])

    def expected(self, states: torch.Tensor) -> Expected:
        expected = Expected(lambda model: {"out": hidden(model, states)}, self.model.model)
        return expected.with_limits(lambda _: BOUND_FP8) if self.name.endswith("fp8") else expected

    def verified(self, expected: Expected, states: torch.Tensor) -> dict[str, Any]:
        try:
            return {"verified": True} | expected.check({"out": hidden(self.model.model, states)})
        except Exception as error:
            return {"verified": False, "error": describe(error)}

    def facts(self, batch: int) -> dict[str, Any]:
        """What a record of so many sequences says before it is timed."""
        return {"zeros": round(self.zeros, 4)} | self.checks[batch]

    def prepare(self, ways: list[tuple[str, int]]) -> None:
        """Compile what these modes and batches do."""
        for mode, batch in ways:
            for new in reversed(NEW[mode]):  # the long call first: a static cache stays as long as it was
                self.timed(mode, batch, new)

    def time(self, mode: str, batch: int, core: int | None = None) -> float:
        """Of one token in us, on this core of the host. A short call before is not timed: others have worked."""
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread
        short, long = NEW[mode]
        self.timed(mode, batch, short)
        return (self.timed(mode, batch, long) - self.timed(mode, batch, short)) / (long - short)

    @torch.inference_mode()
    def timed(self, mode: str, batch: int, new: int) -> float:
        """A call of `generate` that gives so many new tokens, in us."""
        tokens = torch.Generator().manual_seed(self.options.seed)
        prompt = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=tokens).to(self.options.device)
        how = dict(MODES[mode], do_sample=False, pad_token_id=0)
        if self.options.smoke:
            how["disable_compile"] = True
        self.wait()
        start = time.perf_counter()
        out = self.model.generate(prompt, min_new_tokens=new, max_new_tokens=new, **how)
        self.wait()
        if out.shape[1] != PROMPT + new:
            raise RuntimeError(f"expected {new} new tokens, got {out.shape[1] - PROMPT}")
        return (time.perf_counter() - start) * 1e6

    def wait(self) -> None:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize()


def built(stack: Stack, layers: int, options: Options) -> tuple[Any, torch.Tensor, float]:
    """The model as it is, hidden states [batch, length, d_model] to verify with, and the share of zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base, states, zeros = model_stacks.with_zeros(stack, layers, ZEROS, device=options.device, seed=options.seed)
    base.eval()
    base.embed_tokens.weight.copy_(states[0, :VOCABULARY])
    config = AutoConfig.for_model(stack.model, **{k: v for k, v in base.config.to_dict().items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model = base
    generator = torch.Generator().manual_seed(options.seed)
    head = torch.randn(VOCABULARY, stack.d_model, generator=generator).to(states)
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    model.generation_config.eos_token_id = None
    return model.eval(), states, zeros


def convert(model: nn.Module, name: str, layers: int) -> None:
    config = CONFIGS[name]
    if config is not None:
        report = sparse24.convert(model, config, quiet=True)
        if len(report.converted) != layers:
            raise RuntimeError(f"expected {layers} networks to be converted: {report}")


def hidden(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return model_stacks.run(model, states.to(next(model.parameters()).dtype))
