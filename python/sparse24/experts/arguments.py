"""What the experts are computed from, in the form that both passes hand on."""

from typing import NamedTuple

from torch import Tensor

from sparse24.mlp.arguments import Plan


class Arguments(NamedTuple):
    """Everything that `relu2_experts` computes its result from, checked and cast; those with a gradient are first."""

    x: Tensor  # [S, D], rows sorted by expert
    w1: Tensor  # [E, F, D]
    w2: Tensor  # [E, D_out, F]
    row_scale: Tensor | None  # [S]
    offsets: Tensor  # [E], int32: where the rows of each expert end
    w1_scale: Tensor | None  # [E, F]
    w2_scale: Tensor | None  # [E, D_out]
    plan: Plan

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all but how it runs."""
        return self[:-1]


class Needed(NamedTuple):
    """Which gradients are wanted; in the order of the first arguments."""

    x: bool
    w1: bool
    w2: bool
    row_scale: bool
