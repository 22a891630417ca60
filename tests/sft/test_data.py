import gzip
import json
from pathlib import Path

import pytest

from lightning_lora.sft.data import CompanyMessages, E2EJson, EpochShuffle, SnipsJson
from lightning_lora.sft.records import e2e_example, snips_example

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_records(folder, records):
    for split in ("train", "validation", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def prompts(loader):
    return [prompt for batch in loader for prompt in batch["prompts"]]


def test_each_stage_has_its_loaders(tiny_pretrained):
    data = CompanyMessages(pretrained=tiny_pretrained, train_size=10, validation_size=3, test_size=5, batch_size=4)
    data.setup("fit")
    assert len(data.train_dataloader()) == 3
    assert len(prompts(data.train_dataloader())) == 10
    assert len(prompts(data.val_dataloader())) == 3
    data.setup("test")
    assert len(prompts(data.test_dataloader())) == 5
    assert prompts(data.predict_dataloader()) == prompts(data.test_dataloader())


def test_the_order_of_training_depends_on_seed_and_epoch_alone():
    def order(epoch, seed=0):
        sampler = EpochShuffle(50, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1)
    assert sorted(order(0)) == list(range(50)) == sorted(order(1))
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1))}) == 3


def test_solved_examples_can_go_before_each_prompt(tiny_pretrained):
    data = CompanyMessages(pretrained=tiny_pretrained, test_size=2, shots=3)
    data.setup("test")
    assert all(prompt.count("<|im_start|>assistant") == 4 for prompt in prompts(data.test_dataloader()))


@pytest.mark.parametrize(
    ("kind", "record", "answer"),
    [
        (SnipsJson, {"text": "play x", "intent": "PlayMusic", "slots": {"track": "x"}}, snips_example),
        (E2EJson, {"text": "The Mill is a pub", "fields": {"name": "The Mill"}, "mr": "-"}, e2e_example),
    ],
)
def test_records_become_examples(tmp_path, tiny_pretrained, kind, record, answer):
    write_records(tmp_path, [record] * 3)
    data = kind(data_dir=str(tmp_path), pretrained=tiny_pretrained, test_size=2)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["expected"] == [answer(record).answer] * 2
    assert all(record["text"] in prompt for prompt in batch["prompts"])


def test_a_missing_folder_is_named_with_the_setting_that_moves_it(tmp_path, tiny_pretrained):
    data = SnipsJson(data_dir=str(tmp_path / "nowhere"), pretrained=tiny_pretrained)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*data\.data_dir=") as caught:
        data.setup("fit")
    assert "train.jsonl.gz" in str(caught.value)


@pytest.mark.parametrize("kind", [SnipsJson, E2EJson])
def test_real_records_are_read(kind, tiny_pretrained):
    folder = REAL_DATA / {SnipsJson: "snips", E2EJson: "e2e"}[kind]
    if not folder.is_dir():
        pytest.skip(f"the real data set is not at {folder}")
    data = kind(data_dir=str(folder), pretrained=tiny_pretrained, train_size=20, validation_size=5, test_size=20)
    for split, size in data.sizes.items():
        examples = data.examples(split, size)
        assert len({example.text for example in examples}) == size
        assert all(isinstance(json.loads(example.answer), dict) for example in examples)
    train, test = ({e.text for e in data.examples(split, 100_000)} for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize(
    "option", [{"train_size": 0}, {"test_size": -1}, {"batch_size": 0}, {"instruction": "no place for it"}]
)
def test_a_wrong_setting_is_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        CompanyMessages(**option)
