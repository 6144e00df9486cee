"""Convert the squared-ReLU feed-forward networks of a model to 2:4 activations, and back."""

from collections.abc import Callable
from dataclasses import fields, replace

from torch import nn

from sparse24._options import boolean, check_model
from sparse24.convert.adapters import calibrate, fit
from sparse24.convert.call import called_children
from sparse24.convert.config import PRECISIONS, ConvertConfig
from sparse24.convert.conversion import Conversion
from sparse24.convert.find import find_networks
from sparse24.convert.forward import install, uninstall
from sparse24.convert.layers import layers_of, weight_of
from sparse24.convert.near import near_misses
from sparse24.convert.problems import experts_problem, precision_problem, weights_problem
from sparse24.convert.report import ConvertReport
from sparse24.convert.run import dense_tokens
from sparse24.convert.seen import look
from sparse24.convert.weights import check_mergeable, merge_weights
from sparse24.errors import fail, type_name
from sparse24.format import FP8
from sparse24.recipe import Recipe

#: Which fields of `ConvertConfig` are arguments of `relu2_mlp`.
_OPTIONS = ("recipe", "min_tokens", "recompute", "threshold")


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
    quantised per token. Weights that ``dtype="fp8"`` quantises have such a factor for few tokens that run dense.

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
    quiet = boolean("convert", "quiet", quiet)
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
        precision = PRECISIONS[config.dtype if decision is True else decision]
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
        weights, or of some that networks share which prune them otherwise, or have adapters. Nothing has changed then.
    """
    check_model("revert", model)
    merge = boolean("revert", "merge", merge)
    found = [(n, m) for n, m in model.named_modules() if getattr(m, "_sparse24_converted", False)]
    for name, module in found:
        if "_sparse24_base" not in vars(type(module)):
            fail("revert", f"{name or 'model'} to have the class that convert gave it", type(module).__name__)
    if merge:
        check_mergeable(found)
        merge_weights(found)
    for _, module in found:
        uninstall(module)
    return [name for name, _ in found]
