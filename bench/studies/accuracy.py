"""What fp8 and 2:4 cost in accuracy: errors of the FFN outputs of the model that `python -m sparse24 demo` trains.

    python -m bench accuracy --out bench/results/accuracy.json
    python -m bench accuracy --checkpoint demo.pt           # trains and saves; the next call loads

Every FFN gets what the dense float32 model feeds it on held-out text, and its output is compared with the dense
float32 FFN: ``|out - reference| / |reference|`` (Frobenius norms, all tokens). Variants:

* `pruning alone`: 2:4 in float32; `dense bf16`, `2:4 bf16`
* `dense fp8 row-wise`, `dense fp8 tensor-wise`: x, the weights and the activation with exact scales, in plain torch
* `2:4 fp8 row`: relu2_mlp with the exact scale of each token, composed (one rounding to float8) and fused (to bf16
  before); `delayed`: one scale, from the largest activation of the batch before; `static`: one scale, from training
  text; `predicted`: per token, a factor from training text times |x_row|^2; `bound`: the factor with which nothing can
  saturate, from the weights alone; `x 2`: twice that scale

The static scale and the factor are the smallest that saturated nothing of the training text. What saturates elsewhere,
and what is so small that it becomes zero, is counted. With an exact scale the largest value of a row is 448 and not
rounded at all, and in a row of squares it has a quarter to half of the energy: no given scale does that.

An fp8 error is judged by those of dense fp8 row-wise and of pruning alone: together they are at most their sum, and the
root of the sum of their squares where they are independent. Exit status 1: some error is above SLACK times the sum.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse24
from sparse24.bench import environment, results
from sparse24.bench.ffn import baselines
from sparse24.bench.reference import FP8_MAX, prune24, relative_error, relu2
from sparse24.demo.data import Corpus, even_windows, read_corpus
from sparse24.demo.model import BYTES, GPT, SMALL, DenseMLP
from sparse24.demo.training import TrainConfig, train
from sparse24.mlp import up_projection

DENSE, PRUNED = "dense fp8 row-wise", "pruning alone"
# How much above dense fp8 and pruning together an fp8 error may be.
SLACK = 1.05
BATCHES = 4
WINDOWS, SMOKE_WINDOWS = 8, 1  # of one batch
MARGINS = (1, 2)


@dataclass
class Statistics:
    """Of the values that a given scale made: kept non-zeros, those beyond 448, those that became zero."""

    nonzeros: int = 0
    saturated: int = 0
    underflowed: int = 0


class Layer:
    """One FFN with its weights in every precision, and the scales that calibration gives its activation."""

    def __init__(self, w1: Tensor, w2: Tensor, calibration: list[Tensor]) -> None:
        self.float32 = w1, w2
        self.bf16 = w1.bfloat16(), w2.bfloat16()
        (self.q1, self.s1), (self.q2, self.s2) = (sparse24.quantize_fp8(w) for w in self.bf16)
        self.tensor_wise = [t for w in self.bf16 for t in baselines.quantize(w, per_row=False)]
        amax, factors = zip(*(self._observe(x) for x in calibration), strict=True)
        self.amax = torch.stack(amax)
        self.factor = torch.stack(factors).amax().reshape(1)
        self.bound = sparse24.bounding_factor(self.q1, self.s1)

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The largest activation of a batch, and the factor of |x_row|^2 that saturates none of it."""
        y = relu2(up_projection(x, self.q1, fp8=True, w1_scale=self.s1)).amax(dim=1, keepdim=True)
        *_, square = sparse24.quantize_fp8_predict(x, torch.ones(1, device=x.device))
        return y.amax(), (y / FP8_MAX / square).amax()

    def reference(self, x: Tensor) -> Tensor:
        w1, w2 = self.float32
        return relu2(x @ w1.t()) @ w2.t()

    def pruned(self, x: Tensor) -> Tensor:
        w1, w2 = self.float32
        return prune24(relu2(x @ w1.t()), -1) @ w2.t()

    def sparse_fp8(self, x: Tensor, scale_y: Tensor | None, fused: bool = True) -> Tensor:
        scales = {"w1_scale": self.s1, "w2_scale": self.s2, "scale_y": scale_y}
        return sparse24.relu2_mlp(x, self.q1, self.q2, precision="fp8", min_tokens=0, fused=fused, **scales)

    def scales(self, batches: list[Tensor]) -> dict[str, list[Tensor]]:
        """The ways to give the activation a scale, each with one for every batch."""
        static = self.amax.amax().reshape(1) / FP8_MAX
        amax = [self.amax[-1:], *(self._first(x, static)[3] for x in batches[:-1])]
        return {
            "delayed": [before / FP8_MAX for before in amax],
            "static": [static] * len(batches),
            "predicted": [sparse24.quantize_fp8_predict(x, self.factor)[2] for x in batches],
            "bound": [sparse24.quantize_fp8_predict(x, self.bound)[2] for x in batches],
        }

    def count(self, x: Tensor, scale_y: Tensor, into: Statistics) -> None:
        values, meta, _, _, saturated = self._first(x, scale_y)
        y = relu2(up_projection(x, self.q1, fp8=True, w1_scale=self.s1))
        places = sparse24.decompress(torch.ones_like(values.float()).to(values.dtype), meta, *y.shape).float()
        nonzeros = int(torch.count_nonzero(y * places))
        into.nonzeros += nonzeros
        into.saturated += int(saturated)
        into.underflowed += nonzeros - int(torch.count_nonzero(values.float()))

    def _first(self, x: Tensor, scale_y: Tensor) -> tuple[Tensor, ...]:
        q, scale_x = sparse24.quantize_fp8(x)
        return sparse24.linear_compress(q, self.q1, scale_x, self.s1, None, scale_y)


def measure(layer: Layer, batches: list[Tensor]) -> dict[str, tuple[float, Statistics | None]]:
    """The error of every variant over all batches, by name, and what a given scale did."""
    w1, w2 = layer.bf16
    rows = (layer.q1, layer.s1, layer.q2, layer.s2)
    expected = torch.cat([layer.reference(x) for x in batches]).double()
    inputs = [x.bfloat16() for x in batches]

    def error(outputs: list[Tensor]) -> float:
        return relative_error(torch.cat(outputs), expected)

    results: dict[str, tuple[float, Statistics | None]] = {
        PRUNED: (error([layer.pruned(x) for x in batches]), None),
        "dense bf16": (error([baselines.mlp(x, w1, w2) for x in inputs]), None),
        "2:4 bf16": (error([sparse24.relu2_mlp(x, w1, w2, min_tokens=0) for x in inputs]), None),
        DENSE: (error([baselines.mlp_fp8_rows(x, *rows) for x in inputs]), None),
        "dense fp8 tensor-wise": (error([baselines.mlp_fp8_tensor(x, *layer.tensor_wise) for x in inputs]), None),
        "2:4 fp8 row, composed": (error([layer.sparse_fp8(x, None, fused=False) for x in inputs]), None),
        "2:4 fp8 row, fused": (error([layer.sparse_fp8(x, None) for x in inputs]), None),
    }
    for name, scales in layer.scales(inputs).items():
        for margin in MARGINS:
            outputs, statistics = [], Statistics()
            for x, scale in zip(inputs, scales, strict=True):
                outputs.append(layer.sparse_fp8(x, margin * scale))
                layer.count(x, margin * scale, statistics)
            results[f"2:4 fp8 {name}" + (f" x {margin}" if margin > 1 else "")] = error(outputs), statistics
    return results


def judged(results: dict[str, tuple[float, Statistics | None]], size: dict, header: dict) -> list[results.Record]:
    """Records of one layer; sparse fp8 with its error over dense fp8 and pruning, added up in both ways."""
    dense, pruned = results[DENSE][0], results[PRUNED][0]
    records = []
    for name, (error, statistics) in results.items():
        record = {"bench": "accuracy", "variant": name, **size, "rel_error": error}
        if name.startswith("2:4 fp8"):
            record["over_sum"] = error / (dense + pruned)
            record["over_root_of_squares"] = error / math.hypot(dense, pruned)
            record["within_sum"] = record["over_sum"] <= SLACK
            record["within_root_of_squares"] = record["over_root_of_squares"] <= SLACK
        records.append(record | (vars(statistics) if statistics else {}) | header)
    return records


def text(records: list[results.Record]) -> str:
    """One line per variant: errors in % of every layer, then the largest ratios and what the scales did."""
    layers = sorted({r["layer"] for r in records})
    zeros = {r["layer"]: f"{100 * r['zeros']:.1f}" for r in records}
    lines = [f"{'error of the output in %, layer':<34}" + "".join(f"{i:>8}" for i in layers) + "   over sum, root"]
    lines.append(f"{'zeros in %':<34}" + "".join(f"{zeros[i]:>8}" for i in layers))
    for name in dict.fromkeys(r["variant"] for r in records):
        mine = [r for r in records if r["variant"] == name]
        line = f"{name:<34}" + "".join(f"{100 * r['rel_error']:>8.3f}" for r in mine)
        if "over_sum" in mine[0]:
            ratios = [max(r[key] for r in mine) for key in ("over_sum", "over_root_of_squares")]
            line += "   " + ", ".join(f"{ratio:.3f}{'' if ratio <= SLACK else ' (more)'}" for ratio in ratios)
        if "nonzeros" in mine[0]:
            total, high, low = (sum(r[key] for r in mine) for key in ("nonzeros", "saturated", "underflowed"))
            line += f"; of {total:,} saturated {high:,}, zero {low:,}"
        lines.append(line)
    return "\n".join(lines)


def trained(args: argparse.Namespace, data: Tensor, device: torch.device) -> tuple[GPT, int]:
    """The demo's model: the same seed, batches and thread count; and its number of steps."""
    model = GPT(SMALL, BYTES, DenseMLP, args.seed, torch.float32).to(device)
    if args.checkpoint and args.checkpoint.exists():
        stored = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(stored["model"])
        return model.eval(), stored["steps"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = list(train(model, data, TrainConfig(steps=args.steps), args.seed, seconds=math.inf))
    torch.set_num_threads(threads)
    print(f"trained {len(losses)} steps, last loss {losses[-1]:.3f}", flush=True)
    if args.checkpoint:
        torch.save({"model": model.state_dict(), "steps": len(losses)}, args.checkpoint)
    return model.eval(), len(losses)


def inputs(model: GPT, data: Tensor, count: int, device: torch.device) -> list[list[Tensor]]:
    """What the FFN of each layer gets, by layer and batch of `count` windows: [tokens, D] in float32."""
    windows = even_windows(data, BATCHES * count, model.size.sequence + 1).to(device)
    batches = [model.ffn_inputs(some) for some in windows.split(count)]
    return [list(layer) for layer in zip(*batches, strict=True)]


class Subject(NamedTuple):
    """What a study of the demo's model is about."""

    args: argparse.Namespace
    device: torch.device
    facts: dict[str, Any]  # of every record
    corpus: Corpus
    model: GPT


def subject(description: str | None, argv: list[str] | None) -> Subject:
    """Read the options of a study, and train the demo's model or read it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the records")
    parser.add_argument("--checkpoint", type=Path, help="the trained model; made where it does not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--smoke", action="store_true", help="three steps, little text: checks the code path")
    args = parser.parse_args(argv)
    args.steps = 3 if args.smoke else args.steps
    device = torch.device(args.device)
    facts = environment.facts(device) | {"seed": args.seed}
    corpus = read_corpus((), args.seed, SMALL.sequence + 1)
    model, facts["steps"] = trained(args, corpus.train, device)
    return Subject(args, device, facts, corpus, model)


def main(argv: list[str] | None = None) -> int:
    args, device, header, corpus, model = subject(__doc__, argv)

    records = []
    with torch.no_grad():
        count = SMOKE_WINDOWS if args.smoke else WINDOWS
        calibration, held_out = (inputs(model, part, count, device) for part in (corpus.train, corpus.held_out))
        for index, (block, seen, batches) in enumerate(zip(model.blocks, calibration, held_out, strict=True)):
            w1, w2 = block.mlp.up_proj.weight, block.mlp.down_proj.weight
            layer = Layer(w1, w2, [x.bfloat16() for x in seen])
            active = sum(int((F.linear(x, w1) > 0).sum()) for x in batches)
            tokens = sum(x.shape[0] for x in batches)
            size = {"layer": index, "tokens": tokens, "d_model": w1.shape[1], "d_ff": w1.shape[0]}
            size["zeros"] = round(1 - active / (tokens * w1.shape[0]), 4)
            records += judged(measure(layer, batches), size, header)
    print(text(records))
    if args.out:
        results.write_json(args.out, records)
    return 0 if all(r["within_sum"] for r in records if "within_sum" in r) else 1
