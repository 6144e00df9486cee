"""Sets of arguments in a row: what runs, what failed and how often, as a person reads it."""

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzzing.calls import Call, legal_call
from fuzzing.dice import Dice
from fuzzing.judge import Judge, Mismatch
from fuzzing.mutations import mutate
from fuzzing.networks import legal_network


def set_of(seed: int, index: int, device: str) -> Call:
    """The call of a number: legal, or changed once, or rarely more often."""
    dice = Dice(seed, index, device)
    call = legal_network(dice) if dice.chance(0.07) else legal_call(dice)
    for _ in range(dice.choices((0, 1, 2, 3), (50, 38, 9, 3))[0]):
        call = mutate(call, dice)
    return call


@dataclass
class Session:
    """Sets `start` to ``start + count - 1`` of a seed, or as many as `seconds` are enough for.

    `note` is a file that holds the number of the set that runs, for who finds the process dead.
    """

    device: str = "cpu"
    seed: int = 0
    start: int = 0
    count: int = 10**9
    seconds: float = float("inf")
    batch: int = 64
    failures: int = 20
    fakes: bool = True
    note: Path | None = None

    def __post_init__(self) -> None:
        self.judge = Judge(self.device, self.batch, self.fakes, self._failure)
        self.failed = 0
        self.kinds: Counter[str] = Counter()

    def run(self) -> int:
        """The number of failures, each of which is printed as a program."""
        started = shown = time.monotonic()
        index = self.start
        while index < self.start + self.count and self.failed < self.failures:
            now = time.monotonic()
            if now - started > self.seconds:
                break
            if now - shown > 15:
                shown = now
                print(f"{index - self.start} sets, {now - started:.0f} s", file=sys.stderr, flush=True)
            self._one(index)
            index += 1
        self._guard(index, self.judge.flush)
        self._report(index - self.start, time.monotonic() - started)
        return self.failed

    def _one(self, index: int) -> None:
        if self.note:
            self.note.write_text(str(index))
        call = set_of(self.seed, index, self.device)
        self._guard(index, lambda: self.judge.judge(index, call), call)

    def _guard(self, index: int, action: Callable[[], None], call: Call | None = None) -> None:
        try:
            action()
        except Exception as error:  # a mistake of these tests is a failure too
            self._failure(index, call, error)

    def _failure(self, index: int, call: Call | None, error: Exception) -> None:
        """Print a set that failed, where the judge was."""
        text = str(error) or type(error).__name__
        self.failed += 1
        self.kinds[f"{call.op if call else 'device'}: {text.splitlines()[0][:100]}"] += 1
        print(f"\n== failure: --seed {self.seed} --start {index} --count 1", flush=True)
        if not isinstance(error, (Mismatch, AssertionError)):
            traceback.print_exception(error, file=sys.stdout)
        print(text)
        if call is not None:
            place = self.judge.place
            print(f"\non {place}; mutations: {', '.join(call.mutations) or 'none'}\n{call.code(place)}", flush=True)
        if "CUDA error" in text:
            pending = [p.index for p in self.judge.pending]
            print(f"\nThe context is lost. It was one of the sets {pending}: try them with --batch 1.", flush=True)
            raise SystemExit(1) from None

    def _report(self, count: int, seconds: float) -> None:
        print(f"{count} sets in {seconds:.1f} s, seed {self.seed}, {self.device}")
        for op, (accepted, refused, skipped) in sorted(self.judge.tally.items()):
            print(f"  {op:24} {accepted:6} accepted {refused:6} refused {skipped:4} too large")
        print(f"{self.failed} failures", flush=True)
        for kind, times in self.kinds.most_common():
            print(f"  {times:4} {kind}", flush=True)
