"""Tiny models for plans, and what a real run of them takes."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.memory import peak_bytes

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "use_cache": False,
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=256, decoder_start_token_id=0)
    )


def step_bytes(module, loss):
    """Peak of forward and backward of a real module, measured by the allocator; gradients are gone before and after."""
    for measured in (False, True):
        for parameter in module.parameters():
            parameter.grad = None
        if measured:
            return peak_bytes(lambda: loss().backward())
        loss().backward()
    return None


def tokens(*shape):
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(0))
