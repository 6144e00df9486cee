"""How converted modules run: what the caller of `sparse24.convert` chooses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparse24._options import boolean, check_batches, whole_number
from sparse24.errors import fail, type_name
from sparse24.mlp import Precision
from sparse24.ops.activation import threshold_of
from sparse24.recipe import Recipe, SparseWeights, check_recipe, check_sparse_weights, recipe_of

#: What `relu2_mlp` calls the choices of `dtype`.
PRECISIONS: dict[str, Precision] = {"auto": "auto", "bf16": "16bit", "fp8": "fp8"}


@dataclass(frozen=True)
class ConvertConfig:
    """How converted modules run.

    Parameters
    ----------
    dtype : {"auto", "bf16", "fp8"}
        "bf16" computes in the 16-bit dtype of the input, so float16 stays float16; "fp8" quantises to float8_e4m3fn.
        "auto" is "fp8" for weights that are float8 with a scale, else "bf16". See `precision` of `sparse24.relu2_mlp`.
    recipe, min_tokens, recompute
        As in `sparse24.relu2_mlp`.
    decisions : mapping of str to (bool or {"auto", "bf16", "fp8"})
        For modules by name, as `sparse24.analyze_model` decides: False leaves one out, True and modules without an
        entry are converted with `dtype`, a string replaces `dtype`.
    threshold : float
        As in `sparse24.relu2_mlp`. A converted module then computes something else than before: for models that are
        trained with it.
    decode : bool
        For models that generate: few tokens without gradients run exactly, without pruning and without reading the
        weights of neurons that are zero, as `sparse24.nn.ReLU2MLP.prepare_decode_` says. Each module keeps a copy of
        its second weight for it, as many bytes again, unless it stores that by neuron already, as a parameter
        [F, D_out].
    sparse_weights : {"none", "up", "both"}
        As `Recipe.sparse_weights`, which it sets: the networks run with 2:4 weights. The stored weights stay dense;
        calls for inference take a copy of the pruned ones, as large as these, that is no part of the state_dict.
    adapters : int
        With 2:4 weights: the rank of adapters beside the first weight, fitted to what pruning takes away from it.
        ``x @ (pruned(w1) + left @ right).T``, with parameters of the module ``sparse24_up_left`` [F, rank] and
        ``sparse24_up_right`` [rank, D], which are trained and in the state_dict; `revert` removes them. More than D of
        them would say nothing that D do not: D are made then.
    calibration : iterable, optional
        Batches as `sparse24.analyze_model` takes them, a few. With them the entries of w1 are chosen, and adapters
        fitted, by what they do to the output: a magnitude counts times the norm of its input feature over all tokens.
        The choice then stays. Default: by magnitude alone, in each call.

    Notes
    -----
    "fp8" of weights that are not float8 keeps float8 copies of both in evaluation, a byte for each entry, and with
    `decode` one more of the second; training quantises in each call. They are made at conversion, or in the first call
    in evaluation, and follow the weights as those of `prepare_decode_` do. Of weights that FSDP gathers there are none.

    Raises
    ------
    RuntimeError
        ``sparse24.ConvertConfig: expected <field> <rule>, got <value>``.
    """

    dtype: Literal["auto", "bf16", "fp8"] = "auto"
    recipe: Recipe | None = None
    min_tokens: int | None = None
    recompute: bool = False
    decisions: Mapping[str, bool | str] = field(default_factory=dict)
    threshold: float = 0
    decode: bool = False
    sparse_weights: SparseWeights = "none"
    adapters: int = 0
    calibration: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        modes = ", ".join(f'"{name}"' for name in PRECISIONS)
        if not _is_mode(self.dtype):
            fail("ConvertConfig", f"dtype to be one of {modes}", f'"{self.dtype}"')
        if isinstance(self.recipe, Mapping) and self.recipe:  # of dataclasses.asdict, or a file; empty it says nothing
            object.__setattr__(self, "recipe", recipe_of("ConvertConfig", self.recipe))
        check_recipe("ConvertConfig", self.recipe)
        if self.min_tokens is not None:
            object.__setattr__(self, "min_tokens", whole_number("ConvertConfig", "min_tokens", self.min_tokens))
        object.__setattr__(self, "recompute", boolean("ConvertConfig", "recompute", self.recompute))
        object.__setattr__(self, "decode", boolean("ConvertConfig", "decode", self.decode))
        object.__setattr__(self, "threshold", threshold_of("ConvertConfig", self.threshold))
        check_sparse_weights("ConvertConfig", self.sparse_weights)
        object.__setattr__(self, "adapters", whole_number("ConvertConfig", "adapters", self.adapters))
        of_recipe = "none" if self.recipe is None else self.recipe.sparse_weights
        if self.sparse_weights != "none" and of_recipe not in ("none", self.sparse_weights):
            fail("ConvertConfig", f'sparse_weights to be "{of_recipe}" as recipe says', f'"{self.sparse_weights}"')
        if self.sparse_weights == of_recipe == "none" and (self.adapters or self.calibration is not None):
            what = "adapters" if self.adapters else "calibration"
            fail("ConvertConfig", f'sparse_weights to be "up" or "both" for {what}', '"none"')
        if self.calibration is not None:
            check_batches("ConvertConfig", "calibration", self.calibration)
        if self.adapters and self.recipe is not None and self.recipe.double_pruning:
            fail("ConvertConfig", "recipe to prune each weight once, beside adapters", "double_pruning=True")
        if not isinstance(self.decisions, Mapping):
            fail("ConvertConfig", "decisions to be a mapping of names", type_name(self.decisions))
        for name, decision in self.decisions.items():
            if not isinstance(decision, bool) and not _is_mode(decision):
                fail("ConvertConfig", f"decisions to be True, False or one of {modes}", f"{decision!r} for {name}")


def _is_mode(value: object) -> bool:
    return isinstance(value, str) and value in PRECISIONS
