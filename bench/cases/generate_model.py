"""A model that `generate` runs in its variants: built, verified, compiled, and timed by turns."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

import sparse24
from bench.cases import model_stacks
from bench.cases.model_stacks import Stack
from bench.cases.models import BOUND_FP8, Expected
from sparse24.bench import results
from sparse24.bench.harness import describe
from sparse24.bench.options import Options

VOCABULARY, PROMPT = 8, 16
ZEROS = 0.9
CONFIGS = {
    "dense": None,
    "sparse24": sparse24.ConvertConfig(dtype="bf16", decode=True),
    "sparse24_fp8": sparse24.ConvertConfig(dtype="fp8", decode=True),
}
MODES: dict[str, dict[str, Any]] = {"eager": {}, "static": {"cache_implementation": "static"}}
#: New tokens of the two calls whose difference is timed, and how often: an eager one takes the host five times as long.
NEW = {"eager": (2, 10), "static": (4, 28)}
ROUNDS = {"eager": 9, "static": 15}

Ways = list[tuple[str, int]]


def variant(name: str) -> results.Record:
    """What its records begin with."""
    role, dtype = ("dense" if name == "dense" else "sparse24"), ("fp8" if name.endswith("fp8") else "bf16")
    return {"variant": name, "role": role, "dtype": dtype, "zeros": ZEROS, "median_us": None, "verified": True}


def failed(error: str) -> list[results.Record]:
    """The records of all variants where there are none."""
    return [variant(name) | {"verified": False, "error": error} for name in CONFIGS]


class Model:
    """The variants of a model, which share their weights.

    Copies of the weights in float32, which they are verified with, are there one at a time: while `lock` is held.
    """

    @torch.no_grad()  # not in inference mode: no copies are kept of weights that count no changes
    def __init__(
        self, lock: AbstractContextManager, stack: Stack, layers: int, batches: list[int], options: Options
    ) -> None:
        self.options = options
        self.prepared: tuple[str, int] | None = None
        base, states, zeros = model_stacks.with_zeros(stack, layers, ZEROS, device=options.device, seed=options.seed)
        base.eval()
        base.embed_tokens.weight.copy_(states[0, :VOCABULARY])
        with lock:
            expected = {batch: expected_of(base, states[:batch, :1]) for batch in batches}
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
        self.models: dict[str, Any] = {}
        self.records: dict[int, dict[str, results.Record]] = {batch: {} for batch in batches}
        for name in CONFIGS:
            found = variant(name) | {"zeros": round(zeros, 4)}
            try:
                self.models[name] = model = with_head(base, stack, states, options)
                convert(model, name, layers)
                error = None
            except Exception as exception:
                error = describe(exception)
            for batch in batches:
                wrong = {"verified": False, "error": error}
                facts = wrong if error else verified(model.model, name, expected[batch], states[:batch, :1])
                self.records[batch][name] = found | facts

    def prepare(self, mode: str, batch: int) -> None:
        """Compile what `generate` does so, of variants that are right, and nothing of other shapes beside it."""
        if self.prepared != (mode, batch):
            torch._dynamo.reset()
            for name, record in self.records[batch].items():
                for new in reversed(NEW[mode]):  # the long call first: a static cache stays as long as it was
                    self.timed(record, name, mode, batch, new)
            self.prepared = (mode, batch)

    def race(self, mode: str, batch: int) -> list[results.Record]:
        """A record of each variant: those that are right take turns, in rounds."""
        self.prepare(mode, batch)
        named = {name: dict(record) for name, record in self.records[batch].items()}
        short, long = NEW[mode]
        rounds: list[dict[str, float]] = []
        for count in range(1 + (1 if self.options.smoke else ROUNDS[mode])):
            times = {}
            for name, record in turns(named, count):
                both = [self.timed(record, name, mode, batch, new) for new in (long, short)]
                if record["verified"]:
                    times[name] = (both[0] - both[1]) / (long - short)
            rounds += [times] if count else []  # the first one warms up
        return [r | by_rounds(rounds, name) if r["verified"] else r for name, r in named.items()]

    @torch.inference_mode()
    def timed(self, record: results.Record, name: str, mode: str, batch: int, new: int) -> float:
        """A call of `generate` that gives so many new tokens, in us; 0 if it fails or has failed."""
        if not record["verified"]:
            return 0.0
        tokens = torch.Generator().manual_seed(self.options.seed)
        prompt = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=tokens).to(self.options.device)
        how = dict(MODES[mode], do_sample=False, pad_token_id=0)
        if self.options.smoke:
            how["disable_compile"] = True
        try:
            self.wait()
            start = time.perf_counter()
            out = self.models[name].generate(prompt, min_new_tokens=new, max_new_tokens=new, **how)
            self.wait()
            elapsed = time.perf_counter() - start
            if out.shape[1] != PROMPT + new:
                raise RuntimeError(f"expected {new} new tokens, got {out.shape[1] - PROMPT}")
        except Exception as error:
            record |= {"verified": False, "error": f"timing: {describe(error)}"}
            return 0.0
        return elapsed * 1e6

    def wait(self) -> None:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize()


def with_head(base: nn.Module, stack: Stack, states: torch.Tensor, options: Options) -> Any:
    """A model to generate with, whose layers share the parameters of `base`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(stack.model, **{k: v for k, v in base.config.to_dict().items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model = model_stacks.shared_copy(base)
    generator = torch.Generator().manual_seed(options.seed)
    head = torch.randn(VOCABULARY, stack.d_model, generator=generator).to(states)
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    model.generation_config.eos_token_id = None
    return model.eval()


def convert(model: nn.Module, name: str, layers: int) -> None:
    config = CONFIGS[name]
    if config is not None:
        report = sparse24.convert(model, config, quiet=True)
        if len(report.converted) != layers:
            raise RuntimeError(f"expected {layers} networks to be converted: {report}")


def expected_of(base: nn.Module, states: torch.Tensor) -> Expected:
    return Expected(lambda model: {"out": hidden(model, states)}, base)


def verified(model: nn.Module, name: str, expected: Expected, states: torch.Tensor) -> results.Record:
    bounded = expected.with_limits(lambda _: BOUND_FP8) if name.endswith("fp8") else expected
    try:
        return {"verified": True} | bounded.check({"out": hidden(model, states)})
    except Exception as error:
        return {"verified": False, "error": describe(error)}


@torch.inference_mode()
def hidden(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return model_stacks.run(model, states.to(next(model.parameters()).dtype))


def turns(named: dict[str, Any], count: int) -> list[tuple[str, Any]]:
    """The variants in the order of a round: each begins with another one."""
    first = count % len(named)
    return [*named.items()][first:] + [*named.items()][:first]


def by_rounds(rounds: list[dict[str, float]], name: str) -> dict[str, float]:
    """A variant's time, and its speed-up over the dense one: of times in the same round."""
    if any("dense" not in times for times in rounds):
        return {"median_us": round(statistics.median(times[name] for times in rounds), 1)}
    dense = statistics.median(times["dense"] for times in rounds)
    ratio = statistics.median(times["dense"] / times[name] for times in rounds)
    found = {"median_us": round(dense / ratio, 1)}
    return found if name == "dense" else found | {"speedup_vs_best_dense": round(ratio, 3)}
