"""Find out by running it what a module computes: ``W2 max(W1 x + b1, 0)^2 + b2``, or something else.

What runs is a replica of small sizes (`sparse24.convert.trial`): the module itself is not touched. Where that computes
the network, it has to do so whatever shape its input has, in every dtype that it takes, and in its gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.convert.call import called_children
from sparse24.convert.layers import weight_of
from sparse24.convert.operators import tells_sizes_apart, told_apart
from sparse24.convert.reason import Mismatch
from sparse24.convert.replica import Network
from sparse24.convert.seen import look, summary
from sparse24.convert.trial import ROUGH, Trial
from sparse24.errors import dtype_name
from sparse24.format import FP8

#: What is raised where sizes are not those that a module insists on.
_OF_SIZES = (RuntimeError, ValueError, AssertionError, IndexError)
#: Weights with more entries are not tried at their own sizes where smaller ones do.
_QUICK = 2**18
#: Nor those with more even if they call other operators there: in float64 they take gigabytes.
_TOO_LARGE = 2**26
#: That a model may be cast to.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: How the tokens [magnitudes, 3, d] of a trial are arranged else: one, a list, transposed, so many that a module may
#: cut them into parts.
_ARRANGED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[0, 2],
    lambda x: x[0, 2:],
    lambda x: x[:1, 2:],
    lambda x: x.flatten(0, 1),
    lambda x: x.transpose(0, 1),
    lambda x: x[None],
    lambda x: x.flatten(0, 1).repeat(300, 1)[None],
    lambda x: x.flatten(0, 1).repeat(300, 1)[:, None],
)
_SHAPE = "it computes something else for inputs of another shape"
_SIZES = "it computes something else at its own sizes than at smaller ones"
_GRADIENTS = "its gradients are not those of W2 relu(W1 x)^2, as where something is detached"


def probe(
    module: nn.Module, networks: list[Network], own_sizes: bool = True, alike: list[object] | None = None
) -> Network | Mismatch:
    """Find the network that a module computes.

    It has to be that one in evaluation, with and without biases, and in training too if the module is in training.

    Parameters
    ----------
    module : Module
        Its parameters and buffers are those of the two layers, or it calls nothing else.
    networks : list of Network
        What it could be: layers have an order, and a parameter may be stored either way.
    own_sizes : bool
        Whether to try it also with its own sizes, which may take long, where it does not run with smaller ones.
    alike : list, optional
        What is known of modules of this model that are networks for inputs of any shape and type. Another of the same
        class, with the same attributes and sizes, is not tried on all of them; models have hundreds of experts.

    Returns
    -------
    Network or Mismatch
        One of `networks`, or why it is none of them.
    """
    errors: list[Exception] = []
    mismatch: Mismatch | None = None
    for small in (True, False) if own_sizes else (True,):  # a module may insist on its own sizes
        for network in networks:
            tried = network.smaller() if small else network
            for dtypes in _dtypes(module, network):
                try:
                    found = _try(module, tried, *dtypes)
                except Exception as caught:  # of the module, and it may be anything
                    errors.append(caught)
                    continue
                if isinstance(found, bool):
                    known = network, dtypes, summary(look(module, called_children(module)))
                    if alike is None or known not in alike:
                        different = _difference(module, network, tried, dtypes)
                        if different:
                            return different
                        if alike is not None:
                            alike.append(known)
                    return replace(network, in_training=found)
                mismatch = mismatch or found
                break  # it runs in this dtype: the answer holds
        if mismatch:
            return mismatch
        if not isinstance(errors[0], _OF_SIZES) or isinstance(errors[0], NotImplementedError):
            break
    text = str(errors[0]).partition("\n")[0]
    return Mismatch(f"its forward does not run: {type(errors[0]).__name__}: {text}", False)


def _dtypes(module: nn.Module, network: Network) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Of weights and input: the most precise first, then those that a cast inside the module may ask for."""
    own = weight_of(module, network.up.name).dtype
    if own == FP8:
        return iter([(FP8, torch.bfloat16), (FP8, torch.float32), (FP8, torch.float16)])
    return iter([(torch.float64, torch.float64), (own, own), (own, torch.bfloat16)])


def _try(
    module: nn.Module, network: Network, dtype: torch.dtype, x_dtype: torch.dtype, tolerance: float = 0
) -> bool | Mismatch:
    """Whether a replica of the module with random weights is the network in training too; or how it differs."""
    in_training = True
    for biases in (False, True):
        trial = Trial(module, network, dtype, x_dtype, biases, tolerance)
        for training in (False, True):
            found = trial.mismatch(training)
            if found and training and not module.training:
                in_training = False
            elif found:
                return found
    return in_training


def _difference(
    module: nn.Module, network: Network, tried: Network, dtypes: tuple[torch.dtype, torch.dtype]
) -> Mismatch | None:
    """Tell where a module that was the network in one trial is another. What it refuses to run says nothing."""
    trial = Trial(module, tried, *dtypes, biases=True)
    arrangements = chain(_ARRANGED, told_apart(trial.replica, trial.x, _ARRANGED))
    if any(_ran(lambda arranged=arranged: trial.mismatch(False, arranged)) for arranged in arrangements):
        return Mismatch(_SHAPE, True)
    if dtypes[0] == torch.float64 and _ran(trial.gradients_differ):
        return Mismatch(_GRADIENTS, True)
    entries = max(network.d, network.d_out) * network.f
    own = trial.x.new_empty(*trial.x.shape[:-1], network.d, device="meta")
    if tried != network and (entries <= _QUICK or tells_sizes_apart(module, trial.replica, trial.x, own)):
        if entries > _TOO_LARGE or isinstance(_ran(lambda: _try(module, network, *dtypes)), Mismatch):
            return Mismatch(_SIZES, True)
    own = weight_of(module, network.up.name).dtype
    for others in () if own == FP8 else [(own, torch.bfloat16), *((t, t) for t in _DTYPES)]:
        found = None if others == dtypes else _ran(lambda others=others: _try(module, tried, *others, ROUGH))
        if isinstance(found, Mismatch):
            return Mismatch(f"in {dtype_name(others[1])} {found.reason}", True)
    return None


def _ran(call: Callable[[], Any]) -> Any:
    """Call something that runs the module, which may refuse."""
    try:
        return call()
    except Exception:  # of the module, and it may be anything
        return None
