"""A squared-ReLU network of two layers of vLLM: which of its products run, and with which weights."""

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fusion.fused_act_quant import maybe_fused_act_quant
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

from sparse24.format import FEATURES, FP8
from sparse24.mlp import pays, relu2_mlp
from sparse24.ops import linear_compress, mm, quantize_fp8


class Network:
    """What one rank computes: ``relu2(x @ w1.T + b1) @ w2.T + b2`` of its shards, before any collective.

    Parameters
    ----------
    up, down : LinearBase
        vLLM's layers, with their weights loaded and processed.
    activation : Module
        vLLM's squared ReLU.
    min_tokens : int, optional
        As in `Settings`.

    Attributes
    ----------
    problem : str or None
        Why these layers cannot run 2:4.
    static : bool
        float8 with a scale of each layer's input from the checkpoint.
    """

    def __init__(self, up: nn.Module, down: nn.Module, activation: nn.Module, min_tokens: int | None) -> None:
        self.up, self.down, self.activation, self.min_tokens = up, down, activation, min_tokens
        self.up_method, self.down_method = up.quant_method, down.quant_method
        self.d, self.f, self.d_out = _sizes(up)[1], _sizes(up)[0], _sizes(down)[0]
        self.dtype = up.params_dtype
        weights = getattr(up, "weight", None), getattr(down, "weight", None)
        self.fp8 = all(isinstance(w, Tensor) and w.dtype == FP8 for w in weights)
        scales = [getattr(layer, "input_scale", None) for layer in (up, down)]
        self.static = self.fp8 and all(scale is not None and scale.numel() == 1 for scale in scales)
        #: On a CPU vLLM repacks weights of 16 bits and drops them: this is what they were.
        self.unpacked: tuple[Tensor, Tensor] | None = None
        self.problem = self._problem()

    def __call__(self, x: Tensor, scale_x: Tensor | None, with_bias: bool) -> Tensor:
        """Compute [T, D_out] of x [T, D], which is float8 if it has a scale."""
        bias = self.down.bias if with_bias else None
        if not self.runs_sparse(x.shape[0]):
            return self._dense(x, scale_x, bias)
        w1, w2 = self._weights()
        if not self.fp8:
            return relu2_mlp(x, w1, w2, self.up.bias, bias, min_tokens=0)
        scale_1, scale_2 = self.up.weight_scale, self.down.weight_scale
        if not self.static:
            scales = {"w1_scale": scale_1, "w2_scale": scale_2}
            return relu2_mlp(x, w1, w2, self.up.bias, bias, min_tokens=0, **scales)
        if scale_x is None:
            x, scale_x = quantize_fp8(x, self.up.input_scale.view(1), "tensor")
        scale_y = self.down.input_scale.view(1)
        y, meta, *_ = linear_compress(x, w1, scale_x, scale_1, self.up.bias, scale_y, out_dtype=FP8, statistics=False)
        return mm(y, meta, w2.t(), scale_y, scale_2, bias, out_dtype=self.dtype)

    def runs_sparse(self, tokens: int) -> bool:
        """Whether a call with so many tokens runs 2:4."""
        if self.min_tokens is not None:
            return tokens >= self.min_tokens
        # As for one scale also where there are scales by row: vLLM's products with these are as fast, torch's are not.
        return pays(tokens, self.f, self.d_out, fp8=self.fp8, one_scale=True)

    def _dense(self, x: Tensor, scale_x: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run vLLM's own products, as if the layers were called one after another."""
        if scale_x is not None:
            x = QuantizedActivation(x, scale_x, self.dtype, x.shape, kFp8StaticTensorSym)
        hidden = self.up_method.apply(self.up, x, self.up.bias)
        return self.down_method.apply(self.down, maybe_fused_act_quant(self.activation, hidden, self.down), bias)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Return w1 [F, D] and w2 [D_out, F]; vLLM keeps float8 weights transposed."""
        if self.unpacked is not None:
            return self.unpacked
        w1, w2 = self.up.weight, self.down.weight
        return (w1.t(), w2.t()) if self.fp8 else (w1, w2)

    def _problem(self) -> str | None:
        up, down = self.up, self.down
        if _sizes(down)[1] != self.f:
            return "the sizes of its layers do not fit each other"
        if up.skip_bias_add or down.skip_bias_add or getattr(up, "gather_output", False):
            return "a layer leaves its bias or its output to others"
        if not getattr(down, "input_is_parallel", True):
            return "the second layer splits its input"
        if self.f % FEATURES[self.fp8] or (self.fp8 and (self.d % 16 or self.d_out % 16)):
            return f"{self.f} features of {self.d} and {self.d_out} are no multiples that 2:4 products take"
        if not self.fp8:
            return self._problem_of_16_bits()
        for layer in (up, down):
            if layer.weight.shape != _sizes(layer)[::-1] or not layer.weight.t().is_contiguous():
                return "its float8 weights are packed for another kernel"
            scale = getattr(layer, "weight_scale", None)
            if scale is None or scale.dtype != torch.float32 or scale.numel() not in (1, _sizes(layer)[0]):
                return "its float8 weights have scales of blocks"
        # The pre-activation is rounded to bfloat16, and so is the bias.
        return None if self.dtype == torch.bfloat16 else f"it is float8 in {self.dtype}, not in bfloat16"

    def _problem_of_16_bits(self) -> str | None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            return f"it is of {self.dtype}"
        if not all(type(method).__name__ == "UnquantizedLinearMethod" for method in (self.up_method, self.down_method)):
            return "its layers are quantised in another way than float8"
        layers = (self.up, self.down)
        if all(layer.weight.shape == _sizes(layer) and layer.weight.dtype == self.dtype for layer in layers):
            return None
        if self.up.weight.device.type != "cpu":
            return "its weights are packed for another kernel"
        self.unpacked = _unpack(self.up, self.dtype), _unpack(self.down, self.dtype)
        return None


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return the rows and columns of this rank's weight, as `torch.nn.Linear` stores it."""
    return layer.output_size_per_partition, layer.input_size_per_partition


def _unpack(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Ask a layer for its weight: the product with the identity is exact."""
    identity = torch.eye(_sizes(layer)[1], dtype=dtype)
    return layer.quant_method.apply(layer, identity, None).t().contiguous()
