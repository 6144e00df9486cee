"""A model that `generate` runs, as it is or converted: built, verified, compiled, and timed when its turn comes."""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import sparse24
from bench.cases import model_stacks
from bench.cases.model_stacks import Stack
from sparse24.bench import reference, results
from sparse24.bench.harness import describe
from sparse24.bench.options import Options

#: Words that differ, of which texts are made. Others have the embedding of one of these.
WORDS, PROMPT = 256, 16
ZEROS = 0.9
CONFIGS = {
    "dense": None,
    "sparse24": sparse24.ConvertConfig(dtype="bf16", decode=True),
    "sparse24_fp8": sparse24.ConvertConfig(dtype="fp8", decode=True),
}
#: The largest error of a network with float8 weights, against its float8 weights in float32: what is left is rounding x
#: and y to float8, and the columns that are equal in x, which make the zeros, are rounded alike.
BOUND_FP8 = 0.15


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


class Exact(NamedTuple):
    """Hidden states in float32, and the largest error of such in 16 bits."""

    states: torch.Tensor
    limit: float


class Variant:
    """One of `CONFIGS` of a model."""

    @torch.no_grad()  # not in inference mode: no copies are kept of weights that count no changes
    def __init__(self, name: str, model: Whole, batches: list[int], options: Options) -> None:
        self.options = options
        self.prepared: tuple[str, int] | None = None
        stack, layers, self.vocabulary = model
        how: dict[str, Any] = {"device": options.device, "seed": options.seed}
        words, self.text = model_stacks.text(stack, min(WORDS, self.vocabulary), **how)
        base, states, zeros = model_stacks.with_zeros(stack, layers, ZEROS, x=words[self.text], **how)
        base.eval()
        expected = {batch: expected_of(base, states[:batch, :1]) for batch in batches}
        if options.device.type == "cuda":
            torch.cuda.empty_cache()  # processes share the device's memory
        self.model = with_head(base, model, words)
        convert(self.model, name, layers)
        self.records = {}
        for batch in batches:
            facts = verified(self.model.model, name, stack, expected[batch], states[:batch, :1])
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
        """Call `generate` once, which goes on as the text does: the median time from one new token to the next."""
        how, new, first, _ = MODES[mode]
        text = self.text[:batch, : PROMPT + new]
        scores = torch.zeros(new, batch, self.vocabulary, dtype=torch.bfloat16, device=text.device)
        scores.scatter_(2, text[:, PROMPT:].t().unsqueeze(2), 1)
        stamps: list[float] = []

        def next_word(_words: torch.Tensor, _logits: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return scores[len(stamps) - 1]

        how = dict(how, do_sample=False, pad_token_id=0, min_new_tokens=new, max_new_tokens=new)
        if self.options.smoke:
            how["disable_compile"] = True
        out = self.model.generate(text[:, :PROMPT], logits_processor=[next_word], **how)
        if not torch.equal(out, text):
            raise RuntimeError(f"expected the {new} words that follow, got others, or {out.shape[1] - PROMPT} of them")
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


@torch.no_grad()
def expected_of(base: nn.Module, states: torch.Tensor) -> Exact:
    """What the model gives in float32: each of its modules has its weights so while it works."""
    modules = [*base.layers, base.norm]
    handles = [module.register_forward_pre_hook(lambda module, _: module.float() and None) for module in modules]
    handles += [module.register_forward_hook(lambda module, *_: module.bfloat16() and None) for module in modules]
    exact = model_stacks.run(base, states.float())
    for handle in handles:
        handle.remove()
    error = reference.relative_error(hidden(base, states), exact)
    return Exact(exact, 2 * error + reference.ABSOLUTE_SLACK)


def verified(model: nn.Module, name: str, stack: Stack, expected: Exact, states: torch.Tensor) -> results.Record:
    """The error of the hidden states, or why it is wrong.

    Errors of float8 weights grow from layer to layer, so that they tell little: there each network is compared alone.
    """
    found: list[tuple[float, float]] = []

    def compare(network: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x, (w1, w2) = args[0].float(), (as_float8(layer.weight) for layer in stack.weights(network))
        exact = F.linear(F.relu(F.linear(x, w1)).square(), w2)
        found.append(((out - exact).norm().item(), exact.norm().item()))

    fp8 = name.endswith("fp8")
    handles = [network.register_forward_hook(compare) for network in stack.networks(model)] if fp8 else []
    try:
        error = reference.expect_error(hidden(model, states), expected.states, math.inf if fp8 else expected.limit)
        if fp8:
            check_networks(found)
        return {"verified": True, "rel_error": error}
    except Exception as error:
        return {"verified": False, "error": describe(error)}
    finally:
        for handle in handles:
            handle.remove()


def check_networks(found: list[tuple[float, float]]) -> None:
    """Errors of networks and what they give, as norms: one for whose tokens hardly a neuron is active gives little."""
    usual = statistics.median(norm for _, norm in found)
    for number, (error, norm) in enumerate(found):
        if not error <= BOUND_FP8 * max(norm, usual):  # written so that NaN fails
            raise reference.Unverified(f"network {number}: expected an error of {BOUND_FP8} of {norm}, got {error}")


def as_float8(w: torch.Tensor) -> torch.Tensor:
    """The numbers that a float8 weight has, in float32."""
    values, scale = sparse24.quantize_fp8(w)
    return values.float() * scale.reshape(-1, 1)


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
