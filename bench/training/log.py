"""What a training run of train_gpt is, and its record."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse24.demo.model import Size

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What distinguishes the runs of one call."""

    ffn: str
    recipe: str
    seed: int
    precision: str = "bf16"

    @property
    def variant(self) -> str:
        name = f"sparse_{self.recipe}" if self.ffn == "sparse" else "dense"
        return name if self.precision == "bf16" else f"{name}_{self.precision}"

    @property
    def name(self) -> str:
        return f"{self.variant}_seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the runs of one call share. `every`: steps per logged interval."""

    size: Size
    steps: int
    batch: int
    warmup: int
    learning_rate: float
    compile: bool
    held_out_windows: int
    every: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Log:
    """Collects the record of a run; times and memory are of training steps alone."""

    def __init__(self, run: Run, settings: Settings, device: torch.device, facts: Record, path: Path) -> None:
        self.settings, self.device, self.path = settings, device, path
        self.losses: list[torch.Tensor] = []
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.phases: set[str] = set()
        self.seconds = 0.0
        self.record: Record = {
            "bench": "train_gpt",
            "variant": run.variant,
            "ffn": run.ffn,
            "recipe": run.recipe,
            "precision": run.precision,
            "seed": run.seed,
            "complete": False,
            "verified": False,
            "steps": 0,
            "tokens": 0,
            "held_out_loss": None,
            "tokens_per_s": {},
            "peak_bytes": {},
            "loss": [],
            "held_out": [],
            "activations": [],
            **facts,
        }
        self.begin()

    def begin(self) -> None:
        """Start an interval."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.phases = set()
        self.started = time.perf_counter()

    def pause(self) -> None:
        """What follows in this interval is not only training: it gives no rate."""
        self.phases.add("verification")

    def verified(self, check: Callable[[], Record]) -> None:
        """Add the facts that `check` returns, or the error that it raises."""
        try:
            self.record |= check()
            self.record["verified"] = True
        except Exception as error:
            self.record["verified"] = False
            self.record["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]

    def step(self, step: int, loss: torch.Tensor, sparse: bool) -> None:
        self.losses.append(loss)
        self.phases.add("sparse" if sparse else "dense")
        self.record["steps"] = step + 1
        self.record["tokens"] = (step + 1) * self.settings.batch * self.settings.size.sequence

    def interval(self) -> None:
        """Close an interval: its mean loss, and its rate and peak memory if it was all of one kind."""
        mean = torch.stack(self.losses).double().mean().item()  # waits for the device
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        count = len(self.losses)
        self.losses.clear()
        self.record["loss"].append([self.record["steps"], round(mean, 5), round(self.seconds, 2)])
        if len(self.phases) == 1:
            (phase,) = self.phases
            self.rates[phase].append(count * self.settings.batch * self.settings.size.sequence / seconds)
            # Compiling makes the first interval of a phase slow: the median does not see it.
            self.record["tokens_per_s"][phase] = round(statistics.median(self.rates[phase]))
            if self.device.type == "cuda":
                peak = max(torch.cuda.max_memory_allocated(), self.record["peak_bytes"].get(phase, 0))
                self.record["peak_bytes"][phase] = peak
        print(f"  step {self.record['steps']:>5}  loss {mean:.4f}  {self.seconds:6.1f} s", flush=True)
        self.begin()

    def write(self) -> None:
        """Whole files only: a process that is stopped while it writes leaves the last one."""
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.record) + "\n")
        partial.replace(self.path)
        self.begin()
