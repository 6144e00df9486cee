"""None, or what is no tensor, where a tensor has to be: the usual sentence."""

import functools

import numpy as np
import pytest
import torch
from data import normal
from samples import CASES, Sample

import sparse24

WRONG = {"None": None, "str": "x", "float": 0.5, "list": [1.0], "ndarray": np.ones(3, dtype=np.float32)}


@functools.cache
def samples(device):
    """One call of every op that takes all of its optional tensors."""
    of_op = {}
    for case in CASES:
        if case.dtype in (torch.bfloat16, torch.int32, torch.float8_e4m3fn):
            of_op.setdefault(case.op, case)
    made = {op: case.make(device) for op, case in of_op.items()}
    x = normal(16, 32, dtype=torch.bfloat16).to(device)
    made["quantize_fp8_predict"] = Sample("quantize_fp8_predict", (x, torch.ones(1, device=device)))
    features = torch.tensor([1, 2], device=device)
    made["put_features"] = Sample("put_features", (x, x.new_ones(1, 16, 2), features, -1))
    return made


ARGUMENTS = [
    (op, place, argument.name, str(argument.type))
    for op in samples("cpu")
    for place, argument in enumerate(getattr(torch.ops.sparse24, op).default._schema.arguments)
    if str(argument.type) in ("Tensor", "Optional[Tensor]")
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op, place, name, kind", ARGUMENTS, ids=lambda v: str(v))
def test_ops(device, op, place, name, kind, wrong):
    required = kind == "Tensor"
    if wrong == "None" and not required:
        pytest.skip("may be None")
    sample = samples(device)[op]
    args = [*sample.args, *[None] * (place + 1 - len(sample.args))]
    args[place] = WRONG[wrong]
    with pytest.raises(RuntimeError) as error:
        getattr(sparse24, op)(*args, **sample.kwargs)
    rule = "a Tensor" if required else "a Tensor or None"
    assert str(error.value).splitlines()[0] == f"sparse24.{op}: expected {name} to be {rule}, got {wrong}"
    if wrong == "None" and any(isinstance(a, torch.Tensor) for a in args):  # without one, torch finds no op to call
        with pytest.raises(RuntimeError, match=f"^sparse24.{op}: expected {name} to be a Tensor, got None"):
            sample.overload(*args, **sample.kwargs)


def test_every_op_is_tried():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("sparse24::")}
    assert {op for op, *_ in ARGUMENTS} == names


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "name", ["x", "w1", "w2", "b1", "b2", "w1_scale", "w2_scale", "scale_y", "scale_y_factor", "hot_features"]
)
def test_network(device, name, wrong):
    if wrong == "None" and name not in ("x", "w1", "w2"):
        pytest.skip("may be None")
    x, w1, w2 = (normal(*shape, dtype=torch.bfloat16).to(device) for shape in ((8, 32), (64, 32), (32, 64)))
    arguments = {"x": x, "w1": w1, "w2": w2}
    if "scale" in name:
        q1, q2 = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
        arguments |= {"w1": q1[0], "w1_scale": q1[1], "w2": q2[0], "w2_scale": q2[1]}
    arguments[name] = WRONG[wrong]
    with pytest.raises(RuntimeError) as error:
        sparse24.relu2_mlp(**arguments)
    assert str(error.value) == f"sparse24.relu2_mlp: expected {name} to be a Tensor, got {wrong}"


@pytest.mark.parametrize("name", ["w", "scale"])
def test_bounding_factor(name):
    arguments = {"w": torch.ones(2, 2), name: 0.5}
    with pytest.raises(RuntimeError, match=f"^sparse24.bounding_factor: expected {name} to be a Tensor, got float$"):
        sparse24.bounding_factor(**arguments)
