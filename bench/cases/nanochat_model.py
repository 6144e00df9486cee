"""nanochat's own GPT, from a checkout that is given by path, with weights whose activations have a share of zeros.

Nothing of a checkout is changed or copied: its modules are imported, and used as its scripts/base_train.py uses them.
They need torch and filelock, which torch brings; its attention is torch's where the package kernels, or what that
downloads, is not there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sparse24.bench import inputs

HEAD = 128
#: What its script converts to float8: no side is smaller, and all are multiples of 16.
SMALLEST_FP8 = 128
#: How large what a network adds is beside the entries of the residual stream.
ADDED = 0.5


class Checkout(NamedTuple):
    """Modules of nanochat."""

    gpt: ModuleType
    fp8: ModuleType


class Size(NamedTuple):
    """A GPT, and `batch` sequences of `length` tokens."""

    width: int
    layers: int
    batch: int = 16
    length: int = 2048
    vocabulary: int = 32768
    head: int = HEAD

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def load(path: Path) -> Checkout:
    """Import nanochat from a checkout, in place of another one that was imported before."""
    package = (path / "nanochat").resolve()
    known = sys.modules.get("nanochat")
    if known is None or Path(known.__file__ or "").resolve().parent != package:
        for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
            del sys.modules[name]
    os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16")  # what it finds on a GPU by itself
    sys.path.insert(0, str(package.parent))
    try:
        with _logging_untouched():
            return Checkout(*(importlib.import_module(f"nanochat.{name}") for name in Checkout._fields))
    finally:
        sys.path.remove(str(package.parent))


@contextlib.contextmanager
def _logging_untouched() -> Iterator[None]:
    """nanochat sets the root logger up when it is imported."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])


def build(checkout: Checkout, size: Size, device: torch.device, seed: int) -> nn.Module:
    """The model as its script makes it: on the meta device, then memory, then its own initialisation."""
    torch.manual_seed(seed)
    heads = size.width // size.head
    config = checkout.gpt.GPTConfig(
        sequence_len=size.length,
        vocab_size=size.vocabulary,
        n_layer=size.layers,
        n_head=heads,
        n_kv_head=heads,
        n_embd=size.width,
        window_pattern="L",  # as it advises where the attention is torch's
    )
    with torch.device("meta"):
        model = checkout.gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Its own optimizer at a learning rate of 0: all of its work, and the same weights after it."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.setup_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def use_fp8(checkout: Checkout, model: nn.Module, but: str | None = None) -> None:
    """Its float8 layers where its script has them, less those whose name has `but` in it."""

    def fits(module: nn.Module, name: str) -> bool:
        sides = module.in_features, module.out_features
        if but and but in name:
            return False
        return min(sides) >= SMALLEST_FP8 and not any(side % 16 for side in sides)

    checkout.fp8.convert_to_float8_training(model, module_filter_fn=fits)


@torch.no_grad()
def give_zeros(model: nn.Module, ids: torch.Tensor, zeros: float, seed: int) -> float:
    """Weights as training makes them in what matters here; returns the share of zeros in the activations.

    At its initialisation half of each activation is zero, and what networks and attention add is zero. Here the
    embeddings get a mean, and the first weights of each network a negative shift along the direction that its tokens
    share; the second weights, those of the attention's output and of the head are random.
    """
    gen = inputs.generator(ids.device, seed)
    shares: list[float] = []

    def normal(weight: nn.Parameter) -> None:
        weight.normal_(0, weight.shape[1] ** -0.5, generator=gen)

    def calibrate(network: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        tokens = args[0].flatten(0, -2)
        sample = tokens[:: max(1, len(tokens) // 256)].float()
        shared = F.normalize(sample.mean(0), dim=0)
        up, down = network.c_fc.weight, network.c_proj.weight
        up.sub_(torch.outer(up @ shared, shared))
        pre = sample @ up.t()
        up.div_(pre.std())
        # relu(h - s u) is zero where h / u < s, for what a token has of the shared direction, u.
        ratio = (pre / pre.std() / (sample @ shared)[:, None]).flatten()
        up.sub_(ratio.kthvalue(max(1, int(zeros * ratio.numel()))).values * shared)
        normal(down)
        down.mul_(ADDED / F.linear(F.relu(sample @ up.t()).square(), down).std())
        shares.append(inputs.zero_share(F.linear(tokens, up.to(tokens.dtype))))

    model.transformer.wte.weight.add_(1)
    normal(model.lm_head.weight)
    for block in model.transformer.h:
        normal(block.attn.c_proj.weight)
    handles = [block.mlp.register_forward_pre_hook(calibrate) for block in model.transformer.h]
    model(ids)
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares)
