"""A schedule for the Trainer of Lightning."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer

from sparse24.schedule import Schedule


class ScheduleCallback(Callback):
    """Set before each batch whether it runs sparse.

    Parameters
    ----------
    schedule : Schedule, optional
        Default: that of all steps of the training, ``sparse24.Schedule(trainer.estimated_stepping_batches)``.

    Raises
    ------
    RuntimeError
        When training begins: the module has no `sparse24.nn.ReLU2MLP` and no converted modules, or nobody knows how
        many steps there are and no schedule was given.

    Examples
    --------
    >>> sparse24.convert(module.model)
    >>> Trainer(max_steps=10_000, callbacks=[ScheduleCallback()]).fit(module, data)
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the schedule, if none was given."""
        if self.schedule is None:
            self.schedule = Schedule(trainer.estimated_stepping_batches)  # type: ignore[arg-type]
        self.schedule.apply(pl_module, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Apply the schedule; batches whose gradients are accumulated are one step."""
        assert self.schedule is not None
        self.schedule.apply(pl_module, trainer.global_step)
