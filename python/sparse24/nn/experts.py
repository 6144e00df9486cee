"""The experts of a mixture as a module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse24._options import floating_dtype, positive_number, whole_number
from sparse24.errors import fail
from sparse24.experts import relu2_experts
from sparse24.experts.products import sixteen_bit
from sparse24.experts.routing import routing_problem, run_routed
from sparse24.format import FP8
from sparse24.mlp import Precision
from sparse24.mlp.weights import prune24
from sparse24.nn.checked_options import OPTIONS, CheckedOptions
from sparse24.nn.entering_weights import Stored
from sparse24.nn.quantized_state import as_bytes, quantized_experts, with_dtypes_of
from sparse24.nn.tracing import as_one_call, is_traced
from sparse24.nn.weight_copies import let_go
from sparse24.recipe import Recipe

_LAYERS = ("up_proj", "down_proj")


class ReLU2Experts(CheckedOptions):
    """Squared-ReLU experts whose activation is 2:4: the module form of `sparse24.relu2_experts`.

    Its parameters are ``up_proj`` [E, F, D] and ``down_proj`` [E, D_out, F], the names and shapes of the experts of
    Hugging Face models. A state is converted where one side is quantised (`quantize_`) and the other is not.

    Parameters
    ----------
    num_experts : int
        Experts E.
    dim : int
        Input features D.
    hidden : int
        Hidden features F of each expert.
    dim_out : int, optional
        Output features; default `dim`.
    precision : {"auto", "16bit", "fp8"}
        As in `sparse24.relu2_experts`.
    device, dtype
        Of the parameters.
    recipe : Recipe, optional
        As in `sparse24.relu2_experts`.

    Attributes
    ----------
    sparse : bool
        False: it runs dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it).
    """

    sparse: bool = True
    _NAME, _OPTIONS = "nn.ReLU2Experts", OPTIONS

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        dim_out: int | None = None,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.recipe = recipe
        num_experts = positive_number("nn.ReLU2Experts", "num_experts", num_experts)
        dim, hidden = whole_number("nn.ReLU2Experts", "dim", dim), whole_number("nn.ReLU2Experts", "hidden", hidden)
        dim_out = dim if dim_out is None else whole_number("nn.ReLU2Experts", "dim_out", dim_out)
        options = {"device": device, "dtype": floating_dtype("nn.ReLU2Experts", dtype)}
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden, dim, **options))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim_out, hidden, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert as `torch.nn.Linear` initialises its layers."""
        for name in _LAYERS:
            w = getattr(self, name)
            bound = 1 / math.sqrt(w.shape[2]) if w.shape[2] else 0
            nn.init.uniform_(w, -bound, bound)

    @property
    def num_experts(self) -> int:
        """How many experts there are here."""
        return int(self.up_proj.shape[0])

    def forward(self, x: Tensor, offsets: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """Compute rows that are sorted by expert.

        Parameters
        ----------
        x : Tensor [S, D]
        offsets : Tensor [E]
        row_scale : Tensor [S], optional
            All as in `sparse24.relu2_experts`.

        Returns
        -------
        Tensor [S, D_out]

        Raises
        ------
        RuntimeError
            ``sparse24.relu2_experts: expected <argument> <rule>, got <value>``.
        """
        if is_traced(x):
            return as_one_call(self, "nn.ReLU2Experts", x, offsets, row_scale)  # type: ignore[no-any-return]
        return relu2_experts(
            x,
            self.up_proj,
            self.down_proj,
            offsets,
            row_scale=row_scale,
            precision=self.precision,
            w1_scale=self._buffers.get("up_proj_scale"),
            w2_scale=self._buffers.get("down_proj_scale"),
            recipe=self.recipe,
            sparse=self.sparse,
        )

    def routed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute [T, D_out] of tokens x [T, D] that a router sends to experts `index` [T, k] with `weights` [T, k].

        Tokens are sorted and brought back in a fixed order, without waiting for the device. An index of E or more, or
        a negative one, is nobody's: its share is zero.

        Parameters
        ----------
        x : Tensor [T, D]
        index : Tensor [T, k]
            Integers.
        weights : Tensor [T, k]
            Of any floating dtype.

        Returns
        -------
        Tensor [T, D_out]

        Raises
        ------
        RuntimeError
            ``sparse24.nn.ReLU2Experts: expected <argument> <rule>, got <value>``.
        """
        problem = routing_problem(x, index, weights)
        if problem is not None:
            fail("nn.ReLU2Experts", *problem)
        return run_routed(x, index, weights, self.num_experts, self)

    @torch.no_grad()
    def quantize_(self) -> "ReLU2Experts":
        """Replace the weights by float8_e4m3fn with one scale per row, for inference. In place; returns the module.

        The parameters become buffers of their names, with scales ``up_proj_scale`` [E, F] and ``down_proj_scale``
        [E, D_out]. There is no way back, and float8 weights get no gradient. Where the recipe has 2:4 weights they are
        pruned first, unless `sparse` is False; so are those of states that are loaded.
        """
        if self.precision == "16bit":
            fail("nn.ReLU2Experts", 'precision to be "auto" or "fp8" to quantise', '"16bit"')
        for size in (*self.up_proj.shape[1:], self.down_proj.shape[1]):
            if size % 16 != 0:
                fail("nn.ReLU2Experts", "multiples of 16 features to quantise", size)
        for name in () if self._is_quantized else _LAYERS:
            made = self._quantized(name, getattr(self, name))
            delattr(self, name)
            self.register_buffer(name, made["weight"])
            self.register_buffer(f"{name}_scale", made["weight_scale"])
        return self

    def _recipe_in_use(self) -> Recipe | None:
        return self.recipe

    def _stored_weights(self) -> tuple[Stored, Stored]:
        return Stored(self.up_proj), Stored(self.down_proj)

    def _quantized(self, name: str, w: Tensor) -> dict[str, Tensor]:
        """Quantise a weight, pruned by what it is: float8 has equals of what was not."""
        kind = "none" if self.recipe is None or not self.sparse else self.recipe.sparse_weights
        if kind == "both" or (kind == "up" and name == "up_proj"):
            w = prune24(w, -1 if name == "up_proj" else -2)
        return quantized_experts(w)

    @property
    def _is_quantized(self) -> bool:
        return "up_proj" in self._buffers

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        let_go(self)
        for name in _LAYERS:
            key, own = f"{prefix}{name}", getattr(self, name)
            found = state_dict.get(key)
            if found is None or found.shape != own.shape or (found.dtype == FP8) == self._is_quantized:
                continue
            if self._is_quantized:
                state_dict[key], state_dict[f"{key}_scale"] = self._quantized(name, found).values()
                continue
            scale = state_dict.pop(f"{key}_scale", None)
            if scale is None:
                fail("nn", f"the state to have {key}_scale beside float8 weights", "none")
            state_dict[key] = sixteen_bit(found, scale, own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "_buffers": as_bytes(self._buffers)}

    def __setstate__(self, state):
        super().__setstate__(state)
        for name in _LAYERS if self._is_quantized else ():
            self._buffers[name] = self._buffers[name].view(FP8)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        let_go(self)
        super()._apply(fn, recurse)
        with_dtypes_of(self._buffers, before)
        return self

    def extra_repr(self) -> str:
        """Name the sizes, and what differs from the default."""
        experts, hidden, dim = self.up_proj.shape
        given = [f"precision={self.precision}"]
        given += [f"recipe={self.recipe}"] if self.recipe is not None else []
        given += ["float8_e4m3fn"] if self._is_quantized else []
        return f"{experts} experts, {dim} -> {hidden} -> {self.down_proj.shape[1]}, {', '.join(given)}"
