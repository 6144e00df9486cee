"""A schedule for the Trainer of transformers."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse24.schedule import Schedule


class ScheduleCallback(TrainerCallback):
    """Set before each step whether it runs sparse.

    Parameters
    ----------
    schedule : Schedule, optional
        Default: that of all steps of the training, ``sparse24.Schedule(state.max_steps)``.

    Raises
    ------
    RuntimeError
        When training begins: the model has no `sparse24.nn.ReLU2MLP` and no converted modules.

    Examples
    --------
    >>> sparse24.convert(model)
    >>> Trainer(model, args, train_dataset=data, callbacks=[ScheduleCallback()]).train()
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the schedule, if none was given."""
        if self.schedule is None:
            self.schedule = Schedule(state.max_steps)
        self._apply(kwargs["model"], state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the schedule; steps with accumulated gradients are one."""
        self._apply(kwargs["model"], state.global_step)

    def _apply(self, model: nn.Module, step: int) -> None:
        assert self.schedule is not None
        self.schedule.apply(model, step)
