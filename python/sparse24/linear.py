"""An older name of `sparse24.ops.linear`."""

from sparse24.ops.linear import OutputActivation, OutputScaling, linear_compress, linear_relu2

__all__ = ["OutputActivation", "OutputScaling", "linear_compress", "linear_relu2"]
