"""Look at the feed-forward networks of a model while it runs on data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse24._options import check_batches, check_model, positive_number
from sparse24.analyze import speed
from sparse24.analyze.activation import stats_of
from sparse24.analyze.counts import Counts
from sparse24.analyze.networks import Watched, networks_of, watching
from sparse24.analyze.report import ModelReport, decide
from sparse24.analyze.speed import Calls
from sparse24.convert.watch import call, evaluating
from sparse24.errors import fail
from sparse24.terminal import bar

#: Steps of `feature_density`.
_QUANTILES = 21


def analyze_model(model: nn.Module, batches: Iterable[Any], *, max_tokens: int = 65536) -> ModelReport:
    """Find out of each feed-forward network what 2:4 would drop, on your data, and whether converting it pays.

    The networks are those that `sparse24.convert` finds; converted ones and `sparse24.nn.ReLU2MLP` are looked at, too.
    The model runs as it is, dense, in evaluation mode and without gradients; every module gets its mode back. Counts
    are kept, not activations: memory does not grow with the number of batches. On a terminal a bar shows how far it is.

    Parameters
    ----------
    model : Module
        Changed by nothing.
    batches : iterable
        What the model is called with, one call each: a tensor, a tuple or list (``model(*batch)``) or a mapping
        (``model(**batch)``), on the device where the model wants it. It may be endless.
    max_tokens : int
        So many tokens are looked at in each network, then it ends. Tokens are what a network is called with, padding
        included.

    Returns
    -------
    ModelReport
        ``print(report)`` shows a table and a verdict; ``report.decisions`` is for `sparse24.ConvertConfig`.

    Raises
    ------
    RuntimeError
        ``sparse24.analyze_model: expected <argument> <rule>, got <value>``: also if there is no batch, or if the first
        one reaches no network.

    Notes
    -----
    A network is worth converting if 2:4 drops at most 8 % of its non-zeros and changes its output by at most 5 %. What
    that does to the whole model only an evaluation of the converted one tells.

    Speed-ups are those of the network alone, by number of tokens (`ModelReport.at`), over torch.compile in the same
    precision, as measured at the nearest of the sizes in ``bench/results``; 1.0 where `sparse24.relu2_mlp` runs dense
    by default. `sparse24 bench` measures your sizes on your GPU.

    Examples
    --------
    >>> report = sparse24.analyze_model(model, loader)
    >>> print(report.verdict)
    convert 22 of 24; expect 1.23x in FFN prefill (8,192 tokens) ...
    >>> sparse24.convert(model, sparse24.ConvertConfig(decisions=report.decisions))
    """
    check_model("analyze_model", model)
    max_tokens = positive_number("analyze_model", "max_tokens", max_tokens)
    check_batches("analyze_model", "batches", batches)
    networks, skipped, near_misses = networks_of(model)
    counts = {network.name: Counts(network.sizes()["d_ff"], _device_of(network)) for network in networks}
    _run(model, networks, counts, batches, max_tokens)
    skipped |= {network.name: "no batch reached it" for network in networks if not counts[network.name].tokens}
    seen = [network for network in networks if counts[network.name].tokens]
    layers = {network.name: _layer(network, counts[network.name]) for network in seen}
    precision = "fp8" if seen and all(network.is_float8() for network in seen) else "bf16"
    return ModelReport(layers, skipped, near_misses, Calls(), precision)


def _run(
    model: nn.Module, networks: list[Watched], counts: dict[str, Counts], batches: Iterable[Any], max_tokens: int
) -> None:
    """Call the model until one network has seen enough, or there is no further batch."""

    def given(network: Watched, x: Tensor, experts: Tensor | None) -> None:
        seen = counts[network.name]
        room = max_tokens - seen.tokens
        network.count(x[:room], None if experts is None else experts[:room], seen)

    called = False
    with evaluating(model), watching(networks, given), bar(max_tokens, "tokens") as show:
        for batch in batches:
            if not networks:
                return
            call(model, batch)
            tokens = max(seen.tokens for seen in counts.values())
            if tokens == 0 and not called:
                fail(
                    "analyze_model", "batches to reach the feed-forward networks of model", "a first one that does not"
                )
            called = True
            show(tokens)
            if tokens >= max_tokens:
                return
    if not called:
        fail("analyze_model", "batches to have at least one", "none")


def _layer(network: Watched, counts: Counts) -> dict[str, Any]:
    """Everything about one network, as `ModelReport.layers` has it."""
    density = counts.active.double().sort().values / counts.tokens
    places = torch.linspace(0, counts.features - 1, _QUANTILES).round().long()
    layer = {"tokens": counts.tokens, **network.sizes(), **stats_of(counts).as_dict()}
    layer["feature_density"] = density.cpu()[places].tolist()
    layer |= speed.speedups(layer, Calls())
    return layer | {"state": network.state, **decide(layer)}


def _device_of(network: Watched) -> torch.device:
    return next(tensor for tensor in (*network.module.parameters(), *network.module.buffers())).device
