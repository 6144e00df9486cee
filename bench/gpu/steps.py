"""Runs commands one after the other, each with a time limit, into one log; a failure is recorded and the next runs."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

TAIL_LINES = 40


class StepFailed(Exception):
    """What a step left behind shows that it failed, whatever its exit status says."""


@dataclass
class Step:
    """What became of one command."""

    name: str
    status: str  # "ok", "failed", "timed out" or "skipped"
    seconds: float = 0.0
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status in ("ok", "skipped")


class Runner:
    """Steps within an overall time limit, counted from its creation.

    Parameters
    ----------
    log : Path
        Receives the complete output of all steps.
    limit : float
        Seconds after which no step is started and a running one is stopped.
    """

    def __init__(self, log: Path, limit: float) -> None:
        self.log = log.open("w", buffering=1)
        self.limit = limit
        self.started = time.perf_counter()
        self.steps: list[Step] = []

    def say(self, text: str) -> None:
        """A line with the elapsed time, to the terminal and to the log."""
        line = f"[{self.elapsed():6.1f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def command(
        self,
        name: str,
        command: list[str],
        *,
        env: dict[str, str],
        timeout: float,
        cwd: Path,
        echo: bool = False,
        detail: Callable[[], str] | None = None,
    ) -> Step:
        """Run a command; `echo` shows its output as it comes.

        `detail` describes the result from what the command wrote, or raises `StepFailed`.
        """
        timeout = min(timeout, self.limit - self.elapsed())
        if timeout <= 5:
            return self.add(Step(name, "timed out", 0.0, "not started: the time limit is reached"))
        self.say(f"{name}: {' '.join(command)}")
        start = time.perf_counter()
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            # A process group of its own, so that a stop reaches its children; the same session: they end with us.
            process = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
            )
        except OSError as error:
            return self.add(Step(name, "failed", 0.0, str(error)))
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                self.log.write(line)
                tail.append(line.rstrip())
                if echo:
                    print(line, end="", flush=True)
            code = process.wait()
        finally:
            timer.cancel()
        seconds = time.perf_counter() - start
        status = "timed out" if expired.is_set() else "ok" if code == 0 else "failed"
        text = f"after {timeout:.0f} s" if expired.is_set() else "" if code == 0 else f"exit status {code}"
        if detail:
            try:
                told = detail()
            except StepFailed as failure:
                told, status = str(failure), "failed" if status == "ok" else status
            except Exception as error:  # no file, or half a file: the command's own failure says more
                told = f"no detail ({type(error).__name__})"
            text = ", ".join(filter(None, (text, told)))
        if status != "ok" and not echo:
            print("\n".join(f"    {line}" for line in tail), flush=True)
        return self.add(Step(name, status, seconds, text))

    def call(self, name: str, function: Callable[[], str]) -> Step:
        """The same for a Python function, which returns the detail."""
        self.say(name)
        start = time.perf_counter()
        try:
            step = Step(name, "ok", 0.0, function())
        except Exception as error:
            self.log.write(f"{error}\n")
            step = Step(name, "failed", 0.0, f"{type(error).__name__}: {str(error)[-1500:]}")
        step.seconds = time.perf_counter() - start
        return self.add(step)

    def add(self, step: Step) -> Step:
        self.steps.append(step)
        self.say(f"{step.name}: {step.status}{': ' if step.detail else ''}{step.detail}")
        return step

    def records(self) -> list[dict]:
        return [asdict(step) | {"seconds": round(step.seconds, 1)} for step in self.steps]

    @property
    def ok(self) -> bool:
        return all(step.ok for step in self.steps)
