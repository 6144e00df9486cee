"""Generation with models of transformers before and after `sparse24.convert(decode=True)`, eager and compiled.

    python -m bench generate --out bench/results/<gpu>/generate.json --budget 300
    python -m bench generate --out generate.json --models nemotron --batches 1 --modes eager

Layers of Nemotron-Mini-4B, AFM-4.5B and a model with the FFN of RWKV-7 (4096 -> 16384), with attention and norms, and
a head of eight words: bfloat16, random weights, 90 % zeros (model_stacks.py). Sixteen of each: with a static cache a
step of `generate` takes the host a millisecond beside them, which deep models hide. `generate` runs as users call it:
`eager` with its own cache, `static` with a static cache, which it compiles. Variants: `dense` (the model as it is),
`sparse24` (converted) and `sparse24_fp8` (with float8 copies of the FFNs' weights). Times are of one token: of a long
call less a short one, over their difference, so that the prompt does not count. A host's speed may change by a third
within seconds, so variants take turns every few tokens, and times are compared within a round: a record's is the median
of the model as it is, by the median of the ratios to that.

Verified: the hidden states of one token for each sequence against the model in float32, with at most twice the error of
the dense one; with float8 weights there is a bound.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sparse24
from bench.cases import model_stacks
from bench.cases.model_stacks import Stack
from bench.cases.models import BOUND_FP8, Expected
from sparse24.bench import environment, results
from sparse24.bench.harness import describe
from sparse24.bench.options import Options, parse

VOCABULARY, PROMPT = 8, 16
ZEROS = 0.9
#: New tokens of the two calls, and how often each is timed.
SHORT, LONG, ROUNDS = 4, 16, 11
FFN = ("up_proj", "down_proj")
STACKS = {
    "nemotron": Stack("Nemotron-Mini-4B", "nemotron", 32, 64, 3072, 9216, 24, 8, FFN),
    "arcee": Stack("AFM-4.5B", "arcee", 32, 64, 2560, 18432, 20, 4, FFN),
    "rwkv7": Stack("RWKV-7 FFN", "nemotron", 32, 64, 4096, 16384, 32, 8, FFN),
}
CONFIGS = {
    "dense": None,
    "sparse24": sparse24.ConvertConfig(dtype="bf16", decode=True),
    "sparse24_fp8": sparse24.ConvertConfig(dtype="fp8", decode=True),
}
MODES: dict[str, dict[str, Any]] = {"eager": {}, "static": {"cache_implementation": "static"}}


def arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--models", type=names, default=list(STACKS), help=f"default: {','.join(STACKS)}")
    parser.add_argument("--modes", type=names, default=list(MODES), help=f"default: {','.join(MODES)}")
    parser.add_argument("--layers", type=int, default=16, help="of each model (default: 16)")
    parser.add_argument("--batches", type=names, default=["1", "8", "32"], help="sequences (default: 1,8,32)")


def main(argv: list[str] | None = None) -> int:
    options, args = parse(__doc__, argv, arguments)
    header = environment.facts(options.device)
    started, records = time.perf_counter(), []
    for name in args.models:
        stack = STACKS[name]
        if options.smoke:
            stack = stack._replace(batch=4, length=48, d_model=64, d_ff=256, heads=4, key_value_heads=4)
        layers = 2 if options.smoke else args.layers
        models, states, zeros = variants(stack, layers, options)
        for mode in args.modes:
            for batch in (int(text) for text in args.batches):
                if time.perf_counter() - started > args.budget:
                    print(f"not started, over the budget: {name} {mode} {batch}")
                    continue
                facts = {"model": stack.name, "layers": layers, "batch": batch, "zeros": round(zeros, 4)}
                facts |= {"tokens": batch, "d_model": stack.d_model, "d_ff": stack.d_ff, "pattern": "iid"}
                new = race(models, states[:batch], mode, batch, options)
                records += [{"bench": "generate", "race": mode} | facts | record | header for record in new]
                print("\n".join(text_of(record) for record in records[-len(new) :]), flush=True)
                if args.out:
                    results.write_json(args.out, records)
                torch._dynamo.reset()
    failed = [r for r in records if not r["verified"]]
    print(f"generate: {len(records)} records, {len(failed)} of them not verified")
    return 1 if failed or not records else 0


def text_of(record: results.Record) -> str:
    time_us = "not verified: " + record["error"] if record["median_us"] is None else f"{record['median_us']:9.1f} us"
    return f"{record['model']:<18}{record['race']:<8}batch {record['batch']:<4}{record['variant']:<14}{time_us}"


def variants(stack: Stack, layers: int, options: Options) -> tuple[dict[str, nn.Module], torch.Tensor, float]:
    """The models, which share their weights; hidden states [batch, length, d_model] to verify with; share of zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base, states, zeros = model_stacks.with_zeros(stack, layers, ZEROS, device=options.device, seed=options.seed)
    base.eval()
    with torch.no_grad():
        base.embed_tokens.weight.copy_(states[0, :VOCABULARY])
    config = AutoConfig.for_model(stack.model, **{k: v for k, v in base.config.to_dict().items() if k != "model_type"})
    models = {}
    for name, conversion in CONFIGS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.model = model_stacks.shared_copy(base)
        generator = torch.Generator().manual_seed(options.seed)
        head = torch.randn(VOCABULARY, stack.d_model, generator=generator).to(states)
        model.lm_head.weight = nn.Parameter(head, requires_grad=False)
        model.generation_config.eos_token_id = None
        model.eval()
        if conversion is not None:
            report = sparse24.convert(model, conversion, quiet=True)
            if len(report.converted) != layers:
                raise RuntimeError(f"expected {layers} networks to be converted: {report}")
        models[name] = model
    return models, states, zeros


@torch.inference_mode()
def race(
    models: dict[str, nn.Module], states: torch.Tensor, mode: str, batch: int, options: Options
) -> list[results.Record]:
    """A record of each model: verified, then timed one after another, in rounds."""
    records = [
        {"variant": name, "role": "dense" if name == "dense" else "sparse24", "median_us": None, "verified": True}
        | {"dtype": "fp8" if name.endswith("fp8") else "bf16"}
        for name in models
    ]
    one_token = states[:, :1].clone()
    expected = Expected(lambda model: {"out": hidden(model, one_token)}, models["dense"].model)
    for record, model in zip(records, models.values(), strict=True):
        bounded = expected.with_limits(lambda _: BOUND_FP8) if record["dtype"] == "fp8" else expected
        try:
            record |= bounded.check({"out": hidden(model.model, one_token)})
        except Exception as error:
            record |= {"verified": False, "error": describe(error)}
    calls = {name: generation(model, mode, batch, options) for name, model in models.items()}
    named = {record["variant"]: record for record in records}
    rounds: list[dict[str, float]] = []
    for count in range(1 + (1 if options.smoke else ROUNDS)):
        times = {}
        for name, call in turns(calls, count):
            if named[name]["verified"]:
                try:
                    # The long one first: a static cache stays as long as it was.
                    times[name] = (timed(call, LONG, options) - timed(call, SHORT, options)) / (LONG - SHORT)
                except Exception as error:
                    named[name] |= {"verified": False, "error": f"timing: {describe(error)}"}
        rounds += [times] if count else []  # the first one compiles
    for record in records:
        if record["verified"]:
            record |= by_rounds(rounds, record["variant"])
    return records


def turns(calls: dict[str, Any], count: int) -> list[tuple[str, Any]]:
    """The calls in the order of a round: each begins with another one."""
    first = count % len(calls)
    return [*calls.items()][first:] + [*calls.items()][:first]


def by_rounds(rounds: list[dict[str, float]], name: str) -> dict[str, float]:
    """A variant's time, and its speed-up over the dense one: of times in the same round."""
    if any("dense" not in times for times in rounds):
        return {"median_us": round(statistics.median(times[name] for times in rounds), 1)}
    dense = statistics.median(times["dense"] for times in rounds)
    ratio = statistics.median(times["dense"] / times[name] for times in rounds)
    found = {"median_us": round(dense / ratio, 1)}
    return found if name == "dense" else found | {"speedup_vs_best_dense": round(ratio, 3)}


def hidden(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return model_stacks.run(model, states.to(next(model.parameters()).dtype))


def generation(model: nn.Module, mode: str, batch: int, options: Options) -> Callable[[int], torch.Tensor]:
    """`generate` of so many new tokens."""
    tokens = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=tokens).to(options.device)
    how: dict[str, Any] = dict(MODES[mode], do_sample=False, pad_token_id=0)
    if options.smoke:
        how["disable_compile"] = True

    def generate(new: int) -> torch.Tensor:
        return model.generate(prompt, min_new_tokens=new, max_new_tokens=new, **how)

    return generate


def timed(call: Callable[[int], torch.Tensor], new: int, options: Options) -> float:
    """In us."""
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = call(new)
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    if out.shape[1] != PROMPT + new:
        raise RuntimeError(f"expected {new} new tokens, got {out.shape[1] - PROMPT}")
    return (time.perf_counter() - start) * 1e6
