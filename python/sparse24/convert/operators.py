"""At which sizes a module calls other operators than at those that it was tried at.

Tensors on the meta device have no numbers: running a module with them costs little, whatever the sizes are. Where it
then calls others, it tells sizes apart, and is to be tried there with numbers.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse24.convert.replica import make_replica, put, run

Arranged = Callable[[Tensor], Tensor]

#: How many tokens are looked at: few, one by one, and more and more of them, in even numbers and odd ones.
_TOKENS = (*range(1, 17), *(2**power + more for power in range(5, 18) for more in (0, 1)))
#: Kinds of calls that are told apart, after which a module is not asked any more.
_KINDS = 8
#: Calls of one run: what cuts its input into small parts would make thousands.
_CALLS = 500


def told_apart(replica: nn.Module, x: Tensor, tried: tuple[Arranged, ...]) -> Iterator[Arranged]:
    """Yield an arrangement of tokens for each way that a replica has beside those that it was tried in.

    Parameters
    ----------
    replica : Module
        With weights of any device.
    x : Tensor [.., D]
        An input that it was tried with.
    tried : tuple of callable
        In which arrangements of these tokens, beside as they are.
    """
    without_numbers, x = _on_meta(replica), x.to("meta")
    if without_numbers is None:
        return
    known = {called(without_numbers, x)} | {called(without_numbers, arranged(x)) for arranged in tried}
    for count in _TOKENS:
        for arranged in _arrangements(count):
            found = called(without_numbers, arranged(x))
            if found is not None and found not in known:
                known.add(found)
                yield arranged
        if len(known) > _KINDS:
            return


def tells_sizes_apart(module: nn.Module, replica: nn.Module, x: Tensor, own: Tensor) -> bool:
    """Whether a module calls other operators with an input of its `own` sizes than its small replica does with x."""
    pairs = (_on_meta(module), own), (_on_meta(replica), x)
    large, small = (None if which is None else called(which, t.to("meta")) for which, t in pairs)
    return large is not None and small is not None and large != small


def called(replica: nn.Module, x: Tensor) -> frozenset[tuple[Any, ...]] | None:
    """Tell which operators it calls with which numbers, that are no sizes; None where it does not run, or for long."""
    with _Operators() as operators:
        try:
            run(replica, x, training=False)
        except Exception:  # of the module, and it may be anything
            return None
    return frozenset(operators.called)


class _Operators(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[tuple[Any, ...]] = set()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > _CALLS:
            raise RuntimeError("too many calls")
        given = zip(function._schema.arguments, args, strict=False)
        numbers = (value for argument, value in given if str(argument.type) in ("number", "Optional[number]"))
        self.called.add((str(function), *numbers))
        return function(*args, **(kwargs or {}))


def _arrangements(count: int) -> tuple[Arranged, ...]:
    """Take so many tokens of a trial, which repeat: as a list, as one batch, as batches of one."""

    def tokens(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return flat.repeat(-(-count // len(flat)), 1)[:count]

    return tokens, lambda x: tokens(x)[None], lambda x: tokens(x)[:, None]


def _on_meta(module: nn.Module) -> nn.Module | None:
    """Copy a module with tensors of no numbers; None where it has tensors of a kind that is on its device alone."""
    replica = make_replica(module)
    try:
        for child in replica.modules():
            for name, t in (*child._parameters.items(), *child._buffers.items()):
                if t is not None:
                    put(child, name, t.detach().to("meta"))
    except Exception:  # of a subclass of tensors, and it may be anything
        return None
    return replica
