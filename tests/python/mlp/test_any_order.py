"""What can be done to a module for inference, in random order: it computes what a copy of it does, made anew.

A copy makes its own copies of weights: what the module holds of another state shows.
"""

import copy
import pickle
import random

import pytest
import torch
from compare import assert_same_bits
from torch import nn

from sparse24 import Recipe, WeightPruning
from sparse24.nn import ReLU2MLP

RECIPES = (None, Recipe(), Recipe(sparse_weights="up"), Recipe(sparse_weights="both"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def add_adapters(m, r):
    m.add_adapters_(r.choice((1, 4)))
    nn.init.normal_(m.up_left, std=0.05)


@torch.no_grad()
def write(m, r):
    for p in m.parameters():
        p.add_(0.05 * p.flip(0))


def train(m, r):
    learning = [p for p in m.parameters() if p.requires_grad]
    if learning:
        m(torch.randn(80, 32)).square().mean().backward()
        torch.optim.SGD(learning, lr=0.1).step()
        m.zero_grad()


def load(m, r):
    m.load_state_dict({name: t.clone() for name, t in m.state_dict().items()}, assign=r.random() < 0.5)


def prune_as(m, r):
    WeightPruning(m, **r.choice(({"soft": True}, {"refresh_steps": 0}, {}))).step()


#: Each is given a module and a source of choices, and returns the module that goes on, or None for the same.
ACTS = {
    "prune_weights_": lambda m, r: m.prune_weights_(r.choice((None, "up", "both"))),
    "prepare_decode_": lambda m, r: m.prepare_decode_(),
    "quantize_": lambda m, r: m.quantize_() if r.random() < 0.2 else None,  # there is no way back
    "add_adapters_": add_adapters,
    "merge_adapters_": lambda m, r: m.merge_adapters_(),
    "copied": lambda m, r: copy.deepcopy(m),
    "pickled": lambda m, r: pickle.loads(pickle.dumps(m)),
    "cast": lambda m, r: m.to(r.choice(DTYPES)),
    "written to": write,
    "trained": train,
    "loaded": load,
    "sparse": lambda m, r: setattr(m, "sparse", r.random() < 0.6),
    "recipe": lambda m, r: setattr(m, "recipe", r.choice(RECIPES)),
    "pruned as": prune_as,
}


@pytest.mark.parametrize("seed", range(40))
def test_a_module_is_what_its_copy_is(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    m, done = ReLU2MLP(32, 64, recipe=r.choice(RECIPES), precision=r.choice(("auto", "fp8", "16bit"))), []
    for _ in range(30):
        done.append(r.choice(sorted(ACTS)))
        try:
            m = ACTS[done[-1]](m, r) or m
        except RuntimeError as refusal:
            assert str(refusal).startswith("sparse24."), done
        for tokens in (3, 80):
            x = torch.randn(tokens, 32)
            with torch.no_grad():
                out, other = m(x), copy.deepcopy(m)(x)
                try:
                    assert_same_bits(out, other)
                    assert_same_bits(m(x), out)
                except AssertionError as error:
                    raise AssertionError(f"after {done}") from error
