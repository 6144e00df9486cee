"""Objects in processes of their own answer, or tell why they do not."""

import os
import time

import pytest

from bench.cases import workers


class Stubborn:
    """Something that a worker is."""

    def __init__(self, wanted):
        if not wanted:
            raise ValueError("no room")

    def run(self, how):
        if how == "ends":
            os._exit(3)
        if how == "hangs":
            time.sleep(60)
        if how == "fails":
            raise ValueError("one\ntwo")
        return how


@pytest.mark.parametrize("apart", [True, False])
def test_workers_answer_whatever_happens(apart):
    def fails(worker, how, text, seconds=100):
        worker.ask("run", how)
        with pytest.raises(RuntimeError, match=text):
            worker.answer(seconds)

    made = workers.begin(Stubborn, {"first": (True,), "second": (True,), "third": (False,)}, apart)
    with pytest.raises(RuntimeError, match="ValueError: no room"):
        made["third"].answer(100)
    assert made["first"].answer(100) is None and made["second"].answer(100) is None
    fails(made["first"], "fails", "ValueError: one$")
    made["first"].ask("run", "works")
    assert made["first"].answer(100) == "works"
    if apart:
        fails(made["first"], "ends", "its process ended with status 3")
        fails(made["first"], "works", "its process ended with status 3")
        fails(made["second"], "hangs", "no answer within 0 s", 0.2)
        fails(made["second"], "works", "its process ended with status -9")
    for worker in made.values():
        worker.end()
