"""The weights of a converted module as its products take them: pruned, with adapters, and copied for inference."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse24.convert.conversion import Conversion, Layer, Weights, weights_of
from sparse24.convert.layers import owner_of
from sparse24.errors import fail
from sparse24.experts.pruning import pruned as pruned_experts
from sparse24.format import FP8
from sparse24.mlp.arguments import Packed, Weight
from sparse24.mlp.packed_weights import Adapters, packed_once, packed_with_adapters, with_adapters
from sparse24.mlp.weights import check_untied, prune24, pruned_weights
from sparse24.nn.children import weight_problem
from sparse24.nn.entering_weights import Stored, entering, entering_sparse
from sparse24.nn.quantized_state import quantized, quantized_experts
from sparse24.nn.weight_copies import Copies, follow, is_by_neuron, put_copies
from sparse24.recipe import Recipe

#: The parameters of adapters, which are the converted module's own.
ADAPTERS = ("sparse24_up_left", "sparse24_up_right")
#: The first weight packed, for inference.
PACKED = ("sparse24_w1_values", "sparse24_w1_meta")
#: What bounds the activation of a float8 copy of the first weight.
FACTOR = "sparse24_scale_y_factor"


class Entering(NamedTuple):
    """Both layers as they enter, w2 by neuron, whether nothing is left to be pruned or added, w1 packed, its factor."""

    first: Weights
    second: Weights
    rows: Tensor | None = None
    settled: bool = True
    packed: tuple[Tensor, ...] | None = None
    factor: Tensor | None = None


def owner(module: nn.Module, layer: Layer) -> Any:
    """Give what owns a weight, or the parameter that is one."""
    child = module._modules.get(layer.name)
    return owner_of(module, layer.name) if child is None else child


def both_weights(module: nn.Module) -> tuple[Weights, Weights]:
    """Read the weights of both layers."""
    conversion: Conversion = module._sparse24  # type: ignore[assignment]
    first, second = (weights_of(module, layer, owner(module, layer)) for layer in (conversion.up, conversion.down))
    return first, second


def adapters_of(module: nn.Module) -> Adapters | None:
    """Give the adapters: two parameters, if there are any."""
    left = module._parameters.get(ADAPTERS[0])
    return None if left is None else (left, module._parameters[ADAPTERS[1]])  # type: ignore[return-value]


def recipe_in_use(self: Any) -> Recipe | None:
    """Give the recipe of a converted module: see `sparse24.WeightPruning`."""
    recipe: Recipe | None = self._sparse24.options.get("recipe")
    return recipe


def stored_weights(self: Any) -> tuple[Stored, Stored]:
    """Give the two parameters of a converted module that are its weights."""
    conversion = self._sparse24
    first, second = both_weights(self)
    return Stored(first.stored, conversion.up.transposed), Stored(second.stored, conversion.down.transposed)


def as_they_enter(module: Any, conversion: Conversion, first: Weights, second: Weights) -> Entering:
    """Give the weights of a step: softened or masked."""
    w1, w2 = entering(module, first.weight, second.weight, conversion.options.get("recipe"))
    settled = adapters_of(module) is None and not (module.sparse and prunes(conversion))
    return Entering(first._replace(weight=w1), second._replace(weight=w2), None, settled)


def for_inference(module: Any, conversion: Conversion, first: Weights, second: Weights) -> Entering:
    """Give the weights as inference wants them: made before the call, and the second one by neuron as well."""
    if not copies_help(module, conversion, first):
        return Entering(first, second)
    changes = has_changes(module, conversion)
    if module._copies_fresh is None:
        if not (changes or _quantises(conversion, first)) and is_by_neuron(second.weight):
            return Entering(first, second, second.weight.t())
        if not torch.compiler.is_compiling():
            put_copies(module)
    if (changes and not module.sparse) or not follow(module, _sources(module, conversion, first, second)):
        return as_they_enter(module, conversion, first, second)
    copies = module._buffers
    first, second = (
        weights._replace(weight=copies.get(f"sparse24_w{number}", weights.weight))
        for number, weights in enumerate((first, second), start=1)
    )
    if _quantises(conversion, first):
        first, second = (
            weights._replace(scale=copies[f"sparse24_w{number}_scale"])
            for number, weights in enumerate((first, second), start=1)
        )
    rows = copies["sparse24_w2_rows"] if conversion.decode else None
    packs = module.sparse and PACKED[0] in copies
    packed = _as_packed(module) if packs else None
    return Entering(first, second, rows, packed=packed, factor=copies.get(FACTOR))


def wants_copies(module: Any, conversion: Conversion) -> bool:
    """Whether a module keeps copies of its weights, or will in evaluation."""
    return copies_help(module, conversion, both_weights(module)[0])


def what_to_copy(self: Any) -> Copies | None:
    """Tell what a converted module copies: see `sparse24.nn.weight_copies`."""
    conversion = self._sparse24
    first, second = both_weights(self)
    if not copies_help(self, conversion, first) or (self.training and not conversion.decode):
        return None
    if any(weight_problem("", t.weight) or t.weight.dtype == torch.float64 for t in (first, second)):
        return None
    quantises, changes = _quantises(conversion, first), has_changes(self, conversion)
    if not (quantises or changes) and is_by_neuron(second.weight):
        return None

    def make() -> dict[str, Tensor]:
        made, w1, w2 = {}, first.weight, second.weight
        if changes:
            w1, w2 = all_entering(self)
        for number, (w, weights) in enumerate(((w1, first), (w2, second)), start=1):
            if quantises:
                of_weight = quantized(w) if w.dim() == 2 else quantized_experts(w)
                made[f"sparse24_w{number}"] = w2 = of_weight["weight"]
                made[f"sparse24_w{number}_scale"] = of_weight["weight_scale"]
                if number == 1 and "scale_y_factor" in of_weight:  # experts have none
                    made[FACTOR] = of_weight["scale_y_factor"]
            elif w is not weights.weight:
                made[f"sparse24_w{number}"] = w
        if prunes(conversion) and not conversion.experts:
            made.update(zip(PACKED, _first_packed(self, made.get("sparse24_w1", w1)) or (), strict=False))
        return {**made, "sparse24_w2_rows": w2.t()} if conversion.decode else made

    return Copies(make, _sources(self, conversion, first, second))


def _first_packed(module: Any, w1: Tensor) -> Packed | None:
    """Pack the first weight as it enters, or what is pruned of it beside its adapters."""
    adapters = adapters_of(module)
    if not adapters:
        return packed_once(w1)
    if w1.dtype == FP8:
        return None
    first, second = both_weights(module)
    pruned, _ = entering_sparse(module, first.weight, second.weight, module._sparse24.options["recipe"])
    return packed_with_adapters(prune24(pruned), adapters[0])


def _as_packed(module: Any) -> tuple[Tensor, ...]:
    """Give the first weight as `w1_packed` of `relu2_mlp`."""
    return *(module._buffers[name] for name in PACKED), *(adapters_of(module) or ())[1:]


@torch.no_grad()
def all_entering(module: Any) -> tuple[Tensor, Tensor]:
    """Give both weights as sparse steps multiply them, in a dense phase too."""
    conversion = module._sparse24
    first, second = both_weights(module)
    if conversion.experts:
        kind = conversion.options["recipe"].sparse_weights
        return pruned_experts(kind, first.weight, second.weight, second.scale)
    w1, w2 = entering_sparse(module, first.weight, second.weight, conversion.options.get("recipe"))
    if prunes(conversion):
        w1, w2, _ = pruned_weights(
            conversion.options["recipe"], Weight(w1, first.scale), Weight(w2, second.scale), None
        )
    return with_adapters(w1, adapters_of(module)), w2


def check_mergeable(modules: list[tuple[str, Any]]) -> None:
    """Check that `merge_weights` can write to each of the parameters, also where several modules share one."""
    written: dict[int, list[tuple[Any, int]]] = {}
    for _, module in modules:
        first, second = stored_weights(module)
        if has_changes(module, module._sparse24):
            check_untied("revert", first.parameter, second.parameter)
        for index, stored in enumerate((first, second)):
            written.setdefault(id(stored.parameter), []).append((module, index))
    for users in written.values():
        if len(users) > 1 and any(has_changes(module, module._sparse24) for module, _ in users):
            made = [_to_write(module)[index] for module, index in users]
            if not all(torch.equal(w, made[0]) for w in made):
                fail("revert", "weights that several networks share to be the same in all, to be written to", "others")


@torch.no_grad()
def merge_weights(modules: list[tuple[str, Any]]) -> None:
    """Write the weights of the networks into the parameters, where they are not that: pruned, and with adapters."""
    written = set()
    for _, module in modules:
        if not has_changes(module, module._sparse24):
            continue
        for stored, w in zip(stored_weights(module), _to_write(module), strict=True):
            if id(stored.parameter) not in written:  # a softened one would be softened again
                written.add(id(stored.parameter))
                stored.parameter.copy_(w)


def _to_write(module: Any) -> list[Tensor]:
    return [
        w.t() if stored.transposed else w
        for stored, w in zip(stored_weights(module), all_entering(module), strict=True)
    ]


def copies_help(module: Any, conversion: Conversion, first: Weights) -> bool:
    """Whether inference is faster with copies; experts are pruned where they are multiplied, if they are as stored."""
    changes = has_changes(module, conversion) and not conversion.experts
    return conversion.decode or _quantises(conversion, first) or changes


def _sources(module: Any, conversion: Conversion, first: Weights, second: Weights) -> tuple[Tensor, ...]:
    if has_changes(module, conversion):
        return first.stored, second.stored, *(adapters_of(module) or ())
    return (first.stored, second.stored) if _quantises(conversion, first) else (second.stored,)


def has_changes(module: Any, conversion: Conversion) -> bool:
    """Whether the weights of the network are not those that are stored."""
    return prunes(conversion) or adapters_of(module) is not None


def prunes(conversion: Conversion) -> bool:
    """Whether the weights are 2:4."""
    recipe = conversion.options.get("recipe")
    return recipe is not None and recipe.sparse_weights != "none"


def _quantises(conversion: Conversion, first: Weights) -> bool:
    return conversion.precision == "fp8" and first.scale is None
