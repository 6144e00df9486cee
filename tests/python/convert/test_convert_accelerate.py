"""Networks under the hooks that accelerate puts on the modules of a model whose parts lie on several devices.

Where a hook moves inputs to the weights, the weights can be read; where it brings the weights, the layers are called.
"""

import copy

import pytest
import torch
from compare import assert_same_bits
from convert_models import EXACT, BothParameters, CountOps, D, Inline, Stack, WithModule, randomize, relu2
from data import normal
from found_models import InList, encoder, feed_forward

import sparse24
from sparse24.nn import ReLU2MLP

hooks = pytest.importorskip("accelerate.hooks")


class Chain(Stack):
    """Without residual connections, which would add tensors of two devices: hooks return outputs where weights are."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def build(kind=Stack):
    return randomize(kind(Inline(), WithModule(bias=True), BothParameters()))


def inputs(device="cpu"):
    return normal(21, D, dtype=torch.float32, seed=5).to(device)


def dispatch(model, device="cpu", **options):
    """Hook every module that has weights, as `dispatch_model` does."""
    for module in model.modules():
        if len(module.state_dict()) > 0:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(device, **options))
    return model


def sparse_calls(model, x):
    with CountOps() as ops:
        out = model(x)
    return out, ops.sparse


@pytest.fixture(scope="module")
def expected():
    model = build()
    dense = model(inputs())
    sparse24.convert(model, EXACT, quiet=True)
    return model(inputs()), dense


@pytest.mark.parametrize("first", ["convert", "dispatch"])
@pytest.mark.parametrize("io_same_device", [False, True])
def test_inputs_that_are_moved(first, io_same_device, expected):
    """Converted before or after; also reverted, and without the hooks again."""
    sparse, dense = expected
    model = build()
    if first == "dispatch":
        dispatch(model, io_same_device=io_same_device)
    assert len(sparse24.convert(model, EXACT, quiet=True).converted) == 3
    if first == "convert":
        dispatch(model, io_same_device=io_same_device)
    out, calls = sparse_calls(model, inputs())
    assert calls == 3
    assert_same_bits(out, sparse)
    assert_same_bits(copy.deepcopy(model)(inputs()), sparse)
    unhooked = hooks.remove_hook_from_module(copy.deepcopy(model), recurse=True)
    assert sparse_calls(unhooked, inputs())[1] == 3
    for m in (model, unhooked):
        with sparse24.disabled():
            assert_same_bits(m(inputs()), dense)
        assert len(sparse24.revert(m)) == 3
        out, calls = sparse_calls(m, inputs())
        assert calls == 0
        assert_same_bits(out, dense)


@pytest.mark.parametrize("io_same_device", [False, True])
@pytest.mark.parametrize("make", [Inline, lambda: ReLU2MLP(D, 160, min_tokens=0)], ids=["converted", "module"])
def test_each_network_runs_where_its_weights_are(make, io_same_device):
    """The layers' hooks alone would move the input there (here to the meta device)."""
    network = make()
    if not isinstance(network, ReLU2MLP):
        assert sparse24.convert(network, EXACT, quiet=True).converted == [""]
    for child in network.children():
        dispatch(child, "meta", io_same_device=io_same_device)
    assert all(p.is_meta for p in network.parameters())
    x = inputs()
    if io_same_device:
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # it goes back
            network(x)
        return
    out, calls = sparse_calls(network, x)
    assert calls == 1 and out.is_meta and out.shape == x.shape


@pytest.mark.parametrize("first", ["convert", "dispatch"])
@pytest.mark.parametrize(
    "make",
    [feed_forward, InList, lambda: encoder(activation=relu2, dropout=0.0)],
    ids=["Sequential", "list", "encoder"],
)
def test_networks_of_any_name_under_hooks(make, first):
    model, x = make(), normal(3, 7, D, dtype=torch.float32, seed=5)
    alone = copy.deepcopy(model)
    names = sparse24.convert(alone, EXACT, quiet=True).converted
    if first == "dispatch":
        dispatch(model, io_same_device=True)
    assert sparse24.convert(model, EXACT, quiet=True).converted == names
    if first == "convert":
        dispatch(model, io_same_device=True)
    out, calls = sparse_calls(model, x)
    assert calls == len(names)
    assert_same_bits(out, alone(x))


def test_module_under_hooks(expected):
    network = randomize(ReLU2MLP(D, 160, min_tokens=0))
    sparse = network(inputs())
    out, calls = sparse_calls(dispatch(network), inputs())
    assert calls == 1
    assert_same_bits(out, sparse)
    with pytest.raises(RuntimeError, match="to quantise, got: up_proj has hooks"):
        network.quantize_()


@pytest.mark.parametrize("kind", ["converted", "module"])
def test_weights_that_are_brought(kind):
    """Offloaded: there is nothing to read before a layer is called."""
    network = randomize(Inline() if kind == "converted" else ReLU2MLP(D, 160, min_tokens=0))
    names = [name for name, _ in network.named_children()]
    dense = network.get_submodule(names[1])(torch.relu(network.get_submodule(names[0])(inputs())).square())
    sparse24.convert(network, EXACT, quiet=True)
    for child in network.children():
        dispatch(child, offload=True)
    assert all(p.is_meta for p in network.parameters())
    with pytest.warns(UserWarning, match=f"the weight of {names[0]} is offloaded"):
        out, calls = sparse_calls(network, inputs())
    assert calls == 0
    assert_same_bits(out, dense)
    if kind == "converted":
        sparse24.revert(network)
        reason = {"": f"the weight of {names[0]} is offloaded"}
        assert sparse24.convert(network, EXACT, quiet=True).skipped == reason


def test_weights_that_a_hook_of_the_network_brings(expected):
    """They are there when the network runs."""
    network = randomize(Stack(Inline()))
    sparse24.convert(network, EXACT, quiet=True)
    sparse = network(inputs())
    mlp = network.layers[0]
    hooks.add_hook_to_module(mlp, hooks.AlignDevicesHook("cpu", offload=True, place_submodules=True))
    assert all(p.is_meta for p in mlp.parameters())
    out, calls = sparse_calls(network, inputs())
    assert calls == 1
    assert_same_bits(out, sparse)


def test_other_hooks_are_called():
    class Adds(hooks.ModelHook):
        def post_forward(self, module, output):
            return output + 1

    network = randomize(Inline())
    sparse24.convert(network, EXACT, quiet=True)
    moves = hooks.AlignDevicesHook("cpu")
    hooks.add_hook_to_module(network.c_fc, moves)
    assert sparse_calls(network, inputs())[1] == 1
    hooks.add_hook_to_module(network.c_fc, Adds(), append=True)
    with pytest.warns(UserWarning, match="c_fc has a Adds"):
        out, calls = sparse_calls(network, inputs())
    assert calls == 0
    assert_same_bits(out, network.c_proj(torch.relu(network.c_fc(inputs())).square()))


def test_a_patch_over_a_hook_is_called():
    network = randomize(Inline())
    sparse24.convert(network, EXACT, quiet=True)
    layer = dispatch(network.c_fc)
    hooked = layer.forward
    layer.forward = lambda x: hooked(x) + 1
    with pytest.warns(UserWarning, match="the forward of c_fc is patched"):
        out = network(inputs())
    assert_same_bits(out, network.c_proj(torch.relu(network.c_fc(inputs())).square()))


def test_dispatch_model(expected):
    """The real thing, with all of it on one device, and with a part on the CPU."""
    accelerate = pytest.importorskip("accelerate")
    model = build()
    sparse24.convert(model, EXACT, quiet=True)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    out, calls = sparse_calls(model, inputs())
    assert calls == 3
    assert_same_bits(out, expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.gpu
def test_two_devices():
    """Each network on its own device; a network whose layers are on two calls them."""
    accelerate = pytest.importorskip("accelerate")
    model = build(Chain).to(torch.bfloat16)
    x = inputs("cuda:0").to(torch.bfloat16)
    alone = copy.deepcopy(model).to("cuda:0")
    sparse24.convert(alone, EXACT, quiet=True)
    sparse24.convert(model, EXACT, quiet=True)
    devices = {"layers.0": 0, "layers.1": 1, "layers.2": 0}
    split = accelerate.dispatch_model(copy.deepcopy(model), devices)
    out, calls = sparse_calls(split, x)
    assert calls == 3 and {p.device.index for p in split.parameters()} == {0, 1}
    assert_same_bits(out, alone(x))
    inside = {"layers.0.c_fc": 0, "layers.0.c_proj": 1, "layers.1": 1, "layers.2": 1}
    split = accelerate.dispatch_model(model, inside)
    with pytest.warns(UserWarning, match="its layers are on different devices"):
        out, calls = sparse_calls(split, x)
    assert calls == 2
