"""Decisions on sizes that nobody knows while tracing: how many tokens ``x[mask]`` has."""

import torch


def or_true(condition: bool) -> bool:
    """Return the condition, or True where it hangs on such a size."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # heavy to import

    return guard_or_true(condition)


def or_false(condition: bool) -> bool:
    """Return the condition, or False where it hangs on such a size."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def known(condition: bool) -> bool:
    """Return whether the condition holds whatever the symbolic sizes are: it becomes no guard, and parts no graph."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def exporting() -> bool:
    """Whether a program is exported, which has one graph for all sizes."""
    # Not torch.compiler.is_exporting(): Dynamo of torch 2.11 takes it for true.
    return torch.compiler._is_exporting_flag
