"""Run scripts/base_train.py of a checkout of nanochat on a CPU, on random tokens: `python nanochat_run.py ARGUMENTS`.

It runs in the root of the checkout. What it needs of packages and data is replaced by the least that will do, and the
compiler by nothing. Its last line says, for each call of the library's network, whether it trained and ran sparse.
"""

import os
import runpy
import sys
import types
from unittest import mock

import torch

from sparse24.convert import run

VOCABULARY = 256


class Tokenizer:
    def get_vocab_size(self):
        return VOCABULARY

    def get_bos_token_id(self):
        return 0

    def encode_special(self, text):
        return 1

    def __call__(self, text, prepend=None):
        return [0, *text.encode()]

    def decode(self, tokens):
        return str(tokens)


def batches(tokenizer, batch, length, split, device, resume_state_dict=None):
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(2, VOCABULARY, (batch, length + 1), generator=generator)
        yield ids[:, :-1], ids[:, 1:], {"epoch": 0, "pq_idx": 0, "rg_idx": 0}


def validation(*args, **kwargs):
    return ((x, y) for x, y, _ in batches(*args, **kwargs))


def token_bytes(device):
    return torch.ones(VOCABULARY, dtype=torch.int)


def replace(name, **contents):
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module


calls = []


def relu2_mlp(*args, **kwargs):
    calls.append((torch.is_grad_enabled(), kwargs["sparse"]))
    return network(*args, **kwargs)


network, run.relu2_mlp = run.relu2_mlp, relu2_mlp
replace("wandb")
replace("nanochat.tokenizer", get_tokenizer=Tokenizer, get_token_bytes=token_bytes)
replace(
    "nanochat.dataloader",
    tokenizing_distributed_data_loader_bos_bestfit=validation,
    tokenizing_distributed_data_loader_with_state_bos_bestfit=batches,
)
replace("scripts.base_eval", evaluate_core=lambda *args, **kwargs: {"core_metric": 0.0, "centered_results": {}})
sys.path.insert(0, os.getcwd())
with mock.patch.object(torch, "compile", lambda model=None, **options: model or (lambda function: function)):
    runpy.run_module("scripts.base_train", run_name="__main__")
print("calls", calls)
