"""transformers' models: caches and their own switch do not get in the way."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.gradient_checkpointing import disable_gradient_checkpointing, enable_gradient_checkpointing
from tests.gradient_checkpointing.cases import (
    CASES,
    Block,
    assert_same,
    build,
    gradients,
    loss_of,
    recomputations,
    rows,
    saved_bytes,
    tokens,
)

pytest.importorskip("transformers")
CACHED = pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])


@CACHED
@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_makes_no_cache_unless_it_asks_for_one(name: str, training: bool) -> None:
    module, inputs = build(name, training=training), CASES[name].inputs()
    assert module(**inputs).past_key_values is not None
    enable_gradient_checkpointing(module)
    assert module(**inputs).past_key_values is None
    assert module(**inputs, use_cache=True).past_key_values is not None
    with torch.no_grad():
        assert module(**inputs).past_key_values is not None
    disable_gradient_checkpointing(module)
    assert module(**inputs).past_key_values is not None
    assert not [child for child in module.modules() if child._forward_pre_hooks or child._forward_pre_hooks_with_kwargs]


@CACHED
def test_a_cache_that_a_step_asks_for_is_written_once(name: str) -> None:
    inputs = {**CASES[name].inputs(), "use_cache": True}
    plain = build(name, training=False)
    module = copy.deepcopy(plain)
    enable_gradient_checkpointing(module)
    results = []
    for each in (plain, module):
        output = each(**inputs)
        loss_of(output).backward()
        results.append((output.past_key_values, {k: p.grad for k, p in each.named_parameters() if p.requires_grad}))
    assert_same(results[1][1], results[0][1])
    found, expected = (_tensors(cache) for cache, _ in results)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@CACHED
def test_it_may_be_recomputed_twice(name: str) -> None:
    module = build(name, training=False)
    enable_gradient_checkpointing(module)
    loss = loss_of(module(**CASES[name].inputs(), use_cache=True))
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, (p for p in module.parameters() if p.grad is not None)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_filled_cache_is_continued_as_without(name: str) -> None:
    plain = build(name, training=False)
    module = copy.deepcopy(plain)
    enable_gradient_checkpointing(module)
    results = []
    for each in (plain, module):
        past = each(input_ids=tokens()[:, :4], use_cache=True).past_key_values
        results.append(gradients(each, {"input_ids": tokens()[:, 4:], "past_key_values": past}))
    assert_same(results[1], results[0])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    if type(value).__module__ == "transformers.cache_utils":
        return [tensor for item in vars(value).values() for tensor in _tensors(item)]
    return []


def test_a_cache_that_changes_in_place_is_refused() -> None:
    from transformers import StaticCache

    module = build("llama", training=False)
    enable_gradient_checkpointing(module)
    cache = StaticCache(config=module.config, max_cache_len=8)
    with pytest.raises(UnsupportedSetupError, match="use_cache=False"):
        module(**CASES["llama"].inputs(), past_key_values=cache)
    with torch.no_grad():
        module(**CASES["llama"].inputs(), past_key_values=cache)


def test_generation_is_the_same_and_uses_its_cache() -> None:
    plain = build("llama", training=False)
    module = copy.deepcopy(plain)
    enable_gradient_checkpointing(module)
    calls = []
    module.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected, found = (m.generate(tokens(), **options) for m in (plain, module))
    assert torch.equal(found, expected)
    assert calls == [8, 1, 1, 1]


@pytest.mark.parametrize("training", [True, False])
def test_their_own_switch_is_off_meanwhile_and_comes_back(training: bool) -> None:
    module, inputs = build("llama", training=training), CASES["llama"].inputs()
    names = [f"model.layers.{i}" for i in range(3)]
    turn_on_own(module)
    flags = _flags(module)
    before = saved_bytes(module, inputs)
    report = enable_gradient_checkpointing(module)
    assert "of the model's own" in report.notes[0]
    assert recomputations(module, inputs, names) == dict.fromkeys(names, 1)
    assert True not in _flags(module).values()
    enable_gradient_checkpointing(module)
    disable_gradient_checkpointing(module)
    assert _flags(module) == flags
    assert saved_bytes(module, inputs) == before
    assert recomputations(module, inputs, names) == (dict.fromkeys(names, 1) if training else {})


def turn_on_own(module: Any) -> None:
    # Its name since transformers 5.
    getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)()


def _flags(module: nn.Module) -> dict[str, Any]:
    return {name: vars(child).get("gradient_checkpointing") for name, child in module.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_their_own_switch_turned_on_later_does_not_recompute_twice(training: bool) -> None:
    module, inputs = build("llama", training=training), CASES["llama"].inputs()
    enable_gradient_checkpointing(module)
    turn_on_own(module)
    assert recomputations(module, inputs) == {f"model.layers.{i}": 1 for i in range(3)}


def test_a_loaded_model_in_eval_mode_is_recomputed(tmp_path: Any) -> None:
    from transformers import LlamaForCausalLM

    build("llama").config.save_pretrained(tmp_path)
    LlamaForCausalLM(build("llama").config).save_pretrained(tmp_path)
    module = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not module.training
    enable_gradient_checkpointing(module)
    assert recomputations(module, CASES["llama"].inputs()) == {f"model.layers.{i}": 1 for i in range(3)}


def test_copies_keep_what_was_turned_off() -> None:
    module = build("llama")
    turn_on_own(module)
    module.disable_input_require_grads()  # transformers' hook does not pickle
    flags = _flags(module)
    enable_gradient_checkpointing(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin(**CASES["llama"].inputs()).past_key_values is None
        disable_gradient_checkpointing(twin)
        assert _flags(twin) == flags
        assert not [child for child in twin.modules() if child._forward_pre_hooks_with_kwargs]


@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_and_attentions_that_a_step_asks_for_are_those_without(training: bool) -> None:
    plain = build("llama", training=training)
    plain.set_attn_implementation("eager")
    module = copy.deepcopy(plain)
    enable_gradient_checkpointing(module)
    results = []
    for each in (plain, module):
        torch.manual_seed(0)
        output = each(**CASES["llama"].inputs(), output_hidden_states=True, output_attentions=True)
        parts = [*output.hidden_states, *output.attentions]
        torch.stack([loss_of(part) for part in parts]).sum().backward()
        results.append((parts, {key: p.grad for key, p in each.named_parameters() if p.requires_grad}))
    assert len(results[1][0]) == len(results[0][0]) == 4 + 3
    assert all(torch.equal(a, b) for a, b in zip(results[1][0], results[0][0]))
    assert_same(results[1][1], results[0][1])


class LikeTimm(nn.Module):
    """Has a switch as timm's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.grad_checkpointing = True

    def forward(self, input: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint_sequential(self.blocks, 3, input, use_reentrant=False)
        return self.blocks(input)


def test_a_switch_like_that_of_timm_is_off_meanwhile_and_comes_back() -> None:
    module, names = LikeTimm(), [f"blocks.{i}" for i in range(3)]
    theirs = recomputations(module, rows(), names)
    enable_gradient_checkpointing(module)
    assert recomputations(module, rows(), names) == dict.fromkeys(names, 1)
    disable_gradient_checkpointing(module)
    assert module.grad_checkpointing
    assert recomputations(module, rows(), names) == theirs
