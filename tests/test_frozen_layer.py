"""A frozen layer without an adapter computes what its class does, and spares casts and slow derivatives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    QuantizationConfig,
    frozen_layer,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora import frozen as frozens
from lightning_lora.frozen_layer import FrozenLayer, drop_cast_copies
from lightning_lora.fused import draw as draws
from lightning_lora.layers import AdaptedLayer

WIDTH = 32
CONFIG = LoRAConfig(rank=2, target_modules=["1", "3"])
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def emulated(monkeypatch):
    """As on a CPU without instructions for 16 bits."""
    for module in (draws, frozens, frozen_layer):
        monkeypatch.setattr(module, "is_emulated", lambda dtype: dtype in DTYPES)


def plain(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, **settings) for _ in range(5))).to(dtype)


def adapted(dtype=torch.float32, **settings):
    """The second of five layers has an adapter, which does something, and so has the fourth."""
    net = plain(dtype, **settings)
    inject_adapters(net, CONFIG)
    for index in (1, 3):
        nn.init.normal_(net[index].adapter("default").lora_B)
    return net


def rows(dtype=torch.float32):
    return torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def under_autocast(net, x=None):
    with torch.autocast("cpu", torch.bfloat16):
        return net(rows() if x is None else x)


class WeightCasts(TorchDispatchMode):
    """Counts what has the shape and the dtype of a weight and is cast."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].shape == (WIDTH, WIDTH) and args[0].dtype == torch.float32
        return function(*args, **kwargs or {})


def casts_of_a_step(net):
    with WeightCasts() as casts:
        under_autocast(net).float().sum().backward()
    return casts.count


def test_from_the_second_step_on_autocast_casts_no_weight_between_the_adapters():
    net = adapted()
    assert casts_of_a_step(net) == 5
    assert [casts_of_a_step(net) for _ in range(3)] == [2, 2, 2]  # of what is below them, and of what is behind


def test_what_autocast_computes_is_the_same_to_the_last_bit():
    net, base = adapted(), plain()
    net[1].active = net[3].active = ()
    x, y = rows().requires_grad_(), rows().requires_grad_()
    for _ in range(2):
        ours, theirs = under_autocast(net, x), under_autocast(base, y)
        assert torch.equal(ours, theirs)
        x.grad = y.grad = None
        ours.float().square().sum().backward()
        theirs.float().square().sum().backward()
        assert torch.equal(x.grad, y.grad)


def test_copies_are_dropped_and_made_anew_and_no_file_holds_them():
    net = adapted()
    under_autocast(net)
    assert [getattr(layer.cast_copy, "kept", None) is not None for layer in net] == [False, True, True, True, False]
    size = len(pickle.dumps(net))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[2].cast_copy.kept is None
        assert torch.equal(under_autocast(twin), under_autocast(net))
    drop_cast_copies(net)
    assert all(getattr(layer.cast_copy, "kept", None) is None for layer in net)
    assert len(pickle.dumps(net)) == size
    with torch.no_grad():
        net[2].weight.mul_(2.0)
    under_autocast(net)
    assert torch.equal(net[2].cast_copy.kept, net[2].weight.bfloat16())


def test_where_activations_are_recomputed_or_nothing_is_differentiated_no_copy_is_kept():
    net = adapted()
    with torch.no_grad():
        under_autocast(net)
    for reentrant in (True, False):
        x = rows().requires_grad_()
        checkpoint(lambda x: under_autocast(net, x), x, use_reentrant=reentrant).float().sum().backward()
    assert all(getattr(layer.cast_copy, "kept", None) is None for layer in net)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (20, WIDTH), (2, 3, 11, WIDTH), (0, WIDTH)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("emulated")
def test_outputs_are_the_bases_to_the_last_bit_and_gradients_are_rounded_once(shape, dtype, bias):
    base = plain(dtype, bias=bias)[2]
    net = adapted(dtype, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    output = net[2](x)
    assert torch.equal(output, base(x))
    assert type(output.grad_fn).__name__.startswith("_FrozenLinear")
    output.backward(gradient)
    exact = gradient.double() @ base.weight.double()
    assert x.grad.shape == x.shape and x.grad.dtype == dtype
    if exact.numel():
        error = (x.grad.double() - exact).abs()
        few = x.numel() < 16 * WIDTH  # torch's own product, which may round its sums in between
        assert bool((error <= torch.finfo(dtype).eps * (exact.abs().max() if few else exact.abs() + 1e-4)).all())


@pytest.mark.usefixtures("emulated")
def test_mixed_precision_takes_the_same_derivatives_as_a_base_in_16_bits():
    mixed, narrow = adapted(bias=False), adapted(torch.bfloat16, bias=False)
    x, y = rows().requires_grad_(), rows().requires_grad_()
    under_autocast(mixed, x).float().square().sum().backward()
    narrow(y.bfloat16()).float().square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.usefixtures("emulated")
def test_second_derivatives_are_those_of_fp32():
    def second(dtype):
        net = adapted(torch.bfloat16).to(dtype)
        x = rows(torch.bfloat16).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(net(x).double().square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.double().square().sum(), net[1].adapter("default").lora_B)
        return found.double()

    exact = second(torch.float32)
    assert float((second(torch.bfloat16) - exact).norm()) <= 0.03 * float(exact.norm())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.usefixtures("emulated")
def test_a_recomputed_layer_gives_the_same_gradients_to_the_last_bit(reentrant):
    net = adapted(torch.bfloat16)
    x, y = rows(torch.bfloat16).requires_grad_(), rows(torch.bfloat16).requires_grad_()
    net(x).float().sum().backward()
    checkpoint(net, y, use_reentrant=reentrant).float().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.usefixtures("emulated")
def test_what_is_unfrozen_later_gets_its_gradient(name):
    for dtype, run in ((torch.bfloat16, lambda net, x: net(x)), (torch.float32, under_autocast)):
        net, base = adapted(dtype), plain(dtype)
        for layer in (net[2], base[2]):
            layer.get_parameter(name).requires_grad_()
        hidden = rows(dtype)
        run(net[2], hidden.clone().requires_grad_()).float().square().sum().backward()
        run(base[2], hidden.clone().requires_grad_()).float().square().sum().backward()
        assert torch.equal(net[2].get_parameter(name).grad, base[2].get_parameter(name).grad)


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.parametrize("build", [Own, Conv1D], ids=["own forward", "Conv1D"])
@pytest.mark.usefixtures("emulated")
def test_a_layer_of_another_class_computes_what_its_class_does_while_its_adapter_is_off(build):
    torch.manual_seed(0)
    layer = build(8, 8).bfloat16()
    x = rows(torch.bfloat16)[:, :8].clone().requires_grad_()
    expected = layer(x)
    net = nn.Sequential(layer)
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"]))
    layer.active = ()
    found = net(x)
    assert torch.equal(found, expected)
    assert type(found.grad_fn) is type(expected.grad_fn)


def test_layers_that_train_hold_codes_or_have_a_forward_of_their_own_are_left_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 8))
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    assert [type(layer).__name__ for layer in net] == ["AdaptedLinear", "Linear", "Own", "FrozenLinear"]
    assert net(torch.ones(2, 8)).shape == (2, 8)
    coded = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inject_adapters(coded, LoRAConfig(rank=2, target_modules=["0"]), quantization=QuantizationConfig())
    assert not isinstance(coded[1], FrozenLayer)


def test_a_base_in_16_bits_is_left_alone_where_the_cpu_has_products_for_it(monkeypatch):
    monkeypatch.setattr(frozens, "is_emulated", lambda dtype: False)
    assert not isinstance(adapted(torch.bfloat16)[2], FrozenLayer)


@pytest.mark.parametrize("leave", [remove_adapters, merge_adapters])
def test_a_module_that_is_left_is_what_it_was(leave):
    net = adapted()
    under_autocast(net)
    leave(net)
    assert all(type(layer) is nn.Linear and not {"cast_copy", "keeps_cast"} & vars(layer).keys() for layer in net)


def test_it_is_there_again_after_an_unmerge():
    net = adapted()
    merge_adapters(net)
    unmerge_adapters(net)
    assert [isinstance(layer, FrozenLayer) for layer in net] == [True] * 5
    assert [isinstance(layer, AdaptedLayer) for layer in net] == [False, True, False, True, False]


def test_a_second_adapter_finds_frozen_layers_as_it_finds_plain_ones():
    net = adapted()
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["2"]), name="other")
    assert [type(layer).__name__ for layer in net] == [
        "FrozenLinear", "AdaptedLinear", "AdaptedLinear", "AdaptedLinear", "FrozenLinear",
    ]  # fmt: skip
    remove_adapters(net)
    assert all(type(layer) is nn.Linear for layer in net)


@pytest.mark.parametrize("index", [1, 2])
def test_a_parametrization_of_a_layer_works_before_and_after_the_adapters_are_gone(index):
    net = adapted()
    x = rows().requires_grad_()
    before = net(x)
    parametrizations.weight_norm(net[index])
    torch.testing.assert_close(net(x), before)
    net[index].parametrizations.requires_grad_()
    for _ in range(2):
        net.zero_grad()
        under_autocast(net, x).float().sum().backward()
        assert all(parameter.grad.any() for parameter in net[index].parametrizations.parameters())
    net[index].parametrizations.requires_grad_(False)
    remove_adapters(net)
    assert not any(isinstance(layer, FrozenLayer) for layer in net)
    torch.testing.assert_close(net(x), plain()(x))
    nn.utils.parametrize.remove_parametrizations(net[index], "weight")
    assert type(net[index]) is nn.Linear


def test_it_compiles_without_a_graph_break_and_computes_the_same():
    net = adapted()
    net[1].active = net[3].active = ()  # which is compiled in another form
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = rows().requires_grad_()
    assert torch.equal(under_autocast(compiled, x), under_autocast(net, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapts_all", [True, False], ids=["all adapted", "some adapted"])
def test_a_base_of_any_precision_compiles_without_a_graph_break(dtype, adapts_all):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    inject_adapters(net, LoRAConfig(rank=2, target_modules="all-linear" if adapts_all else ["0"]))
    x = torch.randn(20, 8).to(dtype).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("device", ["meta"])
def test_shapes_can_be_inferred_without_values(device):
    net = adapted().to(device)
    assert net(torch.empty(2, WIDTH, device=device)).shape == (2, WIDTH)


@pytest.mark.parametrize("shape", [(20, WIDTH), (2, 10, WIDTH)], ids=str)
@pytest.mark.usefixtures("emulated")
def test_what_comes_behind_may_change_the_output_in_place(shape):
    net, base = adapted(torch.bfloat16), plain(torch.bfloat16)
    x, y = (torch.ones(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    net[2](x).relu_().float().sum().backward()
    base[2](y).relu_().float().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, bias):
        return bias + self.by.to(bias)


@pytest.mark.usefixtures("emulated")
def test_a_bias_that_is_computed_gets_its_gradient():
    for dtype, run in ((torch.bfloat16, lambda net, x: net(x)), (torch.float32, under_autocast)):
        net = adapted(dtype)
        nn.utils.parametrize.register_parametrization(net[2], "bias", Shift())
        run(net, rows(dtype)).float().sum().backward()
        assert net[2].parametrizations.bias[0].by.grad.any()


def test_a_product_in_fp64_is_left_to_the_layer_as_autocast_leaves_it():
    net, base = adapted(), plain()
    x = rows().double().requires_grad_()
    for layer in (net[2], base[2]):
        with pytest.raises(RuntimeError, match="dtype"):
            under_autocast(layer, x)
    assert net[2].cast_copy is None


def test_an_input_of_another_dtype_is_refused_as_the_layer_refuses_it(monkeypatch):
    monkeypatch.setattr(frozen_layer, "is_emulated", lambda dtype: True)
    monkeypatch.setattr(frozens, "is_emulated", lambda dtype: True)
    with pytest.raises(RuntimeError, match="dtype"):
        adapted(torch.bfloat16)[2](rows().requires_grad_())


class Codes(torch.Tensor):
    """As of another package that stores weights in a form of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return torch.nn.functional.linear(*(a.as_subclass(torch.Tensor) for a in args))
        if function in (torch.Tensor.to, torch.Tensor.detach):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.usefixtures("emulated")
def test_a_weight_of_a_class_with_products_of_its_own_is_left_to_them():
    net = adapted()
    weight = net[2].weight.detach().as_subclass(Codes)
    del net[2].weight
    net[2]._parameters["weight"] = weight
    assert under_autocast(net[2], rows().requires_grad_()).shape == (20, WIDTH)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_lazy_parametrized_and_empty_layers_are_left_alone():
    lazy = nn.LazyLinear(8)
    lazy.load_state_dict(nn.Linear(8, 8).state_dict())
    other = nn.Linear(8, 8)
    nn.utils.parametrize.register_parametrization(other, "bias", nn.Identity())
    net = nn.Sequential(nn.Linear(8, 8), other, lazy, nn.Linear(8, 0))
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"]))
    assert not any(isinstance(layer, FrozenLayer) for layer in net[1:])
    assert net(torch.ones(2, 3, 8)).shape == (2, 3, 0)
    nn.utils.parametrize.remove_parametrizations(other, "bias")


def test_layers_quantized_later_hold_no_cast_and_trained_adapters_stay():
    net, quantization = nn.Sequential(nn.Linear(64, 64)), QuantizationConfig()
    config = LoRAConfig(rank=2, target_modules=["0", "1", "3"])
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"]), quantization=quantization)
    remove_adapters(net)
    net.extend(nn.Linear(64, 64) for _ in range(3))
    inject_adapters(net, config)
    nn.init.normal_(net[1].adapter("default").lora_B)
    x = torch.ones(1, 64)
    under_autocast(net, x).float().sum().backward()
    assert net[2].cast_copy.kept is not None
    trained = net[1].adapter("default").lora_B.clone()
    inject_adapters(net, config, quantization=quantization)
    assert torch.equal(net[1].adapter("default").lora_B, trained)
    assert [type(layer).__name__ for layer in net[1:]] == ["AdaptedLinear", "QuantizedLinear4bit", "AdaptedLinear"]
    assert not {"cast_copy", "keeps_cast"} & vars(net[2]).keys()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_head_behind_the_adapters_keeps_no_cast(recompute):
    net = adapted()

    def blocks(x):
        return net[:4](x)

    with torch.autocast("cpu", torch.bfloat16):
        x = rows().requires_grad_()
        hidden = checkpoint(blocks, x, use_reentrant=False) if recompute else blocks(x)
        net[4](hidden).float().sum().backward()
    assert net[4].cast_copy is None
    assert (net[2].cast_copy.kept is None) == recompute
