"""The loss of the answered tokens alone: no other token gets logits, and those of a large vocabulary come in chunks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lightning_lora.sft.encoding import IGNORED, Batch


def answer_loss(model: Any, batch: Batch, *, chunk_tokens: int) -> Tensor:
    """Mean cross-entropy over the answers' tokens, a scalar in fp32; 0 if there are none.

    Args:
        model: A causal language model of transformers whose logits are its head's output (:func:`head_makes_logits`).
        batch: Any batch, padded or packed.
        chunk_tokens: Answered tokens that have logits at a time. Where there are more, the backward pass computes
            the logits of each chunk again.
    """
    hidden = model.base_model(**inputs_of(batch), use_cache=False).last_hidden_state
    states, labels = _answered(hidden, batch["labels"])
    head = model.get_output_embeddings()
    count = max(1, len(labels))
    if count <= chunk_tokens:
        return _summed(head, states, labels) / count
    chunks = zip(torch.split(states, chunk_tokens), torch.split(labels, chunk_tokens), strict=True)
    parts = [checkpoint(_summed, head, few, followers, use_reentrant=False) for few, followers in chunks]
    return torch.stack(parts).sum() / count


def loss_of_logits(model: Any, batch: Batch) -> Tensor:
    """The same of a model that changes its head's output, from all logits."""
    logits = model(**inputs_of(batch), use_cache=False).logits
    predicted, labels = _answered(logits, batch["labels"])
    return cross_entropy(predicted.float(), labels, reduction="sum") / max(1, len(labels))


def inputs_of(batch: Batch) -> dict[str, Tensor | None]:
    """What the model reads of a batch."""
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "position_ids": batch["position_ids"],
    }


@torch.no_grad()
def head_makes_logits(model: Any) -> bool:
    """Whether the logits are what the output embeddings make of the last hidden state, and nothing is done to them.

    Some models scale or cap them afterwards (Gemma 2, Cohere, Granite). Two tokens tell, of a model in eval mode.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model or _has_no_values(model):
        return False
    ids = _some_ids(model, 2)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def tells_packed_apart(model: Any) -> bool:
    """Whether other examples in its row change nothing for an example, of a model in eval mode.

    transformers masks what lies before a position that starts again, in attention layers. A model with others (a
    recurrence, a convolution) reads the examples of a row as one text.
    """
    if _has_no_values(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = _some_ids(model, 16).view(2, 8)
    neighbours = ids.clone()
    neighbours[:, :3] = ids.flip(0)[:, :3]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=ids.device).expand(2, 8)
    one, other = (
        model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, 3:] for rows in (ids, neighbours)
    )
    return torch.equal(one, other)


def _answered(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (n, ...) of the n tokens that are followed by one of an answer, and those followers (n,)."""
    # Position t answers for token t + 1. The indices come from the labels alone, and an index can be planned with.
    index = (labels[:, 1:] != IGNORED).flatten().nonzero().squeeze(1)
    return outputs[:, :-1].flatten(0, 1).index_select(0, index), labels[:, 1:].flatten().index_select(0, index)


def _summed(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(head(states).float(), labels, reduction="sum")


def _some_ids(model: Any, length: int) -> Tensor:
    """Token ids (1, length), all different in a vocabulary of some size."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return (torch.arange(7, 7 + 11 * length, 11, device=model.device) % vocabulary)[None]


def _has_no_values(model: Any) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())
