"""Tiny real modules and a quiet Trainer, shared by all tests."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if shutil.which("nvidia-smi") is None:  # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig

WIDTH = 16


class TinyModule(pl.LightningModule):
    """A regression network with a backbone and a head, built in ``__init__``."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0, optimizer: str = "all", seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build()

    def build(self) -> None:
        width, dropout = self.hparams["width"], self.hparams["dropout"]
        with torch.random.fork_rng():
            torch.manual_seed(self.hparams["seed"])
            self.backbone = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
            )
            self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def _loss(self, batch: Any, name: str) -> Tensor:
        loss = F.mse_loss(self(batch[0]).float(), batch[1].float())
        self.log(name, loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch, "train_loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "val_loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "test_loss")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = self.hparams["optimizer"]
        if kind == "filtered":
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        if kind == "groups":
            return torch.optim.AdamW(
                [
                    {"params": self.backbone.parameters(), "lr": 1e-2},
                    {"params": self.head.parameters(), "lr": 1e-3},
                ]
            )
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.fixture
def config() -> LoRAConfig:
    return LoRAConfig(rank=2, alpha=4)


@pytest.fixture
def module() -> TinyModule:
    return TinyModule()


@pytest.fixture
def loader() -> DataLoader[Any]:
    return make_loader()


def make_loader(rows: int = 16, width: int = WIDTH, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    """A fixed regression data set."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **options)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """A Trainer on one CPU that prints and writes nothing but what a test asks for."""

    def make(**options: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**settings, **options})

    return make


@pytest.fixture(scope="session")
def tiny_pretrained(tmp_path_factory) -> str:
    """Return a folder that `load_pretrained` opens: a two-layer Llama with random weights."""
    pytest.importorskip("transformers", reason="the sft package needs transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lightning_lora.sft.messages import company_messages

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    texts = [text for example in company_messages("train", 50) for text in (example.text, example.answer)]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|im_end|>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
    folder = tmp_path_factory.mktemp("tiny_pretrained")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
