"""One training run of train_gpt: the loop, its verification, and what is looked at on the way."""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sparse24
from bench.training.corpus import Corpus
from bench.training.log import Log, Record, Run, Settings
from bench.training.weights import WEIGHTS, PrunedRun
from sparse24.bench import reference
from sparse24.bench.ffn.training_baselines import mlp_float8, quantize
from sparse24.bench.reference import FP8
from sparse24.demo.model import GPT, DenseMLP, learning_rate_at

#: What an ablation changes of the default recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "no_mask_reuse": {"reuse_mask": False},
    "no_permutation": {"permute_tokens": False},
    "no_split": {"dense_features": 0.0},
    "large_split": {"dense_features": 0.05},
    "dense_dw": {"weight_gradients": "dense"},
    "no_warmup": {},
} | {name: way.recipe for name, way in WEIGHTS.items()}
#: Tokens whose FFN outputs are verified, and whose activations are described.
SAMPLE_TOKENS = 8192
#: Logged intervals between two looks at held-out text and at the activations.
LOOK_EVERY = 5
#: Windows of held-out text for a point of the curve; the loss at the end takes all.
CURVE_WINDOWS = 64
# The compiled and the eager step round differently; a wrong graph does not come this close.
COMPILED_TOLERANCE = 5e-3
STATISTICS = (
    "zeros",
    "feature_nonzeros_dropped",
    "feature_energy_dropped",
    "output_error",
    "token_nonzeros_dropped",
    "token_energy_dropped",
    "features_never_active",
)


def train(
    run: Run, settings: Settings, corpus: Corpus, device: torch.device, deadline: float, facts: Record, path: Path
) -> Record:
    """Train one model, writing its record to `path` after each interval; returns the record."""
    gc.collect()
    model = build(run, settings, corpus.vocabulary).to(device)
    if settings.compile:
        model.compile()
    way = WEIGHTS.get(run.recipe) if run.ffn == "sparse" else None
    warmup = 0 if run.recipe == "no_warmup" else min(settings.warmup, settings.steps)
    schedule = way.schedule(settings.steps) if way else sparse24.Schedule(settings.steps, dense_warmup_steps=warmup)
    first = schedule_start(schedule, settings.steps) if run.ffn == "sparse" else 0
    tokens = corpus.train.to(device)
    batches = windows_of(tokens, settings, run.seed)
    held_out = corpus.held_out.to(device).unfold(0, settings.size.sequence + 1, settings.size.sequence + 1)
    optimizer = model.optimizer(settings.learning_rate)
    log = Log(run, settings, device, facts, path)
    log.record["first_sparse_step"] = first if run.ffn == "sparse" else None
    weights = PrunedRun(model, way, optimizer, settings.steps, log.record) if way else None

    for step in range(settings.steps):
        sparse = run.ffn == "sparse" and schedule.is_sparse(step)
        if run.ffn == "sparse":
            schedule.apply(model, step)
        if weights:
            weights.before(step)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_at(step, settings.steps)
        windows = next(batches)
        if step == first:
            log.pause()
            log.verified(lambda windows=windows, sparse=sparse: verify(model, windows, sparse, run.precision))
        loss = model(windows)
        if step == first and "error" not in log.record:
            log.verified(lambda loss=loss, windows=windows: verify_compiled(model, windows, loss))
        if "error" in log.record:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if weights:
            weights.decay()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.step(step, loss.detach(), sparse)

        last = step + 1 == settings.steps
        if (step + 1) % settings.every and not last:
            continue
        log.interval()
        if not math.isfinite(log.record["loss"][-1][1]):
            log.record["diverged"] = True
            break
        if last or (step + 1) % (LOOK_EVERY * settings.every) == 0:
            look(model, held_out[:CURVE_WINDOWS], step + 1, log.record)
            if weights:
                weights.look(step + 1)
        if last:
            finish(model, held_out, log.record)
        log.write()
        if time.perf_counter() > deadline and not last:
            return log.record
    log.record["complete"] = "error" not in log.record
    log.write()
    return log.record


def build(run: Run, settings: Settings, vocabulary: int) -> GPT:
    fp8 = run.precision == "fp8"
    if run.ffn == "sparse":
        make = sparse_mlp(sparse24.Recipe(**RECIPES[run.recipe], fp8_weight_gradients=fp8), run.precision)
    else:
        make = DenseFloat8MLP if fp8 else DenseMLP
    return GPT(settings.size, vocabulary, make, run.seed)


def sparse_mlp(recipe: sparse24.Recipe, precision: str) -> Callable[[int, int], nn.Module]:
    """Makes the FFNs of a sparse run: sparse for few tokens too, which is what is to be verified and evaluated."""
    options = {"recipe": recipe, "min_tokens": 0, "precision": "fp8" if precision == "fp8" else "16bit"}
    return lambda dim, hidden: sparse24.nn.ReLU2MLP(dim, hidden, **options)


class DenseFloat8MLP(DenseMLP):
    """The dense rival with all six products in float8, for torch.compile."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the FFN."""
        w1, w2 = self.up_proj.weight.to(x.dtype), self.down_proj.weight.to(x.dtype)
        return mlp_float8(x.flatten(0, -2), w1, w2).view_as(x)


def schedule_start(schedule: sparse24.Schedule, steps: int) -> int:
    """The first sparse step; `steps` if there is none."""
    return next((step for step in range(steps) if schedule.is_sparse(step)), steps)


def windows_of(tokens: torch.Tensor, settings: Settings, seed: int) -> Iterator[torch.Tensor]:
    """Batches [B, S + 1] without end: each epoch takes every window once, in an order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    length = settings.size.sequence
    count = (tokens.numel() - 1) // length
    order = torch.empty(0, dtype=torch.int64)
    offsets = torch.arange(length + 1, device=tokens.device)
    while True:
        while order.numel() < settings.batch:
            order = torch.cat((order, torch.randperm(count, generator=generator)))
        starts, order = order[: settings.batch] * length, order[settings.batch :]
        yield tokens[starts.to(tokens.device)[:, None] + offsets]


def verify(model: GPT, windows: torch.Tensor, sparse: bool, precision: str) -> Record:
    """Each FFN against float64, pruned to 2:4 where it is sparse: at most twice the error of torch's precision."""
    rounded = as_float8 if precision == "fp8" else lambda operand: operand
    errors, rivals, pruning = [], [], []
    for block, x in zip(model.blocks, model.ffn_inputs(windows), strict=True):
        x = x[:SAMPLE_TOKENS]
        # With gradients: the forward of training, which saves what its backward needs.
        out = block.mlp(x.clone().requires_grad_()).detach()
        w1, w2 = weights_of(block.mlp, model.dtype)
        y = F.relu(F.linear(rounded(x), rounded(w1))).square()
        exact_y = (x.double() @ w1.double().t()).relu_().square_()
        dense = reference.product(exact_y, w2.t())
        if sparse:
            y, exact_y = reference.prune24(y, -1), reference.prune24(exact_y, -1)
        exact = reference.product(exact_y, w2.t())
        rivals.append(reference.relative_error(F.linear(rounded(y), rounded(w2)), exact))
        pruning.append(reference.relative_error(exact, dense))
        errors.append(reference.expect_error(out, exact, 2 * rivals[-1] + reference.ABSOLUTE_SLACK))
    return {"ffn_error": errors, "ffn_error_of_torch": rivals, "pruning_error": pruning}


def weights_of(mlp: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights that a step multiplies."""
    if isinstance(mlp, sparse24.nn.ReLU2MLP):
        w1, w2 = mlp.entering_weights()
    else:
        w1, w2 = mlp.up_proj.weight, mlp.down_proj.weight
    return w1.detach().to(dtype), w2.detach().to(dtype)


def as_float8(x: torch.Tensor) -> torch.Tensor:
    """What is left of a matrix in e4m3 with one scale."""
    codes, scale = quantize(x, FP8)
    return (codes.float() * scale).to(x.dtype)


def verify_compiled(model: GPT, windows: torch.Tensor, loss: torch.Tensor) -> Record:
    """The step's loss against that of the modules as they are."""
    eager = model.evaluate(windows, 8)
    difference = abs(loss.item() - eager) / eager
    if not difference <= COMPILED_TOLERANCE:
        raise reference.Unverified(f"expected a loss of {eager:.5f} as without compiling, got {loss.item():.5f}")
    return {"compiled_loss_difference": difference}


@torch.no_grad()
def look(model: GPT, held_out: torch.Tensor, step: int, record: Record) -> None:
    """A point of the held-out curve, and what the activations of each layer look like."""
    record["held_out"].append([step, model.evaluate(held_out, 8)])
    count = max(1, SAMPLE_TOKENS // model.size.sequence)
    inputs = model.ffn_inputs(held_out[:count])
    recipe = sparse24.Recipe(**RECIPES[record["recipe"] or "default"])
    columns: dict[str, list[float]] = defaultdict(list)
    for block, x in zip(model.blocks, inputs, strict=True):
        w1, w2 = weights_of(block.mlp, model.dtype)
        y1 = F.linear(x, w1)
        layer = sparse24.activation_stats(y1, w2)
        values = {name: getattr(layer, name) for name in STATISTICS} | dropped_along_tokens(y1, recipe)
        for name, value in values.items():
            columns[name].append(float(f"{value:.4g}"))
    record["activations"].append({"step": step} | columns)


def dropped_along_tokens(y1: torch.Tensor, recipe: sparse24.Recipe) -> Record:
    """What the weight gradients of `recipe` drop of the 2:4 activation; dense runs are judged by the default recipe."""
    y = reference.prune24(reference.relu2(y1), -1)
    tokens, features = y.shape
    if recipe.weight_gradients == "dense":
        return {"recipe_token_nonzeros_dropped": 0.0, "recipe_token_energy_dropped": 0.0}
    rest = y.clone()
    rest[:, y.count_nonzero(0).argsort(descending=True)[: recipe.hot_features(features)]] = 0
    if recipe.permute_tokens:  # groups of tokens that are a quarter apart
        rest = rest.view(4, tokens // 4, features).transpose(0, 1).reshape(tokens, features)
    lost = rest - reference.prune24(rest, -2)
    return {
        "recipe_token_nonzeros_dropped": lost.count_nonzero().item() / max(1, y.count_nonzero().item()),
        "recipe_token_energy_dropped": (lost.double().square().sum() / y.double().square().sum()).item(),
    }


@torch.no_grad()
def finish(model: GPT, held_out: torch.Tensor, record: Record) -> None:
    """The loss that the table compares; of a sparse model also with its FFNs run sparse, and dense."""
    record["held_out_loss"] = model.evaluate(held_out, 8)
    if record["ffn"] == "sparse":
        for name, sparse in (("sparse", True), ("dense", False)):
            for block in model.blocks:
                block.mlp.sparse = sparse
            record[f"held_out_loss_run_{name}"] = model.evaluate(held_out, 8)
