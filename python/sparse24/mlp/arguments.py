"""What the network is computed from, in the forms that its passes hand on: tensors, and a plan of how it runs."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import Parameter

from sparse24.ops.activation import ActivationFunction
from sparse24.recipe import Recipe

#: Products over tokens of a network that runs dense.
DENSE = Recipe(weight_gradients="dense")
#: Types of weights whose operators are torch's, as no subclass's are.
PLAIN = (Tensor, Parameter)


class Plan(NamedTuple):
    """Which of the paths both passes take, and of what activation: constants of a compiled graph.

    No frozen dataclass: for its fields Dynamo of torch 2.11 takes nothing but numbers and strings.
    """

    function: ActivationFunction
    fp8: bool = False
    sparse: bool = False
    fused: bool = False
    #: The activation is stored as its root, relu(h): training in float16, where squares of small ones underflow.
    roots: bool = False
    #: The backward pass computes the activation again, from x.
    recompute: bool = False
    #: fp8: the products of the weight gradients are to be float8 too (`Recipe.fp8_weight_gradients`).
    fp8_weight_gradients: bool = False
    #: The backward pass multiplies weights that are pruned along their output features as well.
    double_pruned: bool = False
    #: fp8: the first weight is packed where it is quantised.
    packs_first: bool = False
    #: Likewise the second one, in a float8 step.
    packs_second: bool = False
    #: A float8 step prunes its weights where it quantises them, along these dimensions.
    prunes: tuple[int | None, int | None] = (None, None)

    @property
    def packs(self) -> tuple[int | None, int | None]:
        """Along which dimensions the codes of a float8 step's weights are packed."""
        return -1 if self.packs_first else None, -2 if self.packs_second else None

    @property
    def stored(self) -> ActivationFunction:
        """What is stored of the first layer."""
        return self.function.root if self.roots else self.function


class Weight(NamedTuple):
    """A weight [rows, columns], and the scale of its rows where it is float8."""

    values: Tensor
    scale: Tensor | None


class Packed(NamedTuple):
    """A 2:4 weight as `pack24` packs it."""

    values: Tensor
    meta: Tensor


class Activated(NamedTuple):
    """The activation [T, F]: 2:4 values with metadata, or dense values without; with a scale where they are float8."""

    values: Tensor
    meta: Tensor | None
    scale: Tensor | None


class Arguments(NamedTuple):
    """Everything that `relu2_mlp` computes its result from, checked and cast.

    Weights and biases are of the dtype that they are multiplied in, or weights are float8 with a scale. Autograd
    follows no tensor inside of another object: its functions take ``*arguments`` and make this of them. Those that can
    have a gradient are first.
    """

    x: Tensor  # [T, D]
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    w1_scale: Tensor | None
    w2_scale: Tensor | None
    scale_y: Tensor | None
    scale_y_factor: Tensor | None
    hot_features: Tensor | None
    w1_packed: Tensor | None  # w1 and w2 once more, where they are 2:4 and packed: values and metadata
    w1_meta: Tensor | None
    x_right: Tensor | None  # [rank, D]: w1 has adapters packed beside it, and x @ x_right.T more columns of x
    w2_packed: Tensor | None
    w2_meta: Tensor | None
    plan: Plan
    recipe: Recipe  # `DENSE` where it does not run sparse

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all but how it runs."""
        return self[:-2]

    def first_packed(self) -> Packed | None:
        """Return the first weight packed, if it is."""
        return None if self.w1_packed is None or self.w1_meta is None else Packed(self.w1_packed, self.w1_meta)

    def second_packed(self) -> Packed | None:
        """Return the second weight packed, if it is."""
        return None if self.w2_packed is None or self.w2_meta is None else Packed(self.w2_packed, self.w2_meta)

    def first(self) -> Weight:
        """Return the first weight with its scale."""
        return Weight(self.w1, self.w1_scale)

    def second(self) -> Weight:
        """Return the second weight with its scale."""
        return Weight(self.w2, self.w2_scale)


class Needed(NamedTuple):
    """Which gradients are wanted; in the order of the first arguments."""

    x: bool
    w1: bool
    w2: bool
    b1: bool
    b2: bool


class Gradients(NamedTuple):
    """The gradients of the first arguments."""

    x: Tensor | None = None
    w1: Tensor | None = None
    w2: Tensor | None = None
    b1: Tensor | None = None
    b2: Tensor | None = None
