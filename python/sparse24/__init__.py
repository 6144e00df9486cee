"""2:4 activation sparsity for squared-ReLU feed-forward networks.

`relu2_mlp` and `nn.ReLU2MLP` run a feed-forward network whose activation keeps two of each four neighbours. They are
composed from ``torch.ops.sparse24.*``, which are here with their documentation: `sparse24.ops`.
`relu2_experts` and `nn.ReLU2Experts` run many of them, the experts of a mixture, as one.
`convert` makes the networks of an existing model run that way, `revert` and `disabled` undo it for good and for a
while. `activation_stats` measures what pruning an activation drops, and `analyze_model` does so for all networks of a
model; `build_info` and ``python -m sparse24 info`` tell what was built.
"""

# ruff: noqa: F403

from sparse24 import _library, nn
from sparse24 import distributed as distributed
from sparse24 import linear as linear
from sparse24 import mlp as mlp
from sparse24 import training as training
from sparse24.analyze import ActivationStats, ModelReport, activation_stats, analyze_model, analyze_weights
from sparse24.convert import ConvertConfig, ConvertReport, convert, revert
from sparse24.convert.forward import disabled
from sparse24.env import build_info, print_env
from sparse24.experts import relu2_experts
from sparse24.mlp import relu2_mlp
from sparse24.mlp.scale import bounding_factor
from sparse24.mlp.weights import prune24, soft_threshold24
from sparse24.ops import functions as _functions
from sparse24.ops.functions import *
from sparse24.training import SAC_SAVE_OPS, Recipe, Schedule
from sparse24.weight_pruning import WeightPruning

__version__ = _library.VERSION

__all__ = [
    "ActivationStats",
    "ConvertConfig",
    "ConvertReport",
    "ModelReport",
    "Recipe",
    "SAC_SAVE_OPS",
    "Schedule",
    "WeightPruning",
    "__version__",
    "activation_stats",
    "analyze_model",
    "analyze_weights",
    "bounding_factor",
    "build_info",
    "convert",
    "disabled",
    "nn",
    "print_env",
    "prune24",
    "relu2_experts",
    "relu2_mlp",
    "revert",
    "soft_threshold24",
]
__all__ += _functions.__all__
