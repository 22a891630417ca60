"""liger-kernel's kernels: put into the models that have some, refused where they would do nothing or not run."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LigerKernels, LoRAConfig, MissingDependencyError, UnsupportedSetupError, inject_adapters
from lightning_lora.layers import adapted_layers
from lightning_lora.liger import use_liger_kernels

transformers = pytest.importorskip("transformers")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


class Wrapper(pl.LightningModule):
    def __init__(self, kind="Llama"):
        super().__init__()
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(intermediate_size=64, **SIZES)
        self.model = getattr(transformers, f"{kind}ForCausalLM" if kind == "Llama" else f"{kind}Model")(config)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randint(64, (4, 9))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_norms_and_gated_layers_are_replaced_and_adapters_stay():
    wrapper = Wrapper()
    inject_adapters(wrapper, LoRAConfig(rank=2, target_modules="all-linear"))
    adapted = [name for name, _ in adapted_layers(wrapper)]
    assert use_liger_kernels(wrapper, rope=False) == ["llama"]
    block = wrapper.model.model.layers[0]
    assert "liger_kernel" in block.mlp.forward.__module__
    assert "liger_kernel" in block.input_layernorm.forward.__module__
    assert [name for name, _ in adapted_layers(wrapper)] == adapted


def test_a_second_stage_changes_nothing():
    wrapper = Wrapper()
    found = []
    for _ in range(2):
        use_liger_kernels(wrapper, rope=False)
        found.append([getattr(child.forward, "__func__", None) for child in wrapper.modules()])
    assert found[0] == found[1]


def test_a_choice_leaves_a_part_as_it_is():
    wrapper = Wrapper()
    use_liger_kernels(wrapper, rope=False, swiglu=False)
    assert "liger_kernel" not in wrapper.model.model.layers[0].mlp.forward.__module__


def test_a_model_that_is_built_later_is_transformers_own():
    use_liger_kernels(Wrapper(), rope=False)
    later = Wrapper()
    assert not any("liger_kernel" in type(child).__module__ for child in later.modules())
    assert "liger_kernel" not in later.model.model.norm.forward.__module__


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 2), "Linear holds no transformers model"),
        (Wrapper("Bert"), "no kernels for bert. It knows .*llama"),
    ],
    ids=["no model", "a type without kernels"],
)
def test_what_would_change_nothing_is_refused(module, message):
    with pytest.raises(UnsupportedSetupError, match=message):
        use_liger_kernels(module)


def test_a_run_without_a_gpu_is_refused_before_anything_is_replaced(make_trainer):
    wrapper = Wrapper()
    with pytest.raises(UnsupportedSetupError, match="run on a GPU, and the Trainer uses cpu"):
        make_trainer(callbacks=[LigerKernels()]).fit(wrapper)
    assert "liger_kernel" not in wrapper.model.model.norm.forward.__module__


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match="pip install liger-kernel"):
        use_liger_kernels(Wrapper())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_computes_the_same_with_them():
    wrapper = Wrapper().cuda()
    inject_adapters(wrapper, LoRAConfig(rank=2, target_modules="all-linear"))
    tokens = torch.randint(64, (2, 9), device="cuda")

    def step():
        wrapper.zero_grad()
        loss = wrapper.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in wrapper.parameters() if p.grad is not None)]

    expected = step()
    use_liger_kernels(wrapper)
    for got, wanted in zip(step(), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
