"""Objects in processes of their own, or in this one: asked for something first, waited for later.

What several of them are asked for they do at the same time, such as compiling. What is timed is asked of one, while the
others wait for theirs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from sparse24.bench.harness import describe


class Here:
    """An object of `make(*arguments)` in this process: what it is asked for it does at once.

    Its first answer says whether it was made.
    """

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.object: Any = None

        def begin() -> None:
            self.object = make(*arguments)

        self._answer = _result(begin)

    def ask(self, method: str, *arguments: Any) -> None:
        self._answer = _result(lambda: getattr(self.object, method)(*arguments))

    def answer(self, seconds: float = 0.0) -> Any:
        """Give what it was asked for; RuntimeError if that failed."""
        value, error = self._answer
        if error is not None:
            raise RuntimeError(error)
        return value

    def end(self) -> None:
        pass


class There:
    """The same in a process of its own, whose death is an answer, and which is stopped if it takes too long."""

    def __init__(self, context: Any, *how: Any) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *how), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> None:
        try:
            self._pipe.send((method, arguments))
        except OSError:
            pass  # the answer tells

    def answer(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                self._process.kill()
                raise RuntimeError(f"no answer within {seconds:.0f} s")
            value, error = self._pipe.recv()
        except (EOFError, OSError) as gone:
            self._process.join()
            raise RuntimeError(f"its process ended with status {self._process.exitcode}") from gone
        if error is not None:
            raise RuntimeError(error)
        return value

    def end(self) -> None:
        self._process.kill()  # it keeps nothing, and its libraries would take seconds to end
        self._process.join()


def begin(make: Callable[..., Any], named: Mapping[Any, tuple[Any, ...]], apart: bool) -> dict[Any, Here | There]:
    """Begin an object of each of these arguments: in processes, or here, one after another."""
    if not apart:
        return {name: Here(make, arguments) for name, arguments in named.items()}
    context = multiprocessing.get_context("spawn")  # not fork: CUDA does not survive it
    return {name: There(context, len(named), make, arguments) for name, arguments in named.items()}


def _serve(pipe: Connection, count: int, *how: Any) -> None:
    from torch._inductor import config

    config.compile_threads = max(1, (os.cpu_count() or 1) // count)  # the others compile too
    here = Here(*how)
    pipe.send(here._answer)
    while True:
        method, arguments = pipe.recv()
        here.ask(method, *arguments)
        pipe.send(here._answer)


def _result(run: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return run(), None
    except Exception as error:
        return None, describe(error)
