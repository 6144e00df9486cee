"""The activations: as options of the ops, as torch computes them, and their derivatives."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse24.errors import fail, refusal, type_name
from sparse24.ops.arguments import Activation
from sparse24.ops.checks import expect

#: All of them, as sentences name them.
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "relu2")

_RULE = "finite and at least 0"
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ActivationFunction:
    """An activation with all that it depends on.

    Attributes
    ----------
    kind : {"relu2", "relu", "none"}
        ``max(h, 0)**2`` of a pre-activation h; ``max(h, 0)``, which is the root of that; or h.
    threshold : float
        What h has to exceed, compared in float32: else the activation is zero. With "none" there is none. Its default
        is the integer wherever there is one: of a float the Dynamo of torch 2.11 makes a symbol, and traces again.
    """

    kind: Activation = "relu2"
    threshold: float = 0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the ops that ask for it."""
        return {"activation": self.kind, "threshold": self.threshold}

    @property
    def root(self) -> "ActivationFunction":
        """Its root, of the squared ReLU."""
        return ActivationFunction("relu", self.threshold)

    def check(self, op: str, allowed: tuple[Activation, ...] = ACTIVATIONS) -> None:
        """Check what an op was asked for, as its adapter in C++ does."""
        *first, last = (f'"{kind}"' for kind in allowed)
        names = f"{', '.join(first)} or {last}" if first else last
        expect(self.kind in allowed, op, f"activation to be {names}", f'"{self.kind}"')
        if not _usable(self.threshold):
            expect(False, op, f"threshold to be {_RULE}", f"{self.threshold:g}")
        if self.kind == "none" and self.threshold != 0:
            expect(False, op, 'threshold to be 0 (activation "none")', f"{self.threshold:g}")

    def __call__(self, h: Tensor) -> Tensor:
        """Compute it, in h's dtype. NaN stays NaN."""
        if self.kind == "none":
            return h
        root = torch.relu(h) if self.threshold == 0 else torch.where(self._dropped(h), 0, h)
        return root if self.kind == "relu" else root.square()

    def gradient(self, grad: Tensor, h: Tensor) -> Tensor:
        """Return the gradient of h from that of the activation."""
        if self.kind == "none":
            return grad
        if self.kind == "relu":
            return torch.where(self._dropped(h), 0, grad)
        return grad * (2 * self.root(h))

    def _dropped(self, h: Tensor) -> Tensor:
        # As the kernels have it: one beyond float32 is its largest number, which infinity exceeds.
        return h.float() <= min(self.threshold, _LARGEST)


#: The squared ReLU itself: made once, since making one costs the host as much as a small op.
RELU2 = ActivationFunction()


def threshold_of(what: str, value: Any) -> float:
    """Convert a threshold of the user's, a number or the text of one.

    Objects that are traced hold the text: a float that is looked at makes `torch.compile` start over where shapes are
    dynamic.
    """
    try:
        threshold = float(value)
    except (TypeError, ValueError, OverflowError):
        raise refusal(what, f"threshold to be a number, {_RULE}", type_name(value)) from None
    if not _usable(threshold):
        fail(what, f"threshold to be {_RULE}", value)
    return threshold


def _usable(threshold: float) -> bool:
    return 0 <= threshold < math.inf
