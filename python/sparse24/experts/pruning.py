"""2:4 weights of experts: each is pruned as that of a network of its own."""

from torch import Tensor

from sparse24.experts.checks import fail
from sparse24.mlp.weights import kept24, masked, prune24
from sparse24.recipe import SparseWeights


def pruned(kind: SparseWeights, w1: Tensor, w2: Tensor, w2_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prune what a recipe says of w1 [E, F, D] and w2 [E, D_out, F]."""
    if w1.shape[2] % 4 != 0:
        fail("w1 to have a multiple of 4 columns for 2:4 weights", w1.shape[2])
    w1 = prune24(w1, -1)
    if kind == "up":
        return w1, w2
    if w2.shape[1] % 4 != 0:
        fail("w2 to have a multiple of 4 rows for 2:4 weights", w2.shape[1])
    if w2_scale is None or w2_scale.dim() == 1:
        return w1, prune24(w2, 1)
    # Entries of a group that have scales of their own are compared as what they are worth.
    return w1, masked(w2, kept24(w2.float() * w2_scale.unsqueeze(2), 1))
