import pytest

from lightning_lora.sft.batching import BATCHING, pack
from lightning_lora.sft.chat import chat_prompt
from lightning_lora.sft.data import CompanyMessages
from lightning_lora.sft.encoding import Encoded, encode
from lightning_lora.sft.messages import company_messages
from lightning_lora.sft.pretrained import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_pretrained):
    return load_tokenizer(tiny_pretrained)


@pytest.fixture(scope="module")
def encoded(tokenizer):
    examples = company_messages("train", 41)
    return [encode(chat_prompt(e.text, instruction="{text}"), e.answer, tokenizer) for e in examples]


def of_length(length):
    return Encoded(prompt="", expected="", prompt_ids=[1] * (length - 1), answer_ids=[2])


def padding(batches, encoded):
    return sum(batch["input_ids"].numel() for batch in batches) / sum(map(len, encoded)) - 1


@pytest.mark.parametrize("way", BATCHING)
def test_each_example_is_in_one_batch_of_the_size(way, encoded, tokenizer):
    batches = BATCHING[way](encoded, 8, tokenizer.pad_token_id)
    assert [len(batch["expected"]) for batch in batches] == [8] * 5 + [1]
    assert sorted(prompt for batch in batches for prompt in batch["prompts"]) == sorted(e.prompt for e in encoded)
    assert sum(int((batch["labels"] >= 0).sum()) for batch in batches) == sum(len(e.answer_ids) for e in encoded)


def test_like_lengths_and_shared_rows_waste_less_than_examples_as_drawn(encoded, tokenizer):
    waste = {way: padding(make(encoded, 8, tokenizer.pad_token_id), encoded) for way, make in BATCHING.items()}
    assert max(waste["by_length"], waste["packed"]) < 0.3 * waste["as_drawn"]


@pytest.mark.parametrize("lengths", [[5], [5, 5], [2, 5, 3, 1, 4], [9, 1, 1, 1], [3] * 17, [1, 40, 2, 39, 3, 38] * 3])
def test_packing_keeps_every_example_in_rows_of_like_length(lengths):
    examples = [of_length(length) for length in lengths]
    rows = pack(examples)
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    filled = [sum(map(len, row)) for row in rows]
    assert min(filled) > 0
    assert max(filled) - min(filled) <= max(lengths)
    assert max(filled) <= 5 * max(lengths)


def test_packing_is_the_same_on_every_run_and_keeps_batches_as_drawn(encoded, tokenizer):
    once, again, drawn = (BATCHING[way](encoded, 8, tokenizer.pad_token_id) for way in ("packed", "packed", "as_drawn"))
    assert [b["prompts"] for b in once] == [b["prompts"] for b in again]
    assert [sorted(b["prompts"]) for b in once] == [sorted(b["prompts"]) for b in drawn]


def test_training_batches_alone_are_packed(tiny_pretrained):
    data = CompanyMessages(pretrained=tiny_pretrained, train_size=8, validation_size=4, batching="packed")
    data.setup("fit")
    assert all(batch["attention_mask"] is None for batch in data.train_dataloader())
    assert all(batch["attention_mask"] is not None for batch in data.val_dataloader())


def test_an_unknown_way_is_refused(tiny_pretrained):
    with pytest.raises(ValueError, match="batching='random' is unknown; use one of by_length, as_drawn, packed"):
        CompanyMessages(pretrained=tiny_pretrained, batching="random")
