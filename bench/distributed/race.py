"""One size on all ranks: each way and variant is verified against one GPU, timed beside it, and profiled."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bench.distributed import collectives, model, profile
from bench.distributed.model import VARIANTS, Size
from bench.distributed.parallel import Alone, Weights
from sparse24.bench import environment, reference, results
from sparse24.bench.harness import describe

#: Relative errors to the same variant on one GPU: gradients are rounded to bfloat16, and float8 scales follow the steps
#: before. Where ranks see all tokens and sum in another order, other entries round and are pruned, and weight gradients
#: are pruned in other groups of tokens.
BOUNDS = {"bf16": 2e-2, "fp8": 1.5e-1}
BOUNDS_MIXED = {"bf16": 1e-1, "fp8": 2.5e-1}
BOUNDS_PRUNED = {"bf16": 0.25, "fp8": 0.35}
#: Of a variant on one GPU to the first, which is dense in bfloat16: other benches verify networks more closely.
BOUNDS_ALONE = {"bf16": 0.4, "fp8": 0.6}
#: Steps before a case is verified: the second one has the first one's float8 scales.
SETTLE = {"bf16": 1, "fp8": 3}
#: A sample is so many steps that it takes at least this long.
SAMPLE_SECONDS = 0.25


@dataclass
class Case:
    """A variant of a way: its step, what it was found to be, and its times in us."""

    way: str
    variant: str
    step: Alone
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        return VARIANTS[self.variant].dtype


@dataclass
class Data:
    """The tokens of this rank, the gradient of its output, and the weights that all ranks share."""

    size: Size
    device: torch.device
    weights: Weights
    zeros: float
    x: torch.Tensor
    dy: torch.Tensor

    @classmethod
    def of(cls, size: Size, device: torch.device, seed: int) -> Data:
        weights, zeros = model.weights_with_zeros(size, device, seed)
        for weight in weights.values():
            dist.broadcast(weight, 0)
        x = model.tokens(size, device, seed + 1 + dist.get_rank()).requires_grad_()
        dy = model.tokens(size, device, seed + 101 + dist.get_rank()) * len(x) ** -0.5
        return cls(size, device, weights, zeros, x, dy)

    def run(self, step: Alone) -> torch.Tensor:
        self.x.grad = None
        return step.run(self.x, self.dy)


def race(
    size: Size, ways: list[type[Alone]], variants: list[str], device: torch.device, seed: int, rounds: int
) -> list[results.Record]:
    """Records of a size, the same on all ranks."""
    data = Data.of(size, device, seed)
    cases: list[Case] = []
    base: Weights = {}
    for variant in variants:
        if size.experts and VARIANTS[variant].dtype == "fp8":
            continue  # their weight gradients are 16-bit products
        alone = built(Alone, variant, data)
        found: Weights = {}
        check(alone, partial(verify_alone, alone, data, found, base))
        cases.append(alone)
        if alone.error is None:
            expected = averaged(found)
            base = base or found
            for way in ways:
                if way.fits(size, dist.get_world_size()) and VARIANTS[variant].dtype in way.dtypes:
                    case = built(way, variant, data)
                    check(case, partial(verify, case, data, expected))
                    cases.append(case)
    sound = [case for case in cases if case.error is None]
    clocks = timed(sound, data, rounds)
    for case in sound:
        dist.barrier()
        case.facts |= profile.shares(partial(data.run, case.step), data.device)
    return [*made(cases, data, clocks), *collectives.records(data, rounds)]


def built(way: type[Alone], variant: str, data: Data) -> Case:
    """A case that has made its first steps; `peak_gb` is all that it takes: weights, gradients, activations."""
    case = Case(way.name, variant, None)  # type: ignore[arg-type]
    weights = sum(w.nbytes for w in data.weights.values())
    before = _allocated(data.device)

    def build() -> dict[str, Any]:
        case.step = way(data.size, VARIANTS[variant], data.weights)
        for _ in range(SETTLE[case.dtype]):
            data.run(case.step)
        if data.device.type == "cpu":
            return {}
        torch.cuda.reset_peak_memory_stats()
        data.run(case.step)
        taken = torch.cuda.max_memory_allocated() - before + (weights if way is Alone else 0)
        return {"peak_gb": round(taken / 1e9, 2)}

    check(case, build)
    return case


def check(case: Case, find: Callable[[], dict[str, Any]]) -> None:
    """Add facts; where one rank fails, all know it, so that none waits for another."""
    if case.error is not None:
        return
    facts, error = {}, None
    try:
        facts = find()
    except Exception as problem:
        error = describe(problem)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (facts, error))
    case.error = next((error for _, error in everywhere if error), None)
    # The largest of all ranks.
    case.facts |= {name: max(facts[name] for facts, _ in everywhere) for name in facts} if not case.error else {}


def verify_alone(case: Case, data: Data, found: Weights, base: Weights) -> dict[str, float]:
    """Distances from the first variant, if there is one; `found` gets what this GPU computed alone."""
    out = data.run(case.step)
    found |= {"out": out, "dx": data.x.grad} | case.step.gradients()
    bound = BOUNDS_ALONE[case.dtype]
    errors = {name: reference.expect_error(found[name], base[name], bound) for name in found if base}
    gradients = [error for name, error in errors.items() if name not in ("out", "dx")]
    return {"rel_error": errors["out"], "dx_error": errors["dx"], "gradient_error": max(gradients)} if base else {}


def averaged(found: Weights) -> Weights:
    """The same, with gradients of the weights in float32 as means over the ranks."""
    means = {name: t if name in ("out", "dx") else t.float() / dist.get_world_size() for name, t in found.items()}
    for name, tensor in means.items():
        if name not in ("out", "dx"):
            dist.all_reduce(tensor)
    return means


def verify(case: Case, data: Data, expected: Weights) -> dict[str, float]:
    """Distances from one GPU: of the output, and the largest of the gradients."""
    step, dtype = case.step, case.dtype
    out = data.run(step)
    usual = (BOUNDS_MIXED if step.mixes else BOUNDS)[dtype]
    facts = {
        "rel_error": reference.expect_error(out, expected["out"], usual),
        "dx_error": reference.expect_error(data.x.grad, expected["dx"], usual),
    }
    found = {"gradient_error": 0.0, "ffn_gradient_error": 0.0}
    for name, gradient in step.gradients().items():
        ffn = ".mlp." in name
        pruned = ffn and step.mixes and VARIANTS[case.variant].sparse
        bound = BOUNDS_PRUNED[dtype] if pruned else usual
        mine, scale = step.part(name, expected[name]), dist.get_world_size() if step.sums(name) else 1
        try:
            error = reference.expect_error(gradient.float() / scale, mine, bound) if mine.numel() else 0.0
        except reference.Unverified as problem:
            raise reference.Unverified(f"{name}: {problem}") from problem
        fact = "ffn_gradient_error" if ffn else "gradient_error"
        found[fact] = max(found[fact], error)
    return facts | found


def timed(cases: list[Case], data: Data, rounds: int) -> dict[str, Any]:
    """Samples of several steps, in turn, each round in another order; the slowest rank counts."""
    cuda = data.device.type == "cuda"
    steps = {id(case): max(2, -(-SAMPLE_SECONDS // (_sample(case, data, 1)[0] / 1e6))) if cuda else 1 for case in cases}
    counts = torch.tensor([steps[id(case)] for case in cases], device=data.device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    shuffled = random.Random(0)
    order = list(range(len(cases)))
    clocks: dict[str, Any] = {}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for index in order:
            time_us, host_us = _sample(cases[index], data, int(counts[index]))
            cases[index].times.append(time_us)
            cases[index].host.append(host_us)
        clocks = environment.clocks(data.device)
    for case in cases:
        times = torch.tensor(case.times, device=data.device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        slowest = times.tolist()
        if case.way == Alone.name:
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, statistics.median(case.times))
            case.facts |= {"fastest_gpu_us": round(min(everywhere), 1), "slowest_gpu_us": round(max(everywhere), 1)}
            case.times = [t * statistics.fmean(everywhere) / statistics.median(case.times) for t in case.times]
        else:
            case.times = slowest
    return clocks


def _sample(case: Case, data: Data, steps: int) -> tuple[float, float]:
    """us of a step on this rank, and what its host takes of that to launch it."""
    dist.barrier()
    if data.device.type == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            data.run(case.step)
        elapsed = (time.perf_counter() - start) * 1e6 / steps
        return elapsed, elapsed
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    for _ in range(steps):
        data.run(case.step)
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / steps, host * 1e6 / steps


def made(cases: list[Case], data: Data, clocks: dict[str, Any]) -> list[results.Record]:
    """A record of each case; times of ways beside those of one GPU."""
    size, ranks = data.size, dist.get_world_size()
    alone = {c.variant: statistics.median(c.times) for c in cases if c.way == Alone.name and c.times}
    records = []
    for case in cases:
        gpus = 1 if case.way == Alone.name else ranks
        record: results.Record = {
            "bench": "distributed",
            "problem": f"{size.name}, {size.layers} layers, {size.tokens} tokens a GPU",
            "race": case.way,
            "variant": case.variant,
            "role": VARIANTS[case.variant].role,
            "dtype": case.dtype,
            "model": size.name,
            "layers": size.layers,
            "gpus": gpus,
            "tokens": gpus * size.tokens,
            "d_model": size.d_model,
            "d_ff": size.d_ff,
            "zeros": round(data.zeros, 4),
            "pattern": "iid",
            "verified": case.error is None,
            "median_us": None,
        }
        record |= {"error": case.error} if case.error else {}
        record |= {k: float(f"{v:.3e}") if k.endswith("error") else v for k, v in case.facts.items()}
        if case.times and not case.error:
            median = statistics.median(case.times)
            spread = statistics.quantiles(case.times, n=4) if len(case.times) > 1 else [median] * 3
            record |= {"median_us": round(median, 1), "iqr_us": round(spread[2] - spread[0], 1)}
            record |= {"min_us": round(min(case.times), 1), "rounds": len(case.host)}
            record |= {"host_us": round(statistics.median(case.host), 1)}
            record |= {"tokens_per_s": round(record["tokens"] / median * 1e6, 1), **clocks}
            if case.way != Alone.name:
                one = alone[case.variant]
                record |= {"one_gpu_us": round(one, 1), "scaling": round(one / median, 4)}
        records.append(record)
    results.add_comparisons(records)
    gains = {r["variant"]: r["speedup_vs_best_dense"] for r in records if _compared(r) and r["race"] == Alone.name}
    for record in records:
        if _compared(record) and record["race"] != Alone.name and record["variant"] in gains:
            record["gain_kept"] = round(record["speedup_vs_best_dense"] / gains[record["variant"]], 4)
    return records


def _compared(record: results.Record) -> bool:
    return "speedup_vs_best_dense" in record


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
