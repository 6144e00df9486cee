"""What training takes beside the network: `Recipe`, `Schedule`, and what checkpointing saves."""

import torch

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24.recipe import Recipe
from sparse24.schedule import Schedule

__all__ = ["SAC_SAVE_OPS", "Recipe", "Schedule"]

#: Ops whose outputs selective activation checkpointing should keep: each holds a GEMM, and the activation of the first
#: comes out at 0.56 of its size. Add them to the set of ops that the policy saves
#: (`torch.utils.checkpoint.create_selective_checkpoint_contexts`).
SAC_SAVE_OPS = frozenset(
    {
        torch.ops.sparse24.linear_compress.default,
        torch.ops.sparse24.linear_relu2.default,
        torch.ops.sparse24.mm.default,
        torch.ops.sparse24.relu2_mlp_fp8.default,  # both products of a float8 step
    }
)
