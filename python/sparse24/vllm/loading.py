"""Find the squared-ReLU networks of a model that vLLM has loaded."""

import copy
import functools
import logging
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from sparse24.env import cuda_problem
from sparse24.vllm import operator
from sparse24.vllm.layers import attach
from sparse24.vllm.network import Network
from sparse24.vllm.settings import Settings

logger = logging.getLogger("vllm.sparse24")


def install(settings: Settings) -> None:
    """Search every model that vLLM loads from now on in this process."""
    load = BaseModelLoader.load_model
    if hasattr(load, "_sparse24"):
        return

    @functools.wraps(load)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **options: Any) -> nn.Module:
        model = load(self, vllm_config, model_config, *args, **options)
        convert(model, vllm_config, settings)
        return model

    load_model._sparse24 = True
    BaseModelLoader.load_model = load_model


def convert(model: nn.Module, vllm_config: Any, settings: Settings) -> list[str]:
    """Make the squared-ReLU networks of a loaded model run 2:4; returns their names.

    Parameters
    ----------
    model : Module
        Of vLLM, its weights loaded and processed, before it is compiled or captured.
    vllm_config : VllmConfig
        Of its engine. Its table of layers gets the networks, and its hash, by which compiled graphs are kept from one
        run to the next, changes if there are any.
    settings : Settings
        What the environment says.
    """
    found = [(name, module, names) for name, module in model.named_modules() if (names := layers_of(module))]
    if not found:
        return []
    problem = _problem(next(model.parameters()).device, settings)
    if problem is not None:
        logger.debug("sparse24: nothing is changed: %s", problem)
        return []
    operator.define()
    converted, skipped = [], {}
    with set_current_vllm_config(vllm_config):
        for name, module, names in found:
            up, down = (getattr(module, layer) for layer in names)
            network = Network(up, down, get_act_fn("relu2"), settings.min_tokens)
            problem = "SPARSE24_VLLM_DENSE names it" if settings.keeps_dense(name) else network.problem
            if problem is not None:
                skipped[name] = problem
                continue
            key = f"{down.prefix or name}.sparse24"
            vllm_config.compilation_config.static_forward_context[key] = network
            attach(module, names, network, key)
            converted.append(name)
    for name, reason in skipped.items():
        logger.info("sparse24: %s stays dense: %s", name, reason)
    if converted:
        if isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config["sparse24"] = settings.as_dict()
        logger.info("sparse24: %d of %d squared-ReLU networks run 2:4", len(converted), len(found))
    return converted


def layers_of(module: nn.Module) -> tuple[str, str] | None:
    """Name the two layers of a module that computes ``down(relu2(up(x)))`` and nothing else.

    Not its class says so but its forward: called with stand-ins of its three children, it has to hand on what each of
    them returns to the next.
    """
    children = dict(module.named_children())
    linear = [name for name, child in children.items() if isinstance(child, LinearBase)]
    others = [type(child).__name__ for name, child in children.items() if name not in linear]
    if len(linear) != 2 or others != ["ReLUSquaredActivation"] or next(module.parameters(recurse=False), None):
        return None
    calls: list[str] = []
    probe = copy.copy(module)
    probe._modules = {name: _StandIn(name, child, calls) for name, child in children.items()}
    x = torch.empty(1, device="meta")
    try:
        out = probe.forward(x)
    except Exception:  # of whatever it does with such a thing
        return None
    if len(calls) != 3 or calls[1] in linear or out is not probe._modules[calls[2]].out:
        return None
    inputs = [probe._modules[name].x for name in calls]
    if inputs[0] is not x or any(i is not probe._modules[name].out for i, name in zip(inputs[1:], calls, strict=False)):
        return None
    up, down = calls[0], calls[2]
    first, second = (ColumnParallelLinear, ReplicatedLinear), (RowParallelLinear, ReplicatedLinear)
    fit = isinstance(children[up], first) and isinstance(children[down], second)
    return (up, down) if fit else None


class _StandIn(nn.Module):
    """Notes what a child is called with, and returns something that can be recognised."""

    def __init__(self, name: str, child: nn.Module, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls, self.x, self.out = name, calls, None, torch.empty(1, device="meta")
        self.returns_tuple = getattr(child, "return_bias", False)

    def forward(self, x: object) -> object:
        self.calls.append(self.name)
        self.x = x
        return (self.out, None) if self.returns_tuple else self.out


def _problem(device: torch.device, settings: Settings) -> str | None:
    """Why no network of this engine can gain."""
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT asks for results that do not depend on the number of tokens"
    if device.type == "cuda":
        return cuda_problem()
    if device.type != "cpu":
        return f"there are no kernels for {device.type}"
    return None if settings.min_tokens is not None else "the reference on the CPU is slow"
