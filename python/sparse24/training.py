"""How the backward pass treats the token direction, when training is dense, and what checkpointing saves."""

import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from typing import Literal, NoReturn

import torch
from torch import nn

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24._options import boolean, whole_number

#: Ops whose outputs selective activation checkpointing should keep: each holds a GEMM, and the activation of the first
#: comes out at 0.56 of its size. Add them to the set of ops that the policy saves
#: (`torch.utils.checkpoint.create_selective_checkpoint_contexts`).
SAC_SAVE_OPS = frozenset(
    {
        torch.ops.sparse24.linear_compress.default,
        torch.ops.sparse24.linear_relu2.default,
        torch.ops.sparse24.mm.default,
    }
)

#: Features that go through the dense product come in multiples of this: the width of a GEMM's tile.
_FEATURE_MULTIPLE = 64


@dataclass(unsafe_hash=True)
class Recipe:
    """Options of the backward pass of `sparse24.relu2_mlp` where it runs sparse.

    The weight gradients are products over tokens. Their sparse operand, the activation or the gradient of the
    pre-activation, has to be 2:4 along *tokens*, and is pruned to that on top of the forward's mask along features.
    The options say how little that drops.

    Immutable and compared by value: `torch.compile` guards on it, equal recipes share a graph.

    Parameters
    ----------
    weight_gradients : {"sparse", "dense"}
        "dense": the products of the weight gradients are dense, nothing is pruned along tokens, and the gradient is
        exact under the forward's mask. Two of six GEMMs are sparse instead of four.
    permute_tokens : bool
        Make groups of tokens ``{g, g + Q, g + 2Q, g + 3Q}``, ``Q = T // 4``, instead of four neighbours, which light
        the same features; the last T % 4 tokens are a group. Internal to the products: no order of tokens changes for
        the user.
    dense_features : float
        Share of features that go through a dense product: `hot_features`. They are those that are active for the most
        tokens of a sample of 1,024, evenly spread in blocks of 16; with ``reuse_mask=False``, for the most of all. The
        paper takes 5 %. On recorded activations 2 % bring most of what 5 % do, at half the cost (bench/NOTES.md).
    residual : bool
        Add the product with a second 2:4 operand that holds what the first dropped. Exact under the forward's mask; the
        sparse products over tokens are then two each.
    reuse_mask : bool
        False is an ablation of the method, for experiments only: dropped entries come back in the backward pass. The
        derivative is taken at all positive pre-activations, recomputed from x and w1; the gradient of the
        pre-activation is pruned along features by its own magnitudes for the gradient of x, and the products over
        tokens start from the unpruned matrices. 16-bit precision only. In the literature training diverges this way.

    Raises
    ------
    RuntimeError
        ``sparse24.Recipe: expected <field> <rule>, got <value>``.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672.
    """

    weight_gradients: Literal["sparse", "dense"] = "sparse"
    permute_tokens: bool = True
    dense_features: float = 0.02
    residual: bool = False
    reuse_mask: bool = True

    # Dynamo of torch 2.11 looks at all fields of a frozen dataclass, so this one is frozen by hand.

    def __post_init__(self) -> None:
        if self.weight_gradients not in ("sparse", "dense"):
            _fail("Recipe", 'weight_gradients to be "sparse" or "dense"', f'"{self.weight_gradients}"')
        if not 0 <= self.dense_features <= 1:
            _fail("Recipe", "dense_features to be from 0 to 1", self.dense_features)
        self.dense_features = float(self.dense_features)
        for name in ("permute_tokens", "residual", "reuse_mask"):
            setattr(self, name, boolean("Recipe", name, getattr(self, name)))
        # As an integer: a float that is looked at makes torch.compile start over where shapes are dynamic. No field,
        # so that ``Recipe(**dataclasses.asdict(recipe))`` is the recipe.
        self._millionths = round(self.dense_features * 1_000_000)

    def __setattr__(self, name: str, value: object) -> None:
        """Set what `__init__` sets; `_millionths` is the last."""
        if hasattr(self, "_millionths"):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse."""
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def hot_features(self, features: int) -> int:
        """Count the features of the dense product: `dense_features` of all, rounded up to 64, at most all."""
        wanted = -(-self._millionths * features // 1_000_000)
        return min(-(-wanted // _FEATURE_MULTIPLE) * _FEATURE_MULTIPLE, features)


@dataclass(frozen=True)
class Schedule:
    """Which steps of a training run are sparse: all but a dense start and, optionally, a dense end.

    At initialisation half of the activation is not zero and 2:4 would drop a fifth of that; within some hundred steps
    most of it is.

    Parameters
    ----------
    total_steps : int
        Steps of the run.
    dense_warmup_steps : int
        Steps at the start that run dense.
    dense_final_steps : int
        Steps at the end that run dense.

    Raises
    ------
    RuntimeError
        ``sparse24.Schedule: expected <field> <rule>, got <value>``.

    Warns
    -----
    UserWarning
        No step is sparse.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672 (warm-up of 1,000 steps).

    Examples
    --------
    >>> schedule = sparse24.Schedule(10_000)
    >>> for step in range(schedule.total_steps):
    ...     schedule.apply(model, step)
    ...     train_one_step(model)
    """

    total_steps: int
    dense_warmup_steps: int = 1000
    dense_final_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("total_steps", "dense_warmup_steps", "dense_final_steps"):
            object.__setattr__(self, name, whole_number("Schedule", name, getattr(self, name)))
        if 0 < self.total_steps <= self.dense_warmup_steps + self.dense_final_steps:
            warnings.warn(f"sparse24: no step of {self} is sparse", stacklevel=3)

    def is_sparse(self, step: int) -> bool:
        """Tell whether a step, counted from 0, runs sparse."""
        return bool(self.dense_warmup_steps <= step < self.total_steps - self.dense_final_steps)

    def apply(self, model: nn.Module, step: int) -> bool:
        """Set the attribute `sparse` of all feed-forward modules in `model` as the step wants it, and return it.

        Call it before each step. A compiled model is traced again at a change of phase, not at every step: the
        attribute is a constant of the graph.

        Parameters
        ----------
        model : Module
            With `sparse24.nn.ReLU2MLP` modules or modules that were converted to run as one.
        step : int
            Counted from 0.

        Raises
        ------
        RuntimeError
            There is no such module in `model`.
        """
        sparse = self.is_sparse(step)
        modules = list(_feed_forwards(model))
        if not modules:
            _fail("Schedule", "model to have ReLU2MLP or converted modules", type(model).__name__)
        for module in modules:
            module.sparse = sparse
        return sparse


def _feed_forwards(model: nn.Module) -> Iterator[nn.Module]:
    from sparse24.nn import ReLU2MLP  # which imports this file

    for module in model.modules():
        if isinstance(module, ReLU2MLP) or getattr(module, "_sparse24_converted", False):
            yield module


def _fail(what: str, rule: str, got: object) -> NoReturn:
    raise RuntimeError(f"sparse24.{what}: expected {rule}, got {got}")
