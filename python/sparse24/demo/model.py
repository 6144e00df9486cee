"""A small byte-level transformer with squared-ReLU FFNs, and its training."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24.demo.data import random_windows
from sparse24.nn import ReLU2MLP

#: How a block runs its FFN: (module, x [B, S, D]) -> [B, S, D].
FFN = Callable[[ReLU2MLP, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes that learn something in a minute on one core."""

    layers: int = 4
    dim: int = 128
    hidden: int = 512
    heads: int = 4
    window: int = 256
    vocabulary: int = 256


@dataclass(frozen=True)
class TrainConfig:
    """Schedule of AdamW."""

    steps: int = 600
    batch: int = 4
    learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.1


def dense_ffn(mlp: ReLU2MLP, x: Tensor) -> Tensor:
    """Plain torch: what the model is trained with."""
    return mlp.down_proj(torch.relu(mlp.up_proj(x)).square())


class Block(nn.Module):
    """Pre-norm attention and FFN, each added to the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.RMSNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_mlp = nn.RMSNorm(config.dim)
        self.mlp = ReLU2MLP(config.dim, config.hidden)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ffn: FFN) -> Tensor:
        """Update the residual stream x [B, S, D]."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, is_causal=True)
        x = x + self.project(attention.transpose(1, 2).flatten(2))
        return x + ffn(self.mlp, self.norm_mlp(x))


class Transformer(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # Residual branches start small, so that depth does not change the scale of the stream.
        for block in self.blocks:
            for linear in (block.project, block.mlp.down_proj):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, tokens: Tensor, ffn: FFN = dense_ffn) -> Tensor:
        """Compute logits [B, S, vocabulary] of tokens [B, S]; `ffn` runs the FFN of every block."""
        x = self.embedding(tokens)
        rotation = _rotation(tokens.shape[1], self.config.dim // self.config.heads, x.device)
        for block in self.blocks:
            x = block(x, rotation, ffn)
        return self.head(self.norm(x))

    def loss(self, windows: Tensor, ffn: FFN = dense_ffn) -> Tensor:
        """Mean cross entropy of each byte after the first, in nats."""
        logits = self(windows[:, :-1], ffn)
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train(model: Transformer, data: Tensor, config: TrainConfig, seed: int, seconds: float) -> Iterator[float]:
    """Train dense, yielding the loss of each step; stops early after `seconds`, but not before a step.

    The batches depend on the seed only.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    start = time.monotonic()
    for step in range(config.steps):
        if step > 0 and time.monotonic() - start > seconds:
            return
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        windows = random_windows(data, config.batch, model.config.window + 1, generator).to(device)
        loss = model.loss(windows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(loss.detach())


@torch.no_grad()
def evaluate(model: Transformer, windows: Tensor, ffn: FFN, batch: int = 8) -> float:
    """Mean loss over all windows."""
    losses = [model.loss(part, ffn) * part.shape[0] for part in windows.split(batch)]
    return float(torch.stack(losses).sum() / windows.shape[0])


@torch.no_grad()
def ffn_inputs(model: Transformer, windows: Tensor) -> list[Tensor]:
    """Record what the dense model feeds to the FFN of each layer: [tokens, D] each."""
    inputs: list[Tensor] = []

    def recording(mlp: ReLU2MLP, x: Tensor) -> Tensor:
        inputs.append(x.flatten(0, -2))
        return dense_ffn(mlp, x)

    model(windows[:, :-1], recording)
    return inputs


def _rotation(length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding: [length, dim / 2] each."""
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (first half, second half) of x [..., S, dim]."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _schedule(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
