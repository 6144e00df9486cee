"""Networks in the forms in which users have them, and what they compute, in plain torch."""

from dataclasses import replace

import torch
from convert_models import EXACT, HIDDEN, D, Inline, Stack, assert_near, gradients, masked_class, randomize
from data import normal
from model_classes import CLASSES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24.mlp import Precision

#: `ReLU2MLP` in 16 bits (float32 on the CPU), in fp8, and a network that is converted. "fp8_step", with all six
#: products of a step in fp8, is none of them: its steps depend on those before.
KINDS = ("module", "fp8", "converted")
#: Nothing is pruned along tokens.
FP8_STEP = sparse24.Recipe(fp8_weight_gradients=True, dense_features=1.0)
#: With 2:4 weights: modules that have adapters too, in 16 bits and in fp8, and a converted network. Tests are few.
WEIGHT_KINDS = ("weights", "fp8_weights", "converted_weights")
WEIGHTS = replace(EXACT, recipe=replace(EXACT.recipe, sparse_weights="both"))
#: For inference also `ReLU2MLP` with float8 weights.
INFERENCE_KINDS = (*KINDS, "quantised")


def network(kind: str) -> nn.Module:
    """One network, in float32: of a kind, or of one of the CLASSES."""
    if kind in CLASSES:
        return CLASSES[kind][0]()
    if kind.startswith("converted"):
        return Inline(bias=True)
    recipe = FP8_STEP if kind == "fp8_step" else WEIGHTS.recipe if kind in WEIGHT_KINDS else EXACT.recipe
    precision: Precision = "16bit" if kind in ("module", "weights") else "fp8"
    return sparse24.nn.ReLU2MLP(D, HIDDEN, bias=True, min_tokens=0, recipe=recipe, precision=precision)


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def build(kind: str, device: str = "cpu", dtype: torch.dtype | None = None, layers: int = 2) -> Stack:
    """Networks with residual connections; the same weights at each call."""
    model = Stack(*(network(kind) for _ in range(layers)))
    if kind in ("weights", "fp8_weights"):
        for layer in model.layers:
            layer.add_adapters_(4)
    model = randomize(model)
    model.to(device, dtype_of(device) if dtype is None else dtype)
    if kind.startswith("converted") or kind in CLASSES:
        sparse24.convert(model, WEIGHTS if kind in WEIGHT_KINDS else EXACT, quiet=True)
    if kind == "quantised":
        for layer in model.layers:
            layer.quantize_()
    return model


def inputs(device: str = "cpu", dtype: torch.dtype | None = None, *, tokens: int = 21, batch: int = 3) -> Tensor:
    """x [batch, tokens, D]."""
    x = normal(batch * tokens, D, dtype=dtype_of(device) if dtype is None else dtype, seed=tokens)
    return x.reshape(batch, tokens, D).to(device)


def masked_gradients(kind: str, x: Tensor) -> list[Tensor]:
    """`gradients` of the dense network whose activation is multiplied with the 2:4 mask; not for fp8."""
    model = randomize(Stack(*(network(kind) for _ in range(2)))).to(x)
    with masked_class(type(model.layers[0]), layer_names(kind)):
        return gradients(model, model, x)


def layer_names(kind: str) -> tuple[str, str]:
    """Of the two layers of a network."""
    if kind in CLASSES:
        return CLASSES[kind][1]
    return ("c_fc", "c_proj") if kind.startswith("converted") else ("up_proj", "down_proj")


def checkpointed(model: Stack, **options):
    """A call of the model that keeps no activation of its networks."""

    def call(x):
        for layer in model.layers:
            x = x + checkpoint(layer, x, **{"use_reentrant": False, **options})
        return x

    return call


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same up to the order of sums, in the precision of the device."""
    assert_near(actual, expected, 5e-2 if actual[0].is_cuda else 1e-5)
