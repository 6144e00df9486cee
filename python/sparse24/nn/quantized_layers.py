"""Layers of `ReLU2MLP` whose weights are float8: made of others, and loaded from states of either kind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse24.errors import fail
from sparse24.mlp import Precision
from sparse24.mlp.checks import check_fp8_sizes
from sparse24.nn import delayed_scales
from sparse24.nn.children import further_problem, layer_problem
from sparse24.nn.entering_weights import SOFT, drop
from sparse24.nn.quantized_linear import QuantizedLinear
from sparse24.nn.quantized_state import state_for_float, state_for_quantized
from sparse24.nn.sparse_weights import SparseWeights24, pruned_state
from sparse24.nn.weight_copies import let_go, put_copies

#: The two layers.
LAYERS = ("up_proj", "down_proj")


class QuantizedLayers(SparseWeights24):
    """What `ReLU2MLP` does with layers that are, or become, `QuantizedLinear`."""

    precision: Precision
    refresh_scales: Callable[[], bool]

    @torch.no_grad()
    def quantize_(self) -> Any:
        """Replace the weights by float8_e4m3fn with one scale per row, for inference. In place.

        The children become `QuantizedLinear`: buffers ``weight``, ``weight_scale`` and ``scale_y_factor`` instead of a
        parameter. There is no way back, and float8 weights get no gradient. Where the recipe has 2:4 weights they are
        pruned first (`prune_weights_`), unless `sparse` is False.

        Returns
        -------
        ReLU2MLP
            The module.

        Raises
        ------
        RuntimeError
            The sizes are no multiples of 16; the recipe has `double_pruning`; weights to be pruned are tied; or a layer
            is more than its weight and bias: it has hooks or adapters, is pruned, parametrised or distributed. Nothing
            has changed then.
        """
        if self.precision == "16bit":
            fail("nn.ReLU2MLP", 'precision to be "auto" or "fp8" to quantise', '"16bit"')
        if self._adapters() is not None:
            fail("nn.ReLU2MLP", "adapters to be merged before weights are quantised", "adapters")
        if self.recipe is not None and self.recipe.double_pruning:
            fail("nn.ReLU2MLP", "a recipe without double_pruning, which is of 16 bits, to quantise", "one with it")
        children = {name: getattr(self, name) for name in LAYERS}
        children = {name: child for name, child in children.items() if not isinstance(child, QuantizedLinear)}
        for name, child in children.items():
            problem = layer_problem(name, child) or further_problem(name, child)
            if problem is not None:
                raise RuntimeError(
                    f"sparse24.nn.ReLU2MLP: expected layers of a weight and a bias alone to quantise, got: {problem}"
                )
        check_fp8_sizes(self.up_proj.weight, self.down_proj.weight)
        if self.recipe is not None and (self._keeps_pruned() or self._is_pruned()):
            with torch.inference_mode():  # the weights may have been made there
                self._prune(self.recipe)  # by what they are: float8 has equals of what was not
        else:
            drop(self, SOFT)  # of a later sparse phase: a threshold is of weights, not of codes
        for name, layer in [(name, QuantizedLinear(child)) for name, child in children.items()]:
            setattr(self, name, layer)
        put_copies(self)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        let_go(self)
        if self._prunes:  # before they are rounded
            pruned_state(state_dict, prefix, self.recipe)
        # Both layers before either is written to, and before they see their entries.
        for name in LAYERS:
            child, key = self._modules.get(name), f"{prefix}{name}."
            if isinstance(child, QuantizedLinear):
                state_dict.update(state_for_quantized(state_dict, key, child.weight.shape))
            elif type(child) is nn.Linear:
                entries = state_for_float(state_dict, key, child.weight)
                for further in ("weight_scale", "scale_y_factor") if entries else ():
                    state_dict.pop(f"{key}{further}", None)
                state_dict.update(entries)
        # States of other recipes have none, or have some that are not used here.
        key, scales = f"{prefix}delayed_scales", self._buffers.get("delayed_scales")
        if scales is None:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = torch.zeros(4)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if scales is not None and not self.refresh_scales():
            delayed_scales.forget(self, "delayed_scales")
