"""The activations: as options of the ops, as torch computes them, and their derivatives."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse24.ops.arguments import Activation
from sparse24.ops.checks import expect

#: All of them, as sentences name them.
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "relu2")


@dataclass(frozen=True)
class ActivationFunction:
    """An activation with all that it depends on.

    Attributes
    ----------
    kind : {"relu2", "relu", "none"}
        ``max(h, 0)**2`` of a pre-activation h; ``max(h, 0)``, which is the root of that; or h.
    """

    kind: Activation = "relu2"

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the ops that ask for it."""
        return {"activation": self.kind}

    @property
    def root(self) -> "ActivationFunction":
        """Its root, of the squared ReLU."""
        return ActivationFunction("relu")

    def check(self, op: str, allowed: tuple[Activation, ...] = ACTIVATIONS) -> None:
        """Check what an op was asked for, as its adapter in C++ does."""
        *first, last = (f'"{kind}"' for kind in allowed)
        names = f"{', '.join(first)} or {last}" if first else last
        expect(self.kind in allowed, op, f"activation to be {names}", f'"{self.kind}"')

    def __call__(self, h: Tensor) -> Tensor:
        """Compute it, in h's dtype. NaN stays NaN."""
        if self.kind == "none":
            return h
        root = torch.relu(h)
        return root if self.kind == "relu" else root.square()

    def gradient(self, grad: Tensor, h: Tensor) -> Tensor:
        """Return the gradient of h from that of the activation."""
        if self.kind == "none":
            return grad
        return torch.where(h <= 0, 0, grad) if self.kind == "relu" else grad * (2 * torch.relu(h))
