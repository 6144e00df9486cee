"""Mixtures of experts as models have them: a router, and experts as a module of this library or of another."""

import torch
import torch.nn.functional as F
from convert_models import EXACT, D, randomize, relu2
from torch import nn

import sparse24

EXPERTS, HIDDEN, TOP = 6, 64, 2


class Experts(nn.Module):
    """As those of transformers' NemotronH, without its interface."""

    def __init__(self, activation=relu2, names=("up_proj", "down_proj"), hidden=HIDDEN):
        super().__init__()
        self.names, self.activation = names, activation
        setattr(self, names[0], nn.Parameter(torch.zeros(EXPERTS, hidden, D)))
        setattr(self, names[1], nn.Parameter(torch.zeros(EXPERTS, D, hidden)))
        randomize(self)

    def forward(self, x, index, factors):
        up, down = (getattr(self, name) for name in self.names)
        out = torch.zeros_like(x, dtype=factors.dtype)
        for expert in range(EXPERTS):
            token, choice = torch.where(index == expert)
            y = F.linear(self.activation(F.linear(x[token], up[expert])), down[expert])
            out = out.index_add(0, token, (y * factors[token, choice, None]).to(out.dtype))
        return out.to(x.dtype)


class Mixture(nn.Module):
    """A router and experts: "module" of this library, "converted", or "plain" as they were before."""

    def __init__(self, kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.gate = nn.Linear(D, EXPERTS)
        if kind == "module":
            self.experts = sparse24.nn.ReLU2Experts(EXPERTS, D, HIDDEN, recipe=EXACT.recipe)
            randomize(self.experts)
        else:
            self.experts = Experts()
        randomize(self.gate)
        self.to(device, dtype)
        if kind == "converted":
            assert sparse24.convert(self, EXACT, quiet=True).converted == ["experts"]

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        factors, index = self.gate(rows).float().sigmoid().topk(TOP)
        own = isinstance(self.experts, sparse24.nn.ReLU2Experts)
        out = self.experts.routed(rows, index, factors) if own else self.experts(rows, index, factors)
        return out.view(x.shape)
