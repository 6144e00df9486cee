"""A short run of the fuzzer (tests/fuzz.py), and that it notices what is wrong."""

import pytest
import torch
from fuzzing.calls import Call
from fuzzing.judge import Judge, Mismatch
from fuzzing.session import Session, set_of
from fuzzing.tensors import Draw

COUNTS = {"cpu": 300, "cuda": 3000}


@pytest.mark.filterwarnings("ignore")  # of torch, about what nobody should do
def test_random_calls(poisoned_memory, device):
    assert Session(device=device, count=COUNTS[device]).run() == 0  # failures are printed


def test_a_set_is_a_function_of_its_number():
    assert set_of(3, 14, "cpu") == set_of(3, 14, "cpu") != set_of(4, 14, "cpu")


def compress_of(**options) -> Call:
    x = Draw((3, 32), torch.bfloat16, "activations", "sliced", seed=5)
    return Call("compress", {"x": x, "activation": "relu2", "dim": -1} | options)


def changed(call: Call, change) -> Call:
    """The call of an op whose results are not what they were."""
    run = call.run
    call.run = lambda values: change(values, run(values))
    return call


def flip_a_bit(values, results):
    results[0].view(torch.int16)[1, 2] ^= 1
    return results


def write_to_the_input(values, results):
    values["x"].mul_(2)
    return results


def write_around_the_input(values, results):
    torch.as_strided(values["x"], (1,), (1,), 0).fill_(1)
    return results


WRONG = {
    "a bit of a result": (flip_a_bit, "result 0: 1 of 48 differ"),
    "another dtype": (lambda _, results: (results[0].float(), results[1]), "float32 instead of torch.bfloat16"),
    "an input that changes": (write_to_the_input, "second run"),
    "a write out of bounds": (write_around_the_input, "x has changed"),
    "random results": (lambda _, results: (torch.randn(3, 16).bfloat16(), results[1]), "second run"),
}


@pytest.mark.parametrize("what", WRONG)
def test_notices(what):
    change, message = WRONG[what]
    with pytest.raises((Mismatch, AssertionError), match=message):
        Judge("cpu", fakes=False).judge(0, changed(compress_of(), change))


def test_notices_what_is_not_refused():
    with pytest.raises(Mismatch, match="accepted, where it has to be refused"):
        Judge("cpu").judge(0, _accepting())


def _accepting() -> Call:
    call = compress_of(dim=0)
    call.run = lambda values: (torch.zeros(3, 16), torch.zeros(1))
    return call


def test_notices_another_sentence():
    call = compress_of(dim=0)

    def complain(values):
        raise RuntimeError("dim is wrong")

    call.run = complain
    with pytest.raises(Mismatch, match="no sentence: RuntimeError: dim is wrong"):
        Judge("cpu").judge(0, call)


def test_a_failure_prints_as_a_program(capsys):
    program = compress_of().code("cpu")
    exec(compile(program, "program", "exec"), {})
    assert "tensor(" in capsys.readouterr().out
