"""An adapted layer computes in one node where it may, and from torch's operations where something looks inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters

IN, OUT = 64, 32


def adapted(layer=None, *, dtype=torch.float32, dropout=0.0, quantization=None):
    """One layer whose adapter does something."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT) if layer is None else layer).to(dtype)
    inject_adapters(net, LoRAConfig(rank=4, dropout=dropout, target_modules=["0"]), quantization=quantization)
    for parameter in net[0].adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(net):
    """The same layer, on the path of torch's own operations."""
    net[0].adapters["default"].register_forward_hook(lambda *_: None)
    return net


def is_fused(output):
    return "LoRALinear" in type(output.grad_fn).__name__ or any(
        "LoRALinear" in type(node).__name__ for node, _ in output.grad_fn.next_functions
    )


def run(net, x, *, autocast=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = net(x)
    output.float().square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in net[0].adapters.parameters()]
    return [output.detach(), x.grad, *gradients], is_fused(output)


LAYERS = {
    "dense": lambda: (None, None),
    "Conv1D": lambda: (Conv1D(OUT, IN), None),
    "no bias": lambda: (nn.Linear(IN, OUT, bias=False), None),
    "nf4": lambda: (None, QuantizationConfig()),
    "int8": lambda: (None, QuantizationConfig(quant_type="int8")),
    "bf16": lambda: (None, QuantizationConfig(quant_type="bf16")),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, None, 1e-5), (torch.bfloat16, None, 0.03), (torch.float32, torch.bfloat16, 0.03)],
    ids=["fp32", "bf16", "bf16-mixed"],
)
def test_one_node_computes_what_the_operations_do(kind, dtype, autocast, tolerance):
    layer, quantization = LAYERS[kind]()
    net = adapted(layer, dtype=dtype, quantization=quantization)
    found, fused = run(net, rows(3, 5, dtype=dtype), autocast=autocast)
    net.zero_grad()
    expected, other = run(plain(net), rows(3, 5, dtype=dtype), autocast=autocast)
    assert (fused, other) == (True, False)
    for got, wanted in zip(found, expected):
        assert got.dtype == wanted.dtype
        assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


def test_adapters_without_a_part_in_it_are_bitwise_the_base():
    for kind in LAYERS:
        layer, quantization = LAYERS[kind]()
        net = adapted(layer, quantization=quantization)
        nn.init.zeros_(net[0].adapters["default"].lora_B)
        x = rows(7)
        with torch.no_grad():
            found = net(x)
            net[0].active = ()
            assert torch.equal(found, net(x)), kind


def test_a_layer_of_another_dtype_than_its_input_is_refused_as_torch_does():
    with pytest.raises(RuntimeError, match="dtype"):
        adapted(dtype=torch.bfloat16)(rows(2))


def test_a_class_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    net = adapted(Doubled(IN, OUT))
    output = net(rows(2))
    assert not is_fused(output)
    base = 2 * nn.functional.linear(rows(2), net[0].weight, net[0].bias)
    update = net[0].weight_update()
    torch.testing.assert_close(output, base + rows(2) @ update.T)


def test_a_bias_that_trains_gets_its_gradient():
    net = nn.Sequential(nn.Linear(IN, OUT))
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["0.bias"]))
    net(rows(3)).sum().backward()
    assert torch.equal(net[0].bias.grad, torch.full((OUT,), 3.0))


def test_hooks_on_the_adapter_and_the_layer_are_called():
    net = adapted()
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append("layer"))
    net(rows(2))
    net[0].adapters["default"].register_forward_hook(lambda module, args, output: seen.append("adapter"))
    net(rows(2))
    assert seen == ["layer", "adapter", "layer"]


def test_two_active_adapters_act_one_after_the_other():
    net = adapted()
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"]), name="second")
    nn.init.normal_(net[0].adapters["second"].lora_B)
    net[0].active = ("default", "second")
    both = nn.functional.linear(rows(2), net[0].weight + net[0].weight_update(), net[0].bias)
    torch.testing.assert_close(net(rows(2)), both, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for forward-mode derivatives
def test_transforms_of_torch_func_and_forward_mode_work():
    net, x = adapted(), rows(3)
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    net.requires_grad_(False)[0].adapters.requires_grad_(True)
    loss(parameters, x).backward()
    torch.testing.assert_close(found["0.adapters.default.lora_A"], net[0].adapters["default"].lora_A.grad)
    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(single["0.adapters.default.lora_B"].sum(0), found["0.adapters.default.lora_B"])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, net(x + 1) - net(x), rtol=1e-3, atol=1e-3)


def test_a_compiled_layer_has_no_graph_break_and_computes_the_same():
    net, x = adapted(), rows(6)
    expected, _ = run(net, x)
    net.zero_grad()
    torch._dynamo.reset()
    net.compile(backend="aot_eager", fullgraph=True)
    found, fused = run(net, x)
    assert not fused
    for got, wanted in zip(found, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_base_weight_that_changes_between_forward_and_backward_is_noticed():
    net = adapted()
    output = net(rows(2).requires_grad_())
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inference_takes_the_same_path_and_gives_the_same():
    net, x = adapted(), rows(4)
    with torch.inference_mode():
        found = net(x)
    assert torch.equal(found, net(x).detach())


def test_inputs_that_are_no_floating_point_numbers_are_refused_by_torch():
    with pytest.raises(RuntimeError):
        adapted()(torch.ones(2, IN, dtype=torch.int64))


def test_a_layer_without_values_has_the_shape_of_its_output():
    net = adapted(dropout=0.5).to("meta")
    output = net(torch.empty(3, IN, device="meta", requires_grad=True))
    assert output.shape == (3, OUT)
    assert not is_fused(output)
