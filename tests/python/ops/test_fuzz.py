"""A short run of the fuzzer (tests/fuzz.py), and that it notices what is wrong."""

import pytest
import torch
from compare import assert_same_bits
from fuzzing import experts
from fuzzing.calls import Call, generators
from fuzzing.dice import ALL_DTYPES
from fuzzing.judge import Judge, Mismatch, Pending
from fuzzing.networks import Network
from fuzzing.session import Session, set_of
from fuzzing.tensors import Draw
from oracle import FP8

import sparse24

COUNTS = {"cpu": 300, "cuda": 3000}


@pytest.mark.filterwarnings("ignore")  # of torch, about what nobody should do
def test_random_calls(poisoned_memory, device):
    assert Session(device=device, count=COUNTS[device]).run() == 0  # failures are printed


def test_every_op_is_drawn():
    names = (name.removeprefix("sparse24::") for name in torch._C._dispatch_get_all_op_names())
    ops = {name for name in names if hasattr(sparse24.ops, name)}
    assert len(ops) > 30 and set(generators()) == ops


def test_a_set_is_a_function_of_its_number():
    assert set_of(3, 14, "cpu") == set_of(3, 14, "cpu") != set_of(4, 14, "cpu")


def compress_of(**options) -> Call:
    x = Draw((3, 32), torch.bfloat16, "activations", "sliced", seed=5)
    return Call("compress", {"x": x, "activation": "relu2", "dim": -1, "threshold": 0.0} | options)


def network_of(x: Draw, w1: Draw, w2: Draw, **options) -> Network:
    args = dict.fromkeys(("b1", "b2", "w1_scale", "w2_scale", "scale_y", "scale_y_factor", "recipe"))
    args |= {"x": x, "w1": w1, "w2": w2, "precision": "fp8", "min_tokens": 0}
    args |= {"fused": True, "recompute": False, "sparse": True}
    return Network("relu2_mlp", args | options, learns=True)


#: Calls that are as they should be, of which the fuzzer has said that they are not.
RIGHT = {
    "NaN that torch negates": compress_of(x=Draw((31, 64), torch.bfloat16, "bits", seed=1, form="negated")),
    "NaN that torch negates among values": Call(
        "decompress",
        {
            "values": Draw((63, 64), torch.float16, "bits", "strided", 2, form="negated"),
            "meta": Draw((2048,), torch.uint8, "pattern", seed=3),
            "rows": 63,
            "cols": 128,
            "dim": -1,
        },
    ),
    "a prediction of infinity times zero": Call(
        "quantize_fp8_predict",
        {
            "x": Draw((5, 16), torch.float16, "hostile", seed=944515784),
            "factor": Draw((1,), torch.float32, "small", form="zerotensor"),
        },
    ),
    "float8 that is sparse": compress_of(x=Draw((5, 32), torch.float8_e5m2, "normal", form="sparse")),
    "squares that are subnormal in bfloat16": Call(
        "linear_compress",
        {
            "x": Draw((32, 130), torch.bfloat16, "bits", "expanded_last", 1678770692),
            "w": Draw((96, 130), torch.bfloat16, "integers", seed=776484928),
            **dict.fromkeys(("scale_x", "scale_w", "bias", "scale_out")),
            "activation": "relu2",
            "threshold": 0.0,
            "scaling": "row",
            "out_dtype": torch.float8_e4m3fn,
            "statistics": False,
        },
    ),
    "padding under a negative scale": Call(
        "quantize_fp8_both",
        {
            "x": Draw((4, 96), torch.float16, "specials", seed=1023506822),
            "scale": Draw((), torch.float32, "bits", "expanded", 1967271907),
            "interleaved": True,
        },
    ),
    "half an atom of metadata, beside the next expert": Call(
        "experts_linear_compress",
        {
            "x": Draw((65, 128), FP8, "integers", seed=631130157),
            "w": Draw((9, 64, 128), FP8, "integers", seed=2005187142),
            "offsets": Draw((9,), torch.int32, "ends", "strided", 958315956, limit=65),
            **dict.fromkeys(("scale_x", "scale_w")),
            "activation": "relu2",
            "threshold": 0.3,
        },
    ),
    "dh that overflows before its factor": Call(
        "experts_linear_gradient",
        {
            "grad": Draw((192, 24), torch.bfloat16, "bits", seed=1633591828),
            "w": Draw((40, 24, 64), torch.bfloat16, "integers", seed=514866880),
            "values": Draw((5248, 32), torch.bfloat16, "bits", seed=763785629),
            "meta": Draw((41984,), torch.uint8, "pattern", "sliced", 770101950),
            "offsets": Draw((40,), torch.int32, "ends", "expanded", 990387512, limit=192),
            "row_scale": Draw((1, 192), torch.float32, "powers", seed=1184995586),
            **dict.fromkeys(("scale_grad", "scale_w", "scale_y")),
            "dense": False,
        },
    ),
    "a second weight by neuron that has three dimensions": Network(
        "relu2_mlp",
        network_of(
            Draw((3, 96), torch.bfloat16), Draw((64, 96), torch.bfloat16), Draw((2, 32, 64), torch.bfloat16)
        ).args,
        by_neuron=True,
    ),
    "a sum that cancels in the first layer": network_of(
        Draw((768,), torch.bfloat16, seed=2028397811),
        Draw((160, 768), torch.bfloat16, "weights", "expanded", 1594624998),
        Draw((64, 160), torch.bfloat16, "weights", seed=1874010187),
    ),
    "a sum that cancels in the second layer": network_of(
        Draw((96,), torch.float16, seed=879670189),
        Draw((192, 96), torch.float16, "weights", seed=1269680046),
        Draw((96, 192), torch.float16, "weights", "expanded", 1517603512),
    ),
    "a token that overflows": network_of(
        Draw((10, 64), torch.float16, "normal", "expanded_last", 1530724680),
        Draw((352, 64), torch.float16, "weights", "expanded_last", 922460975),
        Draw((144, 352), torch.float16, "weights", seed=586461597),
    ),
}


@pytest.mark.parametrize("what", RIGHT)
def test_is_content(poisoned_memory, device, what):
    judge = Judge(device)
    judge.judge(0, RIGHT[what])
    judge.flush()


@pytest.mark.filterwarnings("ignore:.*runs as before conversion")
def test_a_converted_network_in_float32(poisoned_memory, device):
    """On CUDA it runs as before conversion, which is dense and exact."""
    x, w1, w2 = (
        Draw(s, torch.float32, c) for s, c in (((8, 20), "normal"), ((96, 20), "weights"), ((16, 96), "weights"))
    )
    network = network_of(x, w1, w2, precision="16bit")
    network.route = "converted"
    judge = Judge(device)
    judge.judge(0, network)
    judge.flush()


@pytest.mark.parametrize("at", range(4))
def test_notices_a_network_that_is_off(at):
    draws = (
        Draw(s, torch.bfloat16, c) for s, c in (((33, 32), "normal"), ((64, 32), "weights"), ((48, 64), "weights"))
    )
    network = network_of(*draws, precision="16bit", sparse=False)

    def quarter_more(values, results):
        return *results[:at], results[at] * 1.25, *results[at + 1 :]

    Judge("cpu").judge(0, network)
    with pytest.raises(AssertionError, match="the output: error" if at == 0 else "the gradient of .*: error"):
        Judge("cpu").judge(0, changed(network, quarter_more))


PADDED = ("experts_linear_compress", "experts_linear_gradient")


@pytest.mark.parametrize("op", experts.GENERATORS)
def test_notices_an_expert_that_is_off(op):
    """In the last of its rows alone."""
    x, w = Draw((150, 32), torch.bfloat16, "integers"), Draw((3, 32, 32), torch.bfloat16, "integers", seed=1)
    call = Call(op, dict.fromkeys(name for name, _ in Call(op, {}).arguments))
    call.args |= {"offsets": Draw((3,), torch.int32, "ends", limit=150)}
    a = Draw((512, 16), torch.bfloat16, "squares"), Draw((4096,), torch.uint8, "pattern")
    if op == "experts_mm":
        call.args |= dict(zip(("values", "meta", "b", "rows"), (*a, w, 150), strict=True))
    elif op == "experts_linear_gradient":
        call.args |= dict(zip(("grad", "w", "values", "meta"), (x, w, *a), strict=True)) | {"dense": False}
    elif op == "experts_weight_gradient":
        call.args |= {"a": x, "b": Draw((150, 32), torch.bfloat16, "integers", seed=1)}
    else:
        call.args |= {"x": x, "w": w}
        call.args |= {} if op == "experts_linear" else {"activation": "relu", "threshold": 0.0}

    def three_more(values, results):
        *_, last = experts.groups(values["offsets"], 150)
        row = (last.padded_rows if op in PADDED else last.rows).stop
        row = last.expert + 1 if op == "experts_weight_gradient" else row
        results[0][row - 1] += 3
        return results

    Judge("cpu").judge(0, call)
    with pytest.raises(AssertionError, match="are wrong|differ"):
        Judge("cpu").judge(0, changed(call, three_more))


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


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (5, 32)], ids=str)
def test_sparse_tensors_hold_what_dense_ones_do(shape, dtype):
    plain = Draw(shape, dtype, "bits", seed=8).make()
    sparse = Draw(shape, dtype, "bits", seed=8, form="sparse").make()
    at = tuple(sparse._indices())
    assert sparse.shape == plain.shape and sparse.dtype == dtype and sparse.layout == torch.sparse_coo
    assert_same_bits(sparse._values(), plain[at].reshape(-1))
    assert len(sparse._values()) == (plain.to(torch.complex128) != 0).sum()


def test_every_failure_of_a_batch_is_told_by_its_number(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    session = Session(device="cuda")
    for index in (3, 4, 5):
        runs = [(torch.zeros(2),), (torch.full((2,), float(index != 4)),)]
        session.judge.pending.append(Pending(index, compress_of(), None, {}, None, {}, runs))
    session.judge.flush()
    text = capsys.readouterr().out
    assert session.failed == 2 and session.kinds.most_common(1)[0][1] == 2
    assert all(f"--start {index} --count 1" in text for index in (3, 5)) and "--start 4 " not in text
    assert "on cuda" in text


def test_a_failure_prints_as_a_program(capsys):
    program = compress_of().code("cpu")
    exec(compile(program, "program", "exec"), {})
    assert "tensor(" in capsys.readouterr().out
