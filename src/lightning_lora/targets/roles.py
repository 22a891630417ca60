"""What a linear layer is for: output head, attention projection or feed-forward; across naming traditions.

Recognised by names and class names of transformers, timm, torch and Lightning's demos; nothing of them is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_lora.class_swap import original_class
from lightning_lora.targets.patterns import canonical

_HEADS = {
    "lm_head",
    "head",
    "heads",
    "classifier",
    "score",
    "cls",
    "qa_outputs",
    "fc_out",
    "embed_out",
    "proj_out",
    "output_projection",
    "output_layer",
    "out",
    "output",
    "logits",
    "fc",
    "decoder",
}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"(^|_)(mlp|ffn?|feed_?forward|intermediate|swiglu|geglu)(_|$|\d)", re.IGNORECASE)
_FEED_FORWARD_LEAVES = {
    *(
        "fc1",
        "fc2",
        "fc3",
        "lin1",
        "lin2",
        "linear1",
        "linear2",
        "dense1",
        "dense2",
        "w1",
        "w2",
        "w3",
        "wi",
        "wo",
    ),
    *(
        "wi_0",
        "wi_1",
        "up_proj",
        "down_proj",
        "gate_proj",
        "gate_up_proj",
        "c_fc",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ),
}
_QUERY_VALUE = {
    *(
        "q_proj",
        "v_proj",
        "query",
        "value",
        "q",
        "v",
        "q_lin",
        "v_lin",
        "to_q",
        "to_v",
        "wq",
        "wv",
        "w_q",
        "w_v",
    ),
    *("query_proj", "value_proj", "q_linear", "v_linear", "linear_q", "linear_v", "query_key_value", "qkv"),
    *("qkv_proj", "c_attn", "Wqkv", "wqkv", "in_proj", "in_proj_linear", "att_proj"),
}


class Roles:
    """Answers what the layers of one module are for.

    Args:
        module: The root that dotted names start from.
        block_children: Names of modules that are blocks of a block list, see :mod:`lightning_lora.targets.blocks`.
    """

    def __init__(self, module: nn.Module, block_children: Iterable[str]) -> None:
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._blocks = set(block_children)
        self._vocabularies = {
            (child.embedding_dim, child.num_embeddings)
            for child in self._modules.values()
            if isinstance(child, nn.Embedding) and child.embedding_dim != child.num_embeddings
        }
        self._transformers_heads = _output_embeddings(self._modules.values())

    def is_output_head(self, name: str) -> bool:
        """Whether the layer turns the last hidden state into the model's outputs."""
        layer = self._modules[name]
        if id(layer) in self._transformers_heads:
            return True
        out_in = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        blocks = [prefix for prefix in prefixes(name) if prefix in self._blocks]
        if blocks:  # a chain of layers may end in the head; what is inside a block is none
            return blocks == [name] and out_in in self._vocabularies
        parts = canonical(name).split(".")
        # "decoder" is also the name of whole stacks: only a layer of that name itself is a head.
        named = parts[-1] in _HEADS or bool(_HEADS.difference({"decoder", "output", "out"}).intersection(parts))
        return named or out_in in self._vocabularies

    def is_attention(self, name: str) -> bool:
        """Whether the layer is a projection of an attention module."""
        return any(
            _ATTENTION.search(prefix.rpartition(".")[2])
            or _ATTENTION.search(original_class(self._modules[prefix]).__name__)
            for prefix in self._inside_block(name)
        )

    def is_query_or_value(self, name: str) -> bool:
        """Whether the layer makes queries or values (a fused one makes keys, too)."""
        return self.is_attention(name) and name.rpartition(".")[2] in _QUERY_VALUE

    def is_feed_forward(self, name: str) -> bool:
        """Whether the layer belongs to a block's feed-forward part."""
        if self.is_attention(name):
            return False
        own = name.rpartition(".")[2]
        inside = [prefix.rpartition(".")[2] for prefix in self._inside_block(name)]
        # BERT calls the second half of its feed-forward "output.dense".
        bert_output = own == "dense" and inside[-1:] == ["output"]
        return own in _FEED_FORWARD_LEAVES or bert_output or any(map(_FEED_FORWARD.search, inside))

    def _inside_block(self, name: str) -> list[str]:
        """Names of the modules that hold the layer, from its block (not including it) inwards."""
        holders = prefixes(name)[:-1]
        inside = [holder for holder in holders if any(part in self._blocks for part in prefixes(holder)[:-1])]
        return inside or holders


def prefixes(name: str) -> list[str]:
    """All dotted prefixes of a name, shortest first, the name itself last.

    Example:
        >>> prefixes("a.b.c")
        ['a', 'a.b', 'a.b.c']
    """
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _output_embeddings(modules: Iterable[nn.Module]) -> set[int]:
    """Ids of the heads that transformers models declare themselves."""
    heads: set[int] = set()
    for module in modules:
        if any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__):
            declared: Any = module.get_output_embeddings  # of every PreTrainedModel
            heads.add(id(declared()))
    return heads - {id(None)}
