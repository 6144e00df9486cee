"""What of the network is sparse beside its activation: the token direction of the backward pass, and the weights."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any, Literal

from sparse24._options import boolean, one_of, share
from sparse24.errors import fail, type_name

#: Features that go through the dense product come in multiples of this: the width of a GEMM's tile.
_FEATURE_MULTIPLE = 64
#: From so many input features on all six products are float8 by default: the fewest that were measured, where the step
#: takes 0.61 of the time (log 096). Without delayed scales it is 0.90 at 1,664 (log 067).
_FP8_FEATURES = 768

#: Which weights are 2:4.
SparseWeights = Literal["none", "up", "both"]


def check_sparse_weights(what: str, value: object) -> None:
    """Check such a choice."""
    one_of(what, "sparse_weights", value, ("none", "up", "both"))


@dataclass(unsafe_hash=True)
class Recipe:
    """What is sparse in `sparse24.relu2_mlp`, where it runs sparse, beside the activation.

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
        paper takes 5 %. On recorded activations 2 % bring most of what 5 % do, at half the cost (docs/log/021).
    residual : bool
        Add the product with a second 2:4 operand that holds what the first dropped. Exact under the forward's mask; the
        sparse products over tokens are then two each.
    reuse_mask : bool
        False is an ablation of the method, for experiments only: dropped entries come back in the backward pass. The
        derivative is taken at all positive pre-activations, recomputed from x and w1; the gradient of the
        pre-activation is pruned along features by its own magnitudes for the gradient of x, and the products over
        tokens start from the unpruned matrices. 16-bit precision only. In the literature training diverges this way.

    fp8_weight_gradients : bool, optional
        With ``precision="fp8"``: whether the products of the weight gradients are float8 too, so that all six are,
        where both weights get a gradient, and "sparse", without `residual` and with `reuse_mask`. Otherwise they are in
        x's dtype. Default: for networks of 768 input features or more, where it is faster.
    sparse_weights : {"none", "up", "both"}
        "up": w1 enters every product as `sparse24.prune24` of it, in groups along its input features: five of six GEMMs
        of a training step have a sparse operand. "both": w2 too, in groups along its output features: six of six. The
        gradients are exact for the network with these weights, and pass straight through to all entries. With
        ``sparse=False`` no weight is pruned; with few tokens, which run dense, they are.
    double_pruning : bool
        SLoPe's scheme, for comparison, with sparse_weights="both": w2 is pruned along its input features, as w1 is, and
        the backward pass multiplies both weights pruned once more, along their output features. That is what products
        without sparse activations need, and its gradients are not those of the network. 16-bit precision, with
        `reuse_mask` and without recomputation.

    Raises
    ------
    RuntimeError
        ``sparse24.Recipe: expected <field> <rule>, got <value>``.

    Notes
    -----
    Sources: Haziza et al. 2025, arXiv 2503.16672; SLoPe: Mozaffari et al. 2024, arXiv 2405.16325.
    """

    weight_gradients: Literal["sparse", "dense"] = "sparse"
    permute_tokens: bool = True
    dense_features: float = 0.02
    residual: bool = False
    reuse_mask: bool = True
    fp8_weight_gradients: bool | None = None
    sparse_weights: SparseWeights = "none"
    double_pruning: bool = False

    # Dynamo of torch 2.11 looks at all fields of a frozen dataclass, so this one is frozen by hand.

    def __post_init__(self) -> None:
        one_of("Recipe", "weight_gradients", self.weight_gradients, ("sparse", "dense"))
        self.dense_features = share("Recipe", "dense_features", self.dense_features)
        check_sparse_weights("Recipe", self.sparse_weights)
        for name in ("permute_tokens", "residual", "reuse_mask", "double_pruning"):
            setattr(self, name, boolean("Recipe", name, getattr(self, name)))
        if self.double_pruning and self.sparse_weights != "both":
            fail("Recipe", 'sparse_weights to be "both" for double_pruning', f'"{self.sparse_weights}"')
        if self.fp8_weight_gradients is not None:
            self.fp8_weight_gradients = boolean("Recipe", "fp8_weight_gradients", self.fp8_weight_gradients)
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
        """Count the features of the dense product: `dense_features` of all, rounded up to 64, at most all.

        Parameters
        ----------
        features : int
            Hidden features F.

        Returns
        -------
        int
            How many `hot_features` of `sparse24.relu2_mlp` are.
        """
        wanted = -(-self._millionths * features // 1_000_000)
        return min(-(-wanted // _FEATURE_MULTIPLE) * _FEATURE_MULTIPLE, features)

    def weight_groups(self) -> tuple[int | None, int | None]:
        """Tell along which dimension w1 and w2 are pruned, if they are.

        Returns
        -------
        tuple of (int or None)
            As `dim` of `sparse24.prune24`; None for a weight that is not pruned.
        """
        first = None if self.sparse_weights == "none" else -1
        second = None if self.sparse_weights != "both" else -1 if self.double_pruning else 0
        return first, second

    def has_fp8_weight_gradients(self, features: int) -> bool:
        """Tell whether a network has float8 weight gradients in fp8.

        Parameters
        ----------
        features : int
            Input features D, by which `fp8_weight_gradients` decides where it is None.

        Returns
        -------
        bool
        """
        return features >= _FP8_FEATURES if self.fp8_weight_gradients is None else self.fp8_weight_gradients


def recipe_of(what: str, options: Mapping[Any, Any]) -> Recipe:
    """Make a recipe of what `dataclasses.asdict` or a file has of one."""
    unknown = [name for name in options if name not in {f.name for f in fields(Recipe)}]
    if unknown:
        fail(what, "recipe to have the fields of sparse24.Recipe", unknown[0])
    return Recipe(**options)


def check_recipe(what: str, recipe: Recipe | None) -> None:
    """Check that a recipe is one, or none."""
    if recipe is not None and not isinstance(recipe, Recipe):
        fail(what, "recipe to be a sparse24.Recipe", type_name(recipe))
