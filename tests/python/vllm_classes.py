"""Stand-ins of what the plugin uses of vLLM 0.32: modules by name, with classes that behave as vLLM's.

Layers return tuples, own the collectives and run the product of their `quant_method`; float8 weights are kept
transposed; an engine has a table of layers, which ops look names up in while a forward runs.
"""

import contextlib
import functools
import types
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: What the stand-in of a collective was called with: partial sums, in the order of ranks.
reduced: list[Tensor] = []
LIBRARY = torch.library.Library("vllm", "FRAGMENT")
FP8_STATIC = "float8, one static scale"


class LinearMethodBase:
    def apply(self, layer: nn.Module, x: Any, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class UnquantizedLinearMethod(LinearMethodBase):
    def apply(self, layer, x, bias=None):
        if hasattr(layer, "packed"):  # as on a CPU, where the weight is repacked and dropped
            return F.linear(x, layer.packed, bias)
        return F.linear(x, layer.weight, bias)


class Int8LinearMethod(UnquantizedLinearMethod):
    pass


class Fp8LinearMethod(LinearMethodBase):
    """Inputs are quantised by the layer's static scale, or by row where it has none."""

    def apply(self, layer, x, bias=None):
        if isinstance(x, QuantizedActivation):
            assert x.quant_key == layer._input_quant_key
            rows, scale, dtype = x.data, x.scale, x.orig_dtype
        else:
            dtype, scale = x.dtype, layer.input_scale
            if scale is None:
                scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
            rows = to_fp8(x, scale)
        out = rows.float() @ layer.weight.float() * scale * layer.weight_scale
        return (out if bias is None else out + bias.float()).to(dtype)


class LinearBase(nn.Module):
    def __init__(self, out_features, in_features, bias=False, dtype=torch.bfloat16, prefix="", return_bias=True):
        super().__init__()
        self.output_size_per_partition, self.input_size_per_partition = out_features, in_features
        self.params_dtype, self.prefix, self.return_bias = dtype, prefix, return_bias
        self.skip_bias_add, self.quant_method = False, UnquantizedLinearMethod()
        weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(out_features).to(dtype) / 4, requires_grad=False) if bias else None

    def quantize(self, input_scale: float | None, expose: bool) -> None:
        """Make the weight float8, as vLLM keeps it, and say that inputs may come quantised."""
        scale = self.weight.abs().max().float() / 448
        self.weight = nn.Parameter(to_fp8(self.weight, scale).t(), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        given = None if input_scale is None else torch.tensor(input_scale, device=scale.device)
        self.input_scale = None if given is None else nn.Parameter(given, requires_grad=False)
        self.quant_method = Fp8LinearMethod()
        if expose:
            self._input_quant_key = FP8_STATIC

    def result(self, out: Tensor) -> Any:
        return (out, None) if self.return_bias else out


class ColumnParallelLinear(LinearBase):
    gather_output = False

    def forward(self, x):
        return self.result(self.quant_method.apply(self, x, self.bias))


class RowParallelLinear(LinearBase):
    input_is_parallel, reduce_results, tp_rank, tp_size = True, True, 0, 1

    def forward(self, x):
        out = self.quant_method.apply(self, x, None if self.tp_rank > 0 else self.bias)
        if self.reduce_results and self.tp_size > 1:
            reduced.append(out)
        return self.result(out)


class ReplicatedLinear(LinearBase):
    def forward(self, x):
        return self.result(self.quant_method.apply(self, x, self.bias))


class ReLUSquaredActivation(nn.Module):
    def forward(self, x):
        return torch.square(F.relu(x))


@dataclass
class QuantizedActivation:
    data: Tensor
    scale: Tensor
    orig_dtype: torch.dtype
    orig_shape: torch.Size
    quant_key: str


class QuantFP8(nn.Module):
    def __init__(self, static, group_shape):
        super().__init__()
        assert static and group_shape == GroupShape.PER_TENSOR

    def forward(self, x, scale):
        return to_fp8(x, scale), scale


class GroupShape:
    PER_TENSOR = "one"


class BaseModelLoader:
    def load_model(self, vllm_config, model_config, prefix=""):
        return model_config


@dataclass
class CompilationConfig:
    static_forward_context: dict = field(default_factory=dict)


@dataclass
class VllmConfig:
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    additional_config: dict = field(default_factory=dict)


#: The engine that is running.
running: list[VllmConfig] = []


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)


def maybe_fused_act_quant(activation, x, linear):
    return activation(x)


def get_forward_context():
    return types.SimpleNamespace(no_compile_layers=running[-1].compilation_config.static_forward_context)


@contextlib.contextmanager
def set_current_vllm_config(vllm_config):
    yield


def direct_register_custom_op(op_name, op_func, fake_impl):
    LIBRARY.define(op_name + torch.library.infer_schema(op_func, mutates_args=[]))
    LIBRARY.impl(op_name, op_func, "CompositeExplicitAutograd")
    LIBRARY._register_fake(op_name, fake_impl)


@functools.cache
def modules() -> dict[str, types.ModuleType]:
    """Modules of vLLM by name, with what the plugin imports from each; the same ones whenever a file asks."""
    contents = {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.config": {"set_current_vllm_config": set_current_vllm_config},
        "vllm.forward_context": {"get_forward_context": get_forward_context},
        "vllm.utils": {},
        "vllm.utils.torch_utils": {
            "LayerNameType": str,
            "_encode_layer_name": lambda name: name,
            "_resolve_layer_name": lambda name: name,
            "direct_register_custom_op": direct_register_custom_op,
        },
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": BaseModelLoader},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.activation": {"get_act_fn": lambda name: ReLUSquaredActivation()},
        "vllm.model_executor.layers.linear": {
            cls.__name__: cls for cls in (ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear)
        },
        "vllm.model_executor.layers.fusion": {},
        "vllm.model_executor.layers.fusion.fused_act_quant": {"maybe_fused_act_quant": maybe_fused_act_quant},
        "vllm.model_executor.layers.fusion.quant_activation": {
            "QuantizedActivation": QuantizedActivation,
            "get_input_quant_key": lambda layer: getattr(layer, "_input_quant_key", None),
        },
        "vllm.model_executor.layers.quantization": {},
        "vllm.model_executor.layers.quantization.input_quant_fp8": {"QuantFP8": QuantFP8},
        "vllm.model_executor.layers.quantization.utils": {},
        "vllm.model_executor.layers.quantization.utils.quant_utils": {
            "GroupShape": GroupShape,
            "kFp8StaticTensorSym": FP8_STATIC,
        },
    }
    found = {}
    for name, entries in contents.items():
        found[name] = types.ModuleType(name)
        vars(found[name]).update(entries)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(found[parent], own, found[name])
    return found
