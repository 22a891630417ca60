"""Hazard: nn.TransformerEncoder in eval mode calls one fused kernel: validation would be of the base, silently."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, TargetNotFoundError, inject_adapters, merge_adapters, remove_adapters
from lightning_lora.layers import AdaptedLayer
from tests.conftest import WIDTH, TinyModule
from tests.hazards.runs import lora, metric, trained

LENGTH = 6
# torch's advice about its prototype of nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


def encoder(*, nested: bool = True, norm_first: bool = False, activation: str = "relu") -> nn.TransformerEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first, activation=activation
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and not norm_first)


class Encoding(TinyModule):
    def build(self) -> None:
        self.encoder = encoder()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))

    def _loss(self, batch: Any, name: str) -> Tensor:
        x, mask, y = batch
        loss = F.mse_loss(self(x, mask if self.masked else None), y)
        self.log(name, loss)
        return loss

    masked = True


def sequences() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, LENGTH, WIDTH, generator=generator)
    mask = torch.arange(LENGTH) >= torch.arange(16)[:, None] % LENGTH + 1
    return DataLoader(TensorDataset(x, mask, x[:, 0].sum(1, keepdim=True)), batch_size=8)


def randomize(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, AdaptedLayer):
            nn.init.normal_(child.adapter("default").lora_B, std=0.5)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "src_key_padding_mask"])
def test_validation_of_a_transformer_encoder_sees_the_adapters(make_trainer: Any, masked: bool) -> None:
    module = Encoding()
    module.masked = masked
    trainer = make_trainer(max_epochs=2, callbacks=[lora()])
    untrained = metric(make_trainer().validate(copy.deepcopy(module), sequences(), verbose=False))
    trainer.fit(module, sequences(), sequences())
    assert trained(module)
    seen = float(trainer.callback_metrics["val_loss"])
    with torch.no_grad():
        expected = [F.mse_loss(module.train()(x, mask if masked else None), y) for x, mask, y in sequences()]
    assert seen == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert seen != pytest.approx(untrained, rel=1e-3)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "src_key_padding_mask"])
@pytest.mark.parametrize("options", [{}, {"nested": False}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_eval_equals_train_for_an_adapted_encoder(masked: bool, options: dict[str, Any], grad: bool) -> None:
    net = encoder(**options)
    inject_adapters(net, LoRAConfig(rank=2))
    randomize(net)
    x = torch.randn(4, LENGTH, WIDTH)
    mask = torch.arange(LENGTH) >= torch.tensor([[6], [4], [2], [1]]) if masked else None
    visible = ~mask if masked else torch.ones(4, LENGTH, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        in_train = net.train()(x, src_key_padding_mask=mask)[visible]
        in_eval = net.eval()(x, src_key_padding_mask=mask)[visible]
    # Rounding differs between the two; without the adapters the outputs differ by tenths.
    torch.testing.assert_close(in_eval, in_train, rtol=1e-4, atol=1e-4)


def test_a_bare_encoder_layer_and_a_subclass_see_their_adapters_in_eval() -> None:
    class Mine(nn.TransformerEncoderLayer):
        pass

    for cls in (nn.TransformerEncoderLayer, Mine):
        layer = cls(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        inject_adapters(layer, LoRAConfig(rank=2))
        randomize(layer)
        x = torch.randn(2, LENGTH, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), layer.train()(x))


def test_the_fast_path_is_back_for_other_modules_and_after_removal() -> None:
    net, other = encoder(), encoder()
    inject_adapters(net, LoRAConfig(rank=2))
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        net.eval()(torch.randn(2, LENGTH, WIDTH))
    assert torch.backends.mha.get_fastpath_enabled()
    remove_adapters(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in other.modules()]


def test_a_merged_encoder_gives_the_same_outputs_on_the_fast_path() -> None:
    net = encoder()
    inject_adapters(net, LoRAConfig(rank=2))
    randomize(net)
    x = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad():
        adapted = net.eval()(x)
        merge_adapters(net)
        assert type(net) is nn.TransformerEncoder
        torch.testing.assert_close(net.eval()(x), adapted, rtol=1e-4, atol=1e-5)


def test_multihead_attention_out_proj_is_refused_by_name() -> None:
    with pytest.raises(
        TargetNotFoundError, match=r"'out_proj' matches .*nn.MultiheadAttention uses this weight without"
    ):
        inject_adapters(encoder(), LoRAConfig(target_modules=["out_proj"]))


def test_multihead_attention_out_proj_is_skipped_by_presets_with_the_reason() -> None:
    report = inject_adapters(encoder(), LoRAConfig(target_modules="all-linear"))
    assert [row.name.rpartition(".")[2] for row in report.layers] == ["linear1", "linear2"] * 2
    assert set(report.skipped) == {f"layers.{index}.self_attn.out_proj" for index in range(2)}
    assert all("without calling the layer" in reason for reason in report.skipped.values())


def test_a_subclass_of_multihead_attention_is_recognised_too() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    net = nn.ModuleDict({"attn": Mine(WIDTH, 2), "fc1": nn.Linear(WIDTH, WIDTH)})
    report = inject_adapters(net, LoRAConfig())
    assert [row.name for row in report.layers] == ["fc1"]
    assert "attn.out_proj" in report.skipped


def check_compiled(*, masked: bool, training: bool, fullgraph: bool) -> None:
    """An adapted encoder gives compiled what it gives in train mode, where no fast path exists."""
    torch._dynamo.reset()
    net = encoder()
    inject_adapters(net, LoRAConfig(rank=2))
    randomize(net)
    x = torch.randn(4, LENGTH, WIDTH)
    mask = torch.arange(LENGTH) >= torch.tensor([[6], [4], [2], [1]]) if masked else None
    visible = ~mask if masked else torch.ones(4, LENGTH, dtype=torch.bool)
    with torch.no_grad():
        expected = net.train()(x, src_key_padding_mask=mask)[visible]
        compiled = torch.compile(net.train(training), backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(x, src_key_padding_mask=mask)[visible], expected)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "src_key_padding_mask"])
def test_a_compiled_encoder_sees_its_adapters_in_eval(masked: bool) -> None:
    check_compiled(masked=masked, training=False, fullgraph=False)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "src_key_padding_mask"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_adapted_encoder_compiles_without_graph_breaks_and_sees_its_adapters(masked: bool, training: bool) -> None:
    check_compiled(masked=masked, training=training, fullgraph=True)
