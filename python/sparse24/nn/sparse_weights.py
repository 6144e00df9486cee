"""2:4 weights of `ReLU2MLP`: pruned once for inference, and low-rank adapters beside them."""

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse24._options import whole_number
from sparse24.errors import fail
from sparse24.format import FP8
from sparse24.mlp.arguments import Packed, Weight
from sparse24.mlp.packed_weights import packed_once, packed_pays, packed_with_adapters, with_adapters
from sparse24.mlp.weights import check_groups, check_untied, prune24, pruned24, pruned_weights
from sparse24.nn.checked_options import CheckedOptions
from sparse24.nn.entering_weights import Stored, drop, entering, entering_sparse
from sparse24.nn.weight_copies import Copies, Record, follow, is_by_neuron, put_copies, renew_when_loaded
from sparse24.recipe import Recipe, SparseWeights, check_sparse_weights

#: Buffers of weights as they enter, where the parameters are not that: pruned anew, or with adapters.
ENTERING = ("up_weight", "down_weight")
#: Buffers of the first weight packed.
PACKED = ("up_values", "up_meta")
ADAPTERS = ("up_left", "up_right")


class SparseWeights24(CheckedOptions):
    """What `ReLU2MLP` does with 2:4 weights, and with adapters."""

    up_proj: nn.Module
    down_proj: nn.Module
    recipe: Recipe | None
    sparse: bool
    _prunes = False
    _decodes = False
    _copies: Record | None
    _copies_fresh: bool | None
    _layers_problem: Callable[..., str | None]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Copies of the weights follow the recipe."""
        super().__setattr__(name, value)
        if name == "recipe" and (self._prunes or self._decodes or self._copies is not None):
            put_copies(self)  # others may be needed now, and of other weights

    @torch.no_grad()
    def prune_weights_(self, sparse_weights: SparseWeights | None = None) -> Any:
        """Prune the weights to 2:4, once and for inference, and keep them in the form that products want. In place.

        The parameters keep their names and hold the pruned weights, as they entered the products: softened, if
        `sparse24.WeightPruning` did that. What is made of them besides is no part of the state_dict. Loading a state
        prunes what is loaded. The weights may be trained on: steps prune them as the recipe says, and calls without
        gradients follow, with the exceptions that `prepare_decode_` names.

        Parameters
        ----------
        sparse_weights : {"up", "both"}, optional
            Default: that of the recipe; given, the recipe gets it.

        Returns
        -------
        ReLU2MLP
            The module.

        Raises
        ------
        RuntimeError
            Neither the recipe nor the argument has 2:4 weights; they have no groups of four, or are tied; a layer is
            hooked, patched, replaced or distributed. Nothing has changed then.
        """
        recipe = Recipe() if self.recipe is None else self.recipe
        if sparse_weights is not None:
            check_sparse_weights("nn.ReLU2MLP", sparse_weights)
            recipe = replace(recipe, sparse_weights=sparse_weights)
        if recipe.sparse_weights == "none":
            fail("nn.ReLU2MLP", 'sparse_weights to be "up" or "both" to prune the weights', '"none"')
        problem = self._layers_problem()
        if problem is not None:
            raise RuntimeError(f"sparse24.nn.ReLU2MLP: expected layers whose weights can be pruned, got: {problem}")
        self._prune(recipe)
        self.recipe = recipe  # which puts copies
        return self

    def _prune(self, recipe: Recipe) -> None:
        """Write the weights as they enter into layers that can be read; copies of them are for the caller to put."""
        first, second = self._weights()
        check_untied("nn.ReLU2MLP", first.values, second.values)
        check_groups(recipe, first.values, second.values)
        w1, w2 = entering(self, first.values, second.values, self.recipe)
        w1, w2, _ = pruned_weights(recipe, first._replace(values=w1), second._replace(values=w2), None)
        for weight, pruned in ((first, w1), (second, w2)):
            _bits(weight.values).copy_(_bits(pruned))
        drop(self)
        self._prunes = True
        renew_when_loaded(self)

    @torch.no_grad()
    def add_adapters_(self, rank: int) -> Any:
        """Add a product of two thin matrices to the first weight, which changes nothing until it is trained. In place.

        ``y1 = x @ (prune24(w1) + up_left @ up_right).T + b1`` with parameters `up_left` [F, rank], zeros, and
        `up_right` [rank, D], normal with deviation rank^-0.5, in w1's dtype. They are trained and saved with the others
        (give them to the optimizer), in the last steps of a run: what 2:4 cannot say of a weight, a low rank says in
        part. Without 2:4 weights they are a plain low-rank addition.

        Parameters
        ----------
        rank : int
            From 1. Adapters that are there already are replaced by new ones, not merged.

        Returns
        -------
        ReLU2MLP
            The module.

        Raises
        ------
        RuntimeError
            The first layer is hooked, replaced or quantised, or the recipe prunes twice.

        Notes
        -----
        Source: SLoPe: Mozaffari et al. 2024, arXiv 2405.16325 (the last 1 % of the steps, 1.5 % of D).
        """
        rank = whole_number("nn.ReLU2MLP", "rank", rank)
        if rank == 0:
            fail("nn.ReLU2MLP", "rank to be at least 1", rank)
        problem = self._layers_problem()
        if problem is None and self._weights()[0].scale is not None:
            problem = "up_proj is quantised"
        if problem is None and self.recipe is not None and self.recipe.double_pruning:
            problem = "a recipe with double_pruning"
        if problem is not None:
            raise RuntimeError(f"sparse24.nn.ReLU2MLP: expected layers that can have adapters, got: {problem}")
        w = self._weights()[0].values
        with torch.inference_mode(False):  # else they could not be trained
            right = torch.randn(rank, w.shape[1], dtype=torch.float32, device=w.device) * rank**-0.5
            self.up_left = nn.Parameter(w.new_zeros(w.shape[0], rank))
            self.up_right = nn.Parameter(right.detach().to(w.dtype))
        put_copies(self)
        renew_when_loaded(self)
        return self

    @torch.no_grad()
    def merge_adapters_(self) -> Any:
        """Add the adapters to the first weight, and remove them: it is dense from then on. In place.

        The network is the same, up to one rounding. Weights that the recipe prunes are pruned first, and the recipe
        then has ``sparse_weights="none"``.

        Returns
        -------
        ReLU2MLP
            The module.

        Raises
        ------
        RuntimeError
            There are no adapters, the weights are tied, or a layer is hooked, patched, replaced or distributed.
        """
        problem = self._layers_problem() or (None if self._adapters() else "none")
        if problem is not None:
            raise RuntimeError(f"sparse24.nn.ReLU2MLP: expected adapters that can be merged, got: {problem}")
        first, second = self._weights()
        check_untied("nn.ReLU2MLP", first.values, second.values)
        w1, w2 = self._all_entering()
        if self.recipe is not None:
            self.recipe = replace(self.recipe, sparse_weights="none")
        first.values.copy_(w1)
        second.values.copy_(w2)
        for name in ADAPTERS:
            delattr(self, name)
        drop(self)
        self._prunes = False
        put_copies(self)
        return self

    def entering_weights(self) -> tuple[Tensor, Tensor]:
        """Give both weights as the next step multiplies them: softened, masked, pruned, and with adapters.

        Returns
        -------
        tuple of Tensor
            w1 [F, D] and w2 [D_out, F], differentiable; the parameters themselves, where nothing is done to them.
        """
        return self._entering_step(sparse=self.sparse)

    def _entering_step(self, *, sparse: bool) -> tuple[Tensor, Tensor]:
        """Give both weights as a sparse or a dense step multiplies them, in whatever phase the module is."""
        first, second = self._weights()
        w1, w2 = first.values, second.values
        if sparse and self._has_24():
            w1, w2 = entering_sparse(self, w1, w2, self.recipe)
            w1, w2, _ = pruned_weights(self.recipe, first._replace(values=w1), second._replace(values=w2), None)
        return with_adapters(w1, self._adapters()), w2

    def _weights(self) -> tuple[Weight, Weight]:
        return _weight_of(self._modules["up_proj"]), _weight_of(self._modules["down_proj"])

    def _adapters(self) -> tuple[Tensor, Tensor] | None:
        left = self._parameters.get("up_left")
        return None if left is None else (left, self._parameters["up_right"])

    def _recipe_in_use(self) -> Recipe | None:
        return self.recipe

    def _stored_weights(self) -> tuple[Stored, Stored]:
        first, second = self._weights()
        return Stored(first.values), Stored(second.values)

    def _sources(self, first: Weight, second: Weight) -> tuple[Tensor, ...]:
        """List what copies for inference are made of."""
        if self._keeps_entering():
            return first.values, second.values, *(self._adapters() or ())
        return (second.values,)

    def _has_24(self) -> bool:
        return self.recipe is not None and self.recipe.sparse_weights != "none"

    def _keeps_pruned(self) -> bool:
        return self._prunes and self._has_24()  # the recipe may be another since

    def _keeps_entering(self) -> bool:
        return self._keeps_pruned() or self._adapters() is not None

    def _entering(
        self, first: Weight, second: Weight, rows: Tensor | None, *, learning: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Give w1, w2 and w2 by neuron as they enter, and whether nothing is left to be pruned or added."""
        w1, w2 = first.values, second.values
        if not self._is_pruned() and self._adapters() is None:
            return w1, w2, rows, True
        if not learning and self.sparse and self._keeps_entering() and follow(self, self._sources(first, second)):
            # `rows` were made of these.
            w1, w2 = (self._buffers.get(name, w) for name, w in zip(ENTERING, (w1, w2), strict=True))
            return w1, w2, rows, True
        w1, w2 = entering(self, w1, w2, self.recipe)
        return w1, w2, rows if w2 is second.values else None, False

    def _is_pruned(self) -> bool:
        return self.sparse and self._has_24()

    def _packed(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Give the first weight packed, if inference keeps it so and is faster with it; asked after `_entering`."""
        if not self._copies_fresh or PACKED[0] not in self._buffers:
            return None
        packed = *(self._buffers[name] for name in PACKED), *(self._adapters() or ())[1:]
        return packed if packed_pays(packed, x) else None

    def _rows(self, first: Weight, second: Weight) -> Tensor | None:
        """Give the second weight by neuron, if that is at hand."""
        w2 = second.values
        if not self._keeps_entering():
            if is_by_neuron(w2):
                return w2.t()
            return self._buffers["w2_rows"] if follow(self, (w2,)) else None
        if not (self.sparse and follow(self, self._sources(first, second))):
            return None
        return w2.t() if "w2_rows" not in self._buffers else self._buffers["w2_rows"]

    def _what_to_copy(self) -> Copies | None:
        keeps = self._keeps_entering()
        if not (self._decodes or keeps) or self._layers_problem(to_follow=False) is not None:
            return None
        first, second = self._weights()
        if not keeps and is_by_neuron(second.values):
            return None
        return Copies(self._make_copies, self._sources(first, second))

    def _make_copies(self) -> dict[str, Tensor]:
        """Make the weights as they enter, where they are not the parameters; and w2 by neuron, where that is kept."""
        first, second = self._weights()
        w1, w2 = self._all_entering() if self._keeps_entering() else (first.values, second.values)
        made = {}
        for name, w, weight in zip(ENTERING, (w1, w2), (first, second), strict=True):
            if w is not weight.values and not torch.equal(_bits(w), _bits(weight.values)):
                made[name] = w
        if self._keeps_pruned():
            made.update(zip(PACKED, self._first_packed(w1) or (), strict=False))
        if self._decodes and (ENTERING[1] in made or not is_by_neuron(second.values)):
            made["w2_rows"] = w2.t()
        return made

    def _first_packed(self, w1: Tensor) -> Packed | None:
        """Pack the first weight as it enters, or what is pruned of it beside its adapters."""
        adapters = self._adapters()
        if adapters is None:
            return packed_once(w1)
        first, second = self._weights()
        pruned, _ = entering_sparse(self, first.values, second.values, self.recipe)
        return packed_with_adapters(prune24(pruned), adapters[0])

    def _all_entering(self) -> tuple[Tensor, Tensor]:
        """Give both weights as sparse steps multiply them, in a dense phase too."""
        return self._entering_step(sparse=True)

    def _called_layers(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Give layers that have to be called, with their weights as they enter."""
        for name in ("up_proj", "down_proj"):
            w = _own_weight(self._modules[name])
            if type(w) not in (nn.Parameter, Tensor):
                kind = "none" if w is None else type(w).__name__
                fail("nn.ReLU2MLP", f"{name} to have a plain weight, which enters 2:4 or with adapters", kind)
        w1, w2 = self.entering_weights()

        def calling(layer: nn.Module, w: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: torch.func.functional_call(layer, {"weight": w}, (x,))

        return calling(self.up_proj, w1), calling(self.down_proj, w2)


def pruned_state(state: MutableMapping[str, Tensor], prefix: str, recipe: Recipe | None) -> None:
    """Prune the weights of a state that is loaded, where they are whole and the recipe has 2:4 weights."""
    if recipe is None:
        return
    for name, dim in zip(("up_proj", "down_proj"), recipe.weight_groups(), strict=True):
        w, scale = state.get(f"{prefix}{name}.weight"), state.get(f"{prefix}{name}.weight_scale")
        if dim is None or type(w) not in (Tensor, nn.Parameter) or w.dim() != 2 or w.shape[dim] % 4:
            continue
        scale = scale if w.dtype == FP8 else None
        if scale is None or scale.numel() == w.shape[0]:  # others are refused by the layer that gets them
            state[f"{prefix}{name}.weight"] = pruned24(Weight(w.detach(), scale), dim)


def _bits(w: Tensor) -> Tensor:
    """Return a weight as torch can copy and compare it."""
    return w.view(torch.uint8) if w.dtype == FP8 else w


def _own_weight(layer: Any) -> Tensor | None:
    """Give the weight of a layer that owns it: a parameter, or a buffer where it is quantised."""
    weight: Tensor | None = layer._parameters.get("weight")
    return layer._buffers.get("weight") if weight is None else weight


def _weight_of(layer: Any) -> Weight:
    weight = layer._parameters.get("weight")  # attributes of modules take the host longer
    return Weight(layer.weight if weight is None else weight, layer._buffers.get("weight_scale"))
