"""What converted experts compute, from the weights of the module and the choices of its router."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sparse24._symbolic import or_true
from sparse24.convert.conversion import Conversion, weights_of
from sparse24.convert.run import input_problem
from sparse24.convert.seen import difference, trains
from sparse24.convert.weights import copies_help, for_inference, prunes
from sparse24.experts import experts_network
from sparse24.experts.pruning import pruned
from sparse24.experts.routing import routing_problem, run_routed
from sparse24.mlp.inference import learns
from sparse24.nn.children import weight_problem


def run_experts(module: Any, conversion: Conversion, x: Any, index: Any, factors: Any) -> Tensor | str:
    """Compute them, or say why this call has to run the original forward."""
    problem = difference(module, conversion.seen)
    if problem is None and not conversion.in_training and trains(module):
        problem = "in training it computes something else, as dropout does"
    first, second = (weights_of(module, layer) for layer in (conversion.up, conversion.down))
    problem = problem or weight_problem(conversion.up.name, first.weight)
    problem = problem or weight_problem(conversion.down.name, second.weight)
    problem = problem or _choices_problem(x, index, factors) or input_problem(x)
    if problem is not None:
        return problem
    options = conversion.options
    recipe, settled = options.get("recipe"), False
    if copies_help(module, conversion, first) and not learns(x, first.weight, second.weight, factors):
        entering = for_inference(module, conversion, first, second)
        first, second, settled = entering.first, entering.second, entering.settled
    least = options.get("min_tokens")
    sparse = module.sparse and (least is None or or_true(x.shape[0] >= least))
    if prunes(conversion) and settled:
        recipe = replace(recipe, sparse_weights="none")  # copies are made of what is pruned
    elif prunes(conversion) and module.sparse and not sparse:
        # One network, however many tokens there are.
        w1, w2 = pruned(recipe.sparse_weights, first.weight, second.weight, second.scale)
        first, second = first._replace(weight=w1), second._replace(weight=w2)

    def experts(rows: Tensor, offsets: Tensor, row_scale: Tensor) -> Tensor:
        return experts_network(
            rows,
            first.weight,
            second.weight,
            offsets,
            row_scale=row_scale,
            precision=conversion.precision,
            w1_scale=first.scale,
            w2_scale=second.scale,
            recipe=recipe,
            sparse=sparse,
            min_rows=None if least is None else 0,
        )

    return run_routed(x, index, factors, first.weight.shape[0], experts)


def _choices_problem(x: Any, index: Any, factors: Any) -> str | None:
    """Why the arguments are not tokens, their experts and their factors."""
    if not all(isinstance(t, Tensor) for t in (x, index, factors)):
        return "its arguments are not three tensors"
    if x.dim() != 2 or index.dim() != 2 or factors.dim() != 2:
        return f"it is called with tensors of {x.dim()}, {index.dim()} and {factors.dim()} dimensions"
    wrong = routing_problem(x, index, factors)
    return None if wrong is None else f"expected {wrong[0]}, got {wrong[1]}"
