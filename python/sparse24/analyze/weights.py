"""What 2:4 weights do to the loss of a trained model, with adapters and without."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import nn

from sparse24._options import check_batches, check_model, whole_number
from sparse24.convert import ConvertConfig, convert, revert
from sparse24.convert.watch import call, evaluating
from sparse24.errors import fail, type_name
from sparse24.recipe import SparseWeights

#: Of adapters that are looked at by default; 0: none.
RANKS = (0, 16, 64)


def analyze_weights(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Any] | None = None,
    *,
    sparse_weights: SparseWeights = "up",
    ranks: Sequence[int] = RANKS,
    calibration: Iterable[Any] | None = None,
) -> dict[str, float]:
    """Find the loss of a model as it is, with 2:4 weights, and with adapters of some ranks beside them.

    The model is converted for each of these and reverted; its activations stay dense.

    Parameters
    ----------
    model : Module
        Not converted. It runs in evaluation mode, without gradients, and is what it was afterwards.
    batches : iterable
        As `analyze_model` takes them; read once and kept.
    loss : callable, optional
        ``loss(output, batch)``: a number. Default: the output's attribute `loss`, or the output, if that is a number.
    sparse_weights, calibration
        As in `sparse24.ConvertConfig`.
    ranks : sequence of int
        Of the adapters; 0: none.

    Returns
    -------
    dict of str to float
        The mean loss of a batch: "dense", "pruned", "rank 16" and so on.

    Raises
    ------
    RuntimeError
        There is no batch, or no network that can be converted; or one that is converted already.
    """
    check_model("analyze_weights", model)
    check_batches("analyze_weights", "batches", batches)
    if calibration is not None:
        check_batches("analyze_weights", "calibration", calibration)
    if not isinstance(ranks, Sequence):
        fail("analyze_weights", "ranks to be a sequence of numbers", type_name(ranks))
    ranks = [whole_number("analyze_weights", "ranks", rank) for rank in ranks]
    converted = [name for name, m in model.named_modules() if getattr(m, "_sparse24_converted", False)]
    if converted:  # they would be reverted with the others
        fail("analyze_weights", "model to have no converted networks", converted[0] or "model")
    kept = list(batches)
    calibrated = None if calibration is None else list(calibration)
    if not kept:
        fail("analyze_weights", "batches to have at least one", "none")
    found = {"dense": _mean_loss(model, kept, loss)}
    for rank in ranks:
        config = ConvertConfig(
            sparse_weights=sparse_weights, adapters=rank, calibration=calibrated, min_tokens=_EVERY_CALL_IS_DENSE
        )
        report = convert(model, config, quiet=True)
        try:
            if not report.converted:
                fail("analyze_weights", "model to have networks that can be converted", str(report))
            found[f"rank {rank}" if rank else "pruned"] = _mean_loss(model, kept, loss)
        finally:
            revert(model)
    return found


_EVERY_CALL_IS_DENSE = 1 << 40


def _mean_loss(model: nn.Module, batches: list[Any], loss: Callable[[Any, Any], Any] | None) -> float:
    with evaluating(model):
        losses = [_loss_of(call(model, batch), batch, loss) for batch in batches]
    return sum(losses) / len(losses)


def _loss_of(output: Any, batch: Any, loss: Callable[[Any, Any], Any] | None) -> float:
    value = loss(output, batch) if loss is not None else getattr(output, "loss", output)
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        fail("analyze_weights", "loss to give a number", f"a tensor of {value.numel()}")
    if not isinstance(value, (torch.Tensor, SupportsFloat)):  # such as the loss of a model that got no labels
        fail("analyze_weights", "loss to give a number", type_name(value))
    return float(value)
