import pytest
import torch

from lightning_lora.sft.chat import Example, chat_prompt, shown_prompt
from lightning_lora.sft.encoding import IGNORED, collate, collate_packed, encode
from lightning_lora.sft.messages import company_messages
from lightning_lora.sft.pretrained import load_tokenizer

INSTRUCTION = "{text}\nReply with JSON."


@pytest.fixture(scope="module")
def tokenizer(tiny_pretrained):
    return load_tokenizer(tiny_pretrained)


@pytest.fixture(scope="module")
def examples():
    return company_messages("train", 9)


@pytest.fixture(scope="module")
def rows(tokenizer, examples):
    return [encode(chat_prompt(e.text, instruction=INSTRUCTION), e.answer, tokenizer) for e in examples]


def test_the_chat_form_is_compact_chatml():
    assert chat_prompt("hi", instruction="Say: {text}") == (
        "<|im_start|>user\nSay: hi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_braces_in_a_message_are_left_alone():
    assert "{x} {text}" in chat_prompt("{x} {text}", instruction="{text}!")


def test_shots_come_first_with_their_answers():
    shot = Example(text="one", answer='{"n": 1}')
    prompt = chat_prompt("two", instruction="{text}", shots=(shot,))
    assert prompt == chat_prompt("one", instruction="{text}") + '{"n": 1}<|im_end|>\n' + chat_prompt(
        "two", instruction="{text}"
    )
    assert shown_prompt(prompt) == "two"


def test_labels_are_exactly_the_answer_and_the_end_of_turn(rows, examples, tokenizer):
    batch = collate(rows, pad_id=tokenizer.pad_token_id)
    for ids, labels, mask, example in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], examples, strict=True
    ):
        learned = labels != IGNORED
        assert tokenizer.decode(labels[learned]) == example.answer + "<|im_end|>"
        assert torch.equal(ids[learned], labels[learned])
        unlearned = tokenizer.decode(ids[~learned & mask.bool()])
        assert unlearned == chat_prompt(example.text, instruction=INSTRUCTION)


def test_padding_is_on_the_left_and_masked(rows, tokenizer):
    batch = collate(rows, pad_id=tokenizer.pad_token_id)
    for mask, row in zip(batch["attention_mask"], rows, strict=True):
        assert mask.sum() == len(row)
        assert mask[-len(row) :].all()
    for ids, mask, row in zip(batch["prompt_ids"], batch["prompt_mask"], rows, strict=True):
        assert ids[mask.bool()].tolist() == row.prompt_ids
        assert mask[-1] == 1


def test_examples_that_share_a_row_each_start_at_position_zero(rows, tokenizer):
    batch = collate_packed([rows[:2], rows[2:3]], pad_id=tokenizer.pad_token_id)
    first, second, third = rows[:3]
    assert batch["attention_mask"] is None
    assert batch["input_ids"].shape == batch["position_ids"].shape == (2, max(len(first) + len(second), len(third)))
    for row, held in zip(range(2), ((first, second), (third,)), strict=True):
        length = sum(map(len, held))
        ids = [i for example in held for i in example.prompt_ids + example.answer_ids]
        assert batch["input_ids"][row, -length:].tolist() == ids
        assert batch["position_ids"][row, -length:].tolist() == [i for example in held for i in range(len(example))]
        learned = batch["labels"][row] != IGNORED
        assert batch["labels"][row][learned].tolist() == [i for example in held for i in example.answer_ids]
        assert not learned[:-length].any()
    assert batch["expected"] == [example.expected for example in rows[:3]]
