"""What has to be done after each step of an optimizer of torch: fused ones write without a new version of a tensor."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_handles: dict[Callable[[Optimizer], None], Any] = {}


def after_each_step(function: Callable[[Optimizer], None]) -> None:
    """Have a function of a module called after the steps of all optimizers of this process, from now on.

    Asked again, it is still called once. Functions are called in the order in which they were first asked for; whoever
    asks first is the first who needs it, so that a process without such needs pays nothing. What is to be told of a
    step, the function's own module holds, weakly: nothing here is of a module or a tensor, which can be copied, pickled
    and freed as before.
    """
    if function not in _handles:
        _handles[function] = register_optimizer_step_post_hook(lambda optimizer, *_: function(optimizer))
