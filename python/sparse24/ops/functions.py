"""All ops, family by family: what is public in `sparse24` and in `sparse24.ops`."""
# ruff: noqa: F403  (each module names in __all__ what it has)

from sparse24.ops import (
    compression,
    experts,
    experts_gradients,
    experts_products,
    features,
    few_tokens,
    gradients,
    gradients_fp8,
    linear,
    network,
    packed,
    packed_gradients,
    packing,
    products,
    pruned_quantization,
    quantization,
    steps,
    steps_gradients,
)
from sparse24.ops.compression import *
from sparse24.ops.experts import *
from sparse24.ops.experts_gradients import *
from sparse24.ops.experts_products import *
from sparse24.ops.features import *
from sparse24.ops.few_tokens import *
from sparse24.ops.gradients import *
from sparse24.ops.gradients_fp8 import *
from sparse24.ops.linear import *
from sparse24.ops.network import *
from sparse24.ops.packed import *
from sparse24.ops.packed_gradients import *
from sparse24.ops.packing import *
from sparse24.ops.products import *
from sparse24.ops.pruned_quantization import *
from sparse24.ops.quantization import *
from sparse24.ops.steps import *
from sparse24.ops.steps_gradients import *

__all__: list[str] = []
__all__ += compression.__all__
__all__ += features.__all__
__all__ += products.__all__
__all__ += linear.__all__
__all__ += packing.__all__
__all__ += packed.__all__
__all__ += packed_gradients.__all__
__all__ += gradients.__all__
__all__ += gradients_fp8.__all__
__all__ += quantization.__all__
__all__ += pruned_quantization.__all__
__all__ += few_tokens.__all__
__all__ += network.__all__
__all__ += steps.__all__
__all__ += steps_gradients.__all__
__all__ += experts.__all__
__all__ += experts_gradients.__all__
__all__ += experts_products.__all__
