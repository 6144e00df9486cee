"""How the benchmarks time, with calls that are made up here."""

import itertools

import pytest
import torch

from sparse24.bench import timing as module


@pytest.fixture
def timing(monkeypatch):
    """The module, whose host clock goes on by one second with each look."""
    seconds = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
    return module


def test_back_to_back_every_variant_runs_first_and_last(timing):
    """As often as fills the time, in both orders, behind calls of the first that are not counted."""
    calls = []
    runs = [lambda i, name=name: calls.append((name, i)) for name in "ab"]
    known = [timing.Timing(us, 0.0, us, 15, 0.0, {}, 0.0) for us in (100.0, 250.0)]
    times = timing.sustain(runs, torch.device("cpu"), known, seconds=0.0005)
    a, b = [("a", i) for i in range(5)], [("b", i) for i in range(2)]
    assert calls == 4 * a + a + b + b + a
    assert times == [1e6 / 5, 1e6 / 2]


def test_a_call_longer_than_the_time_is_made_once(timing):
    calls = []
    known = [timing.Timing(100.0, 0.0, 100.0, 15, 0.0, {}, 0.0)]
    assert timing.sustain([calls.append], torch.device("cpu"), known, seconds=0.0) == [1e6]
    assert calls == 6 * [0]


def test_samples_say_how_long_the_device_paused(timing):
    """None on the host; on a GPU at least a millisecond, whatever the host takes."""
    (one,) = timing.measure([lambda _: None], torch.device("cpu"), rounds=3, seconds=1.0)
    assert one.pause_us == 0.0 and one.sustained_us is None and one.rounds == 3
    assert timing._CudaClock.pause_us == 1000.0
