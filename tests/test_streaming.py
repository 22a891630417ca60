"""A base that is built without values gets them from files, one tensor at a time, quantized on the way if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import (
    BaseMismatchError,
    CheckpointError,
    LoRACallback,
    LoRAConfig,
    QuantizationConfig,
    QuantizationError,
    UnsupportedSetupError,
    empty_weights,
    inject_adapters,
    load_from_checkpoint,
)
from lightning_lora.quantized_layer import QuantizedLayer
from tests.states import base_of, same

NF4 = QuantizationConfig(quant_type="nf4", double_quant=True)


class Net(nn.Module):
    """Blocks, a norm with statistics, a tied pair, and a table that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(64.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.table / 64
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.norm(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net().eval()
    made.norm.running_mean.normal_()
    return made


def save(module: nn.Module, path: Path, prefix: str = "") -> Path:
    state = {f"{prefix}{key}": value for key, value in module.state_dict().items() if key != "head.weight"}
    save_file(state, path)
    return path


def shard(module: nn.Module, folder: Path) -> Path:
    state = {key: value for key, value in module.state_dict().items() if key != "head.weight"}
    names = list(state)
    files = {name: f"model-{index % 2 + 1}-of-2.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def empty() -> Net:
    with empty_weights():
        return Net().eval()


TOKENS = torch.arange(16)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("form", ["file", "folder", "sharded", "prefix in the file", "prefix in the module"])
def test_the_module_is_the_one_that_was_saved(form: str, quantization: Any, tmp_path: Path) -> None:
    source = {
        "file": lambda: save(net(), tmp_path / "base.safetensors"),
        "folder": lambda: save(net(), tmp_path / "model.safetensors").parent,
        "sharded": lambda: shard(net(), tmp_path),
        "prefix in the file": lambda: save(net(), tmp_path / "base.safetensors", prefix="model."),
        "prefix in the module": lambda: save(net(), tmp_path / "base.safetensors"),
    }[form]()
    module: nn.Module = nn.Sequential(empty()) if form == "prefix in the module" else empty()
    inject_adapters(module, LoRAConfig(rank=2), quantization=quantization, base_weights=source)
    expected = net()
    inject_adapters(expected, LoRAConfig(rank=2), quantization=quantization)
    streamed = {key.removeprefix("0."): value for key, value in base_of(module.eval()).items()}
    assert same(streamed, base_of(expected))
    assert torch.equal(module(TOKENS), expected(TOKENS))


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    module = empty()
    inject_adapters(module, LoRAConfig(rank=2), base_weights=save(net(), tmp_path / "base.safetensors"))
    assert module.head.weight is module.embedding.weight


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_tied_tensor_is_found_by_whichever_name_the_file_has(prefix: str, tmp_path: Path) -> None:
    original, found = net(), empty()
    state = {f"{prefix}{key}": value for key, value in original.state_dict().items() if key != "embedding.weight"}
    save_file(state, tmp_path / "base.safetensors")
    inject_adapters(found, LoRAConfig(rank=2), base_weights=tmp_path / "base.safetensors")
    assert found.head.weight is found.embedding.weight
    inject_adapters(original, LoRAConfig(rank=2))
    assert same(base_of(found), base_of(original))


def test_what_has_values_already_stays_as_it_is(tmp_path: Path) -> None:
    module = empty()
    module.blocks[1] = nn.Linear(64, 64)
    mine = module.blocks[1].weight.detach().clone()
    inject_adapters(module, LoRAConfig(rank=2), base_weights=save(net(), tmp_path / "base.safetensors"))
    assert torch.equal(module.blocks[1].weight, mine)


def test_a_module_of_another_shape_is_refused_and_stays_empty(tmp_path: Path) -> None:
    other = net()
    other.blocks[2] = nn.Linear(64, 32)
    module = empty()
    with pytest.raises(BaseMismatchError, match=r"'blocks.2.weight' is \(32, 64\)"):
        inject_adapters(module, LoRAConfig(rank=2), base_weights=save(other, tmp_path / "base.safetensors"))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any("adapters" in key for key in module.state_dict())


def test_files_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.weight": torch.zeros(64, 64)}, tmp_path / "base.safetensors")
    with pytest.raises(BaseMismatchError, match="are not in"):
        inject_adapters(empty(), LoRAConfig(rank=2), base_weights=tmp_path / "base.safetensors")


def test_buffers_without_values_are_refused_with_the_way_to_build_the_module(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = Net()
    with pytest.raises(BaseMismatchError, match=r"'table' has no values.*empty_weights"):
        inject_adapters(module, LoRAConfig(rank=2), base_weights=save(net(), tmp_path / "base.safetensors"))


def test_weights_without_values_and_without_files_are_refused() -> None:
    with pytest.raises(QuantizationError, match="no values"):
        inject_adapters(empty(), LoRAConfig(rank=2), quantization=NF4)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    broken = net()
    with torch.no_grad():
        broken.blocks[1].weight[3, 3] = torch.inf
    with pytest.raises(QuantizationError, match=r"'blocks.1.weight' can't be quantized.*not finite"):
        inject_adapters(
            empty(), LoRAConfig(rank=2), quantization=NF4, base_weights=save(broken, tmp_path / "base.safetensors")
        )


@pytest.mark.parametrize(
    "damage", ["absent", "empty folder", "cut off", "no safetensors", "missing shard", "bad index"]
)
def test_files_that_cannot_be_read_are_refused(damage: str, tmp_path: Path) -> None:
    source = save(net(), tmp_path / "model.safetensors")
    if damage == "absent":
        source = tmp_path / "nothing.safetensors"
    elif damage == "empty folder":
        source = tmp_path / "empty"
        source.mkdir()
    elif damage == "cut off":
        source.write_bytes(source.read_bytes()[:1000])
    elif damage == "no safetensors":
        source.write_bytes(b"hello")
    else:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}} if damage == "missing shard" else [1]))
        source = tmp_path
    with pytest.raises(CheckpointError):
        inject_adapters(empty(), LoRAConfig(rank=2), base_weights=source)


class Lazy(pl.LightningModule):
    """Builds its network without values, as a user does whose base does not fit into memory."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with empty_weights():
                self.net = Net()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")  # the norm layer, whose statistics are kept
def test_a_lightning_module_built_without_values_trains_on_a_base_streamed_in(tmp_path: Path) -> None:
    module = Lazy()
    callback = LoRACallback(
        LoRAConfig(rank=2),
        quantization=NF4,
        base_weights=save(net(), tmp_path / "base.safetensors"),
        print_report=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS), batch_size=8))
    assert all(isinstance(block, QuantizedLayer) for block in module.net.blocks)
    assert all((block.adapters["default"].lora_B != 0).any() for block in module.net.blocks)
    assert torch.equal(module.net.embedding.weight, net().embedding.weight)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = load_from_checkpoint(Lazy, tmp_path / "run.ckpt", base_weights=tmp_path / "base.safetensors")
    assert torch.equal(loaded.eval().net(TOKENS), module.eval().net(TOKENS))


def test_files_for_a_module_that_has_values_are_refused_and_not_ignored(tmp_path: Path) -> None:
    source = save(net(), tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedSetupError, match="has values already"):
        inject_adapters(net(seed=1), LoRAConfig(rank=2), base_weights=source)


def test_a_file_is_not_needed_again_once_the_module_has_its_values(tmp_path: Path) -> None:
    source, module = save(net(), tmp_path / "base.safetensors"), empty()
    inject_adapters(module, LoRAConfig(rank=2), base_weights=source)
    source.unlink()
    inject_adapters(module, LoRAConfig(rank=2), base_weights=source)


def test_a_file_that_holds_the_module_twice_is_refused(tmp_path: Path) -> None:
    state = {key: value for key, value in net().state_dict().items() if key != "head.weight"}
    both = {f"{prefix}.{key}": value.clone() for prefix in ("ema_model", "model") for key, value in state.items()}
    save_file(both, tmp_path / "base.safetensors")
    with pytest.raises(BaseMismatchError, match="holds the module's tensors twice"):
        inject_adapters(empty(), LoRAConfig(rank=2), base_weights=tmp_path / "base.safetensors")


def test_weights_get_the_dtype_of_the_module_before_they_are_quantized(tmp_path: Path) -> None:
    source = save(net().bfloat16(), tmp_path / "base.safetensors")
    module = empty()
    inject_adapters(module, LoRAConfig(rank=2), quantization=NF4, base_weights=source)
    assert module.blocks[0].dense_dtype == torch.float32
