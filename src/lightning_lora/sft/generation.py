"""Greedy answers to a batch of prompts."""

from __future__ import annotations

from typing import Any

import torch

from lightning_lora.sft.chat import END_OF_TURN


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, *, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, max_new_tokens: int
) -> list[str]:
    """Let the model answer each prompt, always with the likeliest next token, until it ends its turn.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, which must know ``<|im_end|>``.
        prompt_ids: Prompts padded on the left, int64 of shape (B, P).
        prompt_mask: 0 on the padding, int64 of shape (B, P).
        max_new_tokens: Where to cut an answer that doesn't end.

    Returns:
        B answers without special tokens and outer white space.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    generated = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    answers = tokenizer.batch_decode(generated[:, prompt_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
