"""Supervised fine-tuning of causal language models on text -> JSON: the demo, and a start for your task."""

from lightning_lora.sft.data import CompanyMessages, E2EJson, JSONTask, SnipsJson
from lightning_lora.sft.messages import Ticket, company_messages
from lightning_lora.sft.metrics import ExactMatch, FieldF1, ValidJSON
from lightning_lora.sft.module import SFTModule
from lightning_lora.sft.pretrained import load_pretrained

__all__ = [
    "CompanyMessages",
    "E2EJson",
    "ExactMatch",
    "FieldF1",
    "JSONTask",
    "SFTModule",
    "SnipsJson",
    "Ticket",
    "ValidJSON",
    "company_messages",
    "load_pretrained",
]
