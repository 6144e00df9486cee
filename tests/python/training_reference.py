"""Training: inputs, the step of the library, and that of plain torch in float64 with the masks of oracle.py."""

from dataclasses import dataclass

import oracle
import torch
from data import integers, normal
from oracle import Pattern
from torch import Tensor

import sparse24

D, HIDDEN, OUT = 64, 160, 48
NAMES = ("x", "w1", "w2", "b1", "b2")


def token_order(tokens: int, permute: bool) -> list[int]:
    """Tokens in the order of their groups of four."""
    quarter = tokens // 4 if permute else 0
    grouped = [i * quarter + g for g in range(quarter) for i in range(4)]
    return grouped + list(range(4 * quarter, tokens))


def token_mask(a: Tensor, permute: bool) -> Tensor:
    """True where 2:4 along tokens keeps an entry of a [T, F]."""
    order = token_order(a.shape[0], permute)
    meta = oracle.compress(a.cpu()[order], dim=-2)[1]
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[order] = Pattern.of_meta(meta, *a.shape, a.dtype, -2).mask()
    return mask.to(a.device)


def sampled_tokens(tokens: int, samples: int = 1024) -> list[int]:
    """Whole blocks of 16 tokens, evenly spread: enough of them for so many samples."""
    blocks = -(-tokens // 16)
    taken = min(-(-samples // 16), blocks)
    chosen = [i * blocks // taken for i in range(taken)]
    return [t for block in chosen for t in range(16 * block, min(16 * block + 16, tokens))]


def hot_features(y: Tensor, count: int, sampled: bool = True) -> list[int]:
    """The features that most tokens use, or most of a sample of them, of equals the lower, in ascending order."""
    used = (y[sampled_tokens(len(y))] if sampled else y).count_nonzero(0).tolist()
    return sorted(sorted(range(len(used)), key=lambda f: (-used[f], f))[:count])


def operand_over_tokens(a: Tensor, recipe, hot: list[int]) -> Tensor:
    """What is left of a [T, F] in the product over tokens."""
    if recipe.weight_gradients == "dense" or recipe.residual:
        return a
    mask = token_mask(a, recipe.permute_tokens)
    mask[:, hot] = True
    return a * mask


@dataclass
class Step:
    """Output, activation, gradient of the pre-activation and gradients of x, w1, w2, b1, b2: all in float64."""

    out: Tensor
    y: Tensor
    dh: Tensor
    grads: tuple[Tensor, ...]


def step(x, w1, w2, b1, b2, grad, recipe, hot: list[int] | None = None, threshold: float = 0.0) -> Step:
    """Forward and backward of the sparse network; y and dh are rounded to x's dtype, as they are when stored."""
    dtype = x.dtype
    x, w1, w2, b1, b2, grad = (t.double() for t in (x, w1, w2, b1, b2, grad))
    h = x @ w1.t() + b1
    h = torch.where(h.to(dtype).double() > threshold, h, 0.0)
    pattern = Pattern.of_meta(oracle.compress(h.to(dtype), "relu2")[1], *h.shape, dtype, -1)
    mask = pattern.mask().to(x.device)
    every = h.clamp(min=0).square().to(dtype).double()
    y = every * mask
    slope = 2 * h.clamp(min=0)
    dh = (grad @ w2 * slope * mask).to(dtype).double()
    out, dx = y @ w2.t() + b2, dh @ w1
    if not recipe.reuse_mask:  # all of both come back; dx is pruned by its own magnitudes
        y, dh = every, (grad @ w2 * slope).to(dtype).double()
        own = Pattern.of_meta(oracle.compress(dh.to(dtype))[1], *h.shape, dtype, -1).mask().to(x.device)
        dx = (dh * own) @ w1
    if hot is None:
        hot = hot_features(y, recipe.hot_features(w1.shape[0]), sampled=recipe.reuse_mask)
    y_tokens, dh_tokens = (operand_over_tokens(a.to(dtype), recipe, hot).double() for a in (y, dh))
    return Step(out, y, dh, (dx, dh_tokens.t() @ x, grad.t() @ y_tokens, dh.sum(0), grad.sum(0)))


def exact_operands(tokens, dtype, device):
    """x, w1, w2, b1, b2 and a gradient of small integers: every sum of products of the step is exact."""
    shapes = ((tokens, 8), (HIDDEN, 8), (24, HIDDEN), (HIDDEN,), (24,), (tokens, 24))
    return [integers(*s, dtype=dtype, limit=1, seed=i).to(device) for i, s in enumerate(shapes)]


def operands(tokens, dtype, device, out=OUT):
    """Normal numbers; the shift of b1 leaves 30 % of the activation."""
    shapes = ((tokens, D), (HIDDEN, D), (out, HIDDEN), (HIDDEN,), (out,), (tokens, out))
    x, w1, w2, b1, b2, grad = (normal(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes))
    leaves = x, w1 / D**0.5, w2 / HIDDEN**0.5, 0.3 * b1 - 0.5, b2, grad
    return [t.to(device, dtype) for t in leaves]


def run(leaves, grad, *, needed=NAMES, **options):
    """The output, and the gradients of the leaves."""
    leaves = [t.detach().clone().requires_grad_(name in needed) for name, t in zip(NAMES, leaves, strict=True)]
    out = sparse24.relu2_mlp(*leaves, min_tokens=0, **options)
    out.backward(grad)
    return out.detach(), *(t.grad for t in leaves)
