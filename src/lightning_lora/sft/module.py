"""Supervised fine-tuning of a causal language model on JSON answers. Knows nothing of LoRA, and needn't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import MeanMetric

from lightning_lora.sft.encoding import IGNORED, Batch
from lightning_lora.sft.generation import greedy_answers
from lightning_lora.sft.loss import answer_loss, head_makes_logits, loss_of_logits, tells_packed_apart
from lightning_lora.sft.metrics import ExactMatch, FieldF1, ValidJSON
from lightning_lora.sft.precision import has_fast_bfloat16
from lightning_lora.sft.pretrained import SMOLLM2, load_pretrained

AUTOCAST_CHOICES = ("auto", "bfloat16", "off")


class SFTModule(L.LightningModule):
    """A causal language model that learns to answer, scored on its loss and on its greedy answers.

    The weights stay in ``dtype`` and evaluation runs in it, whatever the Trainer's mixed precision; only the training
    step may compute in bfloat16. So the answers measured here are those of the weights as they are saved.

    Args:
        pretrained: ``"smollm2-135m-instruct"``, a folder written by ``save_pretrained``, or a hub id.
        learning_rate: Highest learning rate, reached after the warm-up.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Optimizer steps of linear warm-up; a linear decay to zero follows.
        dtype: Dtype of the weights: ``"float32"`` or ``"bfloat16"``.
        autocast: ``"auto"`` trains in bfloat16 where the hardware has it, ``"bfloat16"`` always, ``"off"``
            leaves it to the Trainer's ``precision``.
        max_new_tokens: Longest answer in a test.
        logits_chunk: Answered tokens that have logits at a time: a large vocabulary makes them the dearest activation.

    Attributes:
        samples: After a test run, one ``{"prompt", "expected", "answer"}`` for each message, in the data's
            order.
        curve: ``{"train": [(step, loss), ...], "validation": [...]}`` of this process.

    Raises:
        ValueError: A number is out of range or a choice unknown.
    """

    def __init__(
        self,
        *,
        pretrained: str = SMOLLM2,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 10,
        dtype: str = "float32",
        autocast: str = "auto",
        max_new_tokens: int = 96,
        logits_chunk: int = 512,
    ) -> None:
        super().__init__()
        _check(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            autocast=autocast,
            max_new_tokens=max_new_tokens,
            logits_chunk=logits_chunk,
        )
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.autocast = autocast
        self.max_new_tokens = max_new_tokens
        self.logits_chunk = logits_chunk
        self.model, self.tokenizer = load_pretrained(pretrained, dtype=dtype)
        self._head_makes_logits, packs = _proved(self.model)
        self._packs_with = _attention(self.model) if packs else "none"
        self.validation_loss = MeanMetric()
        self.test_loss = MeanMetric()
        self.valid_json = ValidJSON()
        self.field_f1 = FieldF1()
        self.exact_match = ExactMatch()
        self.samples: list[dict[str, str]] = []
        self.curve: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the mean loss over the answers' tokens."""
        with self._training_arithmetic():
            loss = self.answer_loss(batch)
        self.curve["train"].append((self.global_step, loss.item()))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["expected"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin with a fresh metric: what `Trainer.validate` leaves are inference tensors, closed to fit."""
        self.validation_loss.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss."""
        with self._evaluation_arithmetic():
            loss = self.answer_loss(batch)
        self.validation_loss.update(loss, weight=_answered(batch))
        self.log("val/loss", self.validation_loss, prog_bar=True, batch_size=len(batch["expected"]))

    def on_validation_epoch_end(self) -> None:
        """Keep the point for the loss curve."""
        if not self.trainer.sanity_checking:
            self.curve["validation"].append((self.global_step, self.validation_loss.compute().item()))

    def on_test_epoch_start(self) -> None:
        """Forget the answers of an earlier test."""
        self.samples = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss, answer greedily and score the answers."""
        size, expected = len(batch["expected"]), batch["expected"]
        with self._evaluation_arithmetic():
            answers, loss = self.answer(batch), self.answer_loss(batch)
        self.test_loss.update(loss, weight=_answered(batch))
        self.valid_json.update(answers)
        self.field_f1.update(answers, expected)
        self.exact_match.update(answers, expected)
        self.log("test/loss", self.test_loss, batch_size=size)
        self.log("test/valid_json", self.valid_json, batch_size=size)
        self.log("test/field_f1", self.field_f1, batch_size=size)
        self.log("test/exact_match", self.exact_match, batch_size=size)
        self.samples += [
            {"prompt": prompt, "expected": wanted, "answer": answer}
            for prompt, wanted, answer in zip(batch["prompts"], expected, answers, strict=True)
        ]

    def answer_loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the answers' tokens, a scalar.

        Raises:
            ValueError: Examples share rows, and the model can't tell them apart.
        """
        if batch["attention_mask"] is None and self._packs_with != _attention(self.model):
            raise ValueError(
                f"{type(self.model).__name__} with {_attention(self.model)!r} attention is not proved to tell examples "
                "that share a row apart, and may read them as one text. Use batching='by_length'."
            )
        if not self._head_makes_logits:
            return loss_of_logits(self.model, batch)
        return answer_loss(self.model, batch, chunk_tokens=self.logits_chunk)

    def answer(self, batch: Batch) -> list[str]:
        """Return the greedy answers, without special tokens and outer white space."""
        return greedy_answers(
            self.model,
            self.tokenizer,
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            max_new_tokens=self.max_new_tokens,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and linear decay to zero at the last step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        factor = partial(_warm_up_then_decay, warmup_steps=self.warmup_steps, total_steps=steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @contextmanager
    def _training_arithmetic(self) -> Iterator[None]:
        device = self.device
        wanted = self.autocast == "bfloat16" or (self.autocast == "auto" and has_fast_bfloat16(device))
        # On a CPU the backward of the fused attention took a quarter of a step; its parts cost next to nothing.
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        bfloat16 = torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()
        with attention, bfloat16:
            yield

    def _evaluation_arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)


def _attention(model: Any) -> str:
    """Name of the attention: each kind has its own way to see where an example of a row starts, or has none."""
    return str(getattr(model.config, "_attn_implementation", None))


def _warm_up_then_decay(step: int, *, warmup_steps: int, total_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, 1.0 - (step - warmup_steps) / max(1, total_steps - warmup_steps))


def _answered(batch: Batch) -> torch.Tensor:
    return (batch["labels"] != IGNORED).sum()


def _proved(model: Any) -> tuple[bool, bool]:
    was_training = model.training
    model.eval()
    proofs = head_makes_logits(model), tells_packed_apart(model)
    model.train(was_training)
    return proofs


def _check(*, learning_rate: float, warmup_steps: int, autocast: str, max_new_tokens: int, logits_chunk: int) -> None:
    if learning_rate <= 0:
        raise ValueError(f"learning_rate={learning_rate} must be above zero.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative.")
    if autocast not in AUTOCAST_CHOICES:
        raise ValueError(f"autocast={autocast!r} is unknown; use one of {', '.join(AUTOCAST_CHOICES)}.")
    for name, count in (("max_new_tokens", max_new_tokens), ("logits_chunk", logits_chunk)):
        if count < 1:
            raise ValueError(f"{name}={count} must be 1 or more.")
