"""Runs with 2:4 weights: the recipe that is recommended, and what each part of it is worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import sparse24
from bench.training.log import Record
from sparse24.demo.model import GPT

BOTH = {"sparse_weights": "both"}


@dataclass(frozen=True)
class Way:
    """How a run trains its weights: a recipe, the options of `sparse24.WeightPruning`, phases, and adapters."""

    recipe: dict[str, Any] = field(default_factory=lambda: BOTH)
    pruning: dict[str, Any] = field(default_factory=dict)
    #: Parts of the steps that are dense.
    start: float = 0.1
    end: float = 0.2
    #: Rank of the adapters that the last tenth of the steps has.
    adapters: int = 0

    def schedule(self, steps: int) -> sparse24.Schedule:
        """Which steps are sparse."""
        start, end = (round(part * steps) for part in (self.start, self.end))
        return sparse24.Schedule(steps, dense_warmup_steps=start, dense_final_steps=end)


#: The first is what is recommended. Names of those that follow say what differs.
WEIGHTS = {
    "weights": Way(),
    "weights_half": Way(start=1 / 3, end=1 / 6),
    "weights_soft": Way(pruning={"soft": True}),
    "weights_no_end": Way(end=0),
    "weights_no_warmup": Way(start=0),
    "weights_static": Way(pruning={"refresh_steps": 0}),
    "weights_adapters": Way(end=0, adapters=48),
    "weights_up": Way(recipe={"sparse_weights": "up"}),
    "weights_unsettled": Way(pruning={"settle": False}),
    # FST: masks stay for 40 steps, and what is pruned decays.
    "weights_decay": Way(pruning={"refresh_steps": 40, "decay": 6e-5}),
    # SLoPe, without its adapters: static masks, and the doubly pruned backward pass.
    "weights_slope": Way(recipe=BOTH | {"double_pruning": True}, pruning={"refresh_steps": 0}, end=0),
    "weights_soft_no_end": Way(pruning={"soft": True}, end=0),
}


class PrunedRun:
    """What such a run does beside the others."""

    def __init__(self, model: GPT, way: Way, optimizer: torch.optim.Optimizer, steps: int, record: Record) -> None:
        self.model, self.way, self.optimizer, self.record = model, way, optimizer, record
        self.pruning = sparse24.WeightPruning(model, **way.pruning)
        self.with_adapters = steps - max(1, steps // 10)
        record["flip_rate"] = []

    def before(self, step: int) -> None:
        """Before a step, behind the schedule."""
        self.pruning.step()
        if not self.way.adapters or step != self.with_adapters:
            return
        added = []
        for block in self.model.blocks:
            block.mlp.add_adapters_(self.way.adapters)
            added += [block.mlp.up_left, block.mlp.up_right]
        self.optimizer.add_param_group({"params": added, "weight_decay": 0.0})
        self.record["adapters_from_step"] = step

    def decay(self) -> None:
        """Between the gradients and the optimizer."""
        rate = self.optimizer.param_groups[0]["lr"]
        self.pruning.decay_(rate)

    def look(self, step: int) -> None:
        """Note the steps that were sparse, and how many entries are pruned that were not at the last look."""
        self.record["sparse_steps"] = self.pruning.steps
        self.record["flip_rate"].append([step, self.pruning.flip_rate()])
