"""Runs calls, on the CPU and on a device, and compares what comes of them with what must."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import assert_same_bits
from torch import Tensor

from fuzzing.calls import Call
from fuzzing.contract import Check, Refused, Unsettled, rule_of
from fuzzing.tensors import Draw, copy_to, storage_of

#: Elements of results and inputs together that are still computed, and with which every allocator has to fail.
AFFORDABLE, UNAFFORDABLE = 2**22, 2**46


#: Of a call by its number: what is wrong with it.
Report = Callable[[int, Call, Exception], None]


class Mismatch(Exception):
    """What an op did is not what it must do."""


@dataclass
class Pending:
    """A call whose results on the device are not looked at yet."""

    index: int
    call: Call
    check: Check | None
    inputs: dict[str, Any]  # on the CPU, as they were
    cpu: tuple[Tensor, ...] | None
    on_device: dict[str, Any] = field(default_factory=dict)
    runs: list[tuple[Tensor, ...]] = field(default_factory=list)


class Judge:
    """Of calls in a row: those on a device are compared `batch` at a time, after one synchronisation.

    `report` is told which call's results are wrong there, and what is wrong; without it the first of a batch raises.
    `place` is where a failing call ran.
    """

    def __init__(self, device: str, batch: int = 64, fakes: bool = True, report: Report | None = None) -> None:
        self.device, self.batch, self.fakes, self.report = device, batch, fakes, report
        self.place = "cpu"
        self.pending: list[Pending] = []
        self.tally: dict[str, list[int]] = {}  # accepted, refused, skipped of each op

    def judge(self, index: int, call: Call) -> None:
        """Raise `Mismatch` if a call does what it must not; results on a device are looked at later."""
        self.place = "cpu"
        counts = self.tally.setdefault(call.op, [0, 0, 0])
        values = {name: v.make() if isinstance(v, Draw) else v for name, v in call.args.items()}
        verdict, check = _verdict(call, values, "cpu")
        size = _size(call, values) if verdict != "refused" else 0
        if AFFORDABLE < size < UNAFFORDABLE or size > AFFORDABLE and not call.is_op:
            counts[2] += 1
            return
        if size >= UNAFFORDABLE and verdict == "legal":
            verdict = "no memory"
        cpu = self._run_twice(call, values, verdict, check)
        if self.fakes and call.is_op and verdict != "no memory":
            _compare_fake(call, values, cpu)
        counts[0 if cpu is not None else 1] += 1
        if self.device != "cpu":
            self.place = self.device
            self._enqueue(index, call, values, check, cpu, verdict)

    def flush(self) -> None:
        """Compare what is pending."""
        if not self.pending:
            return
        self.place = self.device
        torch.cuda.synchronize()
        pending, self.pending = self.pending, []
        for p in pending:
            try:
                _compare_device(p)
            except Exception as error:  # of one of them: the others are compared too
                if self.report is None:
                    raise
                self.report(p.index, p.call, error)

    def _run_twice(self, call: Call, values, verdict: str, check: Check | None) -> tuple[Tensor, ...] | None:
        before = _storages(values)
        first = _run(call, _fresh(call, values, "cpu"), verdict)
        if first is None:
            return None
        results = _results(call, *first)
        if any(t.is_meta for t in results):
            return None
        again = _run(call, _fresh(call, values, "cpu"), verdict)
        if again is None:
            raise Mismatch("refused the second time")
        for a, b in zip(results, _results(call, *again), strict=True):
            assert_same_bits(a, b, "the second run")
        for name, stored in before.items():
            if not torch.equal(storage_of(values[name]), stored):
                raise Mismatch(f"{name} has changed")
        if check is not None:
            check(results)
        return results

    def _enqueue(self, index, call, values, check, cpu, verdict) -> None:
        of_cpu = verdict
        verdict, check = _verdict(call, values, self.device)
        if of_cpu == "no memory" and verdict != "refused":
            verdict = of_cpu
        p = Pending(index, call, check, values, cpu)
        for _ in range(2):
            arguments = _fresh(call, values, self.device, everything=True)
            ran = _run(call, arguments, verdict)
            if ran is None:
                return
            p.on_device = arguments
            p.runs.append(_results(call, *ran))
        if any(t.is_meta for run in p.runs for t in run):
            return
        if call.op == "put_features" and check is None:
            return  # of features that are there twice, either one wins
        self.pending.append(p)
        if len(self.pending) >= self.batch:
            self.flush()


def _verdict(call: Call, values: dict[str, Any], device: str) -> tuple[str, Check | None]:
    """ "refused", "unsettled" or "legal", and then how results are checked."""
    try:
        check = rule_of(call, values, device)
        sizes = [size for v in values.values() if isinstance(v, Tensor) for size in v.shape]
        return "legal", check if max(sizes, default=0) <= AFFORDABLE else None
    except Refused:
        return "refused", None
    except Unsettled:
        return "unsettled", None


def _size(call: Call, values: dict[str, Any]) -> int:
    """Elements that a call makes and reads."""
    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    read = sum(math.prod(t.shape) for t in tensors)
    if read > AFFORDABLE or max((size for t in tensors for size in t.shape), default=0) < 2**16:
        return read
    meta = {name: copy_to(v, "meta") if isinstance(v, Tensor) else v for name, v in values.items()}
    try:
        return read + sum(t.numel() for t in call.run(meta))
    except Exception:  # a mistake of the fake function is found elsewhere
        return read


def _fresh(call: Call, values: dict[str, Any], device: str, everything: bool = False) -> dict[str, Any]:
    """Arguments on a device; on the CPU only what an op writes to is copied."""
    return {
        name: copy_to(v, device)
        if isinstance(v, Tensor) and v.device.type == "cpu" and _moves(call, name, everything)
        else v
        for name, v in values.items()
    }


def _moves(call: Call, name: str, everything: bool) -> bool:
    if everything:
        return call.args[name].device is None
    return call.op == "put_features" and name == "out" and call.args[name].form == "plain"


def _results(call: Call, out: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What an op returns, or what it wrote to."""
    return tuple(t.detach() for t in (out or (arguments["out"],)))


def _storages(values: dict[str, Any]) -> dict[str, Tensor]:
    plain = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    return {n: storage_of(v).clone() for n, v in plain.items() if v.layout == torch.strided and not v._is_zerotensor()}


def _run(call: Call, arguments: dict[str, Any], verdict: str):
    """Results and arguments; None if the call was refused, as it should be."""
    try:
        out = call.run(arguments)
    except Exception as error:
        _check_error(call, error, verdict, arguments)
        return None
    if verdict in ("refused", "no memory"):
        raise Mismatch(f"accepted, where it has to be {verdict}")
    return out, arguments


def _check_error(call: Call, error: Exception, verdict: str, arguments: dict[str, Any]) -> None:
    """Is it a refusal that was due, and a sentence?"""
    text = str(error)
    if "CUDA error" in text:
        raise Mismatch(f"a CUDA error: {text}") from error
    if any(isinstance(v, Tensor) and v.layout != torch.strided for v in arguments.values()):
        return  # torch's own words
    if verdict == "legal":
        raise Mismatch(f"refused, although legal: {text}") from error
    if verdict == "no memory":
        if not (isinstance(error, RuntimeError) and "memory" in text and f"sparse24.{call.op}" in text):
            raise Mismatch(f"no sentence about memory: {type(error).__name__}: {text}") from error
        return
    speaker = "sparse24." if verdict == "unsettled" and not call.is_op else f"sparse24.{call.op}: expected "
    ours = isinstance(error, RuntimeError) and text.startswith(speaker) and ", got " in text
    torchs = f"sparse24::{call.op}" in text or call.op + "(" in text or not call.is_op and "'sparse24::" in text
    if not call.is_op and isinstance(error, TypeError):
        return  # Python's own words about options of other types
    immutable = verdict == "unsettled" and text.startswith("ZeroTensors are immutable")
    if not (ours or torchs or immutable):
        raise Mismatch(f"no sentence: {type(error).__name__}: {text}") from error


def _compare_fake(call: Call, values: dict[str, Any], results: tuple[Tensor, ...] | None) -> None:
    """The fake function accepts the same, and knows shapes, strides and dtypes."""
    if any(isinstance(v, Draw) and (v.device or v.form != "plain") for v in call.args.values()):
        return
    meta = {name: copy_to(v, "meta") if isinstance(v, Tensor) else v for name, v in values.items()}
    try:
        fakes = _results(call, call.run(meta), meta)
    except Exception as error:
        if results is not None:
            raise Mismatch(f"the fake function refuses: {error}") from error
        return
    if results is None:
        raise Mismatch("the fake function accepts what the op refuses")
    for i, (fake, real) in enumerate(zip(fakes, results, strict=True)):
        for what in ("shape", "dtype"):
            if getattr(fake, what) != getattr(real, what):
                raise Mismatch(f"{what} of fake result {i}: {getattr(fake, what)} instead of {getattr(real, what)}")
        if fake.stride() != real.stride():
            raise Mismatch(f"strides of fake result {i}: {fake.stride()} instead of {real.stride()}")


def _compare_device(p: Pending) -> None:
    first, second = ([t.cpu() for t in run] for run in p.runs)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b, "the second run")
    for name, v in p.on_device.items():
        if isinstance(v, Tensor) and v.device.type != "meta" and not (p.call.op == "put_features" and name == "out"):
            if not torch.equal(storage_of(v).cpu(), storage_of(p.inputs[name])):
                raise Mismatch(f"{name} has changed")
    if p.check is not None and not _same(first, p.cpu):
        p.check(first)


def _same(results, others) -> bool:
    return others is not None and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_octets(a), _octets(b))
        for a, b in zip(results, others, strict=True)
    )


def _octets(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
