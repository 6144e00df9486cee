"""How the demo trains its model."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse24.demo.data import random_windows
from sparse24.demo.model import GPT, learning_rate_at


@dataclass(frozen=True)
class TrainConfig:
    """Schedule of AdamW."""

    steps: int = 400
    batch: int = 4
    learning_rate: float = 3e-3


def train(model: GPT, data: Tensor, config: TrainConfig, seed: int, seconds: float) -> Iterator[float]:
    """Train dense, yielding the loss of each step; stops early after `seconds`, but not before a step.

    The batches depend on the seed only.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = model.optimizer(config.learning_rate)
    start = time.monotonic()
    for step in range(config.steps):
        if step > 0 and time.monotonic() - start > seconds:
            return
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_at(step, config.steps)
        windows = random_windows(data, config.batch, model.size.sequence + 1, generator).to(device)
        loss = model(windows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(loss.detach())
