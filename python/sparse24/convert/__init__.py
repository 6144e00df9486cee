"""Convert the squared-ReLU feed-forward networks of a model to 2:4 activations, and back."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn

from sparse24._options import boolean, check_batches, check_model, whole_number
from sparse24.convert.adapters import calibrate, fit
from sparse24.convert.call import called_children
from sparse24.convert.conversion import Conversion
from sparse24.convert.find import find_networks
from sparse24.convert.forward import install, uninstall
from sparse24.convert.layers import layers_of, weight_of
from sparse24.convert.near import near_misses
from sparse24.convert.problems import experts_problem, precision_problem, weights_problem
from sparse24.convert.run import dense_tokens
from sparse24.convert.seen import look
from sparse24.convert.weights import check_mergeable, merge_weights
from sparse24.errors import fail, type_name
from sparse24.format import FP8
from sparse24.mlp import Precision
from sparse24.ops.activation import threshold_of
from sparse24.recipe import Recipe, SparseWeights, check_recipe, check_sparse_weights, recipe_of

_PRECISION: dict[str, Precision] = {"auto": "auto", "bf16": "16bit", "fp8": "fp8"}
#: Which fields of `ConvertConfig` are arguments of `relu2_mlp`.
_OPTIONS = ("recipe", "min_tokens", "recompute", "threshold")
_LOOKED_FOR = "two linear layers or weights, [F, D] and [D_out, F], and a squared ReLU between them"


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
        ``sparse24_up_right`` [rank, D], which are trained and in the state_dict; `revert` removes them.
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
        modes = ", ".join(f'"{name}"' for name in _PRECISION)
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
    return isinstance(value, str) and value in _PRECISION


@dataclass
class ConvertReport:
    """What `convert` did.

    Attributes
    ----------
    converted : list of str
        Names of the modules.
    skipped : dict of str to str
        Names of further feed-forward networks, and why each was left as it is.
    evaluation_only : list of str
        Which of the converted run as before conversion in training, where they have dropout or the like.
    near_misses : dict of str to str
        Names of modules whose code mentions squared ReLU, and why each is no feed-forward network of two layers.
    looked_at : int
        How many modules of the model own other modules or two weights.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    evaluation_only: list[str] = field(default_factory=list)
    near_misses: dict[str, str] = field(default_factory=dict)
    looked_at: int = 0

    def __str__(self) -> str:
        text = f"sparse24: converted {len(self.converted)} of {len(self.converted) + len(self.skipped)}"
        if self.evaluation_only:
            text += f" ({len(self.evaluation_only)} in evaluation only: in training they have dropout or the like)"
        if self.skipped:
            counts = Counter(self.skipped.values())
            reasons = [reason if len(counts) == 1 else f"{count}: {reason}" for reason, count in counts.most_common()]
            text += f", skipped {len(self.skipped)} ({'; '.join(reasons)})"
        elif not self.converted and (looked_at := self.looked_at or len(self.near_misses)):
            text += f": none of {looked_at} {'modules' if looked_at > 1 else 'module'} has {_LOOKED_FOR}"
        if self.near_misses:
            text += "\nnear misses, of which parts can run `sparse24.relu2_mlp`:"
            for reason in dict.fromkeys(self.near_misses.values()):
                names = [name or "the model" for name, found in self.near_misses.items() if found == reason]
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                text += f"\n  {', '.join(names[:3])}{more}: {reason}"
        return text


def convert(
    model: nn.Module,
    config: ConvertConfig | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    quiet: bool = False,
) -> ConvertReport:
    """Make the feed-forward networks of a model run `sparse24.relu2_mlp`, in place.

    Only the forward changes. Children and parameters stay what and where they are, and with them the keys of the
    state_dict, the groups of an optimizer and hooks on the module. A network is any module that owns two linear layers
    or two-dimensional parameters, [F, D] and [D_out, F] or [F, D_out], with their biases or without, under any names,
    and of which a replica with small random weights computes ``W2 max(W1 x + b1, 0)^2 + b2``; also
    `torch.nn.Sequential`, layers in lists, and the network inside of `torch.nn.TransformerEncoderLayer` and
    `torch.nn.TransformerDecoderLayer`. So inlined activations are found, `torch.nn.Linear` subclasses that cast float32
    weights too, and gated, leaky and smoothed variants are not. It has to be that network for inputs of every shape, in
    every dtype that it takes, and in its gradients.

    The experts of a mixture run `sparse24.relu2_experts` where a module owns all of their weights, [E, F, D] and
    [E, D_out, F], and is called with tokens, the experts of each and their factors, as transformers' `NemotronHExperts`
    is. Routers stay as they are, and experts that all tokens share are networks. `threshold` is refused for experts;
    `recompute` and `decode` change nothing for them.

    The report counts networks with an activation of the ReLU family, and modules whose layers have common names
    (up_proj and down_proj, c_fc and c_proj, fc and proj, fc1 and fc2, dense_h_to_4h and dense_4h_to_h, linear_fc1 and
    linear_fc2, linear_1 and linear_2, key and value) whatever they compute. Near misses are modules whose code mentions
    squared ReLU, and which are something else: three layers, a bank of weights, experts that are called in another way.
    `sparse24.nn.ReLU2MLP` and `sparse24.nn.ReLU2Experts` modules are not counted.

    Parameters
    ----------
    model : Module
        Or one network itself. Before `torch.compile`, sharding and distribution, after adapters are merged. The
        weights may be on the meta device.
    config : ConvertConfig, optional
        Default: ``ConvertConfig()``.
    module_filter_fn : callable, optional
        ``module_filter_fn(module, name)``: False leaves the module out.
    quiet : bool
        Do not print the report.

    Returns
    -------
    ConvertReport
        Its text, which is printed, is "converted n of m, skipped k (why)", and a line for each kind of near miss.

    Raises
    ------
    RuntimeError
        ``sparse24.convert: expected <argument> <rule>, got <value>``. A network that cannot be converted is no error:
        the report says why.

    Notes
    -----
    The new forward reads the weights and does not call the children. Where that would be wrong, a network is skipped:
    distributed (DTensor), quantised or parametrised weights, adapters (LoRA), hooks on children, children with a
    patched forward, dropout in training. One in evaluation mode whose dropout does nothing there is converted, and runs
    as before conversion in training. If such a thing appears later, or a child or an attribute (a number, a string, a
    function: the `p` of a dropout, a clip, an activation) is another than at conversion, the converted module notices
    when it is called, and runs as before conversion with a warning, once. What else its forward reads is read at
    conversion only: globals, closures, containers and the contents of other objects. A compiled module looks when it is
    traced, without a warning, and guards on attributes and types, but Dynamo does not guard on hooks: register them
    before. It also runs as before conversion with inputs that the kernels do not take, such as float32 on CUDA without
    autocast, and with further arguments, unless they are None or their default. Hooks for all modules of the process
    see the network and not its children; hooks of accelerate that only move inputs to the weights are followed.
    Conversion is whole or not at all: where it raises, nothing has changed. A replica has other sizes than a large
    module, and random weights and inputs: what a forward does for one value alone is not seen, and what it does at one
    size alone only where it then calls other operators, at the numbers of tokens that are looked at.
    Float8 weights are taken with their `weight_scale`, and the `input_scale` of the second layer as the scale of the
    activation, or the `scale_y_factor` of the first (`sparse24.nn.QuantizedLinear` has one); the input of the first is
    quantised per token.

    A converted module gets a class of its own, a subclass of what it was, and can be copied and pickled (not loaded
    without this library). It has two switches, read at each call and guarded on by `torch.compile`: `sparse` (False:
    dense in the same precision; `sparse24.Schedule` sets it) and `sparse24_enabled` (False: as before conversion).
    `sparse24.disabled` switches all off for a while, `sparse24.revert` undoes the conversion. Calls for inference in 16
    bits whose tokens are too few for 2:4 run the forward of before conversion, so that they are no slower on the host.

    Examples
    --------
    >>> report = sparse24.convert(model, sparse24.ConvertConfig(dtype="fp8"))
    sparse24: converted 24 of 24
    """
    config = ConvertConfig() if config is None else config
    check_model("convert", model)
    if module_filter_fn is not None and not callable(module_filter_fn):
        fail("convert", "module_filter_fn to be a function of a module and its name", type_name(module_filter_fn))
    if not isinstance(config, ConvertConfig):
        fail("convert", "config to be a sparse24.ConvertConfig", type(config).__name__)
    found, others = find_networks(model)
    names = {network.name for network in found}
    unknown = sorted(set(config.decisions) - names)
    if unknown:
        fail("convert", "decisions of config to name feed-forward networks of model", f'"{unknown[0]}"')

    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name in _OPTIONS}
    if config.sparse_weights != "none":
        recipe = Recipe() if config.recipe is None else config.recipe
        options["recipe"] = replace(recipe, sparse_weights=config.sparse_weights)
    options = {name: value for name, value in options.items() if value != getattr(ConvertConfig, name)}
    options.update((name, repr(value)) for name, value in options.items() if isinstance(value, float))  # threshold_of
    looked_at = sum(bool(m._modules) or len(layers_of(m)) > 1 for m in model.modules())
    report = ConvertReport(near_misses=near_misses(model, names, others), looked_at=looked_at)
    conversions: list[tuple[str, nn.Module, Conversion]] = []
    for name, module, network, reason in found:  # nothing is changed before all is known
        decision = config.decisions.get(name, True)
        if decision is False:
            report.skipped[name] = "decided against"
            continue
        if module_filter_fn is not None and not module_filter_fn(module, name):
            report.skipped[name] = "filtered out"
            continue
        precision = _PRECISION[config.dtype if decision is True else decision]
        problem = reason or precision_problem(module, network, precision) or experts_problem(network, options)
        problem = problem or weights_problem(module, network, options.get("recipe"), config.adapters)
        if network is None or problem:
            report.skipped[name] = problem
            continue
        seen = look(module, called_children(module))
        sizes = max(network.d, 1), network.f, network.d_out
        float8 = weight_of(module, network.up.name).dtype == FP8
        experts = network.experts is not None
        decode = config.decode and not experts  # few rows run exactly there anyway
        dense = dense_tokens(sizes, float8, precision, options, decode)
        how = precision, options, sizes, dense, network.in_training, decode, experts
        conversion = Conversion(network.up, network.down, seen, *how)
        conversions.append((name, module, conversion))
    calibrated = [found for found in conversions if not found[2].experts]
    norms = {} if config.calibration is None else calibrate(model, calibrated, config.calibration)
    try:
        for name, module, conversion in conversions:
            problem = install(module, conversion)
            if problem is None and (name in norms or config.adapters):
                fit(module, conversion, config.adapters, norms.get(name))
            if problem is None:
                report.converted.append(name)
                report.evaluation_only += [] if conversion.in_training else [name]
            else:
                report.skipped[name] = problem
    except BaseException:  # an interrupt: all or nothing
        for _, module, _ in conversions:
            if "_sparse24_base" in vars(type(module)):
                uninstall(module)
        raise
    if not quiet:
        print(report)
    return report


def revert(model: nn.Module, *, merge: bool = False) -> list[str]:
    """Undo `convert`, in place: the modules get their class back, and compute what they did, bit for bit.

    Parameters
    ----------
    model : Module
        Modules that were not converted stay as they are.
    merge : bool
        The parameters become the weights of the converted network first, pruned and with their adapters: a plain model
        that has learned what the adapters have. By default adapters are lost, and weights are as they were stored.

    Returns
    -------
    list of str
        Names of the modules that were converted.

    Raises
    ------
    RuntimeError
        Something else has changed the class of a converted module since (as `fully_shard` does); `merge` of tied
        weights. Nothing has changed then.
    """
    check_model("revert", model)
    found = [(n, m) for n, m in model.named_modules() if getattr(m, "_sparse24_converted", False)]
    for name, module in found:
        if "_sparse24_base" not in vars(type(module)):
            fail("revert", f"{name or 'model'} to have the class that convert gave it", type(module).__name__)
    for _, module in found if merge else ():
        check_mergeable(module)
    for _, module in found:
        if merge:
            merge_weights(module)
        uninstall(module)
    return [name for name, _ in found]
