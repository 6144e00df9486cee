"""Classes of networks, those of docs/guide/compatibility.md: of this library, transformers, two projects."""

import pytest
import torch.nn.functional as F
from convert_models import EXACT, HIDDEN, BothParameters, CastLinear, D
from torch import Tensor, nn

import sparse24


class NanochatMLP(nn.Module):
    """As nanochat has it: no biases, an activation that no module shows, weights cast to the dtype of the input."""

    def __init__(self):
        super().__init__()
        self.c_fc = CastLinear(D, HIDDEN, bias=False)
        self.c_proj = CastLinear(HIDDEN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = F.relu(x).square()
        return self.c_proj(x)


def of_transformers(model: str, name: str) -> nn.Module:
    """A module of the transformers library, with the biases that models of this kind have by default."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    from transformers import AutoConfig

    config = AutoConfig.for_model(model, hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=4)
    return getattr(modeling, name)(config)


UP_DOWN = ("up_proj", "down_proj")
#: How each is made, and the names of its layers.
CLASSES = {
    "ReLU2MLP": (lambda: sparse24.nn.ReLU2MLP(D, HIDDEN, min_tokens=0, recipe=EXACT.recipe), UP_DOWN),
    "nanochat MLP": (NanochatMLP, ("c_fc", "c_proj")),
    "modded-nanogpt MLP": (BothParameters, ("c_fc", "c_proj")),
    "NemotronMLP": (lambda: of_transformers("nemotron", "NemotronMLP"), UP_DOWN),
    "NemotronHMLP": (lambda: of_transformers("nemotron_h", "NemotronHMLP"), UP_DOWN),
    "ArceeMLP": (lambda: of_transformers("arcee", "ArceeMLP"), UP_DOWN),
    "Jais2MLP": (lambda: of_transformers("jais2", "Jais2MLP"), UP_DOWN),
    "PersimmonMLP": (lambda: of_transformers("persimmon", "PersimmonMLP"), ("dense_h_to_4h", "dense_4h_to_h")),
    "NanoChatMLP": (lambda: of_transformers("nanochat", "NanoChatMLP"), ("fc1", "fc2")),
}
