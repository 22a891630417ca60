"""Plain LightningModules around transformers models built from a config. This file must not import lightning_lora."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

VOCABULARY = 64


def tokens(count: int = 8, length: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator)


def token_loader(count: int = 8) -> DataLoader[Any]:
    return DataLoader(list(tokens(count)), batch_size=4)  # type: ignore[arg-type]


def small_llama(*, hidden: int = 16, layers: int = 2, key_heads: int = 1, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3 // 8 * 8 + 8,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=key_heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def small_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    )


def small_bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
        )
    )


MODELS = {
    "llama": small_llama,
    "llama-tied": lambda: small_llama(tied=True),
    "llama-wide": lambda: small_llama(hidden=256, layers=4, key_heads=2),
    "gpt2": small_gpt2,
    "bert": small_bert,
}


class Language(pl.LightningModule):
    """Learns to give back its input tokens."""

    def __init__(self, kind: str = "llama", lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            self.model = MODELS[kind]().train()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
