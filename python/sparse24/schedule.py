"""When training is dense: a schedule sets the switch `sparse` of the networks of a model, step by step."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from sparse24._options import whole_number
from sparse24.errors import fail, type_name
from sparse24.nn import ReLU2Experts, ReLU2MLP


@dataclass(frozen=True)
class Schedule:
    """Which steps of a training run are sparse: all but a dense start and, optionally, a dense end.

    At initialisation half of the activation is not zero and 2:4 would drop a fifth of that; within some hundred steps
    most of it is.

    Parameters
    ----------
    total_steps : int
        Steps of the run.
    dense_warmup_steps : int
        Steps at the start that run dense.
    dense_final_steps : int
        Steps at the end that run dense.

    Raises
    ------
    RuntimeError
        ``sparse24.Schedule: expected <field> <rule>, got <value>``.

    Warns
    -----
    UserWarning
        No step is sparse.

    Notes
    -----
    Source: Haziza et al. 2025, arXiv 2503.16672 (warm-up of 1,000 steps).

    Examples
    --------
    >>> schedule = sparse24.Schedule(10_000)
    >>> for step in range(schedule.total_steps):
    ...     schedule.apply(model, step)
    ...     train_one_step(model)
    """

    total_steps: int
    dense_warmup_steps: int = 1000
    dense_final_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("total_steps", "dense_warmup_steps", "dense_final_steps"):
            object.__setattr__(self, name, whole_number("Schedule", name, getattr(self, name)))
        if 0 < self.total_steps <= self.dense_warmup_steps + self.dense_final_steps:
            warnings.warn(f"sparse24: no step of {self} is sparse", stacklevel=3)

    def is_sparse(self, step: int) -> bool:
        """Tell whether a step runs sparse.

        Parameters
        ----------
        step : int
            Counted from 0.

        Returns
        -------
        bool

        Raises
        ------
        RuntimeError
            ``sparse24.Schedule: expected step <rule>, got <value>``.
        """
        step = whole_number("Schedule", "step", step)
        return bool(self.dense_warmup_steps <= step < self.total_steps - self.dense_final_steps)

    def apply(self, model: nn.Module, step: int) -> bool:
        """Set the attribute `sparse` of all feed-forward modules in `model` as the step wants it.

        Call it before each step. A compiled model is traced again at a change of phase, not at every step: the
        attribute is a constant of the graph.

        Parameters
        ----------
        model : Module
            With `sparse24.nn.ReLU2MLP` or `sparse24.nn.ReLU2Experts` modules, or modules that were converted to run
            as one.
        step : int
            Counted from 0.

        Returns
        -------
        bool
            What the attribute is now.

        Raises
        ------
        RuntimeError
            There is no such module in `model`.
        """
        if not isinstance(model, nn.Module):
            fail("Schedule", "model to be a torch.nn.Module", type_name(model))
        sparse = self.is_sparse(step)
        modules = list(feed_forwards(model))
        if not modules:
            fail("Schedule", "model to have ReLU2MLP or converted modules", type(model).__name__)
        for module in modules:
            module.sparse = sparse
            # A compiled step cannot find out that its scales are known. Few steps wait for the device here: the first.
            if not getattr(module, "scales_known", True):
                module.refresh_scales()
        return sparse


def feed_forwards(model: nn.Module) -> Iterator[nn.Module]:
    """Find the modules that have the switch."""
    for module in model.modules():
        if isinstance(module, (ReLU2MLP, ReLU2Experts)) or _is_converted(module):
            yield module


def _is_converted(module: nn.Module) -> bool:
    """Whether the module itself is, not what it wraps: a wrapper, as of torch.compile, has the attributes of that."""
    name = "_sparse24_converted"
    return bool(module.__dict__.get(name, False) or getattr(type(module), name, False))
