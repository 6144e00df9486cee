"""Stacks of a few layers of real models, at their widths, with random weights whose activations have a share of zeros.

The weights are those of no trained model; the modules are the transformers library's own. Zeros come as in
inputs.mlp_inputs: some columns of the input are 1, and those of the first weight share a negative shift. What norms and
attention make of these columns is measured: the shift of each layer is the quantile of what it sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sparse24.bench import inputs, reference
from sparse24.nn import QuantizedLinear

#: Tokens that decide about a layer's shift: enough for the share of zeros to be right to some tenths of a percent.
CALIBRATION_TOKENS = 256


class Stack(NamedTuple):
    """Layers of a model of transformers, `batch` sequences of `length` tokens, and what its FFN calls its layers.

    With the name of the attention's last layer too the constant columns of an input stay as they are in all layers, so
    that zeros of single tokens are as many as those of all: few tokens are timed.
    """

    name: str
    model: str
    batch: int
    length: int
    d_model: int
    d_ff: int
    heads: int
    key_value_heads: int
    ffn: tuple[str, str]
    attention_out: str | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def build(self, layers: int, *, device: torch.device, seed: int) -> nn.Module:
        """The layers without a head, in bfloat16; the embedding is not used."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(
            self.model,
            vocab_size=8,
            hidden_size=self.d_model,
            intermediate_size=self.d_ff,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=self.length,
            pad_token_id=0,
        )
        torch.manual_seed(seed)
        with device:
            return AutoModel.from_config(config, dtype=torch.bfloat16)

    def networks(self, model: nn.Module) -> list[nn.Module]:
        return [layer.mlp for layer in model.layers]

    def weights(self, network: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        up, down = self.ffn
        return getattr(network, up), getattr(network, down)


STACKS = (
    Stack("Nemotron-Mini-4B", "nemotron", 4, 2048, 3072, 9216, 24, 8, ("up_proj", "down_proj")),
    Stack("Persimmon-8B", "persimmon", 4, 2048, 4096, 16384, 64, 64, ("dense_h_to_4h", "dense_4h_to_h")),
    Stack("nanochat d26", "nanochat", 16, 2048, 1664, 6656, 13, 13, ("fc1", "fc2")),
)
SMOKE = tuple(stack._replace(batch=2, length=48, d_model=64, d_ff=256, heads=4, key_value_heads=4) for stack in STACKS)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Hidden states [batch, length, d_model] after the last norm."""
    return model(inputs_embeds=x, use_cache=False).last_hidden_state


def text(stack: Stack, words: int, *, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding of each word [words, d_model], and sequences of them at random [batch, length]."""
    gen = inputs.generator(device, seed)
    rows = torch.randn(words, stack.d_model, dtype=torch.bfloat16, device=device, generator=gen)
    rows[:, : _constant(stack)] = 1
    return rows, torch.randint(words, (stack.batch, stack.length), device=device, generator=gen)


@torch.no_grad()
def with_zeros(
    stack: Stack, layers: int, zeros: float, *, device: torch.device, seed: int, x: torch.Tensor | None = None
) -> tuple[nn.Module, torch.Tensor, float]:
    """The model, its input [batch, length, d_model], and the share of zeros in the activations of all its layers.

    The input is given, as that of a `text`, or random. With one that is not like it the share is another.
    """
    model = stack.build(layers, device=device, seed=seed)
    constant = _constant(stack)
    if x is None:
        gen = inputs.generator(device, seed)
        x = torch.randn(stack.batch, stack.length, stack.d_model, dtype=torch.bfloat16, device=device, generator=gen)
        x[..., :constant] = 1
    if stack.attention_out is not None:
        for layer in model.layers:
            getattr(layer.self_attn, stack.attention_out).weight[:constant] = 0
    given, held = x, stack.attention_out is not None
    networks = [(network, *stack.weights(network)) for network in stack.networks(model)]
    return model, x, give_zeros(networks, lambda: run(model, given), constant, zeros, seed, held=held)


def _constant(stack: Stack) -> int:
    """How many columns of an input are 1."""
    return max(8, stack.d_model // 64)


@torch.no_grad()
def give_zeros(
    networks: Sequence[tuple[nn.Module, nn.Linear, nn.Linear]],
    forward: Callable[[], object],
    constant: int,
    zeros: float,
    seed: int,
    *,
    held: bool = False,
) -> float:
    """Weights of networks (each with its two layers) whose inputs in `forward` begin with `constant` equal columns.

    With `held` they add nothing to these columns. Returns the share of zeros in their activations.
    """
    shares: list[float] = []

    def calibrate(up: nn.Linear, down: nn.Linear, _network: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        number, device = seed + 10 * len(shares), up.weight.device
        up.weight.copy_(inputs.weights(*up.weight.shape, device=device, seed=number + 1))
        down.weight.copy_(inputs.weights(*down.weight.shape, device=device, seed=number + 2))
        if up.bias is not None:
            b1, b2 = inputs.biases(up.out_features, down.out_features, device=device, seed=number)
            up.bias.copy_(b1)
            down.bias.copy_(b2)
        tokens = args[0].flatten(0, -2)
        sample = tokens[:: len(tokens) // CALIBRATION_TOKENS | 1]  # an odd step: tokens of all places in a sequence
        up.weight[:, :constant] = 0
        up.weight.div_(F.linear(sample, up.weight).std())  # norms differ in the scale of what they give
        # relu(h - s u) is zero where h / u < s, for the mean u of a token's constant columns.
        ratio = up(sample).float() / sample[:, :constant].float().mean(1, keepdim=True)
        shift = ratio.flatten().kthvalue(max(1, int(zeros * ratio.numel()))).values
        up.weight[:, :constant] = -shift / constant
        down.weight.div_(F.linear(F.relu(up(sample)).square(), down.weight).std())  # as much as the residual stream
        if held:
            down.weight[:constant] = 0
        shares.append(inputs.zero_share(up(tokens)))

    handles = [network.register_forward_pre_hook(partial(calibrate, up, down)) for network, up, down in networks]
    forward()
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares)


def shared_copy(model: nn.Module) -> nn.Module:
    """Modules of their own around the same parameters, for another conversion of the same model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the weights as well, in `dtype`."""
    return copy.deepcopy(model).to(dtype)


def masked_copy(stack: Stack, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same, where of each four neighbouring activations only the two largest count."""
    model = cast_copy(model, dtype)
    for network in stack.networks(model):
        network.forward = partial(_masked, *stack.weights(network))
    return model


def _masked(up: nn.Linear, down: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(F.linear(x, up.weight, up.bias)).square()
    kept = reference.prune24(y.detach().flatten(0, -2), -1) != 0
    return F.linear(y * kept.view(y.shape), down.weight, down.bias)


def quantised_copy(stack: Stack, model: nn.Module) -> nn.Module:
    """The weights of the FFNs in float8, one scale per row; the others are shared."""
    model = shared_copy(model)
    for network in stack.networks(model):
        for name in stack.ffn:
            setattr(network, name, QuantizedLinear(getattr(network, name)))
    return model
