"""Find the squared-ReLU feed-forward networks of a model, by what they compute, and the reasons against converting one.

Two groups of modules are looked at: those whose layers have the names of a network's, which are reported whatever they
compute, and those that own two layers of any names whose sizes fit. The second are reported if running a replica of
them shows two layers with an activation of the ReLU family between them. Attention and heads of models own two layers,
too.
"""

from collections.abc import Iterator
from itertools import permutations, product
from typing import NamedTuple

from torch import nn

from sparse24.convert.call import called_children
from sparse24.convert.conversion import Layer
from sparse24.convert.experts import examine_experts, experts_of
from sparse24.convert.layers import is_called, is_parameter, layers_of, may_be_bias, named_pair, owner_of, weight_of
from sparse24.convert.mention import mentions_relu2
from sparse24.convert.probe import probe
from sparse24.convert.problems import (
    CONVERTED,
    PATCHED,
    dropout_problem,
    further_problem,
    further_tensors,
    layer_problem,
    module_problem,
    sizes_problem,
)
from sparse24.convert.reason import IN_TRAINING, OTHER, Mismatch
from sparse24.convert.replica import Network
from sparse24.convert.seen import difference, look
from sparse24.format import FP8
from sparse24.nn import ReLU2Experts, ReLU2MLP

#: Weights with more entries are not tried at their own sizes where nothing says squared ReLU.
_LARGE = 2**18
#: Children that are no reason; dropout that drops anything is one of its own.
_SAYS_NOTHING = (nn.Linear, nn.Dropout, nn.Identity)


class Found(NamedTuple):
    """A feed-forward network of a model: what it computes, or the reason against converting it."""

    name: str
    module: nn.Module
    network: Network | None
    reason: str


class _Candidate(NamedTuple):
    """A module with two layers."""

    name: str
    module: nn.Module
    up: str
    down: str
    is_named: bool


def find_networks(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    """Look at all modules of a model.

    Returns
    -------
    list of Found
        Feed-forward networks with an activation of the ReLU family, or with layers of known names.
    dict of str to str
        Of further modules with two layers, by name, why they are no such network.
    """
    found, others, alike = [], {}, []
    for candidate in _candidates(model):
        network, reason, counts = _examine(candidate, alike)
        if counts:
            found.append(Found(candidate.name, candidate.module, network, reason))
        else:
            others[candidate.name] = reason
    return found, others


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    for name, module in model.named_modules():
        if isinstance(module, (ReLU2MLP, ReLU2Experts)):
            continue
        pair = experts_of(module) or named_pair(module)
        if pair is not None:
            yield _Candidate(name, module, *pair, True)
            continue
        layers = layers_of(module)
        if len(layers) == 2 and is_called(module) and not _stand_in_one_child(module, layers):
            yield _Candidate(name, module, layers[0], layers[1], False)


def _stand_in_one_child(module: nn.Module, layers: list[str]) -> bool:
    """Whether the network is a child, which is looked at, too."""
    first = {name.rpartition(".")[0].partition(".")[0] for name in layers}
    return len(first) == 1 and first != {""} and is_called(module._modules[first.pop()])


def _examine(candidate: _Candidate, alike: list[object]) -> tuple[Network | None, str, bool]:
    """Tell what a module computes, why it cannot be converted, and whether it counts as a network."""
    _, module, up, down, is_named = candidate
    if experts_of(module):
        return examine_experts(module, up, down)
    reason, dropout = module_problem(module), dropout_problem(module)
    further, biases = further_problem(module, up, down), _biases(module, up, down)
    problems = layer_problem(module, up) or layer_problem(module, down) or (not biases and further)
    problems = problems or difference(module, look(module, called_children(module)))
    reason = reason or (problems and (dropout or problems))
    weights = [weight_of(module, name) for name in (up, down)]
    if not reason and (weights[0].dtype == FP8) != (weights[1].dtype == FP8):
        reason = "of its weights one is float8 and one is not"
    if reason and (is_named or reason == CONVERTED):
        return None, reason, True
    networks = list(_readings(candidate, biases))
    if not networks:
        return None, further if biases else sizes_problem(module, up, down), is_named
    if (further and not biases) or reason == PATCHED:  # what it runs is not its two layers
        return None, reason or "", False
    is_small = max(w.numel() for w in weights) <= _LARGE
    found = probe(module, networks, is_named or is_small or mentions_relu2(module), alike)
    if isinstance(found, Mismatch) and networks[0].up.name != up and not found.is_relu:
        return None, sizes_problem(module, up, down), False
    if isinstance(found, Mismatch) and biases and (not found.is_relu or found.reason == OTHER):  # they are no biases
        return None, reason or further or "", is_named
    if isinstance(found, Mismatch):
        # Dropout can be switched off: another activation, or a residual, is the better reason.
        is_better = found.is_relu and found.reason != IN_TRAINING
        why = dropout if dropout and not is_better else found.reason + _others(module)
        return None, reason or why, is_named or found.is_relu
    return found, reason or dropout or "", True


def _biases(module: nn.Module, up: str, down: str) -> list[str]:
    """Name all further parameters, if they may be biases of weights that are parameters."""
    names = further_tensors(module, up, down)
    weights = [name for name in (up, down) if is_parameter(module, name)]
    fits = len(names) <= len(weights) and all(may_be_bias(owner_of(module, name)) for name in names)
    return names if fits else []


def _readings(candidate: _Candidate, biases: list[str]) -> Iterator[Network]:
    """List every reading of the weights whose sizes fit: in both orders, unless names say which is the first."""
    _, module, first, second, is_named = candidate
    for up, down in ((first, second),) if is_named else ((first, second), (second, first)):
        shapes = [weight_of(module, name).shape for name in (up, down)]
        stored = [(False, True) if is_parameter(module, name) else (False,) for name in (up, down)]
        for up_transposed, down_transposed in product(*stored):
            f, d = reversed(shapes[0]) if up_transposed else shapes[0]
            d_out, f_down = reversed(shapes[1]) if down_transposed else shapes[1]
            if f != f_down:
                continue
            for first_bias, second_bias in dict.fromkeys(permutations((*biases, "", ""), 2)):
                named = ((first_bias, up, f), (second_bias, down, d_out))
                if {first_bias, second_bias}.issuperset(biases) and all(_fits(module, *of) for of in named):
                    layers = Layer(up, up_transposed, first_bias), Layer(down, down_transposed, second_bias)
                    yield Network(*layers, d, f, d_out)


def _fits(module: nn.Module, bias: str, weight: str, size: int) -> bool:
    """Whether a parameter may be the bias of a weight; no name is no bias."""
    return not bias or (is_parameter(module, weight) and len(owner_of(module, bias)) == size)  # type: ignore[arg-type]


def _others(module: nn.Module) -> str:
    """Name the children that may be the reason."""
    called = called_children(module)
    children = [(n, c) for n, c in module.named_children() if called is None or n in called]
    others = [f"{name}: {type(child).__name__}" for name, child in children if type(child) not in _SAYS_NOTHING]
    return f" ({', '.join(others)})" if others else ""
