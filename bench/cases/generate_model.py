"""A model that `generate` runs, as it is or converted: built, verified, compiled, and timed when its turn comes."""

from __future__ import annotations

import math
import os
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

import sparse24
from bench.cases import model_stacks
from bench.cases.model_stacks import Stack
from bench.cases.models import BOUND_FP8, Expected
from sparse24.bench import results
from sparse24.bench.harness import describe
from sparse24.bench.options import Options

#: Words that differ. Others have the embedding of one of these, and the same logit.
WORDS, PROMPT = 8, 16
ZEROS = 0.9
CONFIGS = {
    "dense": None,
    "sparse24": sparse24.ConvertConfig(dtype="bf16", decode=True),
    "sparse24_fp8": sparse24.ConvertConfig(dtype="fp8", decode=True),
}
#: Errors of layers add up as independent ones do; this many have the bound.
LAYERS_OF_BOUND = 16


class Mode(NamedTuple):
    """How `generate` is called: its arguments, new tokens of a call, which of them are not timed, and rounds."""

    how: dict[str, Any]
    new: int
    first: int
    rounds: int


#: The first token has the prompt in its time; with a static cache the next ones record a graph of that cache.
MODES = {"eager": Mode({}, 8, 2, 7), "static": Mode({"cache_implementation": "static"}, 24, 5, 9)}

Ways = list[tuple[str, int]]


class Whole(NamedTuple):
    """A model: what its layers are, how many of them it has, and of how many words."""

    stack: Stack
    layers: int
    vocabulary: int


def begun(name: str) -> results.Record:
    """What a variant's records begin with."""
    role, dtype = ("dense" if name == "dense" else "sparse24"), ("fp8" if name.endswith("fp8") else "bf16")
    return {"variant": name, "role": role, "dtype": dtype, "zeros": ZEROS, "median_us": None, "verified": True}


class Variant:
    """One of `CONFIGS` of a model.

    A copy of the weights in float32, which it is verified with, is there while `lock` is held: one at a time.
    """

    @torch.no_grad()  # not in inference mode: no copies are kept of weights that count no changes
    def __init__(
        self, lock: AbstractContextManager, name: str, model: Whole, batches: list[int], options: Options
    ) -> None:
        self.options = options
        self.prepared: tuple[str, int] | None = None
        stack, layers, _ = model
        base, states, zeros = model_stacks.with_zeros(stack, layers, ZEROS, device=options.device, seed=options.seed)
        base.eval()
        with lock:
            expected = {batch: expected_of(base, states[:batch, :1]) for batch in batches}
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
        self.model = with_head(base, model, states[0, :WORDS])
        convert(self.model, name, layers)
        self.records = {}
        for batch in batches:
            facts = verified(self.model.model, name, layers, expected[batch], states[:batch, :1])
            self.records[batch] = begun(name) | {"zeros": round(zeros, 4)} | facts

    def record(self, batch: int) -> results.Record:
        return self.records[batch]

    def prepare(self, mode: str, batch: int) -> None:
        """Compile what `generate` does so, and nothing of other shapes beside it."""
        if self.prepared != (mode, batch) and self.records[batch]["verified"]:
            if self.prepared is not None:
                torch._dynamo.reset()
            self.token_us(mode, batch)
            self.prepared = (mode, batch)

    def stay(self, core: int | None) -> None:
        """Let the thread that calls `generate` run on one core, where variants take turns; or on any again."""
        if core is None:
            os.sched_setaffinity(0, self.cores)
        else:
            self.cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {core})

    @torch.inference_mode()
    def token_us(self, mode: str, batch: int) -> float:
        """Call `generate` once: the median time from one new token to the next."""
        how, new, first, _ = MODES[mode]
        tokens = torch.Generator().manual_seed(self.options.seed)
        prompt = torch.randint(1, WORDS, (batch, PROMPT), generator=tokens).to(self.options.device)
        stamps: list[float] = []

        def stamp(_words: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return logits

        how = dict(how, do_sample=False, pad_token_id=0, min_new_tokens=new, max_new_tokens=new)
        if self.options.smoke:
            how["disable_compile"] = True
        out = self.model.generate(prompt, logits_processor=[stamp], **how)
        if out.shape[1] != PROMPT + new or len(stamps) != new:
            raise RuntimeError(f"expected {new} new tokens, got {out.shape[1] - PROMPT}, {len(stamps)} of them timed")
        times = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
        return statistics.median(times[first - 1 :]) * 1e6


def with_head(base: nn.Module, model: Whole, words: torch.Tensor) -> Any:
    """A model to generate with, whose layers share the parameters of `base`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = {k: v for k, v in base.config.to_dict().items() if k != "model_type"}
    config = AutoConfig.for_model(model.stack.model, **facts | {"vocab_size": model.vocabulary})
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rows = words.repeat(math.ceil(model.vocabulary / len(words)), 1)[: model.vocabulary]
    whole.model = model_stacks.shared_copy(base)
    whole.model.embed_tokens = nn.Embedding.from_pretrained(rows)
    whole.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    whole.generation_config.eos_token_id = None
    return whole.eval()


def convert(model: nn.Module, name: str, layers: int) -> None:
    config = CONFIGS[name]
    if config is not None:
        report = sparse24.convert(model, config, quiet=True)
        if len(report.converted) != layers:
            raise RuntimeError(f"expected {layers} networks to be converted: {report}")


def expected_of(base: nn.Module, states: torch.Tensor) -> Expected:
    return Expected(lambda model: {"out": hidden(model, states)}, base)


def verified(model: nn.Module, name: str, layers: int, expected: Expected, states: torch.Tensor) -> results.Record:
    bound = BOUND_FP8 * max(1.0, layers / LAYERS_OF_BOUND) ** 0.5
    bounded = expected.with_limits(lambda _: bound) if name.endswith("fp8") else expected
    try:
        return {"verified": True} | bounded.check({"out": hidden(model, states)})
    except Exception as error:
        return {"verified": False, "error": describe(error)}


@torch.inference_mode()
def hidden(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return model_stacks.run(model, states.to(next(model.parameters()).dtype))


def turns(names: list[str], count: int) -> list[str]:
    """The variants in the order of a round: each begins with another one."""
    first = count % len(names) if names else 0
    return names[first:] + names[:first]


def by_rounds(rounds: list[dict[str, float]], name: str) -> dict[str, float]:
    """A variant's time, and its speed-up over the dense one: of times in the same round."""
    if any("dense" not in times for times in rounds):
        return {"median_us": round(statistics.median(times[name] for times in rounds), 1)}
    dense = statistics.median(times["dense"] for times in rounds)
    ratio = statistics.median(times["dense"] / times[name] for times in rounds)
    found = {"median_us": round(dense / ratio, 1)}
    return found if name == "dense" else found | {"speedup_vs_best_dense": round(ratio, 3)}
