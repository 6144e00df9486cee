"""A GPT with squared-ReLU FFNs: RMSNorm, rotary attention, weights in float32.

The demo trains a small one, `python -m bench train_gpt` one of 768 wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

#: How a block runs its FFN instead of calling it: (module, x [B, S, D]) -> [B, S, D].
FFN = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Size:
    """Of the model and of one sequence; as it is, 768 wide."""

    layers: int = 12
    dim: int = 768
    heads: int = 6
    hidden: int = 3072
    sequence: int = 1024


#: What learns something in a minute on one core.
SMALL = Size(layers=4, dim=128, heads=4, hidden=512, sequence=256)
#: Tokens that are bytes.
BYTES = 256


class Linear(nn.Linear):
    """A float32 weight, cast to the input's dtype in each call."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute ``x @ weight.T``."""
        return F.linear(x, self.weight.to(x.dtype))


class DenseMLP(nn.Module):
    """Plain torch, with the children of `sparse24.nn.ReLU2MLP`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden)
        self.down_proj = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the FFN."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    """Attention and FFN, each on the normalised stream and added to it."""

    def __init__(self, size: Size, mlp: nn.Module) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = Linear(size.dim, 3 * size.dim)
        self.project = Linear(size.dim, size.dim)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ffn: FFN | None = None) -> torch.Tensor:
        """Update the residual stream x [B, S, D]; `ffn` runs the FFN in place of itself."""
        x = x + self.attend(_norm(x), cos, sin)
        return x + (self.mlp(_norm(x)) if ffn is None else ffn(self.mlp, _norm(x)))

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Compute causal attention, before it is added."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _rotate(_norm(q), cos, sin), _rotate(_norm(k), cos, sin)
        return self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Tokens [B, S] to the mean cross entropy of the next ones; activations in `dtype`.

    The parameters of a seed are the same whatever the FFNs are: `mlp` makes modules with `up_proj` and `down_proj`,
    and all weights are drawn here, in a fixed order.
    """

    def __init__(
        self,
        size: Size,
        vocabulary: int,
        mlp: Callable[[int, int], nn.Module],
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.size = size
        self.dtype = dtype
        self.embedding = nn.Embedding(vocabulary, size.dim)
        self.blocks = nn.ModuleList(Block(size, mlp(size.dim, size.hidden)) for _ in range(size.layers))
        self.head = Linear(size.dim, vocabulary)
        frequencies = 10_000.0 ** -torch.linspace(0, 1, size.dim // size.heads // 2)
        angles = torch.outer(torch.arange(size.sequence).float(), frequencies)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        # What training runs, compiled or not; evaluation runs the blocks as they are.
        self.runners: list[Callable[..., torch.Tensor]] = list(self.blocks)
        self.readout: Callable[..., torch.Tensor] = _cross_entropy
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        deviation = self.size.dim**-0.5
        residual = (2 * self.size.layers) ** -0.5  # branches start small: depth does not change the stream's scale
        with torch.no_grad():
            self.embedding.weight.normal_(0, 0.1, generator=generator)
            self.head.weight.normal_(0, 0.1 * deviation, generator=generator)
            for block in self.blocks:
                block.qkv.weight.normal_(0, deviation, generator=generator)
                block.project.weight.normal_(0, deviation * residual, generator=generator)
                block.mlp.up_proj.weight.normal_(0, deviation, generator=generator)
                block.mlp.down_proj.weight.normal_(0, self.size.hidden**-0.5 * residual, generator=generator)

    def compile(self) -> None:
        """Compile one block and the readout: all blocks share their code, so each phase compiles once."""
        self.runners = [torch.compile(block, dynamic=False) for block in self.blocks]
        self.readout = torch.compile(_cross_entropy, dynamic=False)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Loss of windows [B, S + 1], on the compiled parts."""
        x = self.stream(windows[:, :-1], self.runners)
        return self.readout(x, self.head.weight, windows[:, 1:])

    @torch.no_grad()
    def evaluate(self, windows: torch.Tensor, batch: int, ffn: FFN | None = None) -> float:
        """Mean loss over windows [N, S + 1], on the modules as they are, or with FFNs as `ffn` runs them."""
        total = torch.zeros((), dtype=torch.float64, device=windows.device)
        for part in windows.split(batch):
            loss = _cross_entropy(self.stream(part[:, :-1], self.blocks, ffn), self.head.weight, part[:, 1:])
            total += loss.double() * part.shape[0]
        return total.item() / windows.shape[0]

    @torch.no_grad()
    def ffn_inputs(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Record what the FFN of each layer is given: [tokens, dim] each."""
        inputs: list[torch.Tensor] = []
        hooks = [
            block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
            for block in self.blocks
        ]
        self.stream(windows[:, :-1], self.blocks)
        for hook in hooks:
            hook.remove()
        return inputs

    def stream(
        self, tokens: torch.Tensor, blocks: Iterable[Callable[..., torch.Tensor]], ffn: FFN | None = None
    ) -> torch.Tensor:
        """Hidden states [B, S, D] behind the blocks."""
        x = _norm(self.embedding(tokens).to(self.dtype))
        for block in blocks:
            x = block(x, self.cos, self.sin) if ffn is None else block(x, self.cos, self.sin, ffn)
        return x

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW; matrices inside the blocks decay."""
        inside = list(self.blocks.parameters())
        groups = [
            {"params": inside, "weight_decay": 0.1},
            {"params": [self.embedding.weight, self.head.weight], "weight_decay": 0.0},
        ]
        fused = self.head.weight.is_cuda
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate_at(step: int, steps: int) -> float:
    """Give the share of the peak: linear over the first 5 %, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _cross_entropy(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(_norm(x), head.to(x.dtype))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long())


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (first half, second half) of x [B, H, S, head width]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
