"""2:4 activation sparsity for squared-ReLU feed-forward networks.

`relu2_mlp` and `nn.ReLU2MLP` run a feed-forward network whose activation keeps two of each four neighbours. They are
composed from ``torch.ops.sparse24.*``, here with documentation: `compress`, `compress_fp8`, `compress_like`,
`decompress`, `densest_features`, `feature_counts`, `gather_features`, `linear_compress`, `linear_gradient`,
`linear_relu2`, `linear_relu2_gradient`, `mm`, `put_features`, `quantize_fp8`, `quantize_fp8_predict`.
`convert` makes the networks of an existing model run that way, `revert` and `disabled` undo it for good and for a
while. `activation_stats` measures what pruning an activation drops; `build_info` and ``python -m sparse24 info`` tell
what was built.
"""

from sparse24 import _library, nn
from sparse24._bounding_factor import bounding_factor
from sparse24._convert_forward import disabled
from sparse24.analyze import ActivationStats, activation_stats
from sparse24.convert import ConvertConfig, ConvertReport, convert, revert
from sparse24.env import build_info, print_env
from sparse24.mlp import relu2_mlp
from sparse24.ops import (
    compress,
    compress_fp8,
    compress_like,
    decompress,
    densest_features,
    feature_counts,
    gather_features,
    linear_compress,
    linear_gradient,
    linear_relu2,
    linear_relu2_gradient,
    mm,
    put_features,
    quantize_fp8,
    quantize_fp8_predict,
)
from sparse24.training import SAC_SAVE_OPS, Recipe, Schedule

__version__ = _library.VERSION

__all__ = [
    "ActivationStats",
    "ConvertConfig",
    "ConvertReport",
    "Recipe",
    "SAC_SAVE_OPS",
    "Schedule",
    "__version__",
    "activation_stats",
    "bounding_factor",
    "build_info",
    "compress",
    "compress_fp8",
    "compress_like",
    "convert",
    "decompress",
    "densest_features",
    "disabled",
    "feature_counts",
    "gather_features",
    "linear_compress",
    "linear_gradient",
    "linear_relu2",
    "linear_relu2_gradient",
    "mm",
    "nn",
    "print_env",
    "put_features",
    "quantize_fp8",
    "quantize_fp8_predict",
    "relu2_mlp",
    "revert",
]
