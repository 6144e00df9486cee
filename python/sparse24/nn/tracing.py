"""Modules where `torch.fx` traces: one call each, as torch's own modules are."""

from typing import Any

from torch.fx import Proxy

from sparse24.errors import fail


def is_traced(x: object) -> bool:
    """Whether an input is what `torch.fx` traces with."""
    return isinstance(x, Proxy)


def as_one_call(module: Any, what: str, *arguments: Any) -> Any:
    """Record that a module is called, which then decides how it runs with what is there: sizes, weights, switches.

    Parameters
    ----------
    module : Module
        A part of what is traced.
    what : str
        Its class, for the sentence.
    arguments
        Of its forward; the first is traced.
    """
    tracer = arguments[0].tracer
    path = tracer.path_of_module(module)
    if path == "":
        fail(what, "to be a part of what torch.fx traces, of which it is one call", "the module by itself")
    return tracer.create_proxy("call_module", path, arguments, {})
