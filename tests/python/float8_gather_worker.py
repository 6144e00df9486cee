"""What two processes run to compare FSDP2 that gathers float8 codes with FSDP2 that does not."""

import contextlib
import io
from unittest import mock

import distributed_worker as worker
import torch
import torch.distributed.checkpoint as checkpoint
from composition_models import FP8_STEP, build
from convert_models import D, Inline, Stack, randomize
from distributed_worker import CheckpointImpl, FilePeers, batch, checkpoint_wrapper, fully_shard, mesh, whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import sparse24
from sparse24 import float8_gather
from sparse24.distributed import gather_float8
from sparse24.mlp.gathered_weight import GatheredWeight

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CONFIG = sparse24.ConvertConfig(min_tokens=0, dtype="fp8", recipe=FP8_STEP)


def model_of(kind, *, block=False, recompute=False):
    """float32 networks whose steps are float8; in blocks with a layer before each, or by themselves."""
    if kind == "converted":
        model = randomize(Stack(Inline(bias=True), Inline(bias=True))).to(worker.DEVICE)
        sparse24.convert(model, CONFIG, quiet=True)
    else:
        model = build("fp8_step", worker.DEVICE, torch.float32)
    for i, network in enumerate(model.layers):
        if recompute:
            network.recompute = True
        if block:
            model.layers[i] = nn.Sequential(randomize(nn.Linear(D, D)).to(worker.DEVICE), network)
    return model


def sharded(kind="module", gathers=None, wrap="plain", policy=POLICY, **options):
    model = model_of(kind, **options)
    for i, layer in enumerate(model.layers):
        if wrap == "checkpointed":
            model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        elif wrap == "compiled":
            layer.compile(backend="aot_eager", fullgraph=True)
    worker.shard(model, mp_policy=policy)
    if gathers is not None:
        assert gather_float8(model, once=gathers == "once") is model
    return model


def trained(rank, kind, wrap, gathers, folder=None, **options):
    """Outputs and gradients of steps of two micro-batches each, and the weights after; plain, and with codes.

    And how often codes were made. With a folder both are brought by copy engines.
    """
    with contextlib.ExitStack() as patches:
        if folder and worker.DEVICE == "cpu":
            patches.enter_context(mock.patch.object(sparse24.distributed, "Peers", FilePeers))
            patches.enter_context(mock.patch.object(FilePeers, "folder", folder))
        make = patches.enter_context(
            mock.patch.object(float8_gather.Parts, "make", autospec=True, side_effect=float8_gather.Parts.make)
        )
        results = []
        for how in (None, gathers):
            torch._dynamo.reset()
            model = sharded(kind, how, wrap, **options)
            if folder:
                sparse24.distributed.use_copy_engines(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
            found = []
            for _ in range(2):
                optimizer.zero_grad()
                for share in batch(rank).bfloat16().chunk(2):
                    out = model(share)
                    out.float().square().mean().backward()
                    found.append(out.detach())
                found += [g.clone() for g in whole(p.grad for p in model.parameters())]
                optimizer.step()
            results.append([*found, *whole(p.detach() for p in model.parameters())])
        return *results, make.call_count


def codes_in_a_step(rank, kind):
    """Of each weight what the network reads, and the codes of the whole one."""
    model, seen = sharded(kind, "twice"), []
    names = "c_fc.weight", "c_proj.weight"
    names = names if kind == "converted" else ("up_proj.weight", "down_proj.weight")
    expected = [
        sparse24.quantize_fp8_both(w.full_tensor().bfloat16())
        for network in model.layers
        for w in (network.get_parameter(name) for name in names)
    ]

    def look(network, _):
        for w in map(network.get_parameter, names):
            assert type(w) is GatheredWeight and w.is_leaf and w.requires_grad and w.dtype == torch.bfloat16
            seen.append((w.codes.view(torch.uint8).clone(), w.scale.clone()))

    for network in model.layers:
        network.register_forward_pre_hook(look)
    model(batch(rank).bfloat16())
    return seen, [(values.view(torch.uint8), scale) for values, _, scale, _ in expected]


def evaluated(rank):
    """Outputs without gradients, with codes and without."""
    with torch.no_grad():
        return [sharded("module", how)(batch(rank).bfloat16()).clone() for how in (None, "twice")]


def loaded(rank, folder):
    """Outputs before and after weights that were saved are loaded over others; what states hold."""
    model, x = sharded("module", "twice"), batch(rank).bfloat16()
    first = model(x).detach().clone()
    state = {"model": model.state_dict()}
    kinds = {type(w.to_local()) for w in state["model"].values() if isinstance(w, torch.distributed.tensor.DTensor)}
    torch.save(state, io.BytesIO())
    checkpoint.save(state, checkpoint_id=folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.dim() == 2 else 1)
    second = model(x).detach().clone()
    state = {"model": model.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    return first, second, model(x).detach().clone(), [kind is torch.Tensor for kind in kinds]


def refusals(rank):
    """What is said where it does not fit, by case."""

    def said(call):
        try:
            call()
        except RuntimeError as error:
            return str(error)

    def parallel():
        model = model_of("module")
        for network in model.layers:
            parallelize_module(network, mesh(), {"up_proj": ColwiseParallel(), "down_proj": ColwiseParallel()})
        model.layers[0].down_proj.weight = nn.Parameter(
            model.layers[0].down_proj.weight.redistribute(placements=[torch.distributed.tensor.Shard(1)])
        )
        return gather_float8(model)

    def uneven():
        network = sparse24.nn.ReLU2MLP(D, 160, 48 + 16, precision="fp8", recipe=FP8_STEP).to(worker.DEVICE)
        network.down_proj.weight = nn.Parameter(network.down_proj.weight[:63].contiguous())
        return gather_float8(fully_shard(network, mesh=mesh()))

    def without_memory():
        with torch.device("meta"):
            network = sparse24.nn.ReLU2MLP(D, 160, precision="fp8", recipe=FP8_STEP)
        return gather_float8(fully_shard(network, mesh=mesh()))

    def in_blocks():
        gather_float8(sharded(block=True), once=True)

    def recompute():
        gather_float8(sharded(recompute=True), once=True)

    def given_up():
        model = sharded(gathers="twice")
        for network in model.layers:
            network.set_unshard_in_backward(False)
        model(batch(rank).bfloat16()).sum().backward()

    def checkpointed(kind="module"):
        model = model_of(kind)
        for i, network in enumerate(model.layers):
            fully_shard(network, mesh=mesh(), mp_policy=POLICY)
            model.layers[i] = checkpoint_wrapper(network, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        gather_float8(fully_shard(model, mesh=mesh(), mp_policy=POLICY), once=True)
        model(batch(rank).bfloat16()).sum().backward()

    def checkpointed_converted():
        checkpointed("converted")

    cases = parallel, uneven, without_memory, in_blocks, recompute, given_up, checkpointed, checkpointed_converted
    found = {case.__name__: said(case) for case in cases}
    if worker.DEVICE == "cuda":
        found["float32"] = said(lambda: sharded(gathers="twice", policy=MixedPrecisionPolicy())(batch(rank)))
        found["offloaded"] = said(
            lambda: gather_float8(worker.shard(model_of("module"), offload_policy=CPUOffloadPolicy()))
        )
    return found
