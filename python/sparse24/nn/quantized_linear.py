"""A linear layer with a float8 weight, for inference."""

from typing import Any

from torch import Tensor, nn

from sparse24.format import FP8
from sparse24.nn.quantized_state import as_bytes, quantized, state_for_quantized, with_dtypes_of


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is float8_e4m3fn [out, in] with float32 scales [out].

    `scale_y_factor` [1] is `sparse24.bounding_factor` of both: whoever replaces them has to replace it.

    Moving the model to another device moves them; casting the model (``.bfloat16()``, ``.to(dtype)``) leaves them as
    they are, since a float8 weight means nothing without its scale.
    """

    weight: Tensor
    weight_scale: Tensor
    scale_y_factor: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        for name, value in quantized(linear.weight).items():
            self.register_buffer(name, value)
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Dequantise and multiply in x's dtype: for inspection, not for speed."""
        weight = (self.weight.float() * self.weight_scale.unsqueeze(1)).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        entries = state_for_quantized(state_dict, prefix, self.weight.shape)
        super()._load_from_state_dict({**state_dict, **entries}, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "_buffers": as_bytes(self._buffers)}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._buffers["weight"] = self._buffers["weight"].view(FP8)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        with_dtypes_of(self._buffers, before)
        return self

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, float8_e4m3fn"
