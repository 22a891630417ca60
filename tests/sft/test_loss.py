"""One loss in all its forms: padded or packed, at once or in chunks, from the head or from a model's own logits."""

import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.sft.batching import packed
from lightning_lora.sft.chat import chat_prompt
from lightning_lora.sft.data import CompanyMessages
from lightning_lora.sft.encoding import IGNORED, Encoded, collate, encode
from lightning_lora.sft.loss import answer_loss, head_makes_logits, loss_of_logits, tells_packed_apart
from lightning_lora.sft.messages import company_messages
from lightning_lora.sft.module import SFTModule


def make_module(pretrained, **options):
    return SFTModule(pretrained=pretrained, autocast="off", **options)


@pytest.fixture
def module(tiny_pretrained):
    return make_module(tiny_pretrained)


@pytest.fixture(scope="module")
def encoded(tiny_pretrained):
    module = make_module(tiny_pretrained)
    examples = company_messages("train", 12)
    return [encode(chat_prompt(e.text, instruction="{text}"), e.answer, module.tokenizer) for e in examples]


def gradients(module, loss):
    return torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])


def assert_same(module, first, second):
    assert first.item() == pytest.approx(second.item(), rel=1e-5)
    for one, other in zip(gradients(module, first), gradients(module, second), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_examples_that_share_rows_give_the_loss_and_gradients_of_those_with_rows_of_their_own(module, encoded):
    (shared,) = packed(encoded, len(encoded), 2)
    assert len(shared["input_ids"]) < len(encoded)
    alone = collate(encoded, pad_id=2)
    assert_same(module, module.answer_loss(shared), module.answer_loss(alone))


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_change_neither_loss_nor_gradients(module, encoded, chunk):
    batch = collate(encoded, pad_id=2)
    assert_same(
        module,
        answer_loss(module.model, batch, chunk_tokens=chunk),
        answer_loss(module.model, batch, chunk_tokens=10**6),
    )


def test_the_loss_of_the_models_own_logits_is_the_same(module, encoded):
    batch = collate(encoded, pad_id=2)
    assert_same(module, module.answer_loss(batch), loss_of_logits(module.model, batch))


def test_no_token_but_the_answered_ones_gets_logits_and_a_chunk_at_the_most_at_a_time(module, encoded):
    seen = []
    module.model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape[:-1].numel()))
    batch, module.logits_chunk = collate(encoded, pad_id=2), 50
    answered = int((batch["labels"] != IGNORED).sum())
    loss = module.answer_loss(batch)
    assert sum(seen) == answered
    assert max(seen) == 50
    loss.backward()
    assert sum(seen) == 2 * answered


def saved_bytes(module, batch):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.answer_loss(batch)
    return sum(kept.values())


def test_chunks_save_the_memory_of_the_logits(module, encoded):
    batch = collate(encoded, pad_id=2)
    answered, vocabulary = int((batch["labels"] != IGNORED).sum()), module.model.config.vocab_size
    module.logits_chunk = 10**6
    at_once = saved_bytes(module, batch)
    module.logits_chunk = 64
    assert saved_bytes(module, batch) <= at_once - 0.9 * answered * vocabulary * 4


def gemma(**options):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return Gemma2ForCausalLM(config).eval()


def test_a_model_that_caps_its_logits_is_recognised_and_its_own_logits_are_used(tiny_pretrained, tmp_path, encoded):
    capped = gemma(final_logit_softcapping=0.05)
    assert not head_makes_logits(capped)
    assert head_makes_logits(gemma(final_logit_softcapping=None))
    capped.save_pretrained(tmp_path)
    module = make_module(tiny_pretrained)
    module.tokenizer.save_pretrained(tmp_path)
    of_its_own = make_module(str(tmp_path))
    batch = collate(encoded, pad_id=2)
    assert of_its_own.answer_loss(batch).item() == pytest.approx(loss_of_logits(capped, batch).item(), rel=1e-5)


def test_models_without_values_prove_nothing(module):
    on_meta = module.model.to("meta")
    assert not head_makes_logits(on_meta)
    assert not tells_packed_apart(on_meta)


def test_attention_tells_examples_of_a_row_apart_and_a_recurrence_does_not():
    from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2)).eval()
    assert tells_packed_apart(gpt2)
    assert tells_packed_apart(gemma())
    assert not tells_packed_apart(RwkvForCausalLM(RwkvConfig(**sizes)).eval())


def test_a_model_that_reads_a_row_as_one_text_is_refused(module, encoded):
    module._packs_with = "none"
    with pytest.raises(ValueError, match="LlamaForCausalLM with 'sdpa' attention is not proved to tell examples"):
        module.answer_loss(packed(encoded, 8, 2)[0])


def test_attention_that_was_changed_after_the_proof_is_refused(module, encoded):
    module.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager' attention is not proved"):
        module.answer_loss(packed(encoded, 8, 2)[0])


def test_a_convolution_that_leaks_little_is_recognised():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    assert not tells_packed_apart(Lfm2ForCausalLM(config).eval())


@pytest.mark.parametrize("chunk", [4, 512])
def test_a_batch_without_an_answered_token_has_no_loss(module, encoded, chunk):
    batch, module.logits_chunk = collate(encoded[:2], pad_id=2), chunk
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert module.answer_loss(batch).item() == 0.0
    assert loss_of_logits(module.model, batch).item() == 0.0


def test_the_first_token_of_an_example_is_not_learned_from_its_neighbour(module):
    bare = [Encoded(prompt="", expected="", prompt_ids=[], answer_ids=[5, 9, 2 + shift]) for shift in range(3)]
    (shared,) = packed(bare, 3, 2)
    assert_same(module, module.answer_loss(shared), module.answer_loss(collate(bare, pad_id=2)))


def test_a_packed_run_trains_adapters_under_gradient_checkpointing(tiny_pretrained, make_trainer):
    module = make_module(tiny_pretrained, learning_rate=1e-2, warmup_steps=1, logits_chunk=32)
    data = CompanyMessages(
        pretrained=tiny_pretrained, train_size=64, validation_size=6, batch_size=4, batching="packed"
    )
    trainer = make_trainer(callbacks=[LoRACallback(LoRAConfig(rank=4), gradient_checkpointing=True)])
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    assert trainer.validate(module, data, verbose=False)[0]["val/loss"] < 0.99 * before
