"""Language: torchTextClassifiers' `TextClassificationModule`, a transformer over word pieces, learns topics.

It is written for the distribution `pytorch_lightning`, the same code as `lightning.pytorch` under its own name.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

_REASON = "torchTextClassifiers is not installed (see requirements-wild.txt)"
ttc = pytest.importorskip("torchTextClassifiers.model", reason=_REASON)

import lightning as L  # noqa: E402
import pytorch_lightning  # noqa: E402
import torch  # noqa: E402
from torchTextClassifiers.dataset import TextClassificationDataset  # noqa: E402
from torchTextClassifiers.model import components  # noqa: E402
from torchTextClassifiers.tokenizers import WordPieceTokenizer  # noqa: E402

from lightning_lora import LoRAConfig  # noqa: E402

LIGHTNING = pytorch_lightning
EVALUATE = "validate"  # its test_step logs nothing
LORA = LoRAConfig(rank=2, dropout=0.1, target_modules="all-linear", modules_to_save=["classification_head"])

TOPICS = (
    ("the baker", "a cook", "my aunt", "kneads bread", "boils soup", "peels apples", "in the kitchen", "before lunch"),
    ("the captain", "a sailor", "our crew", "sets the sails", "drops anchor", "reads charts", "at sea", "in a storm"),
    ("the doctor", "a nurse", "the surgeon", "treats fever", "cleans a wound", "takes a pulse", "at night", "at work"),
)  # fmt: skip


def _texts() -> list[tuple[str, int]]:
    """54 sentences, the topics in turn."""
    sentences = [itertools.product(topic[:3], topic[3:6], topic[6:]) for topic in TOPICS]
    return [(" ".join(words), label) for row in zip(*sentences) for label, words in enumerate(row)]


@functools.cache  # its training breaks ties in no fixed order
def _tokenizer() -> Any:
    tokenizer = WordPieceTokenizer(vocab_size=200, output_dim=16)
    tokenizer.train([text for text, _ in _texts()])
    return tokenizer


def build() -> Any:
    L.seed_everything(16, verbose=False)
    attention = components.AttentionConfig(n_layers=2, n_head=4, n_kv_head=2, sequence_len=16)
    words = components.TokenEmbedderConfig(vocab_size=200, embedding_dim=32, padding_idx=1, attention_config=attention)
    model = ttc.TextClassificationModel(
        classification_head=components.ClassificationHead(input_dim=32, num_classes=3),
        token_embedder=components.TokenEmbedder(words),
        sentence_embedder=components.SentenceEmbedder(components.SentenceEmbedderConfig()),
    )
    return ttc.TextClassificationModule(**_arguments(model))


def _arguments(model: Any) -> dict[str, Any]:
    return {
        "model": model,
        "loss": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.AdamW,
        "optimizer_params": {"lr": 1e-2},
        "scheduler": torch.optim.lr_scheduler.StepLR,
        "scheduler_params": {"step_size": 1, "gamma": 0.9},
    }


def _sentences(first: int, last: int) -> Any:
    texts, labels = zip(*_texts()[first:last])
    dataset = TextClassificationDataset(list(texts), None, _tokenizer(), list(labels))
    return dataset.create_dataloader(batch_size=9, shuffle=False, num_workers=0)


def loaders() -> dict[str, Any]:
    return {"train": _sentences(0, 36), "val": _sentences(36, 45), "test": _sentences(45, 54)}


def outputs(module: Any) -> torch.Tensor:
    return module(next(iter(_sentences(45, 54))))


def reopen(path: Path) -> Any:
    return ttc.TextClassificationModule.load_from_checkpoint(path, **_arguments(build().model), weights_only=False)
